"""How fast examples reach a model: MNIST through torchvision, a ``TensorDataset`` and this package.

Run as ``python recipes/benchmarks/data_path.py --root data``; ``data/MNIST/raw`` must hold the files. Every way loads
the 60,000 training images in shuffled batches as float32 in [0, 1] (``TensorDataset`` holds them so). The ways take
turns within a round, so that a busy machine slows them all alike. Printed are the medians over the rounds, in thousand
samples per second, of the loader alone and with a training step of a 784-128-784 autoencoder per batch, and the ratios
to torchvision's ``ToTensor`` without workers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from lightning_ae.data import EpochOrder, TensorLoader, VisionDataModule

BATCH_SIZE = 256
BASELINE = "torchvision + ToTensor, 0 workers"


def loaders(root: Path) -> dict[str, Iterable[Any]]:
    """All ways, by name; a batch is ``x`` or ``(x, y)``."""
    images = MNIST(root, train=True, transform=ToTensor())
    x, y = images.data.unsqueeze(1), images.targets
    module = VisionDataModule("MNIST", root, batch_size=BATCH_SIZE, val_fraction=0)
    return {
        BASELINE: DataLoader(images, BATCH_SIZE, shuffle=True),
        "torchvision + ToTensor, 2 workers": DataLoader(
            images, BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True
        ),
        "TensorDataset + DataLoader": DataLoader(TensorDataset(x / 255, y), BATCH_SIZE, shuffle=True),
        "TensorLoader": TensorLoader([x], EpochOrder(len(x), BATCH_SIZE, shuffle=True)),
        "VisionDataModule (x, y)": module.train_dataloader(),
    }


def thousand_per_second(loader: Iterable[Any], step: Callable[[Tensor], None] | None, seconds: float) -> float:
    """Walk epoch after epoch for ``seconds``, with ``step`` on each batch.

    The clock starts at the first batch: starting workers is not counted, new shuffles are.
    """
    batches = (batch for _ in itertools.count() for batch in loader)
    next(batches)
    samples, elapsed = 0, 0.0
    start = time.perf_counter()
    while elapsed < seconds:
        batch = next(batches)
        x = batch if isinstance(batch, Tensor) else batch[0]
        samples += len(x)
        if step:
            step(x)
        elapsed = time.perf_counter() - start
    return samples / elapsed / 1000


def trivial_step() -> Callable[[Tensor], None]:
    """A training step of a 784-128-784 autoencoder."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 784))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x.flatten(1)).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Thousand samples per second of each way to load MNIST.")
    parser.add_argument("--root", type=Path, required=True, help="folder with MNIST/raw")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the medians are printed (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each way and round (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in this process (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    ways = loaders(arguments.root)
    alone: dict[str, list[float]] = {name: [] for name in ways}
    trained: dict[str, list[float]] = {name: [] for name in ways}
    step = trivial_step()
    for _ in range(arguments.repeats):
        for name, loader in ways.items():
            alone[name].append(thousand_per_second(loader, None, arguments.seconds))
            trained[name].append(thousand_per_second(loader, step, arguments.seconds))

    print(f"{'thousand samples/s, medians':36}{'alone':>10}{'ratio':>8}{'with step':>12}{'ratio':>8}")
    for name in ways:
        figures = (statistics.median(alone[name]), statistics.median(trained[name]))
        base = (statistics.median(alone[BASELINE]), statistics.median(trained[BASELINE]))
        ratios = [figure / reference for figure, reference in zip(figures, base, strict=True)]
        print(f"{name:36}{figures[0]:10.1f}{ratios[0]:8.1f}{figures[1]:12.1f}{ratios[1]:8.1f}")


if __name__ == "__main__":
    main()
