r"""Greedy pre-training of a deep stack against training it from scratch, for the same number of epochs.

A stack of sigmoid levels, :math:`64 \to 48 \to 32 \to 16 \to 6` by default, learns the digits in three ways:

* ``greedy``: level by level (:class:`GreedyLevels`), then all together from there;
* ``joint``: all levels together from the first step, each with its loss beside the reconstruction from the top;
* ``end_to_end``: the same with the reconstruction from the top alone (``level_weights`` 0), a plain deep autoencoder.

Shown are the error of validation images while training, in the greedy phases that from the depth trained so far; the
error of test images from each depth, beside PCA with as many components as the level has units; and reconstructions
from each depth. Each way is run with several seeds. An epoch of a greedy phase has the gradients of one level only, so
with equal epochs the greedy run does less work.

What wins, by default settings (mean of three seeds, squared error of a test image from the top; PCA 1.92): joint 1.57,
greedy 1.67, end to end 2.70. The classical remedy works: sigmoids stall a deep autoencoder that hears only of its
output, and greedy pre-training sets it going. But a loss per level does so, too, from the first step, and needs no
phases; before fine-tuning greedy levels add up to 2.55. The rest is the sigmoid's: with ``--activation tanh`` the three
end within each other's spread (1.2 to 1.4), and with ``relu`` end to end is best (1.2 against 1.6 to 2.3; two seeds).

Run ``python recipes/stacked_greedy.py`` (about a minute on two cores, scikit-learn's 8×8 digits), or with
``--root folder --sizes 256 64 16 --epochs-per-level 3 --finetune-epochs 6`` for MNIST in ``folder``; ``--help`` lists
the options, among them ``--activation tanh`` or ``relu``.

Source: Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647; Bengio et al. 2007,
https://papers.nips.cc/paper/3048; Glorot & Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from pathlib import Path

import lightning as L
import matplotlib
import numpy as np
import torch
from torch import Tensor

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WAYS = ("greedy", "joint", "end_to_end")
COLOURS = dict(zip(WAYS, ("tab:blue", "tab:orange", "tab:green"), strict=True))


class Curve(L.Callback):
    """Squared error of validation images after each epoch."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: ae.StackedAutoencoder) -> None:
        """From the depth that is trained so far."""
        depth = None if pl_module.training_level is None else pl_module.training_level + 1
        total, number = 0.0, 0
        for batch in trainer.val_dataloaders:
            x = pl_module.get_input(batch)
            total += float((pl_module.reconstruct(x, depth) - x).square().sum())
            number += len(x)
        self.errors.append(total / number)


def build(
    sizes: list[int], width: int, activation: str, lr: float, weights: list[float] | None
) -> ae.StackedAutoencoder:
    """Levels of one layer: Bernoulli on what lies in [0, 1], squared error on other codes; the top code is linear."""
    levels = []
    for k, (below, size) in enumerate(zip([width, *sizes[:-1]], sizes, strict=True)):
        loss = {"sigmoid": ae.BernoulliNLL(), "tanh": ae.SquaredError("tanh"), "relu": ae.SquaredError("relu")}[
            activation
        ]
        top = size == sizes[-1] and k == len(sizes) - 1
        options = {"hidden": (), "latent_activation": "identity" if top else activation}
        levels.append(ae.MLPAutoencoder(below, size, loss=ae.BernoulliNLL() if k == 0 else loss, **options))
    return ae.StackedAutoencoder(levels, weights, lr=lr)


