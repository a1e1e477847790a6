"""Norms of gradients, weights and updates, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_ae.callbacks.probe.counters import Counters
from lightning_ae.callbacks.probe.site import clean_name


class _Step:
    """Gradients of the optimizers that step side by side."""

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.parameters: list[Tensor] = []
        self.norms: list[Tensor] = []


class LayerSteps:
    """Takes the norms of the layers' gradients before a step, and those of weights and updates after it.

    What it adds to the counters, each one number for a layer, as ``("layers", field)``: sums over steps of the squared
    norms ``grad``, ``weight`` and ``update``, and the number of steps ``grad_steps``. A layer is a module with
    parameters of its own. Steps whose gradient is not finite, which AMP skips, are left out.

    Attributes:
        names: the layers, in the model's order.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._layer_of: dict[int, int] = {}
        self._places: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """Drop what is kept from a step to the end of its batch."""
        self._steps: list[_Step] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._ranks = 1
        self._sharded = False

    def before(
        self, trainer: L.Trainer | None, module: nn.Module, optimizer: torch.optim.Optimizer, unscale: Tensor | float
    ) -> None:
        """Take the norms of the gradients, times ``unscale``; remember the weights before the step."""
        self._index(module)
        owned = [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._layer_of]
        with_grad = [p for p in owned if p.grad is not None and not p.grad.is_sparse]
        if not with_grad:
            return
        with torch.no_grad():
            norms = norms_of([_local(p.grad) for p in with_grad]) * unscale
            for p in with_grad:
                if id(p) not in self._before:
                    self._before[id(p)] = (p, _local(p).clone())
        if trainer is not None:
            self._ranks = trainer.world_size
            self._sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        # optimizers that share the layers out among them (weights to one, biases to another) make one step
        ids = {id(p) for p in with_grad}
        step = next((step for step in self._steps if not ids & step.ids), None)
        if step is None:
            step = _Step()
            self._steps.append(step)
        step.ids |= ids
        step.parameters += with_grad
        step.norms.append(norms)

    def after(self, counters: Counters) -> None:
        """Add the steps of a batch, now that the weights have changed."""
        steps, before, ranks, sharded = self._steps, self._before, self._ranks, self._sharded
        self.forget()
        if not before:
            return
        # every rank of DDP has the whole gradient: their sum over ranks is to count once, as do their steps
        share = 1.0 if sharded else 1 / ranks
        finite = torch.ones((), dtype=torch.bool, device=steps[0].norms[0].device)
        for step in steps:
            norms = torch.cat([norms.to(finite.device) for norms in step.norms])
            taken = norms.isfinite().all()
            finite = finite & taken
            touched = self._add(counters, "grad", step.parameters, norms, taken, share)
            counters.add("layers", "grad_steps", touched * taken / ranks, torch.float64)
        stepped, old = [p for p, _ in before.values()], [value for _, value in before.values()]
        weights = norms_of(old)
        torch._foreach_sub_(old, [_local(p) for p in stepped])
        updates = norms_of(old)
        finite = finite & weights.isfinite().all() & updates.isfinite().all()
        self._add(counters, "weight", stepped, weights, finite, share)
        self._add(counters, "update", stepped, updates, finite, share)

    def _add(
        self, counters: Counters, field: str, parameters: Sequence[Tensor], norms: Tensor, finite: Tensor, share: float
    ) -> Tensor:
        total = counters.get("layers", field, (len(self.names),), torch.float64, norms.device)
        squares = norms.to(total.dtype).square() * share
        index, touched = self._place(parameters, norms.device)
        total.index_add_(0, index, torch.where(finite, squares, torch.zeros_like(squares)))
        return touched

    def _place(self, parameters: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers of the parameters' layers, and 1 for each layer that has one; on the device, made once."""
        key = tuple(id(p) for p in parameters)
        if key not in self._places or self._places[key][0].device != device:
            index = torch.tensor([self._layer_of[i] for i in key])
            touched = torch.zeros(len(self.names)).index_fill_(0, index, 1.0)
            self._places[key] = (index.to(device), touched.to(device))
        return self._places[key]

    def _index(self, module: nn.Module) -> None:
        names: dict[str, int] = {}
        layer_of = {}
        for name, parameter in module.named_parameters():
            layer = clean_name(name.rpartition(".")[0]) or "model"
            layer_of[id(parameter)] = names.setdefault(layer, len(names))
        if layer_of != self._layer_of or list(names) != self.names:
            self._layer_of, self.names, self._places = layer_of, list(names), {}


def _local(tensor: Any) -> Tensor:
    # of a sharded tensor the part that is here
    local: Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return local


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Norms in float32, or in float64 if that is what there is, on one device."""
    parts = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return torch.stack([norm.to(parts[0].device) for norm in torch._foreach_norm(parts, 2, wide)])
