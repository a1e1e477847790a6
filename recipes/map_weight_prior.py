r"""A Gaussian prior on the weights is ridge regression: MAP with its closed form beside it.

With noise :math:`x \mid W \sim N(\hat x, \sigma^2)` and prior :math:`W \sim N(0, \sigma_p^2)` the most probable
weights minimise

.. math:: \sum_i \|x_i - \hat x_i\|^2 + \lambda \|W\|^2, \qquad \lambda = \sigma^2 / \sigma_p^2,

and :class:`WeightPrior` adds the second term to a mean over mini-batches in the right proportion: the Trainer's data
say how many examples there are. A linear autoencoder whose encoder is frozen has a closed form to compare with. Here
the encoder reads the first ``k`` of the features, :math:`z`, and the decoder predicts all of them, so that its weights
are those of scikit-learn's ``Ridge(alpha=lambda)`` from :math:`z` to :math:`x`. The other features are
:math:`zW + \varepsilon` with :math:`W` drawn from the prior. Only the decoder is regularised in this comparison: the
norm of a frozen encoder is a constant. Biases have no prior, like Ridge's intercept. Shown are

* trained weights against Ridge's, for several λ and, at one λ, several batch sizes;
* the error on new examples, exact as their distribution is known: least on average at :math:`\sigma^2/\sigma_p^2`;
* with fewer examples than ``k``, λ → 0: among all weights that fit, those of least norm (the pseudo-inverse), where
  training without a prior ends at others, which depend on the start;
* the Hessian of the sum over the data, for all weights of a small model: the prior adds :math:`2\lambda I`.

Run ``python recipes/map_weight_prior.py``; ``--help`` lists the options.

Source: MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.448; Bishop 2006, sections 1.2.5 and 3.1.4.
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
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ae import LinearAutoencoder, TensorDataModule, WeightPrior

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class SGDRegression(LinearAutoencoder):
    """Mini-batches: momentum, and a learning rate that ends at zero so that the batches' noise dies out."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a cosine schedule over all steps."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FullBatchRegression(LinearAutoencoder):
    """The whole data set at once, for λ so small that SGD would take for ever."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """L-BFGS, which on a quadratic is conjugate gradients."""
        options = {"max_iter": 20, "history_size": 50, "tolerance_grad": 1e-12, "tolerance_change": 1e-16}
        return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe", **options)


def train(cls: type[LinearAutoencoder], x: Tensor, lam: float, args: argparse.Namespace, **fit) -> LinearAutoencoder:
    """Fit the decoder of ``cls`` to ``x`` ``(N, k + m)``; ``fit`` is for the data module and the Trainer."""
    L.seed_everything(args.seed, verbose=False)
    k, batch_size = args.inputs, fit.pop("batch_size")
    prior = WeightPrior(args.noise_variance, args.noise_variance / lam if lam else math.inf)
    model = cls(x.shape[1], k, tied=False, lr=args.lr, penalties={"prior": prior})
    with torch.no_grad():
        model.encoder.weight.copy_(torch.eye(k, x.shape[1]))
    model.encoder.requires_grad_(False)
    trainer = L.Trainer(
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **fit,
    )
    trainer.fit(model, TensorDataModule(x, batch_size=batch_size, val_fraction=0))
    return model.double()


def ridge(x: Tensor, k: int, lam: float) -> tuple[Tensor, Tensor]:
    """Closed form of the decoder: weight ``(k + m, k)`` and bias ``(k + m,)``."""
    fitted = Ridge(alpha=lam).fit(x[:, :k].numpy(), x.numpy())
    return torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)


def new_error(weight: Tensor, bias: Tensor, truth: Tensor, noise_variance: float) -> float:
    """Expected squared error per feature of new examples ``zW + ε``, ``z`` standard normal."""
    k = truth.shape[0]
    return float((weight[k:].T - truth).square().sum(0).mean() + bias[k:].square().mean()) + noise_variance


def relative(a: Tensor, b: Tensor) -> float:
    """Distance over the norm of the second."""
    return float((a - b).norm() / b.norm())


def draw_data(args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Examples ``(N, k + m)`` and the weights ``(k, m)`` behind them, both from the model that MAP assumes."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    z, truth = normal(args.examples, args.inputs), math.sqrt(args.prior_variance) * normal(args.inputs, args.outputs)
    return torch.cat([z, z @ truth + math.sqrt(args.noise_variance) * normal(args.examples, args.outputs)], 1), truth


class DataSetObjective(nn.Module):
    """The sum over examples of a model's objective."""

    def __init__(self, model: LinearAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """A number, ``Σ‖r‖² + λ‖W‖²``."""
        return self.model.objective(self.model.terms(x, self.model(x))).sum()


def hessian(x: Tensor, lam: float, seed: int) -> Tensor:
    """By autograd, over all weights of a small untied autoencoder at its random start."""
    torch.manual_seed(seed)
    penalties = {"prior": WeightPrior(lam, 1.0, num_examples=len(x))} if lam else {}
    total = DataSetObjective(LinearAutoencoder(x.shape[1], 2, tied=False, bias=False, penalties=penalties))
    shapes = {name: p.shape for name, p in total.named_parameters()}
    start = torch.cat([p.detach().flatten() for p in total.parameters()]).double()

    def of_weights(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return functional_call(total, weights, (x,))

    return torch.func.hessian(of_weights)(start)


def draw(
    path: Path, grid: Tensor, curve: Tensor, trained: dict, ridge_weight: Tensor, limit: dict, best: float
) -> None:
    """Error of new examples over λ, trained weights over Ridge's, distance to the pseudo-inverse over λ."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    left.semilogx(grid, curve.mean(1), "--", color="black", label=f"Ridge, mean of {curve.shape[1]} data sets")
    left.semilogx(grid, curve[:, 0], "--", color="C0", label="Ridge, one of them")
    lams, errors = zip(*((run["lam"], run["new_error"]) for run in trained.values()), strict=True)
    left.plot(lams, errors, "o", color="C0", label="trained on that one, mini-batches")
    left.axvline(best, color="grey", linestyle=":", label=f"σ²/σ_p² = {best:g}")
    left.set(title="The prior that made the data is the best", xlabel="λ")
    left.set_ylabel("expected squared error per new feature")
    at_best = [(name, run) for name, run in trained.items() if run["lam"] == best]
    for (name, run), size in zip(at_best, (9, 5, 2), strict=True):
        label = f"{name}: relative error {run['ridge_error']:.0e}"
        middle.plot(ridge_weight.flatten(), run["weight"].flatten(), "o", ms=size, mew=0, label=label)
    span = [float(ridge_weight.min()), float(ridge_weight.max())]
    middle.plot(span, span, "--", color="black", label="equal")
    middle.set(title=f"Weights at λ = {best:g}", xlabel="Ridge, closed form", ylabel="trained")
    right.loglog(limit["grid"], limit["ridge"], "--", color="black", label="Ridge, closed form")
    right.loglog(limit["lam"], limit["trained"], "o", color="C0", label="trained, full batch")
    right.axhline(limit["flat"], color="C3", label="trained without a prior (λ = 0)")
    right.set(title=f"Fewer examples ({limit['examples']}) than inputs: least norm", xlabel="λ")
    right.set_ylabel("relative distance to pseudo-inverse solution")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/map_weight_prior"), help="output folder")
    parser.add_argument("--examples", type=int, default=48, help="N; batch sizes are N/2, N/4, N/8")
    parser.add_argument("--inputs", type=int, default=32, help="k; N/3 examples should be fewer")
    parser.add_argument("--outputs", type=int, default=40, help="features to predict from the k")
    parser.add_argument("--noise-variance", type=float, default=2.0, help="sigma²")
    parser.add_argument("--prior-variance", type=float, default=0.5, help="sigma_p²")
    parser.add_argument("--steps", type=int, default=1000, help="of SGD, for each λ and batch size")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=15, help="of 20 L-BFGS iterations, for λ → 0")
    parser.add_argument("--draws", type=int, default=20, help="data sets for the mean error over λ")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|torch.jit)")  # Lightning's and torch's own use of torch
    torch.set_num_threads(1)  # matrices this small only lose time on several

    best, k, n = args.noise_variance / args.prior_variance, args.inputs, args.examples
    data = [draw_data(args, args.seed + i) for i in range(args.draws)]
    x, truth = data[0]
    numbers = {"lambda": best}

    # divisors of N: in a ragged epoch the examples of the last batch would count more
    runs = [(best, n // 2), (best, n // 4), (best, n // 8), *((best * f, n // 4) for f in (1 / 16, 1 / 4, 4, 16))]
    trained = {}
    print(f"{'λ':>8}{'batch':>7}{'error to Ridge':>16}{'new error':>11}")
    for lam, size in runs:
        model = train(SGDRegression, x.float(), lam, args, batch_size=size, max_epochs=-1, max_steps=args.steps)
        weight, bias = model.decoder.weight.detach(), model.decoder.layer.bias.detach()
        run = {"lam": lam, "weight": weight, "ridge_error": relative(weight, ridge(x, k, lam)[0])}
        run["new_error"] = new_error(weight, bias, truth, args.noise_variance)
        trained[f"batch {size}" if lam == best else f"λ = {lam:g}"] = run
        numbers |= {f"{key}_lambda_{lam:g}_batch_{size}": run[key] for key in ("ridge_error", "new_error")}
        print(f"{lam:8g}{size:7d}{run['ridge_error']:16.1e}{run['new_error']:11.3f}")
    numbers["batch_size_difference"] = relative(
        trained[f"batch {n // 2}"]["weight"], trained[f"batch {n // 8}"]["weight"]
    )

    grid = best * torch.logspace(-2, 2, 41)
    curve = torch.tensor(
        [[new_error(*ridge(x_i, k, float(lam)), w, args.noise_variance) for x_i, w in data] for lam in grid]
    )
    numbers["best_lambda_on_grid"] = float(grid[curve.mean(1).argmin()])

    few = x[: n // 3]
    centred = few - few.mean(0)
    pseudo_inverse = (torch.linalg.pinv(centred[:, :k]) @ centred).T
    lams = [1.0, 0.1, 0.01, 1e-3, 1e-4, 0.0]
    options = {"batch_size": len(few), "max_epochs": args.epochs, "precision": "64-true"}
    print(f"\nN = {len(few)} < k = {k}")
    print(f"{'λ':>8}{'to pseudo-inverse':>19}{'error to Ridge':>16}{'norm / least':>14}{'train error':>13}")
    distances = []
    for lam in lams:
        model = train(FullBatchRegression, few, lam, args, **options)
        weight = model.decoder.weight.detach()
        residual = float((few - model.reconstruct(few)).detach().square().mean())
        ratio, distance = float(weight.norm() / pseudo_inverse.norm()), relative(weight, pseudo_inverse)
        distances.append(distance)
        row = {"pinv_distance": distance, "norm_ratio": ratio, "train_error": residual}
        numbers |= {f"{key}_lambda_{lam:g}": value for key, value in row.items()}
        to_ridge = f"{relative(weight, ridge(few, k, lam)[0]):.1e}" if lam else "–"
        print(f"{lam:8g}{distance:19.1e}{to_ridge:>16}{ratio:14.4f}{residual:13.1e}")
    fine = torch.logspace(-4, 0, 17)
    by_ridge = [relative(ridge(few, k, float(lam))[0], pseudo_inverse) for lam in fine]
    limit = {"lam": lams[:-1], "trained": distances[:-1], "flat": distances[-1], "examples": len(few)}
    limit |= {"grid": fine, "ridge": by_ridge}

    small = x[:6, :4]
    growth = hessian(small, best, args.seed) - hessian(small, 0.0, args.seed)
    numbers["hessian_error"] = float((growth - 2 * best * torch.eye(len(growth))).abs().max())
    print(f"\nbest λ on the grid {numbers['best_lambda_on_grid']:.3g}, σ²/σ_p² = {best:g}")
    print(f"weights of batches {n // 2} and {n // 8} differ by {numbers['batch_size_difference']:.1e}")
    print(f"Hessian with the prior less without, less 2λI: at most {numbers['hessian_error']:.1e}")

    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "map_weight_prior.png", grid, curve, trained, ridge(x, k, best)[0], limit, best)
    return numbers


if __name__ == "__main__":
    main()
