"""What goes in, what comes out, and what it costs: the evidence of a report beside that of the three monitors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.watch import Event, Site
from lightning_ae.diagnostics.watch.batch import first_tensor
from lightning_ae.diagnostics.watch.counters import Key
from lightning_ae.diagnostics.watch.flow import same_numbers
from lightning_ae.losses.base import full_precision
from lightning_ae.models import Autoencoder

#: Where the output of an activation can lie.
RANGES = {
    "bernoulli": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "softsign": (-1.0, 1.0),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "softplus": (0.0, math.inf),
}


class Moment(NamedTuple):
    """Loss and fraction of variance unexplained up to a step, over the batches looked at since the one before."""

    step: int
    loss: float
    fvu: float
    spread: float


class OutputMonitor(Monitor):
    r"""Compares reconstructions with data, number by number, and keeps the terms of the loss.

    ``fvu`` is :math:`\sum\|x - \hat x\|^2 / \sum\|x - \bar x\|^2` (1 for a constant output), ``spread`` the variance of
    :math:`\hat x` over the examples of a batch relative to that of x (0 for a constant output, even if the constant
    moves while training), both summed over the event.
    Logged as ``output/fvu`` and ``output/spread``. In a model that is not ours reconstruction and data are, unless the
    output is named, what one of torch's losses was called with, as large as the batch's first tensor; or else the last
    output of a module, if it has that shape.

    Args:
        output: name of the module, or the site of an activation, that gives the reconstruction.
        every_n_steps: look at every so many optimizer steps.
        horizon: figures rest on the last samples looked at, between this many and twice as many.

    Raises:
        ValueError: if a number is not positive.
    """

    prefix = "output"

    def __init__(self, output: str | None = None, every_n_steps: int = 25, horizon: int = 500) -> None:
        super().__init__(every_n_steps, horizon)
        self.output = output
        self.range = (-math.inf, math.inf)
        self.activation = "identity"
        self.history: list[Moment] = []
        self._weights: dict[str, float | Tensor] = {}
        #: activation applied to the output of another, with nothing in between: names of the sites
        self.twice: dict[str, str] = {}
        self._outputs: dict[torch.Size, Tensor] = {}
        self._x_hat: Tensor | None = None
        self._last: tuple[Tensor, Site] | None = None
        self._pair: tuple[Tensor, Tensor, Tensor, str] | None = None
        self._step = 0
        #: the activation that gives the reconstruction, if one does
        self.site: str | None = None
        #: largest weight decay of the optimizers, and the share of a weight that it takes away in a step
        self.weight_decay, self.shrinkage = 0.0, 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer, with no history."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.history, self.twice, self.site = [], {}, None
            self.weight_decay = self.shrinkage = 0.0

    def on_activation(self, event: Event) -> None:
        """Look whether it comes right after another, and whether it is the output."""
        site, last = event.site, self._last
        name = site.activation.name
        directly = last is not None and event.z is not None and same_numbers(event.z, last[0])
        if last is not None and directly and name in RANGES and not _keeps(name, last[1].activation.name):
            self.twice[site.name] = last[1].name
        self._last = (event.y, site)
        if site.name == self.output:
            self._x_hat, self.activation = event.y, site.activation.name
            self.range = RANGES.get(self.activation, self.range)

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what could be the reconstruction."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if self.output is None and output.requires_grad and output.ndim > 1:
            self._outputs = {output.shape: output.detach()}  # what another module reads is no reconstruction
        elif name == self.output:
            self._x_hat = output.detach()

    def on_loss(self, name: str, prediction: Tensor, target: Tensor, site: Site | None) -> None:
        """Keep what is compared, and how."""
        logits = name == "bce_with_logits"
        if prediction.shape != target.shape or not prediction.requires_grad or prediction.ndim < 2:
            return
        last = self._last[1] if self._last is not None and same_numbers(prediction, self._last[0]) else None
        if logits and last is not None and last.activation.name in RANGES:
            self.twice["the loss's sigmoid"] = last.name
        activation = last.activation.name if last is not None else "identity"
        x_hat = prediction.detach().sigmoid() if logits else prediction.detach()
        kind = "bernoulli" if logits or name == "bce" else activation
        self._pair = (prediction.detach(), x_hat, target.detach(), kind)

    def on_step(self, trainer: L.Trainer | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Remember how hard weights are pulled to zero."""
        for group in optimizer.param_groups:
            decay, lr = group.get("weight_decay", 0.0), group["lr"]
            if isinstance(decay, (int, float)) and isinstance(lr, (int, float)) and decay >= self.weight_decay:
                decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
                # beside Adam's normalised gradient an L2 term acts by its size among the gradients
                self.weight_decay, self.shrinkage = decay, lr * decay if decoupled else 0.3 * decay

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Add a batch."""
        self._step = trainer.global_step if trainer is not None else self._step + 1
        loss = outputs if isinstance(outputs, Tensor) else outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            self._add_loss(loss.detach().float())
        x = first_tensor(batch)
        x_hat, candidates, last, pair = self._x_hat, self._outputs, self._last, self._pair
        self._x_hat, self._outputs, self._last, self._pair = None, {}, None, None
        if isinstance(module, Autoencoder) and isinstance(outputs, Mapping) and "output" in outputs:
            x = module.get_input(batch)
            x_hat = module.loss.prediction(outputs["output"].params, x)
            self.range, self.activation = module.loss.output_range, module.loss.output_activation
            self._add_terms(module, outputs["terms"])
        elif (
            x is not None
            and pair is not None
            and pair[0].numel() == x.numel()
            and (x_hat is None or same_numbers(pair[0], x_hat))
        ):
            _, x_hat, target, self.activation = pair
            x, self.range = target.reshape(x.shape), RANGES.get(self.activation, (-math.inf, math.inf))
        elif x is not None and x_hat is None:
            x_hat = candidates.get(x.shape)
            if x_hat is not None and last is not None and same_numbers(x_hat, last[0]):
                self.activation = last[1].activation.name
                self.range = RANGES.get(self.activation, (-math.inf, math.inf))
        if last is not None and x_hat is not None and same_numbers(x_hat, last[0]):
            self.site = last[1].name
        if x is not None and x_hat is not None and x.numel() == x_hat.numel() and x.ndim > 1 and x.is_floating_point():
            self._add_pair(full_precision(x).flatten(1), full_precision(x_hat.detach()).flatten(1))

    def _add_loss(self, loss: Tensor) -> None:
        finite = loss.isfinite()
        self.counters.add("loss", "sum", torch.where(finite, loss, torch.zeros_like(loss)).sum(), torch.float64)
        self.counters.add("loss", "count", finite.sum())
        self.counters.add("loss", "nonfinite", (~finite).sum())

    def _add_terms(self, module: Autoencoder, terms: Mapping[str, Tensor]) -> None:
        for name in [name for name in terms if name != "loss"]:
            self.counters.add("terms", name, terms[name].detach().float(), torch.float64)
        penalties: dict[str, Any] = {name: penalty.weight for name, penalty in module.penalties.items()}
        self._weights = {
            **module.code.weights(),
            **penalties,
        }  # tensors are read later: now the device would be waited for

    def _add_pair(self, x: Tensor, x_hat: Tensor) -> None:
        low, high = self.range
        add = self.counters.add
        add("output", "rows", len(x))
        add("output", "nonfinite_data", (~x.isfinite()).sum())
        add("output", "x", x.sum(0), torch.float64)
        add("output", "x_square", x.square().sum(0), torch.float64)
        add("output", "x_hat", x_hat.sum(0), torch.float64)
        add("output", "error", (x_hat - x).square().sum(), torch.float64)
        for name, values in (("x_within", x), ("x_hat_within", x_hat)):
            add("output", name, (values - values.mean(0)).square().sum(), torch.float64)
        if low > -math.inf:
            slack = 1e-4 * (high - low if high < math.inf else 1.0)  # what rounding puts outside is not
            add("output", "outside", (x.lt(low - slack) | x.gt(high + slack)).sum())
            add("output", "at_low", x_hat.le(low).sum(0))
        if high - low < math.inf:
            add("output", "far", ((x - x.mean()).abs() > 0.05 * (high - low)).sum())

    def state_dict(self) -> dict[str, Any]:
        """Sums over all ranks, and the history."""
        return {**super().state_dict(), "history": [list(moment) for moment in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums, and the history."""
        super().load_state_dict(state_dict)
        self.history = [Moment(*row) for row in state_dict["history"]]

    # -- reading ----------------------------------------------------------------------------------------------

    def take(self, results: dict[Key, Tensor], keep: bool) -> None:
        """Receive sums over all ranks; remember loss and error."""
        super().take(results, keep)
        figures = self._figures(self.interval())
        if not self.history or self.history[-1].step != self._step:
            self.history.append(
                Moment(
                    self._step,
                    figures.get("loss", math.nan),
                    figures.get("fvu", math.nan),
                    figures.get("spread", math.nan),
                )
            )

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms in the objective, in the last batch looked at."""
        return {name: float(weight) for name, weight in self._weights.items()}

    def figures(self) -> dict[str, float]:
        """All figures that apply, by name."""
        return self._figures(self.results())

    def stuck_outputs(self) -> Tensor:
        """Indices of the numbers of the event at the low end of the output's range in every example, but not in x.

        None if they are less than a hundredth of the variance of x: what is hardly ever seen may as well be left out.
        """
        results = self.results()
        if ("output", "at_low") not in results:
            return torch.zeros(0, dtype=torch.int64)
        rows = results["output", "rows"]
        variance = self._variance(results, "x")
        stuck = (results["output", "at_low"] == rows) & (variance > 1e-6)
        return stuck.nonzero().flatten()[: None if variance[stuck].sum() >= 0.01 * variance.sum() else 0]

    def _variance(self, results: Mapping[Key, Tensor], name: str) -> Tensor:
        rows = results["output", "rows"].double()
        mean = results["output", name] / rows
        return (results["output", f"{name}_square"] / rows - mean.square()).clamp(min=0)

    def _figures(self, results: Mapping[Key, Tensor]) -> dict[str, float]:
        values: dict[str, float] = {}
        if int(results.get(("loss", "count"), torch.tensor(0))):
            values["loss"] = float(results["loss", "sum"]) / int(results["loss", "count"])
        if ("loss", "nonfinite") in results:
            values["nonfinite_losses"] = float(results["loss", "nonfinite"])
        for (site, name), value in results.items():
            if site == "terms":
                values[f"term/{name}"] = float(value) / max(1, int(results["loss", "count"]))
        rows = int(results.get(("output", "rows"), torch.tensor(0)))
        if rows < 2:
            return values
        variance, x_mean = self._variance(results, "x"), results["output", "x"] / rows
        x_hat_mean = results["output", "x_hat"] / rows
        total = float(variance.sum())
        numbers = rows * len(x_mean)
        values |= {
            "samples": float(rows),
            "x_mean": float(x_mean.mean()),
            "x_std": math.sqrt(
                max(0.0, float(results["output", "x_square"].sum()) / numbers - float(x_mean.mean()) ** 2)
            ),
            "x_hat_mean": float(x_hat_mean.mean()),
            "contrast": float(x_hat_mean.std(correction=0) / x_mean.std(correction=0).clamp(min=1e-12)),
            "outside": float(results.get(("output", "outside"), torch.tensor(0))) / numbers,
            "far": float(results.get(("output", "far"), torch.tensor(0))) / numbers,
            "nonfinite_data": float(results["output", "nonfinite_data"]) / numbers,
        }
        if total > 0:
            values["fvu"] = float(results["output", "error"]) / (rows * total)
        within = float(results["output", "x_within"])
        if within > 0:
            values["spread"] = float(results["output", "x_hat_within"]) / within
        return values

    def scalars(self) -> dict[str, float]:
        """``fvu`` and ``spread``."""
        figures = self._figures(self._now)
        return {name: figures[name] for name in ("fvu", "spread") if name in figures}


def _keeps(activation: str, before: str) -> bool:
    """Whether an activation leaves the output of another as it is: a ReLU what is never negative."""
    low, high = RANGES.get(before, (-math.inf, math.inf))
    return low >= 0 and (activation == "relu" or (activation == "relu6" and high <= 6))
