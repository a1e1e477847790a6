r"""Pixels against meaning: the front between squared error and what a classifier sees.

One small autoencoder for each weight of the mix :math:`\alpha\|x - \hat x\|^2 + (1 - \alpha)\|\Phi x - \Phi\hat x\|^2`,
where :math:`\Phi` are the logits of a classifier of digits, trained first and then frozen. The code is far too small
for the images, so what is spent on the logits is missing in the pixels. At :math:`\alpha = 1` strokes are blurred
whatever they mean; at 0 the classifier reads what no eye does; between them lies the front. All models train together,
in one process.

The logits are scaled so that the mean image, the best guess without any code, has the same error in both losses; that
point is the reference of the hypervolume. Beside the losses stands the share of reconstructions that a *second*
classifier, of another seed and width, reads as the digit they are.

    python recipes/pareto_front.py                      # digits, about a minute on two cores
    python recipes/pareto_front.py --root ~/data        # MNIST from a folder of yours
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train the classifiers, sweep, draw and save; returns the numbers."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch's pytree

    options: dict[str, Any] = {"batch_size": args.batch_size, "seed": args.seed}
    data: Any = ae.DigitsDataModule(**options)
    if args.root is not None:
        data = ae.VisionDataModule("MNIST", root=args.root, download=False, **options)
        data.prepare_data()
        data.setup("fit")
    phi = train_classifier(data, args.classifier_epochs, args.seed, width=64)
    judge = train_classifier(data, args.classifier_epochs, args.seed + 1, width=96)
    x, labels = whole(data.test_dataloader())
    reference = balance(phi, x, whole(data.train_dataloader())[0].mean(0))

    make_model = functools.partial(mix_model, phi=phi, in_shape=data.in_shape, args=args)
    alphas = [i / (args.points - 1) for i in range(args.points)]
    start = time.perf_counter()
    front = ae.sweep(
        make_model, alphas, data, split="test", seed=args.seed, max_epochs=args.epochs, accelerator=args.accelerator
    )
    seconds = time.perf_counter() - start
    front.save(args.out / "front")
    torch.save(phi.state_dict(), args.out / "front" / "phi.pt")

    knee = front.knee()
    numbers: dict[str, Any] = {
        "alphas": alphas,
        "objectives": front.objectives.tolist(),
        "non_dominated": front.non_dominated().tolist(),
        "knee_alpha": alphas[knee],
        "reference": reference,
        "hypervolume": front.hypervolume(reference),
        "read_originals": accuracy(judge, x, labels),
        "read_reconstructions": [accuracy(judge, reconstruct(model, x), labels) for model in front.models],
        "seconds": seconds,
    }
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(front, numbers, x, args.out / "pareto_front.png")
    report(numbers, args.out)
    return numbers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=11, help="values of alpha, evenly from 0 to 1")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--classifier-epochs", type=int, default=30)
    parser.add_argument("--latent-dim", type=int, default=3, help="size of the code")
    parser.add_argument("--hidden", type=int, nargs="*", default=[128], help="hidden sizes of the encoder")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--root", type=Path, help="folder with MNIST; scikit-learn's digits without it")
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/pareto_front"), help="output folder")
    args = parser.parse_args(argv)
    if args.points < 2:
        parser.error(f"--points: expected at least 2, got {args.points}")
    return args


def train_classifier(data, epochs: int, seed: int, width: int) -> nn.Sequential:
    """A perceptron with one hidden layer, to logits ``(B, 10)``."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(data.in_shape), width), nn.GELU(), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.1)
    loader = data.train_dataloader()
    for _ in range(epochs):
        for x, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), labels).backward()
            optimizer.step()
    return network.requires_grad_(False)


def balance(phi: nn.Sequential, x: Tensor, mean: Tensor) -> list[float]:
    """Scale the logits so that guessing ``mean`` costs as much in them as in the pixels; returns both costs."""
    pixel = float((x - mean).square().flatten(1).sum(1).mean())
    perceptual = float((phi(x) - phi(mean[None])).square().sum(1).mean())
    for parameter in phi[-1].parameters():
        parameter.mul_(math.sqrt(pixel / perceptual))
    return [pixel, pixel]


