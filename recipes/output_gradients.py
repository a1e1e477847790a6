r"""The gradient at the output: why a sigmoid wants a cross-entropy and not a squared error.

For each loss and output activation the derivative with respect to the pre-activation :math:`a`, by autograd through
the package's losses in double precision, beside its closed form:

.. math::
    \frac{\partial}{\partial a} (x - \varphi(a))^2 = 2 (\hat x - x)\, \varphi'(a), \qquad
    \frac{\partial}{\partial a}\, \text{Bernoulli, continuous Bernoulli, Poisson NLL} = \hat x - x, \qquad
    \text{Gaussian: } \frac{a - x}{\sigma^2}, \qquad \text{Laplace: } \frac{\operatorname{sgn}(a - x)}{b}.

With a sigmoid :math:`\varphi' = \hat x (1 - \hat x)`, so where the output is confidently wrong squared error has next
to no gradient: at :math:`x = 1, \hat x = 10^{-4}` the cross-entropy's is :math:`1 / (2 \hat x (1 - \hat x))`, about
5000 times, as large.

Then the same network learns the digits from such a start, its output biases set so that every pixel is about
:math:`10^{-4}`: once with ``SquaredError("sigmoid")``, once with ``BernoulliNLL``, and, to show that neither network
nor learning rate is to blame, with squared error from biases of zero. All are scored by mean squared error. The
optimizer is plain SGD with one learning rate, as Adam divides the gradient by its size and so hides the difference.

Run ``python recipes/output_gradients.py``; ``--help`` lists the options.

Source: Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning as L
import matplotlib
import torch
from torch import Tensor

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Pair(NamedTuple):
    """A loss, targets in its support, and ``∂L/∂a`` as a function of ``a`` and ``x``."""

    loss: ae.ReconstructionLoss
    targets: tuple[float, ...]
    closed_form: Callable[[Tensor, Tensor], Tensor]


REAL, UNIT, COUNTS = (-1.3, 0.3, 1.0, 2.0), (0.0, 0.3, 1.0), (0.0, 1.0, 7.0)
SCALE = 0.5  # of Gaussian and Laplace; the inverse dispersion of the negative binomial is 1
PAIRS = {
    "SquaredError identity": Pair(ae.SquaredError(), REAL, lambda a, x: 2 * (a - x)),
    "SquaredError relu": Pair(ae.SquaredError("relu"), REAL, lambda a, x: 2 * (a.clamp(min=0) - x) * (a > 0)),
    "SquaredError tanh": Pair(ae.SquaredError("tanh"), REAL, lambda a, x: 2 * (a.tanh() - x) / a.cosh() ** 2),
    "SquaredError sigmoid": Pair(
        ae.SquaredError("sigmoid"), UNIT, lambda a, x: 2 * (1 / (1 + (-a).exp()) - x) / (2 + 2 * a.cosh())
    ),
    "BernoulliNLL": Pair(ae.BernoulliNLL(), UNIT, lambda a, x: 1 / (1 + (-a).exp()) - x),
    "ContinuousBernoulliNLL": Pair(ae.ContinuousBernoulliNLL(), UNIT, lambda a, x: 1 / (1 - (-a).exp()) - 1 / a - x),
    "GaussianNLL": Pair(ae.GaussianNLL(SCALE), REAL, lambda a, x: (a - x) / SCALE**2),
    "LaplaceNLL": Pair(ae.LaplaceNLL(SCALE), REAL, lambda a, x: (a - x).sign() / SCALE),
    "PoissonNLL": Pair(ae.PoissonNLL(), COUNTS, lambda a, x: a.exp() - x),
    "NegativeBinomialNLL": Pair(ae.NegativeBinomialNLL(), COUNTS, lambda a, x: (a.exp() - x) / (1 + a.exp())),
}


def gradient(loss: ae.ReconstructionLoss, a: Tensor, x: Tensor) -> Tensor:
    """``∂L/∂a`` by autograd, for vectors of pre-activations and targets."""
    a = a.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(a[:, None], x[:, None]).sum(), a)
    return result


class MLPWithSGD(ae.MLPAutoencoder):
    """The package's perceptrons with plain SGD."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """No momentum, no schedule, nothing that rescales a gradient."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Curve(L.Callback):
    """Mean squared error per pixel on the validation digits after each validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.mse: list[float] = []
        self.fvu: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what the model logged."""
        self.steps.append(trainer.global_step)
        self.mse.append(float(trainer.callback_metrics["val/mse"]))
        self.fvu.append(float(trainer.callback_metrics["val/fvu"]))


def learn(loss: ae.ReconstructionLoss, output: float, args: argparse.Namespace) -> Curve:
    """Train from output biases at which every pixel is about ``output``."""
    L.seed_everything(args.seed, verbose=False)
    data = ae.DigitsDataModule(batch_size=64, seed=args.seed)
    model = MLPWithSGD(data.in_shape, 16, hidden=(64,), loss=loss, lr=args.lr)
    torch.nn.init.constant_(model.decoder.layers[-1].bias, math.log(output / (1 - output)))
    curve = Curve()
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[curve],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    return curve


