"""What a training step costs beside its arithmetic: a loop by hand, the lean Trainer, and our logging on top.

One tiny model (64-16-64, batch 32, AdamW) is trained in six ways, interleaved in one run, on one thread. The
"lean Trainer" has logger, checkpoints, progress bar and summary off. Ours is `MLPAutoencoder`, which logs every term on
log steps and epoch ends; the peers are the same step in a plain LightningModule, without logging, with one `self.log`,
and with a `log_dict` of ten scalars. Only the ratios mean anything.

    python recipes/benchmarks/trainer_overhead.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_ae as ae


class Plain(L.LightningModule):
    """The same networks and step without this package."""

    def __init__(self, scalars: int = 0) -> None:
        super().__init__()
        self.encoder, self.decoder = ae.mlp_pair(64, 8, hidden=(16,))
        self.scalars = scalars

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Squared error."""
        loss = (self.decoder(self.encoder(batch)) - batch).square().sum(1).mean()
        if self.scalars == 1:
            self.log("train/loss", loss)
        elif self.scalars:
            self.log_dict({f"train/{i}": loss for i in range(self.scalars)})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same as ours."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Timer(L.Callback):
    """Seconds from the first training step to the last."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.start


def lean(module: L.LightningModule, batches: DataLoader[Tensor]) -> float:
    """Seconds of one epoch under the lean Trainer."""
    timer = Timer()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=timer,
    )
    trainer.fit(module, batches)
    return timer.seconds


def by_hand(batches: DataLoader[Tensor]) -> float:
    """Seconds of one epoch without a Trainer."""
    module = Plain()
    optimizer = module.configure_optimizers()
    start = time.perf_counter()
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        module.training_step(batch, i).backward()
        optimizer.step()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print microseconds a step and the ratio to the lean Trainer without logging; returns the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|no `val_dataloader`).*")

    batches = DataLoader(torch.rand(args.steps, 32, 64), batch_size=None)
    prior = {"prior": ae.WeightPrior(num_examples=1000)}
    runs: dict[str, Callable[[], float]] = {
        "loop by hand": lambda: by_hand(batches),
        "lean Trainer, no logging": lambda: lean(Plain(), batches),
        "ours: lean Trainer, loss and 1 term": lambda: lean(ae.MLPAutoencoder(64, 8, hidden=(16,)), batches),
        "ours: with a penalty, loss and 2 terms": lambda: lean(
            ae.MLPAutoencoder(64, 8, hidden=(16,), penalties=prior), batches
        ),
        "lean Trainer, one self.log": lambda: lean(Plain(1), batches),
        "lean Trainer, log_dict of ten": lambda: lean(Plain(10), batches),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    base = seconds["lean Trainer, no logging"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, base, strict=True)) for name, times in seconds.items()
    }
    print(f"{'':40s} {'µs/step':>8s} {'ratio':>6s}   (median of {args.repeats} interleaved runs of {args.steps} steps)")
    for name, times in seconds.items():
        print(f"{name:40s} {statistics.median(times) / args.steps * 1e6:8.0f} {ratios[name]:6.2f}")
    return ratios


if __name__ == "__main__":
    main()
