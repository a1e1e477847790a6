r"""How a saturated network looks to the monitor: squared error through a sigmoid stalls, Bernoulli goes on.

The same network learns the digits from output biases at which every pixel is confidently wrong, about
:math:`10^{-4}`: once with ``SquaredError("sigmoid")``, whose gradient at the output is
:math:`2(\hat x - x)\hat x(1 - \hat x)`, and once with ``BernoulliNLL``, whose gradient is :math:`\hat x - x`; and with
squared error from outputs of 0.5, to show that neither network nor learning rate is to blame. A fourth run has nothing
wrong at its output but is a stack of sigmoids, each of which lets through at most a quarter of the gradient; a fifth is
the same stack of tanh.

All is read from :class:`GradientSaturationMonitor`, attached to the Trainer as to any other: the gradient at the output
over the error there (1 for Bernoulli, :math:`2\hat x(1 - \hat x)` for squared error), the share of elements without a
slope and the share of the gradient that passes, for each activation. The optimizer is plain SGD with one learning rate,
as Adam divides the gradient by its size and so hides what happens.

    python recipes/saturation.py                        # scikit-learn's digits, half a minute
    python recipes/saturation.py --root ~/data          # MNIST from a folder of yours, five minutes

Source: Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import matplotlib
import torch
from lightning.pytorch.loggers.logger import DummyLogger

import lightning_ae as ae
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LINES = {"encoder": ":", "decoder": "--", "loss": "-"}


class Run(NamedTuple):
    """What is trained: a label, a loss, the output of every pixel at the start, and the hidden layers."""

    label: str
    loss: ae.ReconstructionLoss
    output: float
    hidden: tuple[int, ...]
    activation: str


class MLPWithSGD(ae.MLPAutoencoder):
    """The package's perceptrons with plain SGD."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """No momentum, no schedule, nothing that rescales a gradient."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Curves(DummyLogger):
    """A logger that keeps everything in memory, as curves over the optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, tuple[list[int], list[float]]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        for name, value in metrics.items():
            steps, values = self.of.setdefault(name, ([], []))
            steps.append(step or 0)
            values.append(float(value))

    def under(self, ending: str) -> dict[str, tuple[list[int], list[float]]]:
        """The monitor's curves whose names end like this, by the site in between."""
        start = "saturation/"
        return {
            name.removeprefix(start).removesuffix(ending): curve
            for name, curve in self.of.items()
            if name.startswith(start) and name.endswith(ending) and name.count("/") == 2
        }


def learn(run: Run, args: argparse.Namespace) -> Curves:
    """Train with a monitor that looks at every tenth step."""
    L.seed_everything(args.seed, verbose=False)
    data: Any
    if args.root is not None:
        data = ae.VisionDataModule("MNIST", root=args.root, batch_size=64, seed=args.seed)
    else:
        data = ae.DigitsDataModule(batch_size=64, seed=args.seed)
    model = MLPWithSGD(
        data.in_shape,
        16,
        hidden=run.hidden,
        activation=run.activation,
        loss=run.loss,
        lr=args.lr / math.prod(data.in_shape),  # losses are sums over the pixels
    )
    torch.nn.init.constant_(model.decoder.layers[-1].bias, math.log(run.output / (1 - run.output)))
    curves = Curves()
    # a short horizon, so that the curves follow the training
    monitor = GradientSaturationMonitor(every_n_steps=args.every, horizon=1)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        limit_train_batches=20,
        limit_val_batches=5,
        accelerator=args.accelerator,
        devices=1,
        callbacks=[monitor],
        logger=curves,
        log_every_n_steps=args.every,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    return curves


