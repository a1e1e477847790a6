"""What goes in, what comes out, with what it is compared, and what it costs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_ae.diagnostics.monitors.labels import nonfinite
from lightning_ae.diagnostics.monitors.pairs import RANGES, Pair, add_numbers, add_pair, figures, keeps, variance
from lightning_ae.diagnostics.monitors.relation import add_likeness, correlation
from lightning_ae.diagnostics.monitors.structure import StructureMonitor
from lightning_ae.diagnostics.watch import Event, Site
from lightning_ae.diagnostics.watch.batch import first_tensor
from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.counters import Key
from lightning_ae.diagnostics.watch.part import MOST_NUMBERS, part_of
from lightning_ae.diagnostics.watch.trace import Trace, same_numbers
from lightning_ae.losses.base import ReconstructionLoss, full_precision
from lightning_ae.models import Autoencoder
from lightning_ae.models.batches import imputed

MOST_PAIRS = 6  # comparisons of a step that are followed


class Moment(NamedTuple):
    """Loss and fraction of variance unexplained up to a step, over the batches looked at since the one before."""

    step: int
    loss: float
    fvu: float
    spread: float


class OutputMonitor(StructureMonitor):
    r"""Compares predictions with targets, number by number, and keeps the terms of the loss.

    ``fvu`` is :math:`\sum\|x - \hat x\|^2 / \sum\|x - \bar x\|^2` (1 for a constant output), ``spread`` the variance of
    :math:`\hat x` over the examples of a batch relative to that of x (0 for a constant output, even if the constant
    moves while training), both summed over the event.
    Logged as ``output/fvu`` and ``output/spread``. In a model that is not ours, prediction and target are what one of
    torch's losses, or a difference with the batch that is squared, was heard to compare; it is a reconstruction if the
    target is the batch's first tensor, perhaps rescaled. Nothing is guessed from shapes.

    Args:
        output: name of the module, or the site of an activation, that gives the reconstruction of the batch's first
            tensor; None for what the losses say.
        every_n_steps: look at every so many optimizer steps.
        horizon: figures rest on the last samples looked at, between this many and twice as many.

    Raises:
        ValueError: if a number is not positive.
    """

    prefix = "output"

    def __init__(self, output: str | None = None, every_n_steps: int = 25, horizon: int = 500) -> None:
        super().__init__(every_n_steps, horizon)
        self.output = output

    def _start(self) -> None:
        super()._start()
        self.history: list[Moment] = []
        #: what was heard to be compared, by the name of the loss
        self.pairs: dict[str, Pair] = {}
        #: activation applied to the output of another, with nothing in between: names of the sites
        self.twice: dict[str, str] = {}
        #: activation on the output of another, whichever they are
        self.after: dict[str, str] = {}
        #: the activation that gives the prediction, if one does
        self.site: str | None = None
        self.batch_size = 0
        self._failed = False
        self._named: tuple[float, float] = (-math.inf, math.inf)
        self._weights: dict[str, float | Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        """What is kept from one hook of a batch to the next."""
        self._heard: list[Comparison] = []
        self._recent: deque[tuple[Trace, Site]] = deque(maxlen=4)
        self._x_hat: Tensor | None = None
        self._joined, self._read = [], None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer, with no history."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start()

    # -- hearing ----------------------------------------------------------------------------------------------

    def on_activation(self, event: Event) -> None:
        """Look whether it comes right after another, and whether it is the output."""
        site, last, name = event.site, self._recent[-1] if self._recent else None, event.site.activation.name
        directly = last is not None and event.z is not None and last[0].is_of(event.z)
        if last is not None and directly:
            self.after[site.name] = last[1].name
            if name in RANGES and not keeps(name, last[1].activation.name):
                self.twice[site.name] = last[1].name
        self._recent.append((Trace(event.y), site))
        if site.name == self.output:
            self._x_hat = event.y
            self._named = RANGES.get(name, self._named)

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the reconstruction that was named; compare batch statistics with running ones."""
        super().on_module(name, module, inputs, output)
        if name == self.output and isinstance(output, Tensor) and output.is_floating_point():
            self._x_hat = output.detach()

    def on_loss(self, comparison: Comparison) -> None:
        """Keep what is compared."""
        if len(self._heard) < MOST_PAIRS:
            self._heard.append(comparison)

    # -- adding -----------------------------------------------------------------------------------------------

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Add a batch; what fails here is no reason for training to end."""
        try:
            self._add_batch(trainer, module, outputs, batch)
        except Exception as error:
            if not self._failed:
                rank_zero_warn(f"The report could not read a batch and goes on: {type(error).__name__}: {error}")
            self._failed = True
            self._forget()

    def _add_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        self._step = trainer.global_step if trainer is not None else self._step + 1
        loss = outputs if isinstance(outputs, Tensor) else outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            self._add_loss(loss.detach().float())
        x, heard, x_hat, recent = first_tensor(batch), self._heard, self._x_hat, list(self._recent)
        read, joined, given = self._read, self._joined, x if self._read is None else self._read
        self._forget()
        if given is not None and given.is_floating_point():
            self.curve.add("nonfinite", self._step, nonfinite(given))
            some = given[part_of(given.shape, self._number, MOST_NUMBERS)] if given.ndim > 1 else given[None]
            if len(some) > 1:
                self.curve.add("varies", self._step, some.ne(some[:1]).any().float())
        self.batch_size = max(self.batch_size, 0 if x is None or x.ndim == 0 else len(x))
        if isinstance(module, Autoencoder) and isinstance(outputs, Mapping) and "output" in outputs:
            x, params = imputed(module, batch, outputs["output"]), outputs["output"].params.detach()
            self._named = module.loss.output_range
            self.pairs = {"output": Pair(type(module.loss).__name__, [module.loss.output_activation], is_data=True)}
            self._add_terms(module, outputs["terms"])
            same = module.loss.output_activation == "identity" and params.shape == x.shape
            x_hat = params if same else None  # of which activation it is the output; what a loss applies is none
            self._add_reconstruction(x, params, module.loss)
            self._look_before_loss(module, params, heard)
            heard = []
        elif self.output is not None and x_hat is not None and x is not None and x.numel() == x_hat.numel():
            named = next((c for c in heard if same_numbers(c.prediction, x_hat)), None)
            path = [made.name for made in named.path] if named is not None else []
            last = next((site for y, site in reversed(recent) if y.is_of(x_hat)), None)
            path = path if path or last is None else [last.activation.name]
            if named is not None and named.loss == "binary_cross_entropy_with_logits":
                path, x_hat = ["bernoulli", *path], full_precision(x_hat).sigmoid()
            pair = self.pairs["output"] = Pair(named.loss if named is not None else "output", path)
            self._named = pair.range
            target = named.target if named is not None and named.target.numel() == x.numel() else x
            self._add_reconstruction(target.reshape(x.shape), x_hat)
            heard = [c for c in heard if c is not named]
        self._add_heard(heard, x, read)
        for frame, data in joined:
            for comparison in heard[:1]:
                if data.numel() == comparison.target.numel() and comparison.target.is_floating_point():
                    self.skips.add(frame)
                    self.counters.add("skip", "same", correlation(data, comparison.target).gt(0.9999))
                    self.counters.add("skip", "seen", 1)
        if heard and given is not None and given.ndim:
            self._relate(trainer, given, heard[0])
        x_hat = heard[0].prediction if x_hat is None and heard else x_hat
        if x_hat is not None:
            self.site = next((site.name for y, site in reversed(recent) if y.is_of(x_hat)), self.site)

    def _look_before_loss(self, module: Autoencoder, params: Tensor, heard: list[Comparison]) -> None:
        """Note an activation at the end of a decoder whose loss applies a sigmoid within torch's function."""
        named = next((c for c in heard if same_numbers(c.prediction, params)), None)
        if named is not None and named.loss == "binary_cross_entropy_with_logits":
            before = next((m.name for m in named.path if m.name != "dropout"), "layer")
            if before in RANGES and module.loss.output_activation == "sigmoid":
                self.twice["the loss's own sigmoid"] = f"{before}, with which the decoder ends"

    def _add_heard(self, heard: list[Comparison], x: Tensor | None, read: Tensor | None) -> None:
        for number, comparison in enumerate(heard):
            same = sum(c.loss == comparison.loss for c in heard[:number])
            name = f"{comparison.loss}#{same}" if same else comparison.loss
            if name not in self.pairs:
                self.pairs[name] = Pair.of(comparison)
            pair, target = self.pairs[name], comparison.target
            if pair.changes(target):
                self.forget_site(name)
            if target.is_floating_point():
                self.curve.add("nonfinite_target", self._step, nonfinite(target))
            self.counters.add(name, "heard", 1)
            parts = add_pair(self.counters.add, name, comparison, pair)
            if not pair.classes and comparison.target_is_data:
                add_likeness(self.counters.add, name, target, x, read)
            if number == 0 and comparison.value is not None and comparison.value.ndim == 0:
                self.counters.add(name, "raw", comparison.value.float(), torch.float64)
                self.counters.add(name, "raws", 1)
                self.curve.add("raw", self._step, comparison.value)
            if parts is not None and number < 2:
                self.curve.add(f"{name}/error", self._step, parts)

    def _add_reconstruction(self, x: Tensor, x_hat: Tensor, loss: ReconstructionLoss | None = None) -> None:
        if x.ndim and x_hat.ndim and len(x_hat) == len(x):
            x, x_hat = (t[part_of(x.shape, self._number, MOST_NUMBERS)] for t in (x, x_hat))
        x_hat = x_hat if loss is None else loss.prediction(x_hat, x)
        if x.ndim < 2 or not x.is_floating_point() or x.numel() != x_hat.numel():
            return
        y, y_hat = full_precision(x).flatten(1), full_precision(x_hat.detach()).reshape(len(x), -1)
        self.curve.add("output/error", self._step, add_numbers(self.counters.add, "output", y, y_hat, self._named))

    def _add_loss(self, loss: Tensor) -> None:
        finite = loss.isfinite()
        self.counters.add("loss", "sum", torch.where(finite, loss, torch.zeros_like(loss)).sum(), torch.float64)
        self.counters.add("loss", "count", finite.sum())
        self.counters.add("loss", "nonfinite", (~finite).sum())
        self.curve.add("loss", self._step, loss.mean())

    def _add_terms(self, module: Autoencoder, terms: Mapping[str, Tensor]) -> None:
        for name in [name for name in terms if name != "loss"]:
            value = terms[name].detach().float()
            self.counters.add("terms", name, value, torch.float64)
            self.curve.add(f"terms/{name}", self._step, value)
        penalties: dict[str, Any] = {name: penalty.weight for name, penalty in module.penalties.items()}
        # tensors are read later: now the device would be waited for
        self._weights = {**module.code.weights(), **penalties}

    def state_dict(self) -> dict[str, Any]:
        """Sums over all ranks, the history, and what was heard."""
        return {
            **super().state_dict(),
            "history": [list(moment) for moment in self.history],
            "pairs": {name: asdict(pair) for name, pair in self.pairs.items()},
            "site": self.site,
            "named": list(self._named),
            "batch_size": self.batch_size,
            "weights": self.weights,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums, the history, and what was heard."""
        super().load_state_dict(state_dict)
        self.history = [Moment(*row) for row in state_dict["history"]]
        self.site, self.batch_size = state_dict.get("site"), state_dict.get("batch_size", 0)
        self._named = tuple(state_dict.get("named", (-math.inf, math.inf)))
        self._weights = dict(state_dict.get("weights", {}))
        self.pairs = {name: Pair(**row) for name, row in state_dict.get("pairs", {}).items()}

    # -- reading ----------------------------------------------------------------------------------------------

    def take(self, results: dict[Key, Tensor], keep: bool) -> None:
        """Receive sums over all ranks; remember loss and error."""
        super().take(results, keep)
        now = self.figures(self.interval())
        if not self.history or self.history[-1].step != self._step:
            self.history.append(Moment(self._step, *(now.get(name, math.nan) for name in Moment._fields[1:])))

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms in the objective, in the last batch looked at."""
        return {name: float(weight) for name, weight in self._weights.items()}

    def reconstruction(self, results: Mapping[Key, Tensor] | None = None) -> str | None:
        """Name of the comparison that is a reconstruction; None if nothing was heard to be one."""
        if "output" in self.pairs:
            return "output"
        sums = self.results() if results is None else results
        for name in self.pairs:
            seen = int(sums.get((name, "likeness"), torch.tensor(0)))
            if seen and int(sums[name, "like_input"]) == seen:
                return name
        return None

    def main(self, results: Mapping[Key, Tensor] | None = None) -> str | None:
        """Name of the comparison that matters: the reconstruction, else what was heard most often, and first."""
        sums = self.results() if results is None else results
        if (found := self.reconstruction(sums)) is not None or not self.pairs:
            return found
        return max(self.pairs, key=lambda name: int(sums.get((name, "heard"), torch.tensor(0))))

    @property
    def activation(self) -> str:
        """The activation that gives the prediction of the main comparison."""
        name = self.main()
        return "identity" if name is None else self.pairs[name].activation

    @property
    def range(self) -> tuple[float, float]:
        """Where the prediction of the main comparison can lie."""
        name = self.main()
        return (-math.inf, math.inf) if name is None else self._named if name == "output" else self.pairs[name].range

    def stuck_outputs(self) -> Tensor:
        """Indices of the numbers of the event at the low end of the output's range in every example, but not in x.

        None if they are less than a hundredth of the variance of x: what is hardly ever seen may as well be left out.
        """
        results = self.results()
        name = self.main(results) or "output"
        if (name, "at_low") not in results:
            return torch.zeros(0, dtype=torch.int64)
        rows, spread = results[name, "rows"], variance(results, name, "x")
        stuck = (results[name, "at_low"] == rows) & (spread > 1e-6)
        return stuck.nonzero().flatten()[: None if spread[stuck].sum() >= 0.01 * spread.sum() else 0]

    def goes_past(self) -> bool:
        """Whether the target itself was joined to what the prediction is computed from, in every step looked at."""
        results = self.results()
        seen = int(results.get(("skip", "seen"), torch.tensor(0)))
        return seen > 0 and int(results["skip", "same"]) >= max(1, int(results[self.main() or "", "heard"]))

    def pair_figures(self, name: str, results: Mapping[Key, Tensor] | None = None) -> dict[str, float]:
        """Of one comparison."""
        return figures(self.results() if results is None else results, name, self.pairs.get(name))

    def figures(self, results: Mapping[Key, Tensor] | None = None) -> dict[str, float]:
        """All figures that apply to the loss and the main comparison, by name."""
        sums = self.results() if results is None else results
        values: dict[str, float] = {}
        count = int(sums.get(("loss", "count"), torch.tensor(0)))
        if count:
            values["loss"] = float(sums["loss", "sum"]) / count
        if ("loss", "nonfinite") in sums:
            values["nonfinite_losses"] = float(sums["loss", "nonfinite"])
        for site, name in sums:
            if site == "terms":
                values[f"term/{name}"] = float(sums[site, name]) / max(1, count)
        main = self.main(sums)
        return values if main is None else values | figures(sums, main, self.pairs[main])

    def scalars(self) -> dict[str, float]:
        """``fvu`` and ``spread``."""
        return {name: value for name, value in self.figures(self._now).items() if name in ("fvu", "spread")}
