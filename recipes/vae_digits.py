r"""A VAE of handwritten digits: samples, traversals, a path between two digits, and what β does to the latents.

:class:`VariationalAutoencoder` with perceptrons and a Gaussian likelihood whose :math:`\sigma` is learned (σ-VAE) is
trained once for each :math:`\beta`. On test images are shown

* for :math:`\beta = 1`: images decoded from the prior, the latents that carry most nats moved one at a time, and the
  straight line between the latents of two digits;
* active units (latents whose posterior mean varies, Burda et al.) against :math:`\beta`: they collapse onto the prior
  one after another;
* the rate (KL) against the distortion (:math:`-\ln p(x \mid z)`), both in nats, so that -ELBO is their sum: lines of
  the same bound have slope -1, and the run trained on the bound itself, :math:`\beta = 1`, should touch the lowest.

Run ``python recipes/vae_digits.py`` (about a minute on two cores, scikit-learn's 8×8 digits), or with ``--root folder
--epochs 10 --hidden 400 --latents 32`` for MNIST in ``folder``; ``--help`` lists the options.

Source: Kingma & Welling 2014, https://arxiv.org/abs/1312.6114; Higgins et al. 2017,
https://openreview.net/forum?id=Sy2fzU9gl; Alemi et al. 2018, https://arxiv.org/abs/1711.00464 (rate and distortion);
Rybkin et al. 2021, https://arxiv.org/abs/2006.13202.
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
from lightning_ae.metrics import active_units

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def load_images(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Training and test images ``(N, 1, H, W)``, grey levels in [0, 1], and the test images' digits."""
    data = ae.DigitsDataModule(seed=args.seed) if args.root is None else ae.VisionDataModule("MNIST", root=args.root)
    splits = data.splits()
    images = [torch.as_tensor(splits[name][0]) for name in ("train", "test")]
    train, test = (x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in images)
    return train, test, torch.as_tensor(splits["test"][1])


def train(x: Tensor, beta: float, args: argparse.Namespace) -> ae.VariationalAutoencoder:
    """Fit a VAE to images."""
    L.seed_everything(args.seed, verbose=False)
    pair = ae.mlp_pair(x.shape[1:], args.latents, (args.hidden, args.hidden), "silu", h_dim=2 * args.latents)
    loss = ae.GaussianNLL(0.2, learn_scale=True)
    model = ae.VariationalAutoencoder(*pair, loss, code=ae.GaussianCode(beta), lr=args.lr)
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
def evaluate(model: ae.VariationalAutoencoder, x: Tensor, args: argparse.Namespace) -> tuple[dict[str, float], Tensor]:
    """Figures on test images, nats of an image, and the nats of each latent."""
    terms = [model.terms(x, model(x)) for _ in range(10)]
    distortion = float(torch.stack([term["reconstruction"] for term in terms]).mean())
    rate = float(terms[0]["kl"].mean())
    statistics = model.code.statistics(model.encoder(x))
    figures = {
        "distortion": distortion,
        "rate": rate,
        "bound": distortion + rate,
        "nll": -float(model.log_likelihood(x[:1000], args.samples).mean()),
        "active_units": int(active_units(statistics["mean"].var(0))),
        "scale": float(model.loss.scale),
    }
    return figures, statistics["kl"].mean(0)


def tile(images: Tensor, gap: float = 0.12) -> Tensor:
    """Images ``(rows, columns, 1, H, W)`` side by side."""
    padded = torch.nn.functional.pad(images[:, :, 0].clamp(0, 1), (1, 0, 1, 0), value=gap)
    return torch.cat([torch.cat(list(row), 1) for row in padded], 0)[1:, 1:]


def pick(model: ae.VariationalAutoencoder, x: Tensor, y: Tensor, digits: tuple[int, ...]) -> Tensor:
    """Of each digit the test image that the model reconstructs best."""
    error = (model.reconstruct(x) - x).square().flatten(1).sum(1)
    return torch.stack([x[torch.where(y == digit, error, math.inf).argmin()] for digit in digits])


