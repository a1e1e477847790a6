r"""Units that die, and what helps: the same ReLU autoencoder as it is, with three cures from the start, and revived.

Hidden biases start below zero and the learning rate is high, as after a few bad steps, so many ReLUs never fire and
get no gradient: they are dead for the rest of training, and the network is smaller than it looks. Side by side, on
held-out digits:

* as is: weights as torch draws them, biases at −0.2, a high learning rate;
* He: weights drawn with variance 2/n and biases 0;
* positive bias: He, and biases 0.1;
* LeakyReLU: as is, but with a slope below zero, so that no unit can die;
* revived: as is, with ``DeadUnitReviver`` after every epoch.

With the defaults about half of the units are dead as it is, nearly none revived, and revived has the lowest error. A
dead unit need not cost much, though: as is, a wide layer is left with enough units to do better than He on so small a
set. With `--bias -0.3` it is not.

``DeadReLUMonitor`` gives the fraction of dead units over the steps, by site, and how often each unit fires.

    python recipes/dead_relu.py                        # digits; less than a minute on two cores
    python recipes/dead_relu.py --bias -0.3            # a whole layer dies, and with it the model
    python recipes/dead_relu.py --root ../shared/data  # MNIST from a local folder
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import lightning as L
import matplotlib
import torch
from torch import Tensor, nn

import lightning_ae as ae
from lightning_ae.callbacks import DeadReLUMonitor
from lightning_ae.diagnostics.remedies.revival.revive import DeadUnitReviver

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLES = ("-", "--", ":", "-.")
NAMES = ("as is", "He", "positive bias", "LeakyReLU", "revived")


class Curves(L.Callback):
    """Dead fractions, in all and by site, and the held-out loss, after each epoch."""

    def __init__(self, monitor: DeadReLUMonitor) -> None:
        self.monitor = monitor
        self.steps: list[int] = []
        self.dead: dict[str, list[float]] = {}
        self.loss: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the numbers down."""
        if trainer.sanity_checking:
            return
        self.steps.append(trainer.global_step)
        self.loss.append(float(trainer.callback_metrics["val/loss"]))
        units = {site: len(f) for site, f in self.monitor.firing_frequency().items()}
        dead = {site: len(index) for site, index in self.monitor.dead_units().items()}
        for site, number in units.items():
            self.dead.setdefault(site, []).append(dead[site] / number)
        self.dead.setdefault("all", []).append(sum(dead.values()) / max(1, sum(units.values())))


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train the five, measure, draw; returns the numbers by name."""
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    numbers, curves = {}, {}
    for name in NAMES:
        L.seed_everything(args.seed, verbose=False)
        data = load_data(args)
        model = build(name, data.in_shape, args)
        reviver = DeadUnitReviver(seed=args.seed)
        monitor = DeadReLUMonitor(every_n_steps=1, horizon=args.horizon or (1000 if args.root is None else 10_000))
        curves[name] = Curves(monitor)
        trainer = L.Trainer(
            max_epochs=args.epochs,
            accelerator=args.accelerator,
            devices=1,
            callbacks=[monitor, curves[name], *([reviver] if name == "revived" else [])],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, data)
        trainer.test(model, data, verbose=False)
        numbers[name] = {
            "squared_error": float(trainer.callback_metrics["test/loss"]),
            "dead_at_first": curves[name].dead["all"][0],
            "dead_at_last": curves[name].dead["all"][-1],
            "revived": float(sum(len(units) for _, _, units in reviver.history)),
        }
        print(f"{name:14s}" + "".join(f"  {key} {value:8.3f}" for key, value in numbers[name].items()))
    draw(curves, out / "dead_relu.png")
    (out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    return numbers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with MNIST; without it, scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128], help="sizes of the encoder's hidden layers")
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--bias", type=float, default=-0.2, help="hidden biases at the start, as is")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--horizon", type=int, help="examples on which a verdict rests; 1000, of MNIST 10,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--out", default="outputs/dead_relu", help="folder for the picture and the numbers")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> L.LightningDataModule:
    """Images in [0, 1], with a part for validation and a part for the test."""
    if args.root is None:
        return ae.DigitsDataModule(batch_size=64, val_fraction=0.2, seed=args.seed)
    return ae.VisionDataModule("MNIST", root=args.root, batch_size=128, seed=args.seed)


def build(name: str, in_shape: tuple[int, ...], args: argparse.Namespace) -> ae.MLPAutoencoder:
    """The autoencoder under one of the names."""
    model = ae.MLPAutoencoder(
        in_shape,
        args.latent_dim,
        hidden=args.hidden,
        activation="leaky_relu" if name == "LeakyReLU" else "relu",
        bias_init=0.1 if name == "positive bias" else 0.0,
        lr=args.lr,
    )
    if name not in ("He", "positive bias"):
        for half in (model.encoder, model.decoder):
            for layer in [layer for layer in half.modules() if isinstance(layer, nn.Linear)][:-1]:
                layer.reset_parameters()
                nn.init.constant_(layer.bias, args.bias)
    return model


def draw(curves: dict[str, Curves], path: Path) -> None:
    """Dead fractions over the steps, losses, and a map of how often the units fire at the end."""
    colours = dict(zip(NAMES, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    figure = plt.figure(figsize=(12, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.1))
    left, middle, right = (figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3))
    for name, curve in curves.items():
        left.plot(curve.steps, curve.dead["all"], color=colours[name], label=name)
        middle.plot(curve.steps, curve.loss, color=colours[name], label=name)
    for name in ("as is", "revived"):
        for style, (site, dead) in zip(STYLES, _sites(curves[name]).items(), strict=False):
            right.plot(curves[name].steps, dead, style, color=colours[name], label=f"{name}: {_short(site)}")
    left.set(title="dead units", xlabel="step", ylabel="fraction of all", ylim=(-0.03, 1.03))
    middle.set(title="held-out squared error", xlabel="step", yscale="log")
    right.set(title="dead units by layer", xlabel="step", ylim=(-0.03, 1.03))
    left.legend(fontsize=8)
    right.legend(fontsize=7)
    shown = [name for name in NAMES if _frequencies(curves[name])]
    maps = grid[1, :].subgridspec(1, len(shown))
    colourmap = plt.get_cmap("viridis").with_extremes(bad="white", under="tomato")
    for i, name in enumerate(shown):
        axis = figure.add_subplot(maps[i])
        frequencies = _frequencies(curves[name])
        rows = [frequency.sort(descending=True).values for frequency in frequencies.values()]
        table = torch.full((max(map(len, rows)), len(rows)), float("nan"))
        for column, row in enumerate(rows):
            table[: len(row), column] = row.float().clamp(min=1e-9).log10()
            axis.text(column, -2, f"{int((row == 0).sum())} dead", ha="center", fontsize=8)
        image = axis.imshow(table.numpy(), aspect="auto", cmap=colourmap, vmin=-3.5, vmax=0, interpolation="nearest")
        axis.set_title(name, pad=16)
        axis.set_xticks(range(len(rows)), [_short(site) for site in frequencies], fontsize=8)
        if i == 0:
            axis.set_ylabel("unit, by how often it fires")
        if i == len(shown) - 1:
            figure.colorbar(image, ax=axis, extend="min", label="log10 firing frequency (red: never)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sites(curve: Curves) -> dict[str, list[float]]:
    return {site: dead for site, dead in curve.dead.items() if site != "all"}


def _frequencies(curve: Curves) -> dict[str, Tensor]:
    return curve.monitor.firing_frequency()


def _short(site: str) -> str:
    half, _, rest = site.partition(".")
    return f"{half} {int(rest.rpartition('.')[2]) // 2 + 1}"


if __name__ == "__main__":
    main()
