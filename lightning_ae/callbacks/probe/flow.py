"""Where a tensor comes from: which axis holds its units, which weight made it, and which weights read it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Reader:
    """A weight that reads the units of a site.

    Attributes:
        weight: the parameter's name.
        repeat: inputs of the weight for each unit: more than one where a (C, H, W) map was flattened.
        dim: the axis of the weight that runs over its inputs.
    """

    weight: str
    repeat: int
    dim: int


@dataclass(frozen=True)
class Origin:
    """What is known of a tensor.

    Attributes:
        unit_dim: the axis of its units, counted from the end.
        weight: name of the parameter that made them, if it is one of the model's.
        weight_dim: the axis of that parameter that runs over the units.
        bias: name of the bias added to them.
        norm: names of scale and shift of a normalisation in between.
        site: the activation that they have passed.
        repeat: neighbouring positions on ``unit_dim`` that belong to one unit.
    """

    unit_dim: int
    weight: str | None = None
    weight_dim: int = 0
    bias: str | None = None
    norm: tuple[str, ...] = ()
    site: Any = None
    repeat: int = 1


#: Functions with a weight as second argument, and the axis of the units they give, counted from the end.
_PRODUCERS: dict[Any, int] = {
    functional.linear: -1,
    functional.conv1d: -2,
    functional.conv2d: -3,
    functional.conv3d: -4,
    functional.conv_transpose1d: -2,
    functional.conv_transpose2d: -3,
    functional.conv_transpose3d: -4,
    functional.bilinear: -1,
    torch.matmul: -1,
    torch.mm: -1,
    torch.bmm: -1,
    torch.addmm: -1,
    torch.baddbmm: -1,
    Tensor.matmul: -1,
    Tensor.__matmul__: -1,
    functional.embedding: -1,
}
_TRANSPOSED = {functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d}
_READERS = {functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, *_TRANSPOSED}
_NORMS = {functional.batch_norm: 3, functional.instance_norm: 3, functional.group_norm: 2, functional.layer_norm: 2}
#: Functions after which an axis of the same number may hold something else.
_MOVES = {
    torch.transpose,
    torch.permute,
    torch.movedim,
    torch.swapaxes,
    torch.reshape,
    torch.cat,
    Tensor.transpose,
    Tensor.permute,
    Tensor.movedim,
    Tensor.swapaxes,
    Tensor.t,
    Tensor.view,
    Tensor.reshape,
    Tensor.__getitem__,
    Tensor.unfold,
    functional.pixel_shuffle,
    functional.pixel_unshuffle,
}


@dataclass
class Flow:
    """Follows tensors through the functions of a step.

    Args:
        parameters: names by the ``id`` of the parameter.
    """

    parameters: dict[int, str]
    _origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget all tensors."""
        self._origins.clear()

    def of(self, tensor: Any) -> Origin | None:
        """What is known of a tensor."""
        found = self._origins.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def unit_dim(self, tensor: Tensor) -> int:
        """The axis of the units, counted from the end: as the producing layer says, else the channels of an image."""
        origin = self.of(tensor)
        if origin is not None and -origin.unit_dim <= tensor.ndim and origin.repeat == 1:
            return origin.unit_dim
        return -1 if tensor.ndim <= 3 else 1 - tensor.ndim

    def mark(self, tensor: Tensor, origin: Origin) -> None:
        """Remember something of a tensor."""
        self._origins[id(tensor)] = (weakref.ref(tensor), origin)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Follow one call."""
        source = next((o for o in map(self.of, _tensors(args)) if o is not None), None)
        if func in _PRODUCERS:
            self.mark(out, self._produced(func, args, kwargs))
            if func in _READERS and source is not None and source.site is not None and len(args) > 1:
                self._read(func, args, source)
        elif source is not None:
            moved = _moved(func, args, source, out)
            if moved is not None:
                if func in _NORMS:
                    moved = replace(moved, norm=(*moved.norm, *self._names_of(func, args, kwargs)))
                self.mark(out, moved)

    def _produced(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        name = self.parameters.get(id(weight)) if func in _READERS else None
        dim = 1 if func in _TRANSPOSED else 0
        if name is not None and func not in (functional.linear,):
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            name = name if groups == 1 else None
        return Origin(_PRODUCERS[func], name, dim, self.parameters.get(id(bias)))

    def _read(self, func: Any, args: tuple[Any, ...], source: Origin) -> None:
        name = self.parameters.get(id(args[1]))
        dim = 0 if func in _TRANSPOSED else 1
        if name is not None:
            source.site.readers.add(Reader(name, source.repeat, dim))
        else:
            source.site.unknown_readers = True

    def _names_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        first = _NORMS[func]
        affine = [*args[first : first + 2], kwargs.get("weight"), kwargs.get("bias")]
        return [self.parameters[id(p)] for p in affine if isinstance(p, nn.Parameter) and id(p) in self.parameters]


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    return [argument for argument in args if isinstance(argument, Tensor)]


def _moved(func: Any, args: tuple[Any, ...], source: Origin, out: Tensor) -> Origin | None:
    """The origin after a function without weights; None if the axes are no longer known."""
    before = next(a for a in args if isinstance(a, Tensor))
    if func in _MOVES and out.shape == before.shape:
        return None if func not in (Tensor.view, Tensor.reshape, torch.reshape) else source
    if out.ndim == before.ndim and func not in _MOVES:
        return source if out.shape[source.unit_dim] == before.shape[source.unit_dim] else None
    flattened = out.ndim == 2 < before.ndim and out.shape[0] == before.shape[0] and source.unit_dim == 1 - before.ndim
    if flattened and out.shape[1] == before[0].numel():
        return replace(source, unit_dim=-1, repeat=before[0, 0].numel())
    return None