@torch.no_grad()
def pictures(model: ae.VariationalAutoencoder, x: Tensor, y: Tensor, rates: Tensor) -> dict[str, Tensor]:
    """Pictures of one model by title."""
    torch.manual_seed(0)
    reach = torch.linspace(-2.5, 2.5, 9)
    order = rates.argsort(descending=True)[:8]
    (middle,) = pick(model, x, y, (3,))
    traversals = torch.cat([model.traverse(middle[None], int(j), reach) for j in order])
    first, last = (pick(model, x, y, digits) for digits in ((0, 1, 2, 3, 4, 5, 7, 8), (6, 7, 3, 5, 9, 0, 4, 1)))
    return {
        "decoded from the prior": tile(model.sample(72).unflatten(0, (8, 9))),
        f"one latent at a time, −2.5 to 2.5: {rates[order[0]]:.1f} … {rates[order[-1]]:.1f} nats": tile(traversals),
        "on the line between two digits": tile(model.interpolate(first, last, 9)),
    }


def draw(path: Path, results: dict[float, dict[str, float]], shown: dict[str, Tensor], latents: int) -> None:
    """Three pictures, and two curves."""
    figure, axes = plt.subplot_mosaic(
        [["a", "a", "b", "b", "c", "c"], ["u", "u", "u", "r", "r", "r"]], figsize=(13.5, 9.6), layout="constrained"
    )
    for name, (title, picture) in zip("abc", shown.items(), strict=True):
        axes[name].imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes[name].set_title(title)
        axes[name].axis("off")
    betas = sorted(results)
    column = {key: [results[beta][key] for beta in betas] for key in ("active_units", "rate", "distortion", "bound")}
    units = axes["u"]
    units.plot(betas, column["active_units"], "o-", color="tab:blue", label=f"active units, of {latents}")
    units.plot(betas, column["rate"], "s--", color="tab:orange", label="rate (KL), nats")
    units.set(xscale="log", xlabel="β", title="Latents collapse one after another", ylim=(0, None))
    units.set_xticks(betas, [f"{beta:g}" for beta in betas])
    units.minorticks_off()
    units.grid(alpha=0.3)
    units.legend()
    plane = axes["r"]
    plane.plot(column["rate"], column["distortion"], "o-", color="tab:green")
    plane.margins(0.12)
    low, high = plane.get_xlim()
    high += 0.12 * (high - low)
    bottom, top = plane.get_ylim()
    for level in sorted({round(value) for value in column["bound"]}):
        plane.plot([low, high], [level - low, level - high], ":", color="grey", linewidth=0.8, zorder=0)
    for i, beta in enumerate(betas):
        point = (results[beta]["rate"], results[beta]["distortion"])
        label = f"β = {beta:g}: {results[beta]['bound']:.1f}".replace("-", "−")
        # over-fitted runs lie flat, and their labels would overlap
        below = beta < 1 and i % 2 == 0
        plane.annotate(label, point, textcoords="offset points", xytext=(7, -14 if below else 6), fontsize=9)
    plane.set(xlim=(low, high), ylim=(bottom, top), xlabel="rate: KL, nats of a test image")
    plane.set(ylabel="distortion: −ln p(x|z), nats", title="Rate and distortion, with −ELBO, the same on dotted lines")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/vae_digits"), help="output folder")
    parser.add_argument("--root", type=Path, default=None, help="folder with torchvision's MNIST, instead of digits")
    parser.add_argument(
        "--betas", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4, 6, 9], help="1 is always among them"
    )
    parser.add_argument("--latents", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=128, help="units of each of two hidden layers")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=200, help="importance samples for the log-likelihood")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|torch.jit)")  # Lightning's and torch's own use of torch
    torch.set_num_threads(1)  # matrices this small only lose time on several

    train_x, test_x, test_y = load_images(args)
    numbers: dict[str, float] = {"latents": args.latents}
    results: dict[float, dict[str, float]] = {}
    shown: dict[str, Tensor] = {}
    print(f"{'β':>5} {'active':>7} {'rate':>7} {'distortion':>11} {'-ELBO':>8} {'-ln p(x)':>9} {'σ':>6}")
    for beta in sorted({1.0, *args.betas}):
        model = train(train_x, beta, args)
        results[beta], rates = evaluate(model, test_x, args)
        numbers |= {f"beta_{beta:g}_{key}": value for key, value in results[beta].items()}
        print(
            f"{beta:5g} {results[beta]['active_units']:7d} {results[beta]['rate']:7.2f} "
            f"{results[beta]['distortion']:11.2f} {results[beta]['bound']:8.2f} {results[beta]['nll']:9.2f} "
            f"{results[beta]['scale']:6.3f}"
        )
        if beta == 1:
            shown = pictures(model, test_x, test_y, rates)
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "vae_digits.png", results, shown, args.latents)
    return numbers


if __name__ == "__main__":
    main()
