"""SSIM as a training loss: forward and backward, against the peers that are installed, interleaved in one run.

Ours eager, under `torch.compile`, and as `SSIMLoss(compile=True)` called plainly ("compile="), with the border
reflected ("same", as torchmetrics) and without ("valid", as pytorch-msssim); peers uncompiled, as their users run them.
Ratios are medians over rounds of the peer's time over ours, within one convention. On a GPU the share of memory
bandwidth is the traffic that no implementation can avoid (read x̂ and x, write the gradient) over what a copy of the
same size reaches.

    pip install pytorch-msssim piq kornia
    python recipes/benchmarks/ssim.py
    python recipes/benchmarks/ssim.py --device cuda
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import lightning_ae as ae

SHAPES = [(64, 1, 28, 28), (32, 3, 64, 64), (8, 3, 256, 256)]
Loss = Callable[[Tensor, Tensor], Tensor]


def peers() -> dict[str, tuple[str, Loss]]:
    """Convention and loss of every peer that can be imported."""

    def torchmetrics(module, x_hat, x):
        return 1 - module.structural_similarity_index_measure(x_hat, x, data_range=1.0)

    def pytorch_msssim(module, x_hat, x):
        return 1 - module.ssim(x_hat, x, data_range=1.0)

    def piq(module, x_hat, x):
        return 1 - module.ssim(x_hat, x, data_range=1.0, downsample=False)

    def kornia(module, x_hat, x):
        return module.ssim_loss(x_hat, x, 11) * 2  # theirs is (1 - SSIM) / 2

    found = {}
    for convention, name, call in [
        ("same", "torchmetrics.functional.image", torchmetrics),
        ("same", "kornia.losses", kornia),
        ("valid", "pytorch_msssim", pytorch_msssim),
        ("valid", "piq", piq),
    ]:
        try:
            found[name.partition(".")[0]] = (convention, partial(call, importlib.import_module(name)))
        except ImportError:
            print(f"{name.partition('.')[0]} is not installed: left out")
    return found


def ours(compiled: bool) -> dict[str, tuple[str, Loss]]:
    """Both conventions, eager and compiled."""
    losses: dict[str, tuple[str, Loss]] = {}
    for padding in ("same", "valid"):
        loss = ae.SSIMLoss(padding=padding)
        losses[f"ours {padding}"] = (padding, lambda x_hat, x, loss=loss: loss(x_hat, x).mean())
        if compiled:
            fast = torch.compile(loss, fullgraph=True, dynamic=False)
            losses[f"ours {padding}, compiled"] = (padding, lambda x_hat, x, loss=fast: loss(x_hat, x).mean())
            own = ae.SSIMLoss(padding=padding, compile=True)
            losses[f"ours {padding}, compile="] = (padding, lambda x_hat, x, loss=own: loss(x_hat, x).mean())
    return losses


def measure(losses: dict[str, Loss], shape: tuple[int, ...], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, forward and backward, round by round."""
    torch.manual_seed(0)
    x_hat, x = torch.rand(2, *shape, device=device)
    x_hat.requires_grad_()
    calls = 10 if device == "cuda" else 1

    def once(loss: Loss) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            x_hat.grad = None
            loss(x_hat, x).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls * 1e3

    for loss in losses.values():
        once(loss)  # compiles
        once(loss)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(once(loss))
    return times


def bandwidth(device: str) -> float:
    """Bytes a millisecond that a large copy reads and writes."""
    source = torch.rand(2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 8 * source.numel() / (time.perf_counter() - start) / 1e3


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print a table for each shape; returns the medians in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sides", type=int, nargs="+", default=[28, 64, 256], help="which shapes, by their side")
    parser.add_argument("--eager-only", action="store_true", help="do not compile")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    speed = bandwidth(args.device) if args.device == "cuda" else None

    rivals = peers()
    results = {}
    for shape in (shape for shape in SHAPES if shape[-1] in args.sides):
        torch.compiler.reset()
        mine = ours(not args.eager_only)
        conventions = {name: convention for name, (convention, _) in {**rivals, **mine}.items()}
        losses = {name: loss for name, (_, loss) in {**rivals, **mine}.items()}
        times = measure(losses, shape, args.device, args.rounds)
        medians = {name: statistics.median(found) for name, found in times.items()}
        results["×".join(map(str, shape))] = medians
        print(f"\n{'×'.join(map(str, shape))}, {args.device}, {args.threads} threads, {args.rounds} rounds")
        print(f"  {'':22s} {'median':>9s} {'fastest':>9s} ms   median ratio")
        for name, median in medians.items():
            ratios = [
                f"{statistics.median(a / b for a, b in zip(times[rival], times[name], strict=True)):.1f}× {rival}"
                for rival in rivals
                if name in mine and conventions[rival] == conventions[name]
            ]
            if speed and name in mine:
                ratios.append(f"{3 * 4 * torch.Size(shape).numel() / median / speed:.0%} of the bandwidth")
            print(f"  {name:22s} {median:9.2f} {min(times[name]):9.2f}      {', '.join(ratios)}", flush=True)
    return results


if __name__ == "__main__":
    main()
