r"""Dictionaries of handwritten digits: sparsity against error for three codes, and the atoms as pictures.

A :class:`DictionaryAutoencoder` is trained on the digits with :class:`L1Code`, :class:`JumpReLUCode` and
:class:`TopKCode`, each several times for other numbers of active latents. TopK is told the number; the others are told
a target and find the weight :math:`\lambda` that gives it while they train (``target_l0``). On test images are shown

* L0, the active latents of an image, against the fraction of variance unexplained (FVU), with PCA beside them;
* the weights found, and how far each run is from its target;
* the atoms, in the order of how many images use them: strokes and pieces of digits.

L1 also shrinks the latents that it keeps, which shows as more error at the same L0.

Run ``python recipes/sparse_digits.py`` (about a minute on two cores, scikit-learn's 8×8 digits), or with
``--root folder --epochs 10 --latents 1024`` for MNIST in ``folder``; ``--help`` lists the options.

Source: Olshausen & Field 1996, https://doi.org/10.1038/381607a0; Gao et al. 2024, https://arxiv.org/abs/2406.04093;
Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435.
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
import torch
from torch import Tensor

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CODES = {
    "L1": lambda n, l0: ae.L1Code(0.1, "relu", target_l0=l0),
    "JumpReLU": lambda n, l0: ae.JumpReLUCode(n, 0.04, target_l0=l0),
    "TopK": lambda n, l0: ae.TopKCode(l0),
}


def load_images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training and test images as rows, grey levels in [0, 1]."""
    if args.root is None:
        data = ae.DigitsDataModule(flat=True, seed=args.seed)
    else:
        data = ae.VisionDataModule("MNIST", root=args.root, flat=True)
    splits = data.splits()
    rows = [torch.as_tensor(splits[name][0]).flatten(1) for name in ("train", "test")]
    train, test = (x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in rows)
    return train, test


def train(code: ae.Code, x: Tensor, args: argparse.Namespace) -> ae.DictionaryAutoencoder:
    """Fit a dictionary to images ``(N, d)``."""
    L.seed_everything(args.seed, verbose=False)
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "dead_after": 10 * len(x)}
    model = ae.DictionaryAutoencoder(x.shape[1], args.latents, code, **options)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, ae.TensorDataModule(x, batch_size=args.batch_size, val_fraction=0))
    return model.eval()


@torch.no_grad()
def evaluate(model: ae.DictionaryAutoencoder, x: Tensor, variance: Tensor) -> tuple[dict[str, float], Tensor]:
    """Figures on test images, and the share of images that use each latent."""
    z = model.encode(x).to_dense() if isinstance(model.code, ae.TopKCode) else model.encode(x)
    x_hat = model.reconstruct(x)
    on = (z != 0).float()
    figures = {
        "l0": float(on.sum(1).mean()),
        "fvu": float((x - x_hat).square().sum(1).mean() / variance),
        "norm_ratio": float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()),
        "unused_latents": float((on.sum(0) == 0).float().mean()),
    }
    return figures, on.mean(0)


def pca_fvu(train_x: Tensor, test_x: Tensor, variance: Tensor, components: int) -> float:
    """The variance of test images that so many principal components leave."""
    mean = train_x.mean(0)
    axes = torch.linalg.eigh((train_x - mean).T.double() @ (train_x - mean).double()).eigenvectors
    kept = axes[:, -components:].float()
    residual = (test_x - mean) - (test_x - mean) @ kept @ kept.T
    return float(residual.square().sum(1).mean() / variance)


def tile(atoms: Tensor, columns: int) -> Tensor:
    """Atoms ``(n, d)`` side by side, each on a scale of its own with zero in the middle."""
    side = math.isqrt(atoms.shape[1])
    pictures = (atoms / atoms.abs().amax(1, keepdim=True)).view(-1, side, side)
    pictures = torch.nn.functional.pad(pictures, (1, 1, 1, 1), value=float("nan"))
    rows = [torch.cat(list(row), 1) for row in pictures.split(columns)]
    return torch.cat([row for row in rows if row.shape[1] == rows[0].shape[1]], 0)


