"""Starts and rates that are our defaults beside alternatives: held-out objectives after few and many batches.

Two tables, each over several seeds, every row on the same data in the same order:

* where weights start: ours (Kaiming or Glorot by the activation, the decoder's last layer at a tenth, the first of a
  convolutional one at a fifth), the same at full size, and torch's own initialisation of the same layers;
* how fast scales learn that a likelihood owns (σ, b, θ): at the rate of the weights, ten times as fast (ours), thirty
  times; and θ of counts from 10 or from the moments of the data. Counts are drawn from a negative binomial with a
  latent structure, so their true θ is known.

Nats, or squared error of the pixels; lower is better. The defaults were chosen on seeds 0 to 12. `*` marks a row of
ours that another beats by more than both spreads: scales learn faster still at thirty times the rate in the first
hundred batches, and end a little worse. Where a model overfits (counts of 560 cells, 1,200 batches) a slow θ overfits
less.

    python recipes/benchmarks/defaults.py                      # the embedded digits
    python recipes/benchmarks/defaults.py --root folder        # MNIST
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_ae as ae
from lightning_ae.networks.init import OUTPUT_SCALE, SPREAD_SCALE

OURS = "ours"


def images(root: Path | None) -> tuple[Tensor, Tensor]:
    """Grey images ``(N, 1, H, W)`` in [0, 1] to train on, and others."""
    data: Any = ae.DigitsDataModule() if root is None else ae.VisionDataModule("MNIST", root=root)
    if root is None:
        data.setup("fit")
        found = [torch.cat([x for x, *_ in loader]) for loader in (data.train_dataloader(), data.val_dataloader())]
        return found[0], found[1]
    splits = data.splits()
    train, test = (splits[name][0].float().view(-1, 1, 28, 28) / 255 for name in ("train", "test"))
    return train, test[:2000]


def counts(seed: int, theta: float, cells: int = 700, genes: int = 300) -> Tensor:
    """Counts of cells of six kinds, with inverse dispersions of genes around ``theta``."""
    g = torch.Generator().manual_seed(seed)
    centres, kinds = 1.5 * torch.randn(6, 5, generator=g), torch.randint(0, 6, (cells,), generator=g)
    latent = centres[kinds] + 0.5 * torch.randn(cells, 5, generator=g)
    weights, bias = 0.5 * torch.randn(5, genes, generator=g), 1.2 * torch.randn(genes, generator=g)
    totals = (7 + 0.4 * torch.randn(cells, 1, generator=g)).exp()
    mean = (latent @ weights + bias).softmax(1) * totals
    own = theta * (0.5 * torch.randn(genes, generator=g)).exp()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.poisson(torch.distributions.Gamma(own.expand_as(mean), own / mean).sample())


@torch.no_grad()
def restart(model: ae.Autoencoder, how: str) -> None:
    """Another start of the same layers."""
    if how == "torch's":
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                layer.reset_parameters()
    elif how == "at full size":
        layers = [layer for layer in model.decoder.modules() if isinstance(layer, (nn.Linear, nn.ConvTranspose2d))]
        layers[-1].weight.div_(OUTPUT_SCALE)
        if isinstance(model.decoder, ae.ConvDecoder):
            layers[0].weight.div_(SPREAD_SCALE)


def train(
    model: ae.Autoencoder, optimizer: torch.optim.Optimizer, x: Tensor, held_out: Tensor, steps: list[int], batch: int
) -> list[float]:
    """Held-out objectives after so many batches."""
    found, step = [], 0
    while True:
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            model.objective(model.terms(x[rows], model(x[rows]))).mean().backward()
            optimizer.step()
            step += 1
            if step in steps:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    found.append(float(model.objective(model.terms(held_out, model(held_out))).mean()))
            if step == steps[-1]:
                return found


def starts(shape: tuple[int, ...]) -> dict[str, Callable[[], ae.Autoencoder]]:
    """Networks whose start is compared."""
    pixels = shape[1] * shape[2]
    return {
        "MLP, one hidden layer": lambda: ae.MLPAutoencoder(shape, 16, hidden=(128,)),
        "MLP, three": lambda: ae.MLPAutoencoder(shape, 16, hidden=(256, 128, 64)),
        "MLP, tanh": lambda: ae.MLPAutoencoder(shape, 16, hidden=(128,), activation="tanh"),
        "MLP, batch norm": lambda: ae.MLPAutoencoder(shape, 16, hidden=(128,), norm="batch"),
        "MLP, Bernoulli": lambda: ae.MLPAutoencoder(shape, 16, hidden=(128,), loss=ae.BernoulliNLL()),
        "convolutional": lambda: ae.ConvAutoencoder(shape, 16, channels=(16, 32)),
        "VAE, Bernoulli": lambda: ae.VariationalAutoencoder(
            *ae.mlp_pair(shape, 20, (pixels // 2,), h_dim=40), loss=ae.BernoulliNLL()
        ),
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[list[float]]]]:
    """Print the tables; returns all numbers by row, variant and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of torchvision's MNIST; the digits unless given")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300, 1200], help="batches after which to look")
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32])
    parser.add_argument("--rows", nargs="*", help="only rows whose name has one of these in it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    x, held_out = images(args.root)
    found: dict[str, dict[str, list[list[float]]]] = {}

    def wanted(name: str) -> bool:
        return not args.rows or any(part in name for part in args.rows)

    for name, make in starts(tuple(x.shape[1:])).items():
        for how in (OURS, "at full size", "torch's") if wanted(name) else ():
            for seed in args.seeds:
                torch.manual_seed(seed)
                model = make()
                restart(model, how)
                numbers = train(model, optimizer_of(model), x, held_out, args.steps, 100)
                found.setdefault(name, {}).setdefault(how, []).append(numbers)
        show(name, found.get(name), args.steps)

    scales: dict[str, Callable[[], ae.ReconstructionLoss]] = {
        "VAE, Gaussian": lambda: ae.GaussianNLL(learn_scale=True),
        "VAE, Laplace": lambda: ae.LaplaceNLL(learn_scale=True),
        **{
            f"VAE, counts with θ = {theta}": lambda: ae.NegativeBinomialNLL(300, library_size=True)
            for theta in (1, 10, 100)
        },
    }
    for name, loss in scales.items():
        of_counts = "counts" in name
        for how in (OURS, "rate 1", "rate 30", *(("θ from 10", "θ from moments") if of_counts else ())):
            for seed in args.seeds if wanted(name) else ():
                data, others = x, held_out
                if of_counts:
                    drawn = counts(seed, float(name.split()[-1]))
                    data, others = drawn[:560], drawn[560:]
                torch.manual_seed(seed)
                hidden = (128,)
                transform = "log1p" if of_counts else "identity"
                pair = ae.mlp_pair(data.shape[1:], 16, hidden, h_dim=32, input_transform=transform)
                model = ae.VariationalAutoencoder(*pair, loss=loss())
                start_scales(model, how, data)
                optimizer = optimizer_of(model, {"rate 1": 1.0, "rate 30": 30.0}.get(how))
                numbers = train(model, optimizer, data, others, args.steps, 100)
                found.setdefault(name, {}).setdefault(how, []).append(numbers)
        show(name, found.get(name), args.steps)
    return found


@torch.no_grad()
def start_scales(model: ae.Autoencoder, how: str, x: Tensor) -> None:
    """θ of counts from elsewhere than 1."""
    loss: Any = model.loss
    if how == "θ from 10":
        loss.log_inverse_dispersion.fill_(10.0).log_()
    elif how == "θ from moments":
        totals = x.sum(1, keepdim=True).clamp_min(1)
        level = x / totals * totals.mean()
        mean = level.mean(0)
        beyond = (level.var(0) - mean * (totals.mean() / totals).mean()).clamp_min(1e-8)
        loss.log_inverse_dispersion.copy_((mean.square() / beyond).clamp(0.1, 1e4).log())


def optimizer_of(model: ae.Autoencoder, scale_rate: float | None = None) -> torch.optim.Optimizer:
    """The model's own, with another rate of the scales where one is given, in rates of the weights."""
    optimizer: Any = model.configure_optimizers()
    if scale_rate is not None:
        optimizer.param_groups[0]["lr"] = scale_rate * optimizer.param_groups[-1]["lr"]
    return optimizer


def show(name: str, variants: dict[str, list[list[float]]] | None, steps: list[int]) -> None:
    """Mean and spread over the seeds after each number of batches."""
    if not variants:
        return
    print(f"\n{name:28s}" + "".join(f"{f'{step} batches':>20s}" for step in steps))
    columns = {how: [list(column) for column in zip(*runs, strict=True)] for how, runs in variants.items()}
    spread = {how: [statistics.stdev(c) if len(c) > 1 else 0.0 for c in given] for how, given in columns.items()}
    for how, given in columns.items():
        cells = []
        for k, column in enumerate(given):
            mean = statistics.mean(column)
            beaten = how == OURS and any(
                statistics.mean(other[k]) + spread[which][k] < mean - spread[how][k] for which, other in columns.items()
            )
            cells.append(f"{f'{mean:.2f} ± {spread[how][k]:.2f}' + ('*' if beaten else ' '):>20s}")
        print(f"  {how:26s}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
