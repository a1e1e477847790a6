r"""Handwritten digits in a few indices: how many codes of a codebook are used, with and without k-means and expiry.

A convolutional :class:`VectorQuantizedAutoencoder` keeps of each digit a small map of indices into a codebook of
``--codes`` vectors. Five ways to have a codebook:

* k-means start and expiry, the defaults of :class:`VectorQuantizerCode`;
* expiry alone, from small random vectors;
* k-means alone;
* neither: most codes are never the nearest of any vector, so no average ever moves them;
* a grid that needs neither, :class:`FiniteScalarQuantizerCode`.

After each epoch the test images are coded. Shown are the codes in use, their perplexity (``exp`` of the entropy of the
usage, in nats), reconstructions, the encoder's vectors with the codes among them, and the codebook: for each code the
mean of the pieces of images that get it.

Run ``python recipes/vq_digits.py`` (under a minute on two cores, scikit-learn's 8×8 digits), or with
``--root folder --epochs 5 --codes 512`` for MNIST in ``folder``; ``--help`` lists the options.

Source: van den Oord et al. 2017, https://arxiv.org/abs/1711.00937; Dhariwal et al. 2020,
https://arxiv.org/abs/2005.00341 (expiry); Mentzer et al. 2023, https://arxiv.org/abs/2309.15505 (the grid).
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import lightning as L
import matplotlib
import torch
from torch import Tensor

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FULL, NEITHER, GRID = "k-means, expiry", "neither", "grid (FSQ)"
STARTS = {
    FULL: {},
    "expiry alone": {"kmeans": False},
    "k-means alone": {"expire": 0.0},
    NEITHER: {"kmeans": False, "expire": 0.0},
}
COLOURS = dict(zip([*STARTS, GRID], ["C0", "C2", "C1", "C3", "0.4"], strict=True))


def load_images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training and test images, grey levels in [0, 1]."""
    data = ae.DigitsDataModule(seed=args.seed) if args.root is None else ae.VisionDataModule("MNIST", root=args.root)
    splits = data.splits()
    images = [torch.as_tensor(splits[name][0]) for name in ("train", "test")]
    train, test = (x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in images)
    return train, test


def grid_levels(codes: int) -> list[int]:
    """Three levels, as equal as may be, whose product is near the number of codes."""
    first = max(2, round(codes ** (1 / 3)))
    second = max(2, round((codes / first) ** 0.5))
    return sorted([first, second, max(2, round(codes / first / second))], reverse=True)


class Usage(L.Callback):
    """Counts which codes the test images get, after each epoch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.used: list[int] = []
        self.perplexity: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Code them."""
        share = usage(pl_module, self.x)
        self.used.append(int((share > 0).sum()))
        self.perplexity.append(float(torch.special.entr(share).sum().exp()))


@torch.no_grad()
def usage(model: ae.VectorQuantizedAutoencoder, x: Tensor) -> Tensor:
    """Share of the test images' vectors that each code gets."""
    indices = torch.cat([model.indices(part).flatten() for part in x.split(1000)])
    return torch.bincount(indices, minlength=model.code.num_codes) / len(indices)


def train(name: str, x: Tensor, watch: Usage, args: argparse.Namespace) -> ae.VectorQuantizedAutoencoder:
    """Fit a model with the codebook of that name to images ``(N, 1, H, W)``."""
    L.seed_everything(args.seed, verbose=False)
    code: ae.Code
    if name == GRID:
        code = ae.FiniteScalarQuantizerCode(grid_levels(args.codes))
    else:
        code = ae.VectorQuantizerCode(args.codes, args.dim, **STARTS[name])
    pair = ae.conv_pair(x.shape[1:], code.dim, channels=(32, 64), activation="gelu", spatial=True)
    model = ae.VectorQuantizedAutoencoder(*pair, ae.BernoulliNLL(), code=code, lr=args.lr)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=watch,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, ae.TensorDataModule(x, batch_size=args.batch_size, val_fraction=0))
    return model.eval()


@torch.no_grad()
def evaluate(model: ae.VectorQuantizedAutoencoder, x: Tensor, variance: Tensor) -> dict[str, float]:
    """Error on test images."""
    error = sum(float((part - model.reconstruct(part)).square().sum()) for part in x.split(1000)) / len(x)
    loss = sum(float(model.loss(model.decoder(model.encode(part)), part).sum()) for part in x.split(1000)) / len(x)
    return {"fvu": error / float(variance), "nats": loss}


def tile(images: Tensor, columns: int) -> Tensor:
    """Images ``(n, 1, H, W)`` side by side with a gap."""
    blank = images.new_full((-len(images) % columns, *images.shape[1:]), torch.nan)
    framed = torch.nn.functional.pad(torch.cat([images, blank])[:, 0], (1, 1, 1, 1), value=torch.nan)
    return torch.cat([torch.cat(list(row), 1) for row in framed.split(columns)], 0)


@torch.no_grad()
def pieces(model: ae.VectorQuantizedAutoencoder, x: Tensor) -> Tensor:
    """For each code in use the mean of the pieces of images at its places, most used first."""
    size = x.shape[2] // model.decoder.latent_shape[1]
    cut = x.unfold(2, size, size).unfold(3, size, size)[:, 0]  # (N, *map, size, size)
    indices = torch.cat([model.indices(part) for part in x.split(1000)])[:, 0, : cut.shape[1], : cut.shape[2]]
    number = torch.bincount(indices.flatten(), minlength=model.code.num_codes)
    sums = torch.zeros(len(number), size, size).index_add_(0, indices.flatten(), cut.flatten(0, 2))
    order = number.argsort(descending=True)[: int((number > 0).sum())]
    return (sums[order] / number[order, None, None]).unsqueeze(1)


