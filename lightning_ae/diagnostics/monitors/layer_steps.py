"""Norms of gradients, weights and updates, by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_ae.diagnostics.watch.counters import Counters
from lightning_ae.diagnostics.watch.site import clean_name, structure


class _Step:
    """Gradients of the optimizers that step side by side."""

    def __init__(self) -> None:
        self.ids: dict[int, None] = {}  # of parameters, in the order of their norms
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
        self._structure: tuple[Any, ...] = ()
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
        self,
        trainer: L.Trainer | None,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        unscale: Tensor | float,
        known: tuple[Any, ...] = (),
    ) -> None:
        """Take the norms of the gradients, times ``unscale``; remember the weights before the step.

        ``known`` is the model's :func:`structure`, if somebody has worked it out for this step.
        """
        self._index(module, known)
        found = {
            id(p): (p, gradient)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._layer_of and (gradient := p.grad) is not None and not gradient.is_sparse
        }
        if not found:
            return
        with torch.no_grad():
            norms = norms_of([_local(gradient) for _, gradient in found.values()])
            norms = norms * unscale if isinstance(unscale, Tensor) else norms
            fresh = {key: p for key, (p, _) in found.items() if key not in self._before}
            # times 1 is a copy of all in one call
            copies = torch._foreach_mul([_local(p) for p in fresh.values()], 1) if fresh else ()
            self._before.update({key: (p, copy) for (key, p), copy in zip(fresh.items(), copies, strict=True)})
        if trainer is not None:
            self._ranks = trainer.world_size
            self._sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        # optimizers that share the layers out among them (weights to one, biases to another) make one step
        step = next((step for step in self._steps if step.ids.keys().isdisjoint(found)), None)
        if step is None:
            step = _Step()
            self._steps.append(step)
        step.ids.update(dict.fromkeys(found))
        step.norms.append(norms)

    def after(self, counters: Counters) -> Tensor | None:
        """Add the steps of a batch, now that the weights have changed; returns the norm of the whole gradient."""
        steps, before, ranks, sharded = self._steps, self._before, self._ranks, self._sharded
        self.forget()
        if not before:
            return None
        with torch.no_grad():
            return self._add_all(counters, steps, before, ranks, sharded)

    def _add_all(
        self,
        counters: Counters,
        steps: list[_Step],
        before: dict[int, tuple[Tensor, Tensor]],
        ranks: int,
        sharded: bool,
    ) -> Tensor:
        # every rank of DDP has the whole gradient: their sum over ranks is to count once, as do their steps
        share = 1.0 if sharded else 1 / ranks
        device = steps[0].norms[0].device
        finite = torch.ones((), dtype=torch.bool, device=device)
        for step in steps:
            norms = step.norms[0] if len(step.norms) == 1 else torch.cat([norms.to(device) for norms in step.norms])
            taken = norms.sum() < math.inf  # not for NaN either
            finite = finite & taken
            index, touched = self._place(step.ids, device)
            self._add(counters, "grad", index, torch.where(taken, norms, 0.0), share)
            counters.add("layers", "grad_steps", touched * taken / ranks, torch.float64)
        stepped, old = [_local(p) for p, _ in before.values()], [value for _, value in before.values()]
        weights = norms_of(old)
        torch._foreach_sub_(old, stepped)
        norms = torch.stack([weights, norms_of(old)])
        norms = torch.where(finite & (norms.sum() < math.inf).to(device), norms, 0.0)
        index, _ = self._place(before, norms.device)
        self._add(counters, "weight", index, norms[0], share)
        self._add(counters, "update", index, norms[1], share)
        total: Tensor = torch.linalg.vector_norm(torch.cat([step.norms[0].to(device) for step in steps]))
        return total

    def _add(self, counters: Counters, field: str, index: Tensor, norms: Tensor, share: float) -> None:
        total = counters.get("layers", field, (len(self.names),), torch.float64, norms.device)
        total.index_add_(0, index, norms.to(total.dtype).square_(), alpha=share)

    def _place(self, ids: Iterable[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers of the parameters' layers, and 1 for each layer that has one; on the device, made once."""
        key = tuple(ids)
        if key not in self._places or self._places[key][0].device != device:
            index = torch.tensor([self._layer_of[i] for i in key])
            touched = torch.zeros(len(self.names)).index_fill_(0, index, 1.0)
            self._places[key] = (index.to(device), touched.to(device))
        return self._places[key]

    def _index(self, module: nn.Module, known: tuple[Any, ...]) -> None:
        now = known or structure(module)
        if now is self._structure or now == self._structure:
            return
        self._structure = now
        names: dict[str, int] = {}
        layer_of = {}
        for name, parameter in module.named_parameters():
            layer = clean_name(name.rpartition(".")[0]) or "model"
            layer_of[id(parameter)] = names.setdefault(layer, len(names))
        self._layer_of, self.names, self._places = layer_of, list(names), {}


def _local(tensor: Any) -> Tensor:
    # of a sharded tensor the part that is here
    local: Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor
    return local


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Norms in float32, or in float64 if that is what there is, on one device."""
    parts = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    norms = torch._foreach_norm(parts, 2, wide)
    if any(norm.device != norms[0].device for norm in norms):
        norms = tuple(norm.to(norms[0].device) for norm in norms)
    return torch.stack(norms)