def draw(path: Path, runs: dict[str, Run], curves: dict[str, Curves], wrong: float) -> None:
    """Loss, output and activations over the steps."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    (error, ratio, flat), (passed, stack, norms) = axes
    colors = dict(zip(runs, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for key in ("squared_error", "bernoulli", "squared_error_from_half"):
        of, style = curves[key].of, {"color": colors[key], "label": runs[key].label}
        error.plot(*of["val/mse"], **style)
        ratio.semilogy(*of["saturation/output_ratio"], **style)
        for what, axis in (("saturated_fraction", flat), ("transmission", passed)):
            for site, curve in curves[key].under(f"/{what}").items():
                axis.plot(*curve, LINES[site.partition(".")[0]], color=colors[key], label=f"{site}: {runs[key].label}")
    for key, line in (("stack_of_sigmoids", "-"), ("stack_of_tanh", "--")):
        found = curves[key].under("/transmission")
        for i, (site, curve) in enumerate(found.items()):
            shade = plt.get_cmap("viridis")(i / max(1, len(found) - 1))
            stack.semilogy(*curve, line, color=shade, label=f"{site}: {runs[key].activation}")
        layers = curves[key].under("/gradient_norm")
        for place, marker in ((0, "o"), (-1, "s")):
            norm = [values[place] for _, values in layers.values()]
            when = "first" if place == 0 else "last"
            norms.semilogy(range(len(norm)), norm, line, marker=marker, label=f"{runs[key].activation}, {when} steps")
    norms.set_xticks(range(len(layers)), [name.replace(".layers", "") for name in layers], rotation=60, ha="right")
    ratio.axhline(2 * wrong * (1 - wrong), color="grey", ls=":", label=f"2 x̂ (1 − x̂) at x̂ = {wrong:g}")
    stack.axhline(0.25, color="grey", ls=":", label="largest slope of a sigmoid")
    passed.set_yscale("log")
    error.set(title="SGD with the same learning rate", ylabel="validation mean squared error per pixel (ink²)")
    ratio.set(title="Gradient at the output over error there", ylabel="output_ratio")
    flat.set(title="Share of elements with a slope below 0.01", ylabel="saturated_fraction")
    passed.set(title="Share of the gradient that passes", ylabel="transmission")
    stack.set(title="The same in stacks", ylabel="transmission")
    norms.set(title="Gradient in stacks, from the input to the output", ylabel="gradient_norm of the layer")
    for axis in (error, ratio, flat, passed, stack):
        axis.set(xlabel="optimizer steps")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    stack.legend(fontsize="xx-small", ncols=2, loc="lower right", bbox_to_anchor=(1, 0.22))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, read, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with MNIST; scikit-learn's digits without it")
    parser.add_argument("--epochs", type=int, default=40, help="of 20 steps")
    parser.add_argument("--every", type=int, default=10, help="steps between two looks")
    parser.add_argument("--lr", type=float, default=0.64, help="of SGD, for the loss per pixel")
    parser.add_argument("--wrong", type=float, default=1e-4, help="output of every pixel at the bad start")
    parser.add_argument("--depth", type=int, default=3, help="hidden layers on each side of the stacks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu", help="as for lightning.Trainer; the digits are small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/saturation"), help="output folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch's pytree
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(args.threads)

    one, deep = (64,), (64,) * args.depth
    start = f"from outputs {args.wrong:g}"
    runs = {
        "squared_error": Run(f"squared error, {start}", ae.SquaredError("sigmoid"), args.wrong, one, "relu"),
        "bernoulli": Run(f"Bernoulli, {start}", ae.BernoulliNLL(), args.wrong, one, "relu"),
        "squared_error_from_half": Run("squared error, from 0.5", ae.SquaredError("sigmoid"), 0.5, one, "relu"),
        "stack_of_sigmoids": Run("Bernoulli, sigmoids", ae.BernoulliNLL(), 0.5, deep, "sigmoid"),
        "stack_of_tanh": Run("Bernoulli, tanh", ae.BernoulliNLL(), 0.5, deep, "tanh"),
    }
    numbers: dict[str, float] = {}
    curves: dict[str, Curves] = {}
    head = ("val mse", "last", "output ratio", "last", "starved", "last", "lowest transm.", "last")
    print(f"{'':34}" + "".join(f"{name:>15}" for name in head))
    for key, run in runs.items():
        curves[key] = learn(run, args)
        row = []
        for short, name in (
            ("loss", "train/loss"),
            ("mse", "val/mse"),
            ("output_ratio", "saturation/output_ratio"),
            ("starved_fraction", "saturation/starved_fraction"),
            ("lowest_transmission", "saturation/lowest_transmission"),
        ):
            values = curves[key].of[name][1]
            numbers |= {f"{key}_first_{short}": values[0], f"{key}_{short}": values[-1]}
            row += [values[0], values[-1]] if short != "loss" else []
        for what in ("saturated_fraction", "transmission", "gradient_norm"):
            for place, (_, values) in curves[key].under(f"/{what}").items():
                numbers |= {f"{key}_first_{what}_{place}": values[0], f"{key}_{what}_{place}": values[-1]}
        print(f"{run.label:34}" + "".join(f"{value:15.4g}" for value in row))

    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "saturation.png", runs, curves, args.wrong)
    return numbers


if __name__ == "__main__":
    main()