def train(way: str, data: L.LightningDataModule, width: int, args: argparse.Namespace, seed: int) -> tuple:
    """The model and its curve."""
    L.seed_everything(seed, verbose=False)
    n = len(args.sizes)
    model = build(args.sizes, width, args.activation, args.lr, [0.0] * n if way == "end_to_end" else None)
    curve = Curve()
    greedy = [ae.GreedyLevels(args.epochs_per_level, args.finetune_epochs)] if way == "greedy" else []
    trainer = L.Trainer(
        max_epochs=n * args.epochs_per_level + args.finetune_epochs,
        accelerator="cpu",
        callbacks=[*greedy, curve],
        logger=False,
        num_sanity_val_steps=0,  # it would be in the curve
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    return model.eval(), curve.errors


@torch.no_grad()
def errors_by_depth(model: ae.StackedAutoencoder, x: Tensor) -> list[float]:
    """Squared error of an image from each depth."""
    depths = range(1, len(model.levels) + 1)
    return [float((model.reconstruct(x, depth) - x).square().sum(1).mean()) for depth in depths]


def pca_errors(train_x: Tensor, x: Tensor, sizes: list[int]) -> list[float]:
    """The same for principal components."""
    mean = train_x.mean(0)
    axes = torch.linalg.eigh((train_x - mean).T.double() @ (train_x - mean).double()).eigenvectors.float()
    kept = [axes[:, -size:] for size in sizes]
    return [float(((x - mean) - (x - mean) @ v @ v.T).square().sum(1).mean()) for v in kept]


def draw(path: Path, results: dict, pca: list[float], pictures: dict[str, Tensor], args: argparse.Namespace) -> None:
    """Curves, errors by depth, and reconstructions."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 5), layout="constrained", width_ratios=(1.3, 1, 1.1)
    )
    for way, runs in results.items():
        for i, (errors, _) in enumerate(runs):
            label = way.replace("_", " ") if i == 0 else None
            left.plot(range(1, len(errors) + 1), errors, color=COLOURS[way], alpha=0.8, lw=1.2, label=label)
    n = len(args.sizes)
    small = {"transform": left.get_xaxis_transform(), "va": "top", "fontsize": 8, "color": COLOURS["greedy"]}
    for k in range(n):
        edge = (k + 1) * args.epochs_per_level
        left.axvline(edge + 0.5, color="grey", lw=0.8, ls=":")
        left.text(edge - args.epochs_per_level / 2, 0.98, f"level {k}", ha="center", **small)
    left.text(n * args.epochs_per_level + 1, 0.98, "all", **small)
    left.axhline(pca[-1], color="black", ls="--", lw=1, label=f"PCA, {args.sizes[-1]} components (test)")
    left.set(xlabel="epoch", ylabel="squared error of a validation image", yscale="log")
    left.set_title("Greedy: error from the depth trained so far; others: from the top")
    left.set_yticks([tick for tick in (1, 1.5, 2, 3, 4, 5) if left.get_ylim()[0] < tick < left.get_ylim()[1]])
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    left.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.94))
    positions, width = np.arange(n), 0.2
    for i, (way, runs) in enumerate(results.items()):
        values = np.array([errors for _, errors in runs])
        middle.bar(positions + (i - 1) * width, values.mean(0), width, color=COLOURS[way], label=way.replace("_", " "))
        for run in values:
            middle.plot(positions + (i - 1) * width, run, ".", color="black", ms=4)
    middle.plot(positions, pca, "k_", ms=26, label="PCA, as many components")
    middle.set_xticks(positions, [f"depth {k + 1}\n({size} units)" for k, size in enumerate(args.sizes)])
    middle.set(ylabel="squared error of a test image", yscale="log", title="Error from each depth (dots: seeds)")
    middle.set_ylim(top=8 * middle.get_ylim()[1])
    middle.legend(fontsize=8, loc="upper left", ncols=2)
    side = math.isqrt(next(iter(pictures.values())).shape[1])
    gap = {"constant_values": 0.5}
    framed = [[np.pad(image.view(side, side).numpy(), 1, **gap) for image in row] for row in pictures.values()]
    rows = [np.concatenate(row, 1) for row in framed]
    right.imshow(np.concatenate(rows, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    right.set_yticks([(side + 2) * (i + 0.5) - 0.5 for i in range(len(rows))], list(pictures), fontsize=9)
    right.set_xticks([])
    right.set_title("Reconstructions of test images, first seed")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def load_data(args: argparse.Namespace) -> L.LightningDataModule:
    """Images as rows, grey levels in [0, 1]."""
    if args.root is None:
        return ae.DigitsDataModule(flat=True, batch_size=args.batch_size, seed=args.seed)
    return ae.VisionDataModule("MNIST", root=args.root, flat=True, batch_size=args.batch_size)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--out", type=Path, default=Path("outputs/stacked_greedy"), help="output folder")
    parser.add_argument("--root", type=Path, default=None, help="folder with torchvision's MNIST, instead of digits")
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 32, 16, 6], help="units of each level's code")
    parser.add_argument("--activation", choices=["sigmoid", "tanh", "relu"], default="sigmoid")
    parser.add_argument("--epochs-per-level", type=int, default=10)
    parser.add_argument("--finetune-epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|torch.jit)")  # Lightning's and torch's own use of torch
    torch.set_num_threads(1)  # matrices this small only lose time on several

    data = load_data(args)
    splits = data.splits()
    rows = [torch.as_tensor(splits[name][0]).flatten(1) for name in ("train", "test")]
    train_x, test_x = (x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in rows)
    pca = pca_errors(train_x, test_x, args.sizes)
    numbers: dict[str, float] = {f"pca_depth_{k}": error for k, error in enumerate(pca, 1)}
    results: dict[str, list] = {way: [] for way in WAYS}
    pictures = {"test image": test_x[:10]}
    print(f"{'way':11} {'seed':>4}  squared error of a test image from depth 1, 2, …")
    for way in WAYS:
        for seed in range(args.seed, args.seed + args.seeds):
            model, curve = train(way, data, train_x.shape[1], args, seed)
            by_depth = errors_by_depth(model, test_x)
            results[way].append((curve, by_depth))
            print(f"{way:11} {seed:4}  " + "  ".join(f"{error:7.3f}" for error in by_depth))
            if seed == args.seed:
                depths = range(1, len(args.sizes) + 1) if way == "greedy" else [len(args.sizes)]
                with torch.no_grad():
                    pictures |= {
                        f"{way.replace('_', ' ')}, depth {k}": model.reconstruct(test_x[:10], depth=k) for k in depths
                    }
        for k in range(len(args.sizes)):
            numbers[f"{way}_depth_{k + 1}"] = float(np.mean([errors[k] for _, errors in results[way]]))
        numbers[f"{way}_validation"] = float(np.mean([curve[-1] for curve, _ in results[way]]))
    before = len(args.sizes) * args.epochs_per_level
    numbers["greedy_validation_before_fine_tuning"] = float(np.mean([c[before - 1] for c, _ in results["greedy"]]))
    numbers["joint_validation_then"] = float(np.mean([c[before - 1] for c, _ in results["joint"]]))
    numbers["end_to_end_validation_then"] = float(np.mean([c[before - 1] for c, _ in results["end_to_end"]]))
    print("PCA" + " " * 15 + "  ".join(f"{error:7.3f}" for error in pca))
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "stacked_greedy.png", results, pca, pictures, args)
    return numbers


if __name__ == "__main__":
    main()
