"""Small autoencoders of a sweep trained together, against one after the other.

K perceptrons 784-64-784 with the mix of squared error and image gradients, one for each α. Measured twice, interleaved
in one run:

* `sweep`: what a user waits for, `sweep(..., together=True)` against `together=False`, Trainer and evaluation included;
* `steps`: forward, backward and AdamW alone, by hand, without any Trainer: the gain in arithmetic. Here the single
  models have the fused AdamW of the group too, so what is left is the batching of the products.

Small batches gain most, as the cost of a step is then not in its products. Only the ratios mean anything.

    python recipes/benchmarks/together.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import lightning_ae as ae
from lightning_ae.pareto.together import AutoencoderGroup


def make_model(alpha: float) -> ae.Autoencoder:
    """784-64-784."""
    loss = ae.AlphaMix(ae.SquaredError(), ae.FeatureLoss(ae.ImageGradients()), alpha)
    return ae.MLPAutoencoder((1, 28, 28), 64, hidden=(), loss=loss)


def sweep_seconds(alphas: list[float], x: Tensor, batch_size: int, together: bool) -> float:
    """Seconds of a sweep of one epoch."""
    data = ae.TensorDataModule(x, val=x[:64], batch_size=batch_size)
    start = time.perf_counter()
    ae.sweep(make_model, alphas, data, together=together, max_epochs=1, accelerator="cpu")
    return time.perf_counter() - start


def steps_seconds(alphas: list[float], x: Tensor, batch_size: int, together: bool) -> float:
    """Seconds of the same steps in loops by hand."""
    models = [make_model(alpha) for alpha in alphas]
    seconds = 0.0
    for module in [AutoencoderGroup(models)] if together else models:
        if together:
            module.on_fit_start()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        start = time.perf_counter()
        for i, batch in enumerate(x.split(batch_size)):
            optimizer.zero_grad()
            output = module.training_step(batch, i)
            (output if together else output["loss"]).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
    return seconds


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print milliseconds a step of all models and the ratios; returns the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8, help="K")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each model in a run")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")

    alphas = torch.linspace(0, 1, args.models).tolist()
    measured: dict[str, Callable[..., float]] = {"sweep": sweep_seconds, "steps": steps_seconds}
    ratios = {}
    print(f"K = {args.models}, {args.threads} threads, {args.steps} steps, median of {args.repeats} interleaved runs")
    print(f"{'':7}{'batch':>6}{'one by one':>14}{'together':>12}{'ratio':>8}{'(fastest runs)':>17}")
    for batch_size in args.batch_sizes:
        x = torch.rand(args.steps * batch_size, 1, 28, 28)
        for name, seconds in measured.items():
            pairs = [
                [seconds(alphas, x, batch_size, together) for together in (False, True)] for _ in range(args.repeats)
            ]
            ratio = statistics.median(single / group for single, group in pairs)
            single, group = (1e3 * statistics.median(column) / args.steps for column in zip(*pairs, strict=True))
            fastest_single, fastest_group = (min(column) for column in zip(*pairs, strict=True))
            fastest = fastest_single / fastest_group
            print(f"{name:7}{batch_size:6d}{single:11.2f} ms{group:9.2f} ms{ratio:8.2f}{fastest:17.2f}")
            ratios |= {f"{name}_{batch_size}": ratio, f"{name}_{batch_size}_fastest": fastest}
    return ratios


if __name__ == "__main__":
    main()
