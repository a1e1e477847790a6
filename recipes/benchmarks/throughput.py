"""Examples a second of a small autoencoder: a plain loop, pythae, ours, ours with the diagnostic callbacks.

784-128-16-128-784 with squared error, batch 100, AdamW at its defaults: the same networks and data for all, one epoch
each, interleaved in one run. The plain loop is torch alone, over its own DataLoader, once as written by most and once
with its fused AdamW, which ours uses by itself. Ours is `MLPAutoencoder` under the Trainer with its defaults but for
the progress bar, so with loggers, log steps and a checkpoint at the end of the epoch, and once lean. Only ratios mean
anything; they are medians over the rounds.

    pip install pythae
    python recipes/benchmarks/throughput.py [--root FOLDER_WITH_MNIST] [--accelerator gpu]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ae as ae

LATENT, HIDDEN = 16, (128,)


def pixels(root: Path | None, examples: int) -> Tensor:
    """Images as rows: MNIST's where it lies, else random numbers of its size, which train as fast."""
    if root is None:
        return torch.rand(examples, 784)
    from torchvision.datasets import MNIST

    return MNIST(str(root), download=False).data[:examples].flatten(1) / 255


class Timer(L.Callback):
    """Seconds from the first training step to the end of the last."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        synchronize()
        self.start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        synchronize()
        self.seconds = time.perf_counter() - self.start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def loop(x: Tensor, args: argparse.Namespace, fused: bool | None) -> float:
    """Seconds of an epoch of torch alone."""
    encoder, decoder = ae.mlp_pair(784, LATENT, HIDDEN)
    model = nn.Sequential(encoder, decoder).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=fused)
    loader = DataLoader(TensorDataset(x), args.batch_size, shuffle=True)
    synchronize()
    start = time.perf_counter()
    for (batch,) in loader:
        batch = batch.to(args.device)
        optimizer.zero_grad()
        loss = (model(batch) - batch).square().sum(1).mean()
        loss.backward()
        optimizer.step()
    synchronize()
    return time.perf_counter() - start


def ours(x: Tensor, args: argparse.Namespace, callbacks: list[L.Callback], **options: Any) -> float:
    """Seconds of an epoch under the Trainer."""
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator=args.accelerator,
            devices=1,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[timer, *callbacks],
            **options,
        )
        model = ae.MLPAutoencoder(784, LATENT, hidden=HIDDEN)
        trainer.fit(model, ae.TensorDataModule(x, batch_size=args.batch_size, val_fraction=0))
    return timer.seconds


def monitors() -> list[L.Callback]:
    """The three that are attached most."""
    return [ae.DeadReLUMonitor(), ae.GradientSaturationMonitor(), ae.LatentSparsityMonitor()]


def pythae() -> Callable[[Tensor, argparse.Namespace], float] | None:
    """Its own autoencoder with the same networks, its own trainer; None if it is not installed."""
    try:
        from pythae.data.datasets import BaseDataset
        from pythae.models import AE, AEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
        from pythae.trainers import BaseTrainer, BaseTrainerConfig
    except ImportError as error:
        print(f"pythae is left out: {error}")
        return None

    class Encoder(BaseEncoder):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            return ModelOutput(embedding=self.net(x))

    class Decoder(BaseDecoder):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z))

    class Timed(BaseTrainer):
        seconds = 0.0

        def train_step(self, epoch: int) -> Any:
            synchronize()
            start = time.perf_counter()
            loss = super().train_step(epoch)
            synchronize()
            self.seconds += time.perf_counter() - start
            return loss

    def train(x: Tensor, args: argparse.Namespace) -> float:
        encoder, decoder = ae.mlp_pair(784, LATENT, HIDDEN)
        model = AE(AEConfig(input_dim=(784,), latent_dim=LATENT), Encoder(encoder), Decoder(decoder))
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as quiet:
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            config = BaseTrainerConfig(
                output_dir=folder,
                num_epochs=1,
                learning_rate=1e-3,
                per_device_train_batch_size=args.batch_size,
                optimizer_cls="AdamW",
                optimizer_params={"weight_decay": 0.0},
                no_cuda=args.device == "cpu",
            )
            data = BaseDataset(x, torch.zeros(len(x)))
            trainer = Timed(model, train_dataset=data, training_config=config)
            trainer.train()
        return trainer.seconds

    return train


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print thousand examples a second and ratios to the plain loop; returns the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of torchvision's MNIST; random numbers unless given")
    parser.add_argument("--examples", type=int, default=30_000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    args = parser.parse_args(argv)
    args.device = "cuda" if args.accelerator == "gpu" else "cpu"
    torch.set_num_threads(args.threads)
    for name in ("lightning.pytorch", "pythae"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    x = pixels(args.root, args.examples)
    lean: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    runs: dict[str, Callable[[], float]] = {
        "plain loop": lambda: loop(x, args, None),
        "plain loop, fused AdamW": lambda: loop(x, args, True),
        "ours": lambda: ours(x, args, []),
        "ours, lean": lambda: ours(x, args, [], **lean),
        "ours, three monitors": lambda: ours(x, args, monitors()),
    }
    if (peer := pythae()) is not None:
        runs["pythae"] = lambda: peer(x, args)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(run())

    def ratio(name: str, base: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[base], strict=True))

    print(f"{'':26s} {'k/s':>7s} {'fastest':>8s}   speed over the plain loop" + (" and pythae" if peer else ""))
    for name, times in seconds.items():
        rates = f"{len(x) / statistics.median(times) / 1e3:7.1f} {len(x) / min(times) / 1e3:8.1f}"
        against = f"{ratio(name, 'plain loop'):6.2f}" + (f" {ratio(name, 'pythae'):6.2f}" if peer else "")
        print(f"{name:26s} {rates}   {against}")
    return {name: ratio(name, "plain loop") for name in runs}


if __name__ == "__main__":
    main()
