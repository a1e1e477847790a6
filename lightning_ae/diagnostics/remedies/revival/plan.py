"""From evidence to repairs: which units are dead, and what may be changed without touching one that is alive."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.remedies.revival.evidence import Evidence, Facts
from lightning_ae.diagnostics.remedies.revival.surgery import Edit, Repair
from lightning_ae.diagnostics.watch.counters import Key
from lightning_ae.diagnostics.watch.flow import Reader
from lightning_ae.diagnostics.watch.site import clean_name

Method = Literal["redo", "bias"]


class _CannotRepair(Exception):
    """Why a site is left as it is."""


def plan(
    evidence: Evidence,
    sums: dict[Key, Tensor],
    module: nn.Module,
    method: Method,
    bias: float,
    epoch: int,
    include: Sequence[str] | None = None,
) -> tuple[list[Repair], dict[str, str]]:
    """Repairs of dead units, and by site the reason why it, or some of its units, cannot be repaired.

    Args:
        evidence: facts, gathered.
        sums: what :meth:`Evidence.gather` gave.
        module: the model.
        method: as for :class:`DeadUnitReviver`.
        bias: as for :class:`DeadUnitReviver`.
        epoch: the current one, for the record.
        include: names of sites, or of modules around them; None for all.
    """
    model = _Model(module)
    repairs: list[Repair] = []
    reasons: dict[str, str] = {}
    found = {
        name: _diagnose(name, facts, evidence, sums, model, method, bias) for name, facts in evidence.facts.items()
    }
    for name, facts in evidence.facts.items():
        if include is not None and not any(name == i or name.startswith((f"{i}.", f"{i}#")) for i in include):
            continue
        units = found[name].units
        for other, facts_of_other in evidence.facts.items():
            if facts.parameters & facts_of_other.parameters:  # one layer before several activations
                same = facts_of_other.units == facts.units
                units = units & found[other].units if same else torch.zeros_like(units)
        if (reason := found[name].reason) is not None:
            reasons[name] = reason
        rows = units.nonzero().flatten()
        if len(rows):
            edits = [Edit(t.name, t.dim, _repeated(rows, t.repeat), t.how, t.value) for t in found[name].made]
            # where a later layer is dead altogether nothing gets through, and a path of zeros would keep it so
            after = list(found.values())[list(found).index(name) + 1 :]
            if not (units.all() and any(later.units.all() for later in after)):
                edits += [Edit(r.weight, r.dim, _repeated(rows, r.repeat), "fill", 0.0) for r in found[name].read]
            repairs.append(Repair(epoch, name, rows, edits))
    return repairs, reasons


class _Found(NamedTuple):
    """Units of a site that can be repaired, why others cannot, and what is to be changed."""

    units: Tensor
    reason: str | None = None
    made: Sequence[_Target] = ()
    read: Sequence[Reader] = ()


def _diagnose(
    name: str, facts: Facts, evidence: Evidence, sums: dict[Key, Tensor], model: _Model, method: Method, bias: float
) -> _Found:
    dead = _dead(name, facts, sums)
    if not dead.any():
        return _Found(dead)
    try:
        made, read = _targets(facts, evidence, model, method, bias)
        units = dead & _silent(facts, read, sums)
    except _CannotRepair as error:
        return _Found(torch.zeros_like(dead), str(error))
    if torch.equal(units, dead):
        return _Found(units, None, made, read)
    reason = (
        "what reads them has something else than 0 there, from a normalisation or a lower end that is not 0; "
        "method='bias' needs no outgoing weights"
    )
    return _Found(units, reason, made, read)


class _Model:
    """Parameters, buffers and modules by name; and which parameters several modules share."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {clean_name(n): p for n, p in module.named_parameters()}
        self.tensors.update({clean_name(n): b for n, b in module.named_buffers()})
        self.modules = {clean_name(n): m for n, m in module.named_modules()}
        owners = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
        self.shared = {name for name, p in self.tensors.items() if owners[id(p)] > 1}

    def owner(self, name: str) -> Any:
        """The module that has a parameter."""
        return self.modules.get(name.rpartition(".")[0])


class _Target:
    """A tensor with ``repeat`` neighbouring entries (rows, columns) for each unit that is to be changed."""

    def __init__(self, name: str, dim: int, how: Literal["fill", "add", "draw"], value: float, repeat: int = 1) -> None:
        self.name, self.dim, self.how, self.value, self.repeat = name, dim, how, value, repeat


def _dead(name: str, facts: Facts, sums: dict[Key, Tensor]) -> Tensor:
    never = torch.zeros(facts.units, dtype=torch.bool)
    fired, nonfinite = sums.get((name, "fired")), sums.get((name, "nonfinite"))
    if fired is None or nonfinite is None or not int(sums[name, "examples"]) or len(fired) != facts.units:
        return never
    return (fired == 0) & (nonfinite == 0)


