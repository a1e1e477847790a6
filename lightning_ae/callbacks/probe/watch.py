"""Seeing every activation of a step, module or function, without leaving a trace on the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ae.callbacks.probe.activations import MODULES
from lightning_ae.callbacks.probe.flow import Flow
from lightning_ae.callbacks.probe.opened import OpenWatch
from lightning_ae.callbacks.probe.site import WRAPPERS, Listener, Site, clean_name, structure

# torch warns that global hooks hear a compiled module twice, as itself and as what it wraps: wrappers are skipped
_HEARD_TWICE = r"Using `torch\.compile\(module\)` when there are global hooks"


class Watch:
    """Tells listeners of every activation while it is open.

    Two hooks that are global to the process follow which module runs, and a ``TorchFunctionMode`` sees the functions
    that it calls; nothing is registered on the model, so it can be copied and pickled meanwhile. What runs again inside
    the backward pass (activation checkpointing) is not counted again. Sites are found once and keep their order.

    Args:
        exclude: names of submodules whose calls, and what they call, are not looked at.
        unit_dim: the axis of the units for the sites with these names (or inside modules with these names), or for all.

    Example:
        >>> import torch
        >>> class Print:
        ...     def on_activation(self, event): print(event.site.name, event.live().tolist())
        ...     def on_gradient(self, site, grad_z, grad_y): print(site.name, grad_z.tolist())
        ...     def on_module(self, name, module, inputs, output): pass
        ...     def on_loss(self, name, prediction, target, site): pass
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> nn.init.eye_(model[0].weight).sum().item()
        2.0
        >>> with Watch().open(model, [Print()]):
        ...     model(torch.tensor([[1.0, -1.0]])).sum().backward()
        1 [1, 0]
        1 [[1.0, 0.0]]
    """

    def __init__(self, exclude: Sequence[str] = (), unit_dim: int | Mapping[str, int] | None = None) -> None:
        self.exclude = tuple(exclude)
        self.unit_dim = unit_dim
        self.sites: dict[tuple[Any, ...], Site] = {}
        self.ran: set[int] = set()
        self.scratch: dict[Any, Tensor] = {}
        self._structure: tuple[Any, ...] = ()
        self._parameters: dict[int, str] = {}
        self._names: dict[int, list[str]] = {}
        self._excluded: set[int] = set()
        self._wrappers: set[int] = set()

    def open(self, root: nn.Module, listeners: Sequence[Listener], mask: Tensor | None = None) -> OpenWatch:
        """Start to watch; leave the context, or call ``close()``, to stop."""
        self._find(root)
        if self._wrappers:
            known = [getattr(message, "pattern", message) for _, message, *_ in warnings.filters]
            if _HEARD_TWICE not in known:
                warnings.filterwarnings("ignore", _HEARD_TWICE)
        return OpenWatch(self, root, listeners, mask, Flow(self._parameters))

    def _find(self, root: nn.Module) -> None:
        now = (*self.exclude, *structure(root))
        if now == self._structure:
            return
        self._structure = now
        self._parameters = {id(p): clean_name(name) for name, p in root.named_parameters()}
        modules = dict(root.named_modules(remove_duplicate=False))
        metrics = [clean_name(name) for name, module in modules.items() if name and isinstance(module, Metric)]
        outside = (*self.exclude, *metrics)
        self._names, self._excluded, self._wrappers = {}, set(), set()
        for name, module in modules.items():
            above, _, last = name.rpartition(".")
            if last in WRAPPERS:
                self._wrappers.add(id(modules[above]))
            cleaned = clean_name(name)
            if any(cleaned == e or cleaned.startswith(f"{e}.") for e in outside):
                self._excluded.add(id(module))
            elif cleaned not in self._names.setdefault(id(module), []):
                self._names[id(module)].append(cleaned)
        self._excluded -= set(self._names)

    def names_of(self, module: nn.Module) -> list[str]:
        """All names of a module; none if it is no part of the model."""
        return self._names.get(id(module), [])

    def excluded(self, module: nn.Module) -> bool:
        """Whether it is not to be looked at, with all that it calls: metrics, and what the user has excluded."""
        return id(module) in self._excluded or isinstance(module, Metric)

    def wraps(self, module: nn.Module) -> bool:
        """Whether it only stands around a module of the same name, as ``torch.compile`` and checkpointing put it."""
        return id(module) in self._wrappers

    def chosen_dim(self, name: str, ndim: int) -> int | None:
        """The axis that the user has chosen, counted from the end."""
        chosen = self.unit_dim
        if isinstance(chosen, Mapping):
            fits = [k for k in chosen if k == name or name.startswith((f"{k}.", f"{k}#"))]
            chosen = chosen[max(fits, key=len)] if fits else None
        if chosen is None:
            return None
        if not -ndim <= chosen < ndim:
            raise ValueError(f"unit_dim: {name} has {ndim} axes, got {chosen}.")
        return chosen if chosen < 0 else chosen - ndim

    def silent(self, root: nn.Module) -> list[str]:
        """Names of activation modules that have never been seen at work."""
        self._find(root)
        return [
            self.names_of(module)[0]
            for module in root.modules()
            if isinstance(module, MODULES) and id(module) not in self.ran and self.names_of(module)
        ]
