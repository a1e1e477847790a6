"""How a model is wired, as its steps show it: what reads the data, what stands between layers, noise, statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.monitors.labels import add_labels
from lightning_ae.diagnostics.monitors.relation import add_relation, relation
from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.counters import Counters, Key, flat, nested
from lightning_ae.diagnostics.watch.lineage import Made
from lightning_ae.diagnostics.watch.part import MOST_NUMBERS, part_of
from lightning_ae.diagnostics.watch.patterns import Pattern
from lightning_ae.losses.base import full_precision
from lightning_ae.metrics.latents import kl_per_dimension

#: Modules that read the data that are followed.
MOST_ENTRIES = 4
_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_MAPS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class StructureMonitor(Monitor):
    """Base of :class:`OutputMonitor`: notes how a model is wired, and adds up what shows it.

    Args:
        every_n_steps: look at every so many optimizer steps.
        horizon: figures rest on the last samples looked at, between this many and twice as many.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, every_n_steps: int, horizon: int) -> None:
        super().__init__(every_n_steps, horizon)
        self._start()

    def _start(self) -> None:
        self._step = 0
        #: sums of the first epoch, of this rank, and how many examples they are of
        self._relation = Counters()
        self._related = 0
        #: examples in an epoch
        self.examples = math.inf
        #: modules that have read the data: whether they are normalisations
        self.entries: dict[str, bool] = {}
        #: a layer on the output of a layer with nothing between them that is not linear: inner, smaller outer width
        self.linear: dict[str, tuple[str, int, int]] = {}
        #: share that a dropout drops, and the length of what it acts on
        self.dropouts: dict[str, tuple[float, int]] = {}
        #: outputs of linear layers that another layer reads
        self.widths: dict[str, int] = {}
        self._joined: list[tuple[str, Tensor]] = []
        self._read: Tensor | None = None
        #: modules in which data are joined to what is computed from them
        self.skips: set[str] = set()

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note dropouts; compare a batch's statistics with running ones."""
        if isinstance(module, _DropoutNd) and module.training and inputs and inputs[0].ndim:
            self.dropouts[name] = (module.p, int(inputs[0].shape[-1]))
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None and inputs:
            self._add_norm(name, module, inputs[0])

    def on_pattern(self, pattern: Pattern) -> None:
        """Note how the model is wired."""
        if pattern.kind == "skip":
            self._joined.append((pattern.frame, pattern.tensors[0]))
        elif pattern.kind == "chain":
            inner = pattern.layers[0]
            maps = inner.weight is not None and inner.weight.ndim > 2
            if not maps:
                self.widths[inner.frame] = int(inner.tensor.shape[-1])
        elif pattern.kind == "posterior":
            self._add_posterior(*pattern.tensors)
        else:
            self._note_stack(*pattern.layers)

    def _note_stack(self, inner: Made, outer: Made) -> None:
        a, b = inner.weight, outer.weight
        if a is None or b is None or inner.groups > 1 or outer.groups > 1 or inner.frame == outer.frame:
            return
        width = inner.tensor.shape[1] if a.ndim > 2 else inner.tensor.shape[-1]
        before = inner.source.shape[1] if a.ndim > 2 else inner.source.shape[-1]
        after = outer.tensor.shape[1] if b.ndim > 2 else outer.tensor.shape[-1]
        if width >= min(before, after):  # one that is narrower is so on purpose
            self.linear[outer.frame] = (inner.frame, int(width), int(min(before, after)))

    def _add_posterior(self, mean: Tensor, log_variance: Tensor) -> None:
        mean, log_variance = (full_precision(t).flatten(1) for t in (mean, log_variance))
        add = self.counters.add
        add(
            "posterior",
            "kl",
            (kl_per_dimension(mean, log_variance) * len(mean)).nan_to_num(0.0, 0.0, 0.0),
            torch.float64,
        )
        add("posterior", "rows", len(mean))
        self.curve.add("log_variance", self._step, log_variance.abs().max())

    def posterior(self, results: Mapping[Key, Tensor]) -> Tensor | None:
        """KL divergence of each dimension of a Gaussian code that was recognised, nats; None if there was none."""
        rows = float(results.get(("posterior", "rows"), 0.0))
        return results["posterior", "kl"] / rows if rows else None

    def largest_log_variance(self) -> float:
        """Of such a code, over the whole run; 0 if there was none."""
        values = self.curve.read("log_variance")[1]
        return max((v if v == v else math.inf for v in values), default=0.0)

    def on_entry(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Add what a module with weights reads of the data."""
        if name not in self.entries and len(self.entries) >= MOST_ENTRIES:
            return
        self.entries[name] = isinstance(module, _NORMS)
        self._read = x if self._read is None else self._read
        if not self.entries[name] and x.ndim > 1 and x.numel():
            dim = 1 if isinstance(module, _MAPS) else x.ndim - 1
            some = x[part_of(x.shape, self._number, MOST_NUMBERS)]
            rows = full_precision(some).movedim(dim, -1).flatten(0, -2)
            mean = rows.mean(0)
            off = (rows - mean).square_().sum(0)
            wide = mean if mean.device.type == "mps" else mean.double()
            self.counters.add(f"entry/{name}", "rows", len(rows))
            self.counters.add(f"entry/{name}", "x", wide * len(rows), torch.float64)
            self.counters.add(f"entry/{name}", "x_square", off + wide.square() * len(rows), torch.float64)

    def _add_norm(self, name: str, module: _BatchNorm, x: Tensor) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        rows = full_precision(x).movedim(1, -1).flatten(0, -2)
        deviation, mean = torch.var_mean(rows, 0, correction=0)
        scale = deviation + module.eps
        off = (mean - module.running_mean).square() / (module.running_var + module.eps)
        stretch = (scale / (module.running_var + module.eps)).log().abs()
        add = self.counters.add
        add(f"norm/{name}", "off", off.mean().nan_to_num(0.0, 0.0, 0.0), torch.float64)
        add(f"norm/{name}", "stretch", stretch.mean().nan_to_num(0.0, 0.0, 0.0), torch.float64)
        add(f"norm/{name}", "looks", 1)
        add(f"norm/{name}", "positions", len(rows))

    def _relate(self, trainer: L.Trainer | None, x: Tensor, heard: Comparison) -> None:
        """Add what inputs and targets have to do with each other."""
        if trainer is not None:
            self.examples = float(trainer.num_training_batches) * len(x)
        add_labels(self._relation.add, heard)
        if self._related < min(20_000, self.examples):
            # no more than there are: an example that is seen again is no further evidence
            self._related += len(x)
            add_relation(self._relation.add, x, heard)
        self._relation.flush()

    def relation(self) -> tuple[float, float, int] | None:
        """Largest correlation of an input with a target, what chance gives, and the examples; None if not known."""
        return relation({key: value.cpu() for key, value in self._relation.totals().items()})

    def labels(self) -> Tensor | None:
        """How often each class was seen in the whole run, by this rank; None if the targets are no labels."""
        found = self._relation.totals().get(("labels", "counts"))
        return None if found is None else found.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Sums over all ranks, and who reads the data."""
        known = {name: dict(getattr(self, name)) for name in ("entries", "twice", "widths")}
        related = {"relation": nested(self._relation.totals()), "related": self._related}
        tables = {name: {k: list(v) for k, v in getattr(self, name).items()} for name in ("linear", "dropouts")}
        return {**super().state_dict(), **known, **tables, **related, "skips": sorted(self.skips)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums, and who reads the data."""
        super().load_state_dict(state_dict)
        for name in ("entries", "twice", "widths"):
            setattr(self, name, dict(state_dict.get(name, {})))
        for name in ("linear", "dropouts"):
            setattr(self, name, {k: tuple(v) for k, v in state_dict.get(name, {}).items()})
        self._relation.load(flat(state_dict.get("relation", {})), {})
        self._related = state_dict.get("related", 0)
        self.skips = set(state_dict.get("skips", []))
