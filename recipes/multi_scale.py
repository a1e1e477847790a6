r"""Coarse and fine with a gain each: gains against their closed form, coarse first, and pictures of each scale.

A :class:`MultiScaleAutoencoder` has a decoder and a gain :math:`g_l` for each scale, finest first, and minimises
:math:`\sum_l \lambda_l \|x - \sum_{j \le l} g_j P_j D_j(z)\|^2 + \sum_l \rho_l g_l^2`. On images of digits are shown

* the gains that are learned beside perfect decoders, by SGD and Adam at several batch sizes, for a range of
  :math:`\rho`: they lie on :math:`g_l = \Lambda_l E_l / (\Lambda_l E_l + \rho)`, :math:`\Lambda_l = \sum_{j \ge l}
  \lambda_j`, :math:`E_l = \mathbb E\|P_l x\|^2` for block means, and for a Laplacian pyramid on the solution of the
  normal equations (:func:`optimal_gains`); and the same beside decoders that were trained, and then frozen;
* the error of each scale on test images while it trains, all scales at once and coarse first (a schedule of
  ``detail``): the share of the scale's variance that is not explained. The order changes, the end hardly does: a scale
  that joins disturbs the coarser ones for a while, as all read one latent;
* reconstructions from the coarsest scale alone to all of them, for block means and cosines. (The parts of a pyramid
  overlap, so its decoders stand in for each other, and a coarse stage alone need not look like anything.)

Run ``python recipes/multi_scale.py`` (about a minute on two cores, scikit-learn's 8×8 digits), or with ``--root folder
--epochs 10`` for MNIST in ``folder``; ``--help`` lists the options.

Source: Burt & Adelson 1983, https://doi.org/10.1109/TCOM.1983.1095851; Denton et al. 2015,
https://arxiv.org/abs/1506.05751.
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
from torch import Tensor, nn

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SPLITTINGS = {
    "blocks": lambda: ae.BlockMean([2, 4]),
    "cosines": lambda: ae.DCTBands([0.5, 0.25]),
    "pyramid": lambda: ae.LaplacianPyramid(2),
}
ORDERS = ("at_once", "coarse_first")
SCALES = ("fine", "middle", "coarse")
LEVEL_WEIGHTS = [0.2, 0.8, 0.5]
RIDGES = (0.1, 1.0, 10.0)  # in units of the energy of the middle scale


class Band(nn.Module):
    """A perfect decoder where the latent is the image: its band of one scale."""

    def __init__(self, scales: ae.Scales, index: int) -> None:
        super().__init__()
        self.scales, self.index = scales, index

    def forward(self, z: Tensor) -> Tensor:
        """The band."""
        return self.scales.split(z)[self.index]


class Errors(L.Callback):
    """The error of each scale after each validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.errors: list[list[float]] = []

    def on_validation_end(self, trainer: L.Trainer, model: ae.MultiScaleAutoencoder) -> None:
        """Keep them."""
        self.steps.append(trainer.global_step)
        self.errors.append([float(trainer.callback_metrics[f"val/mse_scale_{i}"]) for i in range(len(SCALES))])


