"""Changing single units of a model in place, with all that optimizers keep of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_ae.diagnostics.watch.site import clean_name

#: What optimizers keep that is a copy of the weights and no moment: averages of ASGD, iterates of schedule-free ones.
_COPIES = ("ax", "z")


class Edit(NamedTuple):
    """A change of some rows of a parameter or buffer.

    Attributes:
        name: which.
        dim: the axis along which ``rows`` counts.
        rows: the entries, int64.
        how: ``"fill"`` with a value, ``"add"`` it, or ``"draw"`` from a normal distribution with this deviation.
        value: the number.
    """

    name: str
    dim: int
    rows: Tensor
    how: Literal["fill", "add", "draw"]
    value: float


class Repair(NamedTuple):
    """All changes for the dead units of a site.

    Attributes:
        epoch: in which they were found.
        site: its name.
        units: which, int64.
        edits: the changes.
    """

    epoch: int
    site: str
    units: Tensor
    edits: list[Edit]

    def to_list(self) -> list[Any]:
        """As lists, numbers and tensors, for a checkpoint."""
        return [self.epoch, self.site, self.units, [list(edit) for edit in self.edits]]

    @classmethod
    def from_list(cls, row: Sequence[Any]) -> Repair:
        """From what :meth:`to_list` gave."""
        return cls(row[0], row[1], row[2], [Edit(*edit) for edit in row[3]])


def operate(trainer: L.Trainer, module: L.LightningModule, repairs: Iterable[Repair], seed: int) -> None:
    """Carry out repairs in place; random numbers are drawn on the first rank, with a generator of their own.

    Gradients and optimizer state of the changed entries, every tensor of the parameter's shape, become zero.
    """
    edits = [edit for repair in repairs for edit in repair.edits]
    tensors: dict[str, Tensor] = {clean_name(name): tensor for name, tensor in module.named_buffers()}
    tensors.update({clean_name(name): tensor for name, tensor in module.named_parameters()})
    drawn: list[Tensor] = []
    if trainer.is_global_zero:
        generator = torch.Generator().manual_seed(seed)
        for edit in edits:
            if edit.how == "draw":
                shape = list(tensors[edit.name].shape)
                shape[edit.dim] = len(edit.rows)
                drawn.append(torch.randn(shape, generator=generator) * edit.value)
    if trainer.world_size > 1:
        drawn = trainer.strategy.broadcast(drawn)
    with torch.no_grad():
        for edit in edits:
            tensor = tensors[edit.name]
            index = edit.rows.to(tensor.device)
            if edit.how == "fill":
                tensor.index_fill_(edit.dim, index, edit.value)
            elif edit.how == "add":
                tensor.index_add_(edit.dim, index, torch.full_like(tensor.index_select(edit.dim, index), edit.value))
            else:
                tensor.index_copy_(edit.dim, index, drawn.pop(0).to(tensor))
            _forget(trainer.optimizers, tensor, edit.dim, index)


def _forget(optimizers: Iterable[torch.optim.Optimizer], tensor: Tensor, dim: int, index: Tensor) -> None:
    if tensor.grad is not None:
        tensor.grad.index_fill_(dim, index, 0.0)
    for optimizer in optimizers:
        if tensor not in optimizer.state:
            continue
        for name, kept in optimizer.state[tensor].items():
            if isinstance(kept, Tensor) and kept.shape == tensor.shape and tensor.ndim > 0:
                where = index.to(kept.device)
                if name in _COPIES:
                    kept.index_copy_(dim, where, tensor.index_select(dim, index).to(kept))
                else:
                    kept.index_fill_(dim, where, 0)
