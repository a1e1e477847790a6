"""Remedies in the activations: swapped, removed, put in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_ae.diagnostics.remedies.base import (
    Change,
    Options,
    Remedy,
    modules_by_name,
    note,
    replace_module,
    shown,
)
from lightning_ae.diagnostics.watch.activations import MODULES
from lightning_ae.models import Autoencoder
from lightning_ae.networks.init import Activation, make_activation
from lightning_ae.rebuildable import Rebuildable, describe, rebuild

Swap = Literal["relu", "leaky_relu", "gelu", "tanh", "sigmoid", "softmax", "log_softmax", "identity"]
_NAMED = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax"}


@dataclass(frozen=True)
class SwapActivation(Remedy):
    """Put another activation module in the place of some.

    Of a model of ours all activations of the network are swapped, and its checkpoints know; a function called in
    somebody's ``forward`` cannot be.

    Args:
        to: the new one.
        sites: names of the modules; empty for all of the kinds of ``kinds``.
        kinds: only modules of these kinds, as ``("sigmoid", "tanh")``; empty for all.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Sigmoid())
        >>> SwapActivation("gelu", kinds=("tanh",)).apply(network).done, network[1], network[3]
        (True, GELU(approximate='none'), Sigmoid())
    """

    to: Swap
    sites: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.to not in get_args(Swap):
            raise ValueError(f"to: expected one of {get_args(Swap)}, got {self.to!r}.")

    def describe(self) -> str:
        """From what to what."""
        which = shown(self.sites) if self.sites else " and ".join(self.kinds) or "all activations"
        return f"Remove the activation {which}." if self.to == "identity" else f"Put {self.to} in the place of {which}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Swap them."""
        chosen = [n for n, kind in activation_modules(model) if self._wants(n, kind)]
        if not chosen:
            missing = [n for n in self.sites if n not in modules_by_name(model)]
            why = f"{shown(tuple(missing))} is called in forward() as a function, not a module" if missing else "none"
            return Change(False, why if missing else "there is no such activation module")
        if isinstance(model, Autoencoder):
            return self._swap_ours(model)
        for name in chosen:
            replace_module(model, name, self._new())
        return Change(True, self.describe())

    def _wants(self, name: str, kind: str) -> bool:
        return (not self.sites or name in self.sites) and (not self.kinds or kind in self.kinds) and kind != self.to

    def _new(self) -> nn.Module:
        if self.to == "softmax":
            return nn.Softmax(-1)
        return nn.LogSoftmax(-1) if self.to == "log_softmax" else make_activation(self.to)

    def _swap_ours(self, model: Autoencoder) -> Change:
        if self.to not in get_args(Activation):
            return Change(False, f"the networks of this package have no {self.to}; the loss owns the output activation")
        holders = {id(part): part for part in _parts(model) if _takes_activation(part)}.values()
        before, whole = [part._init_args for part in holders], _rebuilt(model) is not None
        for part in holders:
            part._init_args = {**(part._init_args or {}), "activation": self.to}
        mine, swapped = modules_by_name(model), list[str]()
        names = {id(module): name for name, module in mine.items()}
        for part in [model] if whole else [part for part in holders if id(part) in names]:
            for name, module in modules_by_name(_rebuilt(part) or nn.Identity()).items():
                full = ".".join(filter(None, (names[id(part)], name)))
                swapped += [full] if name and type(mine.get(full)) is not type(module) else []
        if not swapped:
            for part, arguments in zip(holders, before, strict=True):
                part._init_args = arguments
            return Change(False, "its network has no activations of this package's, or these already")
        for name in swapped:
            replace_module(model, name, self._new())
        note(model)
        return Change(True, f"activation = {self.to!r}")


def _parts(part: Any) -> Iterator[Rebuildable]:
    """A part of ours and those among its arguments; not losses, codes and penalties, whose activations are theirs."""
    if isinstance(part, Rebuildable) and part._init_args is not None:
        yield part
        for name, value in part._init_args.items():
            if name not in ("loss", "code", "penalties", "corruption"):
                yield from _parts(value)
        if isinstance(part, Autoencoder):  # its networks, where it has made them itself
            for box in (part.encoder, part.decoder):
                yield from (module for module in box.modules() if isinstance(module, Rebuildable))
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _parts(item)


def _takes_activation(part: Rebuildable) -> bool:
    """Whether its constructor, or for a model one to which it hands arguments on, has an ``activation``."""
    if isinstance(part, Autoencoder):
        return any("activation" in inspect.signature(kind.__init__).parameters for kind in type(part).__mro__)  # type: ignore[misc]
    return "activation" in (part._init_args or {})


def _rebuilt(part: Rebuildable) -> nn.Module | None:
    """A part as a checkpoint would rebuild it; None if it has parts of others. No random number is drawn by it."""
    try:
        with torch.random.fork_rng():
            made = rebuild(describe(part), cls=type(part))
    except (ValueError, TypeError):
        return None
    return made if isinstance(made, nn.Module) else None


def activation_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and kinds of the activation modules, those of a loss of ours left out."""
    for name, module in modules_by_name(model).items():
        if isinstance(module, (*MODULES, *_NAMED)) and not name.startswith("loss."):
            kind = _NAMED.get(type(module), "")
            yield name, kind or "".join(f"_{c.lower()}" if c.isupper() else c for c in _spelled(module)).lstrip("_")


def _spelled(module: nn.Module) -> str:
    """The class's name as functions are: ReLU → Relu, LeakyReLU → LeakyRelu."""
    name = type(module).__name__
    for old, new in (("ReLU", "Relu"), ("GELU", "Gelu"), ("SiLU", "Silu"), ("ELU", "Elu")):
        name = name.replace(old, new)
    return name


@dataclass(frozen=True)
class InsertActivation(Remedy):
    """Put an activation after a layer.

    Args:
        layers: names of the layers.
        activation: which.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
        >>> InsertActivation(("0",)).apply(network).done, network[0][1]
        (True, ReLU())
    """

    layers: tuple[str, ...]
    activation: Activation = "relu"

    def describe(self) -> str:
        """Which, and where."""
        return f"Put {self.activation} after {shown(self.layers)}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Wrap the layers."""
        if isinstance(model, Autoencoder):
            return Change(False, "checkpoints of this package do not record it: give the network its activation")
        known = modules_by_name(model)
        found = [name for name in self.layers if name in known]
        for name in found:
            replace_module(model, name, nn.Sequential(known[name], make_activation(self.activation)))
        return Change(bool(found), self.describe() if found else f"there is no layer {shown(self.layers)}")
