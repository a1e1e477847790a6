"""What a pass over the data tells of each site: which units fired, which weights make and read them, and what else."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_ae.diagnostics.watch import Event, Site, Watch
from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.counters import Counters, Key, reduce_and_read
from lightning_ae.diagnostics.watch.flow import Flow, Reader
from lightning_ae.diagnostics.watch.patterns import Pattern
from lightning_ae.diagnostics.watch.site import clean_name

_LAYERS = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
}
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_MIXING = {functional.layer_norm, functional.group_norm, functional.rms_norm}


@dataclass
class Facts:
    """What is known of a site, the same on all ranks.

    Attributes:
        units: how many.
        unit_dim: their axis in the activation, counted from the end.
        low: the lower end, at and below which a unit is dead; None if the activation has no hard zero.
        weight: name of the parameter that makes them, ``weight_dim`` its axis of the units; ``bias`` that of the bias.
        rows: neighbouring entries on these axes that make one unit.
        norm: names of scale and shift of a normalisation in between.
        readers: the weights that read them; ``unknown_readers`` if there may be more.
    """

    units: int
    unit_dim: int
    low: float | None
    weight: str | None = None
    weight_dim: int = 0
    bias: str | None = None
    rows: int = 1
    norm: tuple[str, ...] = ()
    readers: set[Reader] = field(default_factory=set)
    unknown_readers: bool = False

    @property
    def parameters(self) -> set[str]:
        """Names of all that make the units."""
        return {name for name in (self.weight, self.bias, *self.norm) if name is not None}


class Evidence:
    """Counts while it is open, over as many batches as it is opened for.

    Attributes:
        facts: of each site, by name.
        reused: parameters that serve as a weight in a form of their own, such as the transpose of a tied decoder.
        mixing: weights whose outputs pass a normalisation over several units.
        biases: by weight, the parameter that is added to its product.
    """

    def __init__(self, exclude: Sequence[str] = ()) -> None:
        self.facts: dict[str, Facts] = {}
        self.reused: set[str] = set()
        self.mixing: set[str] = set()
        self.biases: dict[str, str] = {}
        self.counters = Counters()
        self._watch = Watch(exclude)
        self._stack = ExitStack()

    def open(self, module: nn.Module) -> None:
        """Start to count; compiled code runs eagerly meanwhile."""
        self.close()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        watching = self._stack.enter_context(self._watch.open(module, [self]))
        self._stack.enter_context(_Weights(self, module, watching.flow))

    def close(self) -> None:
        """Stop to count; may be called again."""
        self._stack.close()

    # -- counting ---------------------------------------------------------------------------------------------

    def on_activation(self, event: Event) -> None:
        """Count who fired."""
        site, y = event.site, event.y
        if site.interval is None:
            return
        low, high = site.interval
        fired = event.live() if (low, high) == (0.0, float("inf")) else event.sum(y.gt(low).float())
        dims = site.other_dims(y)
        total = y.sum(dims, dtype=torch.float32) if dims else y.float()
        self.counters.add(site.name, "fired", fired)
        self.counters.add(site.name, "nonfinite", ~total.isfinite())
        self.counters.add(site.name, "examples", event.examples())

    def on_gradient(self, site: Site, grad_z: Tensor, grad_y: Tensor) -> None:
        """Nothing: there is no backward pass."""

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing."""

    def on_loss(self, comparison: Comparison) -> None:
        """Nothing."""

    def on_entry(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Nothing."""

    def on_pattern(self, pattern: Pattern) -> None:
        """Nothing."""

    # -- reading ----------------------------------------------------------------------------------------------

    def gather(self, trainer: L.Trainer) -> dict[Key, Tensor]:
        """Bring facts and sums of all ranks together: afterwards they are the same everywhere; sums are on the host."""
        for site in self._watch.sites.values():
            low = None if site.interval is None else site.interval[0]
            facts = Facts(site.units, site.unit_dim, low)
            facts.readers, facts.unknown_readers = set(site.readers), site.unknown_readers
            made = site.origin
            if made is not None and made.repeat == 1:
                facts.weight, facts.weight_dim, facts.norm = made.weight, made.weight_dim, made.norm
                facts.rows = made.rows
                facts.bias = made.bias or self.biases.get(made.weight or "")
            self.facts[site.name] = facts
        totals = self.counters.totals()
        shapes = {key: (tuple(value.shape), value.dtype) for key, value in totals.items()}
        if trainer.world_size == 1:
            return reduce_and_read(totals, shapes, trainer.strategy.root_device, None)
        mine = (self.facts, self.reused, self.mixing, shapes)
        self.facts, self.reused, self.mixing, shapes = {}, set(), set(), {}
        for rank in range(trainer.world_size):
            others, reused, mixing, theirs = trainer.strategy.broadcast(mine, src=rank)
            for name, found in others.items():
                known = self.facts.setdefault(name, found)
                known.readers |= found.readers
                known.unknown_readers |= found.unknown_readers
            self.reused |= reused
            self.mixing |= mixing
            shapes = {**theirs, **shapes}
        shapes = {key: shapes[key] for key in sorted(shapes)}
        device = trainer.strategy.root_device
        return reduce_and_read(totals, shapes, device, lambda flat: trainer.strategy.reduce(flat, reduce_op="sum"))


class _Weights(TorchFunctionMode):
    """Sees how parameters are used: what the inputs of each weight are, and which serve in another form."""

    def __init__(self, evidence: Evidence, module: nn.Module, flow: Flow) -> None:
        super().__init__()
        self._evidence, self._flow = evidence, flow
        self._names = {id(p): clean_name(name) for name, p in module.named_parameters()}
        self._derived: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and args:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if len(args) > 1 and (func in _LAYERS or func in _PRODUCTS):
                    self._product(func, args[0], args[1])
                else:
                    self._other(func, args, out)
        return out

    def _product(self, func: Any, x: Any, weight: Any) -> None:
        name = self._names.get(id(weight))
        used = {self._names.get(id(x)), self._derived_from(x), self._derived_from(weight)}
        self._evidence.reused |= {other for other in used if other is not None}
        if name is not None and x.ndim > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            convolution = func in _LAYERS and func is not functional.linear
            axis = x.ndim - (weight.ndim - 1 if convolution else 1)
            dims = [dim for dim in range(x.ndim) if dim != axis]
            active = x.ne(0).any(dim=dims) if dims else x.ne(0)
            self._evidence.counters.add(name, "active", active)

    def _other(self, func: Any, args: Any, out: Tensor) -> None:
        for argument in args:
            name = self._names.get(id(argument)) or self._derived_from(argument)
            if name is not None and argument.ndim >= 2 and sorted(out.shape) == sorted(argument.shape):
                self._derived[id(out)] = (weakref.ref(out), name)
        origin = next((o for o in map(self._flow.of, args) if o is not None), None)
        if origin is None or origin.site is not None or origin.weight is None:
            return
        if func in _MIXING and not (func is functional.group_norm and args[1:2] == (args[0].shape[1],)):
            self._evidence.mixing.add(origin.weight)
        elif func in _SUMS and origin.bias is None and not origin.norm:
            added = [name for a in args if (name := self._names.get(id(a))) is not None and a.ndim == 1]
            if added:
                self._evidence.biases[origin.weight] = added[0]

    def _derived_from(self, tensor: Any) -> str | None:
        found = self._derived.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None