def draw(path: Path, wrong: float, curves: dict[str, Curve]) -> None:
    """Gradients at ``x = 1`` over the pre-activation, and learning curves."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    a = torch.linspace(-12, 6, 1000, dtype=torch.float64)
    one = torch.ones_like(a)
    bounded = ["SquaredError sigmoid", "SquaredError tanh", "BernoulliNLL", "ContinuousBernoulliNLL"]
    unbounded = ["SquaredError identity", "SquaredError relu", "GaussianNLL", "LaplaceNLL", "PoissonNLL"]
    for axes, names in ((left, bounded), (middle, [*unbounded, "NegativeBinomialNLL"])):
        for name in names:
            loss, _, closed_form = PAIRS[name]
            label = f"{name} (scale {SCALE:g})" if name in ("GaussianNLL", "LaplaceNLL") else name
            axes.semilogy(a, gradient(loss, a, one).abs(), lw=3, alpha=0.6, label=label)
            axes.semilogy(a, closed_form(a, one).abs(), "k--", lw=0.8)
        axes.plot([], [], "k--", lw=0.8, label="closed forms")
        axes.set(xlabel="pre-activation a", ylabel="|∂L/∂a| at x = 1 (units of the loss)")
    left.axvline(math.log(wrong / (1 - wrong)), color="grey", ls=":", label=f"sigmoid(a) = {wrong:g}")
    left.set(title="Bounded outputs", ylim=(1e-6, 1e4))
    middle.set(title="Unbounded outputs (relu: none below 0)", ylim=(1e-3, 1e4))
    for name, curve in curves.items():
        right.plot(curve.steps, curve.mse, label=name)
    right.set(title="Digits, SGD with the same learning rate", xlabel="optimizer steps")
    right.set(ylabel="validation mean squared error per pixel (ink²)", ylim=(0, None))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper right" if axes is left else "best")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Differentiate, train, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/output_gradients"), help="output folder")
    parser.add_argument("--epochs", type=int, default=60, help="of about 20 steps")
    parser.add_argument("--lr", type=float, default=0.01, help="of SGD, for losses that are sums over 64 pixels")
    parser.add_argument("--wrong", type=float, default=1e-4, help="output of every pixel at the bad start")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch's pytree
    torch.set_num_threads(1)  # matrices this small only lose time on several

    numbers = {}
    print(f"{'∂L/∂a, autograd less closed form':34}{'largest':>10}")
    for name, (loss, targets, closed_form) in PAIRS.items():
        # an even number of points, so that 0 (where relu has a kink and 1/a a pole) is not among them
        a, x = torch.cartesian_prod(torch.linspace(-10, 10, 400).double(), torch.tensor(targets).double()).T
        error = (gradient(loss, a, x) - closed_form(a, x)).abs().max()
        numbers[f"error_{name.replace(' ', '_')}"] = float(error)
        print(f"{name:34}{float(error):10.1e}")

    wrong, one = args.wrong, torch.ones(1, dtype=torch.float64)
    a = torch.tensor([wrong], dtype=torch.float64).logit()
    ratio = gradient(ae.BernoulliNLL(), a, one) / gradient(ae.SquaredError("sigmoid"), a, one)
    numbers |= {"ratio": float(ratio), "ratio_closed_form": 1 / (2 * wrong * (1 - wrong))}
    print(f"\nat x = 1, x̂ = {wrong:g}: Bernoulli / squared error = {numbers['ratio']:.2f}", end="")
    print(f", closed form {numbers['ratio_closed_form']:.2f}")

    runs = {
        f"SquaredError sigmoid, from outputs {wrong:g}": ("squared_error", ae.SquaredError("sigmoid"), wrong),
        f"BernoulliNLL, from outputs {wrong:g}": ("bernoulli", ae.BernoulliNLL(), wrong),
        "SquaredError sigmoid, from outputs 0.5": ("squared_error_from_half", ae.SquaredError("sigmoid"), 0.5),
    }
    curves = {}
    print(f"\n{'validation error per pixel':42}{'first mse':>10}{'last mse':>10}{'last fvu':>10}")
    for label, (key, loss, output) in runs.items():
        curves[label] = curve = learn(loss, output, args)
        numbers |= {f"{key}_first_mse": curve.mse[0], f"{key}_mse": curve.mse[-1], f"{key}_fvu": curve.fvu[-1]}
        print(f"{label:42}{curve.mse[0]:10.4f}{curve.mse[-1]:10.4f}{curve.fvu[-1]:10.3f}")

    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "output_gradients.png", wrong, curves)
    return numbers


if __name__ == "__main__":
    main()