def show_images(axis: plt.Axes, picture: Tensor, title: str) -> None:
    """Grey levels, without axes."""
    ink = plt.get_cmap("gray_r").with_extremes(bad="#d5e0ee")  # between the images
    axis.imshow(picture.numpy(), cmap=ink, vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title)
    axis.set(xticks=[], yticks=[])
    axis.set_frame_on(False)


@torch.no_grad()
def show_codes(axis: plt.Axes, model: ae.VectorQuantizedAutoencoder, x: Tensor, title: str) -> None:
    """The encoder's vectors and the codes on the two principal axes of the vectors."""
    vectors = model.encoder(x[:500]).movedim(1, -1).flatten(0, -2)
    mean = vectors.mean(0)
    axes = torch.linalg.svd(vectors - mean, full_matrices=False).Vh[:2].T
    used = usage(model, x) > 0
    flat, codes = (vectors - mean) @ axes, (model.code.codebook - mean) @ axes
    axis.scatter(*flat.T, s=2, color="0.75", label="encoder", rasterized=True)
    axis.scatter(*codes[used].T, s=9, color="C0", label=f"{int(used.sum())} codes in use")
    if not used.all():
        axis.scatter(*codes[~used].T, s=16, color="C3", marker="x", linewidth=0.9, label=f"{int((~used).sum())} unused")
    axis.set_title(title)
    axis.set(xticks=[], yticks=[], xlabel="principal axes of the encoder's vectors")
    axis.legend(loc="upper right", fontsize=8)


@torch.no_grad()
def draw(path: Path, models: dict, watched: dict[str, Usage], x: Tensor, num_codes: int) -> None:
    """Usage over epochs, vectors with codes, reconstructions and the codebook."""
    figure = plt.figure(figsize=(17, 9), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    for column, (what, label) in enumerate((("used", "codes in use"), ("perplexity", "perplexity"))):
        axis = figure.add_subplot(grid[0, column])
        for name, watch in watched.items():
            values = getattr(watch, what)
            axis.plot(range(1, len(values) + 1), values, color=COLOURS[name], label=name)
        axis.axhline(num_codes, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="epoch", title=f"{label[0].upper()}{label[1:]}, of {num_codes}", ylim=(0, 1.5 * num_codes))
        axis.grid(alpha=0.3)
    axis.legend(ncols=2)
    show_codes(figure.add_subplot(grid[0, 2]), models[FULL], x, f"Codebook: {FULL}")
    show_codes(figure.add_subplot(grid[0, 3]), models[NEITHER], x, f"Codebook: {NEITHER}")
    shown = x[:12]
    rows = [shown, *(models[name].reconstruct(shown) for name in (FULL, NEITHER, GRID))]
    axis = figure.add_subplot(grid[1, :2])
    show_images(axis, tile(torch.cat(rows), len(shown)), "Test images and their reconstructions")
    height = shown.shape[2] + 2
    axis.set_yticks([height * (i + 0.5) for i in range(4)], ["image", FULL, NEITHER, GRID])
    axis.tick_params(length=0)
    model = models[FULL]
    title = f"The codes of '{FULL}', most used first: mean of their pieces of images"
    show_images(figure.add_subplot(grid[1, 2:]), tile(pieces(model, x)[:260], 26), title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/vq_digits"), help="output folder")
    parser.add_argument("--root", type=Path, default=None, help="folder with torchvision's MNIST, instead of digits")
    parser.add_argument("--codes", type=int, default=256, help="size of the codebook")
    parser.add_argument("--dim", type=int, default=8, help="channels of a code")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|torch.jit)")  # Lightning's and torch's own use of torch
    torch.set_num_threads(1)  # networks this small only lose time on several

    train_x, test_x = load_images(args)
    variance = (test_x - train_x.mean(0)).square().flatten(1).sum(1).mean()
    numbers: dict[str, float] = {}
    models: dict[str, ae.VectorQuantizedAutoencoder] = {}
    watched: dict[str, Usage] = {}
    print(f"{'codebook':16} {'codes':>6} {'in use':>7} {'perplexity':>11} {'FVU':>7} {'nats':>7} {'bits':>6}")
    for name in COLOURS:
        watched[name] = Usage(test_x)
        models[name] = train(name, train_x, watched[name], args)
        figures = evaluate(models[name], test_x, variance)
        figures |= {"used": watched[name].used[-1], "perplexity": watched[name].perplexity[-1]}
        figures |= {"codes": models[name].code.num_codes, "bits": models[name].bits_per_example()}
        numbers |= {f"{name}/{key}": value for key, value in figures.items()}
        print(
            f"{name:16} {figures['codes']:6} {figures['used']:7} {figures['perplexity']:11.1f} {figures['fvu']:7.4f} "
            f"{figures['nats']:7.2f} {figures['bits']:6.1f}"
        )
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "vq_digits.png", models, watched, test_x, args.codes)
    return numbers


if __name__ == "__main__":
    main()