def load_images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training and test images, grey levels in [0, 1]."""
    data = ae.DigitsDataModule(seed=args.seed) if args.root is None else ae.VisionDataModule("MNIST", root=args.root)
    splits = data.splits()
    images = [torch.as_tensor(splits[name][0]) for name in ("train", "test")]
    train, test = (x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in images)
    return train, test


def learn_gains(model: ae.MultiScaleAutoencoder, x: Tensor, optimizer: str, batch_size: int, args) -> Tensor:
    """Train nothing but the gains; the learning rate falls to 0 along a cosine."""
    gains = model.gains
    with torch.no_grad():
        energies = torch.stack([part.square().sum() / len(x) for part in model.decoder.parts(model.encode(x))])
    curvature = 2 * float((sum(model.level_weights) * energies + torch.tensor(model.gain_ridge)).max())
    chosen = torch.optim.SGD([gains], 0.5 / curvature) if optimizer == "SGD" else torch.optim.Adam([gains], 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, args.gain_steps)
    generator = torch.Generator().manual_seed(args.seed)
    epochs = args.gain_steps * batch_size // len(x) + 1
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(epochs)])
    for step in range(args.gain_steps):
        batch = x[order[step * batch_size : (step + 1) * batch_size]]
        chosen.zero_grad()
        model.training_step(batch, step)["loss"].backward()
        chosen.step()
        schedule.step()
    return gains.detach().double().clone()


def compare_gains(name: str, x: Tensor, args) -> tuple[list[dict], dict[str, float]]:
    """Learned gains and the closed form, beside perfect decoders; and the largest difference of each run."""
    scales = SPLITTINGS[name]()
    parts = scales.parts(x)
    unit = float(parts[1].square().sum() / len(x))
    energies = [float(part.double().square().sum() / len(x)) for part in parts]
    rows, numbers = [], {}
    for ridge in (unit * share for share in RIDGES):
        closed = ae.optimal_gains(parts, x, LEVEL_WEIGHTS, ridge)
        if scales.orthogonal:
            above = [sum(LEVEL_WEIGHTS[index:]) for index in range(len(parts))]
            formula = [w * e / (w * e + ridge) for w, e in zip(above, energies, strict=True)]
            numbers["formula_difference"] = max(
                numbers.get("formula_difference", 0.0),
                float((closed - torch.tensor(formula, dtype=torch.float64)).abs().max()),
            )
        for optimizer in ("SGD", "Adam"):
            for batch_size in args.gain_batches:
                decoders = [Band(scales, index) for index in range(len(parts))]
                options = {"level_weights": LEVEL_WEIGHTS, "gain_ridge": ridge}
                model = ae.MultiScaleAutoencoder(nn.Identity(), decoders, scales, **options)
                learned = learn_gains(model, x, optimizer, min(batch_size, len(x)), args)
                rows.append({"ridge": ridge, "optimizer": optimizer, "batch": batch_size, "gains": learned})
                key = f"{optimizer}_{batch_size}"
                numbers[key] = max(numbers.get(key, 0.0), float((learned - closed).abs().max()))
    return rows, numbers


def train(
    name: str, coarse_first: bool, x: Tensor, test_x: Tensor, args
) -> tuple[ae.MultiScaleAutoencoder, list[int], Tensor]:
    """Fit convolutional decoders; the steps, and the unexplained share of each scale's variance at them."""
    L.seed_everything(args.seed, verbose=False)
    scales, shape = SPLITTINGS[name](), tuple(x.shape[1:])
    channels = (args.channels, 2 * args.channels)
    encoder = ae.ConvEncoder(shape, args.latent_dim, channels, activation="gelu")
    options = {"channels": channels[::-1], "activation": "gelu"}
    decoders = ae.scale_decoders(scales, shape, args.latent_dim, ae.ConvDecoder, **options)
    model = ae.MultiScaleAutoencoder(encoder, decoders, scales, lr=args.lr)
    errors = Errors()
    schedule = [ae.LinearSchedule("detail", 1, len(SCALES), begin=0.1, duration=0.6)] if coarse_first else []
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[errors, *schedule],
        val_check_interval=args.val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    # nothing is chosen by the test set, which is only watched
    trainer.fit(model, ae.TensorDataModule(x, val=test_x, batch_size=args.batch_size, seed=args.seed))
    variances = torch.tensor([float(part.square().mean()) for part in scales.parts(test_x - x.mean(0))])
    return model.eval(), errors.steps, torch.tensor(errors.errors) / variances


def gains_of_trained(model: ae.MultiScaleAutoencoder, x: Tensor, args) -> tuple[Tensor, Tensor]:
    """Freeze the networks of a trained model and learn its gains anew, with a ridge; and their closed form."""
    model.requires_grad_(False)
    model.gains.requires_grad_(True).data.fill_(1.0)
    with torch.no_grad():
        parts = model.decoder.parts(model.encode(x))
    ridge = float(parts[1].square().sum() / len(x))
    model.level_weights, model.gain_ridge = list(LEVEL_WEIGHTS), [ridge] * len(SCALES)
    closed = ae.optimal_gains(parts, x, LEVEL_WEIGHTS, ridge)
    return learn_gains(model, x, "SGD", len(x), args), closed


