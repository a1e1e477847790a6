r"""A linear autoencoder learns PCA: the same subspace, the same error, and what tying the weights buys.

With squared error the optimum of :math:`\hat x = D W x` on centred data spans the first ``k`` eigenvectors of the
covariance :math:`\Sigma = \frac1N \sum_i x_i x_i^\top`, and the loss there is what they leave out,

.. math:: \min \tfrac1N \sum_i \|x_i - \hat x_i\|^2 = \sum_{j > k} \lambda_j(\Sigma).

Three questions, each answered with numbers:

* Training, on the digits: the largest principal angle to scikit-learn's PCA and the loss, iteration by iteration.
* The optimum: how far it is from the closed form, and whether the rows of ``W`` are orthonormal. Tied (``D = W^T``,
  ``dk`` weights) they are; untied (``2dk``) any invertible mix of them is as good.
* Few examples, on data whose subspace is known: the error on held-out examples. With fewer examples than features,
  nothing in the loss reaches the part of an untied ``W`` that is orthogonal to all of them: it stays where it was
  initialised and reads noise. Tied, the decoder's error pulls it to zero, and the optimum is PCA's.

The problem is small and smooth, so training is full-batch L-BFGS in double precision; a subclass of three lines
chooses it. Run ``python recipes/linear_vs_pca.py``; ``--help`` lists the options.

Source: Baldi & Hornik 1989, https://doi.org/10.1016/0893-6080(89)90014-2.
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
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from lightning_ae import LinearAutoencoder, TensorDataModule, linear_gaussian, subspace_angles

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ITERATIONS = 5  # of L-BFGS in one optimizer step, which is one epoch as the batch is the data set


class FullBatchLinearAutoencoder(LinearAutoencoder):
    """The package's linear autoencoder with L-BFGS instead of AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """L-BFGS with a line search, without early stopping worth the name."""
        options = {"history_size": 50, "tolerance_grad": 1e-10, "tolerance_change": 1e-14}
        return torch.optim.LBFGS(self.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe", **options)


class Recorder(L.Callback):
    """Keeps the angle to a reference subspace ``(d, k)`` and the loss after each epoch."""

    def __init__(self, x: Tensor, reference: Tensor) -> None:
        self.x, self.reference = x, reference
        self.angles: list[float] = []
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure on the training data."""
        self.angles.append(float(subspace_angles(pl_module.components(), self.reference)[0]))
        self.losses.append(mean_squared_residual(pl_module, self.x))


def mean_squared_residual(model: L.LightningModule, x: Tensor) -> float:
    """Mean over examples of the squared residual, the model's own loss."""
    with torch.no_grad():
        return float(model.loss(model(x).params, x).mean())


def train(x: Tensor, latent_dim: int, tied: bool, epochs: int, seed: int, *callbacks: L.Callback) -> LinearAutoencoder:
    """Fit to centred data ``(N, d)``, all in one batch."""
    L.seed_everything(seed, verbose=False)
    model = FullBatchLinearAutoencoder(x.shape[1], latent_dim, tied=tied, bias=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="64-true",
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, TensorDataModule(x, batch_size=len(x), val_fraction=0))
    return model


def held_out_errors(sizes: list[int], args: argparse.Namespace) -> dict[str, Tensor]:
    """Squared error per held-out example for each model, ``(repeats, len(sizes))``."""
    d, num_test = 64, 2000
    errors = {name: torch.zeros(args.repeats, len(sizes)) for name in ("PCA", "tied", "untied")}
    for repeat in range(args.repeats):
        seed = args.seed + repeat
        data = linear_gaussian(max(sizes) + num_test, d, args.latent_dim, noise=args.noise, seed=seed).x.double()
        for column, size in enumerate(sizes):
            mean = data[:size].mean(0)
            x, test = data[:size] - mean, data[-num_test:] - mean
            components = torch.from_numpy(PCA(args.latent_dim).fit(x.numpy()).components_)
            errors["PCA"][repeat, column] = (test - test @ components.T @ components).square().sum(1).mean()
            for name in ("tied", "untied"):
                model = train(x, args.latent_dim, name == "tied", args.small_epochs, seed)
                errors[name][repeat, column] = mean_squared_residual(model, test)
    return errors


def draw(path: Path, runs: dict[str, Recorder], floor: float, sizes: list[int], errors: dict, args) -> None:
    """Angle and loss over training, and held-out error over the number of examples."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, run in runs.items():
        iterations = [ITERATIONS * (epoch + 1) for epoch in range(len(run.angles))]
        left.loglog(iterations, run.angles, label=name)
        middle.semilogx(iterations, run.losses, label=name)
    left.set(title="Digits: angle to PCA's subspace", ylabel="largest principal angle (radians)")
    middle.axhline(floor, color="grey", linestyle="--", label=f"sum of discarded eigenvalues, {floor:.3f}")
    middle.set(title="Digits: training loss", ylabel="squared error per example (ink² of 64 pixels)")
    for axes in (left, middle):
        axes.set_xlabel("L-BFGS iterations (full batch)")
    for name, style, colour in (("tied", "o-", "C0"), ("untied", "s-", "C1"), ("PCA", "x:", "black")):
        right.plot(sizes, errors[name].mean(0), style, label=name, color=colour)
        right.fill_between(sizes, errors[name].amin(0), errors[name].amax(0), alpha=0.2, color=colour, lw=0)
    best = (64 - args.latent_dim) * args.noise**2
    right.axhline(best, color="grey", linestyle="--", label=f"(d − k)σ² = {best:g}, the true subspace")
    right.axvline(64, color="grey", lw=0.8, label="N = d = 64")
    right.set(xscale="log", title=f"Known subspace: held-out error of {args.repeats} data sets")
    right.set(xlabel="training examples N", ylabel="squared error per held-out example (mean and range)")
    right.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/linear_vs_pca"), help="output folder")
    parser.add_argument("--latent-dim", type=int, default=8, help="k")
    parser.add_argument("--epochs", type=int, default=100, help=f"of {ITERATIONS} L-BFGS iterations, on the digits")
    parser.add_argument("--small-epochs", type=int, default=30, help="the same, for each run of the third panel")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 512, 1024], help="values of N")
    parser.add_argument("--repeats", type=int, default=3, help="data sets for each N")
    parser.add_argument("--noise", type=float, default=0.5, help="sigma of the linear Gaussian data")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch's pytree
    torch.set_num_threads(1)  # matrices this small only lose time on several

    x = torch.from_numpy(load_digits().data) / 16
    x = x - x.mean(0)
    d, k = x.shape[1], args.latent_dim
    components = torch.from_numpy(PCA(k).fit(x.numpy()).components_)
    floor = float(torch.linalg.eigvalsh(x.T @ x / len(x))[: d - k].sum())
    numbers = {"discarded_eigenvalues": floor}
    runs = {}
    print(f"digits, d = {d}, k = {k}: the discarded eigenvalues sum to {floor:.6f}")
    print(f"{'':8}{'weights':>9}{'angle (rad)':>14}{'excess loss':>14}{'max |WWᵀ − I|':>16}")
    for name in ("tied", "untied"):
        runs[name] = run = Recorder(x, components.T)
        model = train(x, k, name == "tied", args.epochs, args.seed, run)
        w = model.encoder.weight.detach()
        row = {
            "weights": sum(p.numel() for p in model.parameters()),
            "first_angle": run.angles[0],
            "angle": run.angles[-1],
            "excess_loss": run.losses[-1] / floor - 1,
            "orthonormality_error": float((w @ w.T - torch.eye(k)).abs().max()),
        }
        numbers |= {f"{name}_{key}": value for key, value in row.items()}
        weights, _, angle, excess, orthonormality = row.values()
        print(f"{name:8}{weights:9d}{angle:14.1e}{excess:14.1e}{orthonormality:16.1e}")

    sizes = sorted(args.sizes)
    errors = held_out_errors(sizes, args)
    print(f"\nheld-out squared error by N, sigma = {args.noise:g} (best possible {(d - k) * args.noise**2:g})")
    print(f"{'N':>8}" + "".join(f"{name:>10}" for name in errors))
    for column, size in enumerate(sizes):
        means = {name: float(error[:, column].mean()) for name, error in errors.items()}
        numbers |= {f"held_out_{name}_{size}": value for name, value in means.items()}
        print(f"{size:8d}" + "".join(f"{value:10.3f}" for value in means.values()))

    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "linear_vs_pca.png", runs, floor, sizes, errors, args)
    return numbers


if __name__ == "__main__":
    main()
