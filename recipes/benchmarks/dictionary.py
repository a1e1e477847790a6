"""What a training step of a TopK dictionary costs: ours, a dense implementation, and peers, beside the encoder's GEMM.

512 → 8192, k 32, batch 4096, float32, two threads. A step is everything that training does: forward, loss, backward,
the projection of the atoms' gradient, clipping, the optimizer (fused AdamW for ours and the dense one, for peers what
they choose), norms, and counting the dead. All are interleaved in one run; only ratios mean anything. The bare encoder
GEMM, `x @ W.T + b`, is the floor of an exact TopK step. Peers that are not installed are left out:

    python -m venv peers && peers/bin/pip install -e . dictionary-learning eai-sparsify
    peers/bin/python recipes/benchmarks/dictionary.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import lightning_ae as ae

Step = Callable[[], object]


def gemm(x: Tensor, latents: int, k: int) -> Step:
    """The encoder alone."""
    weight, bias = torch.randn(latents, x.shape[1]), torch.zeros(latents)
    return lambda: torch.addmm(bias, x, weight.t())


def ours(x: Tensor, latents: int, k: int) -> Step:
    """A step of DictionaryAutoencoder without a Trainer."""
    model = ae.DictionaryAutoencoder(x.shape[1], latents, ae.TopKCode(k), lr=1e-4)
    model.observe(x)
    optimizer = model.configure_optimizers()

    def step() -> None:
        output = model(x)
        model.objective(model.terms(x, output)).mean().backward()
        model.project_gradient()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.normalize_atoms()
        model.count(output.z.detach())

    return step


def dense(x: Tensor, latents: int, k: int) -> Step:
    """The same in plain PyTorch, with a dense code."""
    start = ae.DictionaryAutoencoder(x.shape[1], latents, ae.TopKCode(k))
    atoms = torch.nn.Parameter(start.decoder.atoms.detach().clone())
    weight, bias = (torch.nn.Parameter(p.detach().clone()) for p in start.encoder.parameters())
    centre = torch.nn.Parameter(x.mean(0))
    parameters = [atoms, weight, bias, centre]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    since = torch.zeros(latents, dtype=torch.int64)

    def step() -> None:
        h = functional.linear(x - centre, weight, bias)
        values, indices = h.topk(k, dim=1, sorted=False)
        z = torch.zeros_like(h).scatter(1, indices, values.relu())
        (z @ atoms + centre - x).square().sum(1).mean().backward()
        with torch.no_grad():
            atoms.grad.sub_((atoms.grad * atoms).sum(1, keepdim=True) * atoms)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            atoms.div_(atoms.norm(dim=1, keepdim=True))
            since.add_(len(x)).masked_fill_((z > 0).any(0), 0)

    return step


def dictionary_learning(x: Tensor, latents: int, k: int) -> Step:
    """The TopK trainer of dictionary_learning."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    trainer = TopKTrainer(
        steps=10_000, activation_dim=x.shape[1], dict_size=latents, k=k, layer=0, lm_name="none", lr=1e-4,
        dict_class=AutoEncoderTopK, device="cpu", warmup_steps=10,
    )  # fmt: skip
    number = iter(range(1, 10_000))  # step 0 finds the geometric median
    return lambda: trainer.update(next(number), x)


def sparsify(x: Tensor, latents: int, k: int) -> Step:
    """A SparseCoder of sparsify, with the chores of its trainer; its eager decoder, as on any CPU."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=latents, k=k, normalize_decoder=True))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4)
    since = torch.zeros(latents, dtype=torch.int64)

    def step() -> None:
        out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
        fired = torch.zeros(latents, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since.add_(len(x)).masked_fill_(fired, 0)

    return step


KINDS = {"encoder GEMM": gemm, "ours": ours, "dense": dense, "dictionary_learning": dictionary_learning,
         "sparsify": sparsify}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print milliseconds and ratios to the encoder GEMM, and return the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a file for the numbers, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    x = torch.randn(args.batch, args.features)
    steps: dict[str, Step] = {}
    for name in dict.fromkeys(["encoder GEMM", *args.only]):
        try:
            steps[name] = KINDS[name](x, args.latents, args.k)
            steps[name]()
        except ImportError as error:
            print(f"{name}: left out ({error})")
            steps.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    floor = seconds["encoder GEMM"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, floor, strict=True)) for name, times in seconds.items()
    }
    print(f"{'':24s}{'ms':>8s}{'fastest':>9s}{'ratio':>8s}   (medians of {args.repeats} interleaved steps)")
    for name, times in seconds.items():
        print(f"{name:24s}{1e3 * statistics.median(times):8.1f}{1e3 * min(times):9.1f}{ratios[name]:8.2f}")
    if args.out is not None:
        args.out.write_text(json.dumps({"ratios": ratios, "seconds": seconds}, indent=1))
    return ratios


if __name__ == "__main__":
    main()