def _silent(facts: Facts, readers: Sequence[Reader], sums: dict[Key, Tensor]) -> Tensor:
    """Units at which all inputs of all readers were 0."""
    found = torch.ones(facts.units, dtype=torch.bool)
    for reader in readers:
        active = sums.get((reader.weight, "active"))
        if active is None or len(active) != facts.units * reader.repeat:
            raise _CannotRepair(f"the inputs of {reader.weight} were not seen")
        found &= (active.view(facts.units, reader.repeat) == 0).all(1)
    return found


def _targets(
    facts: Facts, evidence: Evidence, model: _Model, method: Method, bias: float
) -> tuple[list[_Target], list[Reader]]:
    """What makes the units, as far as it is to be changed, and the weights that read them."""
    shift = [n for n in facts.norm if n.endswith("bias")]
    if method == "bias":
        name = shift[-1] if shift else facts.bias
        if name is None:
            raise _CannotRepair("no bias or shift that is a parameter of the model makes its pre-activation")
        return [_check(_Target(name, 0, "add", bias, 1 if shift else facts.rows), facts, model)], []
    if facts.weight is None:
        raise _CannotRepair(
            "its incoming weight is not a parameter of the model, or not one that can be told: tied, computed from "
            "others, reshaped, or of grouped channels"
        )
    tied = f"{facts.weight} is tied: it serves in another place, too"
    readers = [reader for other in evidence.facts.values() for reader in other.readers]
    if any(reader.weight == facts.weight and reader.dim == facts.weight_dim for reader in readers):
        raise _CannotRepair(tied)
    own = sorted(facts.readers, key=lambda reader: (reader.weight, reader.repeat))
    for name in (facts.weight, *(reader.weight for reader in own)):
        if name in evidence.reused:
            raise _CannotRepair(tied if name == facts.weight else f"{name}, which reads it, is tied")
    sharing = [other for other in evidence.facts.values() if other.weight == facts.weight]
    if any(reader.weight == facts.weight for other in sharing for reader in other.readers):
        raise _CannotRepair(f"{facts.weight} reads what it has made")
    if facts.unknown_readers or not own:
        raise _CannotRepair("not all that reads it is a weight of a linear layer or a convolution of the model")
    for reader in own:
        _check(_Target(reader.weight, reader.dim, "fill", 0.0, reader.repeat), facts, model)
    return [_check(target, facts, model) for target in _fresh(facts, evidence, model)], own


def _fresh(facts: Facts, evidence: Evidence, model: _Model) -> list[_Target]:
    """What makes a unit, as it is at the beginning of training."""
    assert facts.weight is not None
    made = []
    for name in facts.norm:
        if not name.endswith(("weight", "bias")):
            raise _CannotRepair(f"{name}: cannot tell whether it is a scale or a shift")
        made.append(_Target(name, 0, "fill", 1.0 if name.endswith("weight") else 0.0))
        before = name.rpartition(".")[0]
        for statistic, value in (("running_mean", 0.0), ("running_var", 1.0)):
            if f"{before}.{statistic}" in model.tensors and name.endswith("weight"):
                made.append(_Target(f"{before}.{statistic}", 0, "fill", value))
    if facts.weight not in evidence.mixing:
        weight, stride = model.tensors.get(facts.weight), getattr(model.owner(facts.weight), "stride", ())
        if weight is None:
            raise _CannotRepair(f"{facts.weight} is not a parameter of the model")
        inputs = weight.numel() / weight.shape[facts.weight_dim]
        if facts.weight_dim == 1:
            # a transposed convolution reaches each output from only 1/stride of its kernel per axis
            inputs /= math.prod(stride)
        made.append(_Target(facts.weight, facts.weight_dim, "draw", math.sqrt(2 / inputs), facts.rows))
        if facts.bias is not None:
            made.append(_Target(facts.bias, 0, "fill", 0.0, facts.rows))
    elif not made:
        raise _CannotRepair("a normalisation over all units follows it, without scale and shift")
    return made


def _check(target: _Target, facts: Facts, model: _Model) -> _Target:
    tensor = model.tensors.get(target.name)
    if tensor is None:
        raise _CannotRepair(f"{target.name} is not a parameter of the model")
    if target.name in facts.norm:
        # a scale of one axis counts units; one of several has the axes of the activation's end
        target.dim = 0 if tensor.ndim == 1 else tensor.ndim + facts.unit_dim
    if not 0 <= target.dim < tensor.ndim or tensor.shape[target.dim] != facts.units * target.repeat:
        raise _CannotRepair(f"{target.name} of shape {tuple(tensor.shape)} does not fit {facts.units} units")
    if target.name in model.shared:
        raise _CannotRepair(f"{target.name} is tied: several modules have it")
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        raise _CannotRepair(f"{target.name} is frozen")
    return target


def _repeated(index: Tensor, repeat: int) -> Tensor:
    return (index[:, None] * repeat + torch.arange(repeat)).flatten()