def draw(path: Path, curves: dict, pca: list[tuple[int, float]], shown: dict[str, Tensor]) -> None:
    """The curve, and the atoms of each code."""
    figure, axes = plt.subplots(
        1, 1 + len(shown), figsize=(4.6 * (1 + len(shown)), 4.8), layout="constrained", squeeze=False
    )
    first, *others = axes[0]
    for (name, points), marker in zip(curves.items(), "os^", strict=False):
        points = sorted(points)
        first.plot([p[0] for p in points], [p[1] for p in points], marker=marker, label=name)
    first.plot([k for k, _ in pca], [fvu for _, fvu in pca], "--", color="black", label="PCA, as many components")
    first.set(xscale="log", yscale="log", xlabel="active latents of a test image (L0)")
    first.set(ylabel="fraction of variance unexplained", title="Sparsity against error")
    ticks = [k for k, _ in pca]
    first.set_xticks(ticks, [str(k) for k in ticks])
    levels = [level for level in (0.02, 0.05, 0.1, 0.2, 0.5) if first.get_ylim()[0] < level < first.get_ylim()[1]]
    first.set_yticks(levels, [f"{level:g}" for level in levels])
    first.minorticks_off()
    first.grid(alpha=0.3)
    first.legend()
    for axis, (title, atoms) in zip(others, shown.items(), strict=True):
        axis.imshow(tile(atoms, 10).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/sparse_digits"), help="output folder")
    parser.add_argument("--root", type=Path, default=None, help="folder with torchvision's MNIST, instead of digits")
    parser.add_argument("--latents", type=int, default=128, help="atoms of a dictionary")
    parser.add_argument("--l0", type=int, nargs="+", default=[4, 8, 16, 32], help="active latents aimed at")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3, help="lets the noise that atoms start from fade")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|torch.jit)")  # Lightning's and torch's own use of torch
    torch.set_num_threads(1)  # matrices this small only lose time on several

    train_x, test_x = load_images(args)
    variance = (test_x - train_x.mean(0)).square().sum(1).mean()
    pictured = args.l0[(len(args.l0) - 1) // 2]
    numbers: dict[str, float] = {"latents": args.latents}
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in CODES}
    shown: dict[str, Tensor] = {}
    print(f"{'code':9} {'target':>6} {'train L0':>8} {'L0':>6} {'FVU':>7} {'|x̂|/|x|':>8} {'unused':>7} {'weight':>8}")
    for name, make in CODES.items():
        for l0 in args.l0:
            model = train(make(args.latents, l0), train_x, args)
            figures, density = evaluate(model, test_x, variance)
            figures["train_l0"] = evaluate(model, train_x, variance)[0]["l0"]
            weight = 0.0 if name == "TopK" else float(model.code.weights()[model.code.term])
            numbers |= {f"{name}_{l0}_{key}": value for key, value in figures.items()}
            numbers[f"{name}_{l0}_weight"] = weight
            curves[name].append((figures["l0"], figures["fvu"]))
            print(
                f"{name:9} {l0:6} {figures['train_l0']:8.2f} {figures['l0']:6.2f} {figures['fvu']:7.4f} "
                f"{figures['norm_ratio']:8.3f} {figures['unused_latents']:7.1%} {weight:8.4f}"
            )
            if l0 == pictured:
                order = density.argsort(descending=True)[:100]
                shown[f"{name} atoms, L0 {figures['l0']:.1f}"] = model.decoder.weight.detach().T[order]
    pca = [(k, pca_fvu(train_x, test_x, variance, k)) for k in args.l0]
    numbers |= {f"PCA_{k}_fvu": fvu for k, fvu in pca}
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "sparse_digits.png", curves, pca, shown)
    return numbers


if __name__ == "__main__":
    main()
