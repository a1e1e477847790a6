r"""What the pixel loss blurs and SSIM keeps: the same network under squared error, under SSIM, and under a mix.

Squared error averages over what it cannot know, so strokes come out grey and wide; :math:`1 - SSIM` weighs contrast
and structure in every window, so edges stay steeper, at some cost in PSNR that a mix of both wins back. Whether light
spills from strong edges into the flat background beside them, the halo that SSIM is known for, is measured too: these
small networks spill less of it under SSIM than under squared error, on black and on grey (`--background 0.5`); on grey
the whole background drifts instead, since there SSIM hardly sees brightness. Measured on held-out images:

* PSNR in dB and SSIM (torchmetrics);
* sharpness: mean slope of x̂ over that of x, at the tenth of the pixels where x is steepest (1 is right);
* halo: mean of x̂ over background pixels within two pixels of a strong edge, less that over those farther away;
* drift: mean of x̂ over the latter, less the background.

    python recipes/ssim_vs_mse.py                        # digits, enlarged to 32×32; a minute on two cores
    python recipes/ssim_vs_mse.py --root ../shared/data  # MNIST from a local folder
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import lightning as L
import matplotlib
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train the three, measure, draw; returns the numbers by loss."""
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    data = load_data(args)
    test = next(iter(data.test_dataloader()))
    losses = {
        "squared error": ae.SquaredError("sigmoid"),
        "mix": ae.WeightedLoss(
            {"pixel": ae.SquaredError("sigmoid"), "ssim": ae.SSIMLoss()}, {"pixel": 1.0, "ssim": args.ssim_weight}
        ),
        "SSIM": ae.SSIMLoss(activation="sigmoid"),
    }
    numbers, images = {}, {}
    for name, loss in losses.items():
        L.seed_everything(args.seed, verbose=False)
        model = ae.ConvAutoencoder(data.in_shape, args.latent_dim, activation="gelu", loss=loss, lr=2e-3)
        trainer = L.Trainer(
            max_epochs=args.epochs,
            limit_val_batches=0,
            accelerator=args.accelerator,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        with torch.no_grad():
            images[name] = model.cpu().eval().reconstruct(test)
        numbers[name] = measure(images[name], test, args.background)
        print(f"{name:14s}" + "".join(f"  {key} {value:7.3f}" for key, value in numbers[name].items()))
    draw(test, images, numbers, out / "ssim_vs_mse.png")
    (out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    return numbers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with MNIST; without it, scikit-learn's digits enlarged to 32×32")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--examples", type=int, default=1800, help="how many images to train and test on")
    parser.add_argument("--background", type=float, default=0.0, help="grey value behind the digits, below 1")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--ssim-weight", type=float, default=50.0, help="weight of 1 − SSIM beside the squared error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--out", default="outputs/ssim_vs_mse", help="folder for the picture and the numbers")
    args = parser.parse_args(argv)
    if not 0 <= args.background < 1:
        parser.error(f"--background: expected a grey value from 0 to below 1, got {args.background}")
    return args


def load_data(args: argparse.Namespace) -> ae.TensorDataModule:
    """Images in [0, 1]: a fifth of them, at least one, for the test."""
    if args.root is None:
        source = ae.DigitsDataModule(val_fraction=0.0, test_fraction=0.2)
        x = torch.cat([x for loader in (source.train_dataloader(), source.test_dataloader()) for x, _ in loader])
        x = functional.interpolate(x, size=(32, 32), mode="bicubic").clamp(0, 1)
    else:
        source = ae.VisionDataModule("MNIST", root=args.root, val_fraction=0.0)
        x = torch.cat([x for x, _ in source.test_dataloader()])
    x = args.background + (1 - args.background) * x[: args.examples]
    size = max(1, len(x) // 5)
    return ae.TensorDataModule(x[size:], test=x[:size], val_fraction=0.0, batch_size=64, seed=args.seed)


def measure(x_hat: Tensor, x: Tensor, background: float = 0.0) -> dict[str, float]:
    """PSNR, SSIM, sharpness of edges, halo and drift."""
    slopes, ours = slope(x), slope(x_hat)
    steep = slopes >= slopes.quantile(0.9) if slopes.numel() < 2**24 else slopes >= 0.2
    near = functional.max_pool2d((slopes > 0.15 * (1 - background)).float(), 5, stride=1, padding=2) > 0
    flat = (x - background).abs() < 0.02
    return {
        "psnr": float(peak_signal_noise_ratio(x_hat, x, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(x_hat, x, data_range=1.0)),
        "sharpness": float(ours[steep].mean() / slopes[steep].mean()),
        "halo": float(x_hat[flat & near].mean() - x_hat[flat & ~near].mean()),
        "drift": float(x_hat[flat & ~near].mean() - background),
    }


def slope(x: Tensor) -> Tensor:
    """Length of Sobel's gradient, of the size of ``x``."""
    down, right = ae.ImageGradients("sobel")(functional.pad(x, (1, 1, 1, 1), mode="replicate"))
    return (down.square() + right.square()).sqrt()


def draw(x: Tensor, images: dict[str, Tensor], numbers: dict[str, dict[str, float]], path: Path) -> None:
    """A row of images for each loss, with a last column that shows errors around one of them."""
    columns = min(8, len(x))
    rows = {"input": x, **images}
    figure, axes = plt.subplots(
        len(rows), columns + 1, figsize=(1.1 * columns + 2.6, 1.25 * len(rows)), layout="constrained", squeeze=False
    )
    for line, (name, batch) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line[:-1], batch, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        error = line[-1].imshow((batch - x)[0, 0].numpy(), cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        for axis in line:
            axis.set(xticks=[], yticks=[])
        label = name
        if name in numbers:
            n = numbers[name]
            label = f"{name}\n{n['psnr']:.1f} dB, SSIM {n['ssim']:.3f}"
            label += f"\nsharpness {n['sharpness']:.2f}, halo {n['halo']:.3f}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    axes[0, -1].set_title("x̂ − x of the first", fontsize=8)
    figure.colorbar(error, ax=axes[:, -1], shrink=0.6)
    figure.suptitle("One network, three losses: held-out reconstructions")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
