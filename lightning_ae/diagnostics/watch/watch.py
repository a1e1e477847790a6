"""Seeing every activation of a step, module or function, without leaving a trace on the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_ae.diagnostics.watch.activations import MODULES
from lightning_ae.diagnostics.watch.flow import Flow
from lightning_ae.diagnostics.watch.opened import OpenWatch
from lightning_ae.diagnostics.watch.registry import Registry
from lightning_ae.diagnostics.watch.site import Listener

# torch warns that global hooks hear a compiled module twice, as itself and as what it wraps: wrappers are skipped
_HEARD_TWICE = r"Using `torch\.compile\(module\)` when there are global hooks"


class Watch(Registry):
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
        ...     def on_loss(self, comparison): pass
        ...     def on_entry(self, name, module, x): pass
        ...     def on_pattern(self, pattern): pass
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> nn.init.eye_(model[0].weight).sum().item()
        2.0
        >>> with Watch().open(model, [Print()]):
        ...     model(torch.tensor([[1.0, -1.0]])).sum().backward()
        1 [1, 0]
        1 [[1.0, 0.0]]
    """

    def open(
        self, root: nn.Module, listeners: Sequence[Listener], mask: Tensor | None = None, batch: Any = None
    ) -> OpenWatch:
        """Start to watch; leave the context, or call ``close()``, to stop."""
        self.find(root)
        if self._wrappers:
            known = [getattr(message, "pattern", message) for _, message, *_ in warnings.filters]
            if _HEARD_TWICE not in known:
                warnings.filterwarnings("ignore", _HEARD_TWICE)
        return OpenWatch(self, root, listeners, mask, Flow(self._parameters), batch)

    def silent(self, root: nn.Module) -> list[str]:
        """Names of activation modules that have never been seen at work."""
        self.find(root)
        return [
            self.names_of(module)[0]
            for module in root.modules()
            if isinstance(module, MODULES) and id(module) not in self.ran and self.names_of(module)
        ]