def draw_gains(axis, name: str, rows: list[dict], x: Tensor) -> None:
    """Curves of the closed form, and what was learned."""
    parts = SPLITTINGS[name]().parts(x)
    unit = float(parts[1].square().sum() / len(x))
    shares = torch.logspace(-2, 2, 60).tolist()
    curves = torch.stack([ae.optimal_gains(parts, x, LEVEL_WEIGHTS, unit * share) for share in shares])
    markers = {"SGD": "o", "Adam": "x"}
    for index, scale in enumerate(SCALES):
        axis.plot(shares, curves[:, index].tolist(), color=f"C{index}", label=f"{scale}: closed form")
        for row in rows:
            face = {"markerfacecolor": "none"} if row["optimizer"] == "SGD" else {}
            axis.plot(
                row["ridge"] / unit, float(row["gains"][index]), markers[row["optimizer"]], color=f"C{index}", **face
            )
    for optimizer, marker in markers.items():
        axis.plot([], [], marker, color="black", markerfacecolor="none", label=f"{optimizer}, all batch sizes")
    axis.set(xscale="log", xlabel="ridge ρ / energy of the middle scale", ylabel="gain", title=f"Gains, {name}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def draw(path: Path, gains: dict, curves: dict, stages: dict[str, list[Tensor]], x: Tensor, test_x: Tensor) -> None:
    """Gains, errors over time, and pictures."""
    figure = plt.figure(figsize=(15, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    first, second, third = upper.subplots(1, 3)
    for axis, (name, rows) in zip((first, second), gains.items(), strict=True):
        draw_gains(axis, name, rows, x)
    for order, (steps, shares) in curves.items():
        for index, scale in enumerate(SCALES):
            style = "-" if order == "coarse_first" else ":"
            third.plot(
                steps, shares[:, index].tolist(), style, color=f"C{index}", label=f"{scale}, {order.replace('_', ' ')}"
            )
    third.set(yscale="log", xlabel="step", ylabel="share of the scale's variance not explained")
    third.set_title("Error of each scale, test images (blocks)")
    third.grid(alpha=0.3, which="both")
    third.legend(fontsize=7)
    for panel, (name, pictures) in zip(lower.subfigures(1, len(stages)), stages.items(), strict=True):
        panel.suptitle(f"Reconstructions from the coarse scale to all, {name}", fontsize=11)
        shown = [*pictures, test_x[: len(pictures[0])]]
        titles = ["coarse", "+ middle", "+ fine", "original"]
        axes = panel.subplots(len(shown[0]), len(shown), squeeze=False)
        for row, line in enumerate(axes):
            for axis, title, images in zip(line, titles, shown, strict=True):
                axis.imshow(images[row, 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.axis("off")
                if row == 0:
                    axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Learn gains, train both ways, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/multi_scale"), help="output folder")
    parser.add_argument("--root", type=Path, default=None, help="folder with torchvision's MNIST, instead of digits")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--channels", type=int, default=16, help="of the encoder's first convolution")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--val-every", type=int, default=20, help="steps between two looks at the test images")
    parser.add_argument("--gain-steps", type=int, default=300)
    parser.add_argument("--gain-batches", type=int, nargs="+", default=[16, 128, 1024])
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|torch.jit)")  # Lightning's and torch's own use of torch
    torch.set_num_threads(1)  # matrices this small only lose time on several

    x, test_x = load_images(args)
    steps_per_epoch = math.ceil(len(x) / args.batch_size)
    numbers: dict[str, float] = {}
    gains, curves, stages = {}, {}, {}
    print("largest difference between learned gains and the closed form, over scales and ridges")
    for name in ("blocks", "pyramid"):
        gains[name], differences = compare_gains(name, x, args)
        numbers |= {f"{name}_gains_{key}": value for key, value in differences.items()}
        for key, value in differences.items():
            print(f"  {name:8} {key:20} {value:.1e}")
    print("share of each scale's variance not explained at the end, test images")
    for name in ("blocks", "cosines"):
        for order in ORDERS:
            model, steps, shares = train(name, order == "coarse_first", x, test_x, args)
            print(
                f"  {name:8} {order:14} "
                + "".join(f"{s} {float(v):.4f}  " for s, v in zip(SCALES, shares[-1], strict=True))
            )
            early = max(i for i, step in enumerate(steps) if i == 0 or step <= 0.4 * steps_per_epoch * args.epochs)
            for index, scale in enumerate(SCALES):
                numbers[f"{name}_{order}_{scale}"] = float(shares[-1, index])
                numbers[f"{name}_{order}_{scale}_early"] = float(shares[early, index])
            if name == "blocks":
                curves[order] = (steps, shares)
        with torch.no_grad():
            stages[name] = model.stages(test_x[:4])
        # gains beside decoders that are what they are
        learned, closed = gains_of_trained(model, x[:256], args)
        numbers[f"{name}_gains_trained_decoders"] = float((learned - closed).abs().max())
        print(f"  {name:8} gains beside these decoders {learned.tolist()}, closed form {closed.tolist()}")
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "multi_scale.png", gains, curves, stages, x, test_x)
    return numbers


if __name__ == "__main__":
    main()