def mix_model(alpha: float, phi: nn.Module, in_shape: tuple[int, ...], args: argparse.Namespace) -> ae.Autoencoder:
    """A perceptron for one point of the front."""
    loss = ae.AlphaMix(ae.SquaredError(), ae.FeatureLoss(phi), alpha)
    return ae.MLPAutoencoder(in_shape, args.latent_dim, hidden=args.hidden, activation="gelu", loss=loss, lr=args.lr)


def whole(loader) -> list[Tensor]:
    """All images and labels of a loader."""
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


@torch.no_grad()
def reconstruct(model: ae.Autoencoder, x: Tensor) -> Tensor:
    """Without a graph."""
    return model.reconstruct(x)


def accuracy(classifier: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of images that are read as what they are."""
    return float((classifier(x).argmax(1) == labels).float().mean())


def draw(front: ae.ParetoFront, numbers: dict[str, Any], x: Tensor, path: Path) -> None:
    """The front, and reconstructions along it with how many of them are read rightly."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.5, 5), layout="constrained", width_ratios=[1, 1.05])
    front.plot(left, numbers["reference"])
    left.set(xlabel="squared error of pixels per image", ylabel="squared error of logits per image, scaled")
    inside = (front.objectives < torch.tensor(numbers["reference"])).all(1)
    if inside.any():  # α = 0 is far out
        low, high = front.objectives[inside].amin(0), front.objectives[inside].amax(0)
        margin = 0.08 * (high - low) + 1e-3
        (x_low, y_low), (x_high, y_high) = (low - margin).tolist(), (high + margin).tolist()
        left.set(xlim=(x_low, x_high), ylim=(y_low, y_high))
    for alpha, (pixel, logits) in zip(front.alphas[~inside], front.objectives[~inside], strict=True):
        place = f"α = {alpha:g} lies outside, at ({pixel:.3g}, {logits:.2g})"
        left.annotate(place, (0.98, 0.02), xycoords="axes fraction", ha="right", va="bottom", fontsize=8)
    last = len(front) - 1
    chosen = sorted({0, 1, last // 2, front.knee(), last - 1, last})
    images = x[:: max(1, len(x) // 10)][:10]
    rows = [images, *(reconstruct(front.models[i], images) for i in chosen)]
    names = ["input"] + [f"α = {front.alphas[i]:g}" + " (knee)" * (i == front.knee()) for i in chosen]
    shares = [numbers["read_originals"], *(numbers["read_reconstructions"][i] for i in chosen)]
    # one picture of all, with a white pixel around each
    padded = [nn.functional.pad(row[:, 0], (1, 1, 1, 1)) for row in rows]
    right.imshow(torch.cat([torch.cat(list(row), dim=1) for row in padded]).numpy(), cmap="gray_r", vmin=0, vmax=1)
    ticks = [padded[0].shape[1] * (i + 0.5) - 0.5 for i in range(len(rows))]
    right.set_yticks(ticks, names)
    shown = right.secondary_yaxis("right")
    shown.set_yticks(ticks, [f"{share:.0%}" for share in shares])
    shown.set_ylabel("read rightly by another classifier")
    right.set(xticks=[], title="Held-out images and their reconstructions")
    for axes in (right, shown):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(numbers: dict[str, Any], out: Path) -> None:
    """The table at the end."""
    print(f"{'alpha':>6}{'pixel':>10}{'logits':>10}{'read':>8}")
    columns = [numbers[name] for name in ("alphas", "objectives", "read_reconstructions", "non_dominated")]
    for alpha, (pixel, logits), read, kept in zip(*columns, strict=True):
        mark = "knee" if alpha == numbers["knee_alpha"] else "" if kept else "dominated"
        print(f"{alpha:6.2f}{pixel:10.3f}{logits:10.3f}{read:8.1%}  {mark}")
    print(
        f"hypervolume {numbers['hypervolume']:.2f} of at most {math.prod(numbers['reference']):.2f}; "
        f"{numbers['seconds']:.0f} s; picture: {out / 'pareto_front.png'}"
    )


if __name__ == "__main__":
    main()
