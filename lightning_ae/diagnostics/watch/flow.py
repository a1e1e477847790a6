"""Where a tensor comes from: which axis holds its units, which weight made it, and which weights read it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
        rows: neighbouring rows of the weight, and entries of the bias, that make one unit: more than one where a vector
            became a (C, H, W) map.
    """

    unit_dim: int
    weight: str | None = None
    weight_dim: int = 0
    bias: str | None = None
    norm: tuple[str, ...] = ()
    site: Any = None
    repeat: int = 1
    rows: int = 1


_MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
#: Functions with a weight as second argument, and the axis of the units they read and give, counted from the end.
_PRODUCERS: dict[Any, int] = {
    functional.linear: -1,
    functional.conv1d: -2,
    functional.conv2d: -3,
    functional.conv3d: -4,
    functional.conv_transpose1d: -2,
    functional.conv_transpose2d: -3,
    functional.conv_transpose3d: -4,
    functional.bilinear: -1,
    torch.bmm: -1,
    torch.addmm: -1,
    torch.baddbmm: -1,
    functional.embedding: -1,
    **dict.fromkeys(_MATMUL, -1),
}
_TRANSPOSED = {functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d}
_CONVOLUTIONS = {functional.conv1d, functional.conv2d, functional.conv3d, *_TRANSPOSED}
#: The axis of the weight that runs over what it reads; the other one runs over what it gives.
_READ_DIM = {functional.linear: 1, **dict.fromkeys(_CONVOLUTIONS, 1), **dict.fromkeys((*_TRANSPOSED, *_MATMUL), 0)}
#: Where the scale and the shift of a normalisation are among its arguments.
_NORMS = {
    functional.batch_norm: 3,
    functional.instance_norm: 3,
    functional.group_norm: 2,
    functional.layer_norm: 2,
    functional.rms_norm: 2,
}
#: Functions through which every unit reads all others.
_MIXING = {
    functional.group_norm,
    functional.layer_norm,
    functional.rms_norm,
    functional.softmax,
    functional.log_softmax,
    functional.normalize,
    torch.softmax,
    torch.log_softmax,
    Tensor.softmax,
    Tensor.log_softmax,
}
#: Functions that move, add or take away axes, in a way that shows in the shape.
_AXES = {
    torch.transpose,
    torch.permute,
    torch.movedim,
    torch.swapaxes,
    torch.squeeze,
    torch.unsqueeze,
    torch.mean,
    torch.sum,
    torch.amax,
    Tensor.transpose,
    Tensor.permute,
    Tensor.movedim,
    Tensor.swapaxes,
    Tensor.squeeze,
    Tensor.unsqueeze,
    Tensor.t,
    Tensor.mean,
    Tensor.sum,
    Tensor.amax,
    Tensor.mT.__get__,  # type: ignore[attr-defined]
}
_VIEWS = {
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    Tensor.view,
    Tensor.reshape,
    Tensor.flatten,
    Tensor.unflatten,
}
#: Functions after which an axis of the same length may hold something else.
_SHUFFLES = {
    torch.cat,
    torch.stack,
    torch.gather,
    torch.index_select,
    torch.einsum,
    torch.roll,
    torch.flip,
    Tensor.gather,
    Tensor.index_select,
    Tensor.roll,
    Tensor.flip,
    Tensor.__getitem__,
    Tensor.unfold,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    functional.pixel_shuffle,
    functional.pixel_unshuffle,
    functional.channel_shuffle,
    functional.scaled_dot_product_attention,
}


def unit_dim(origin: Origin | None, ndim: int) -> int:
    """The axis of the units, counted from the end: as the producing layer says, else the channels of an image."""
    if origin is not None and -origin.unit_dim <= ndim and origin.repeat == 1:
        return origin.unit_dim
    return -1 if ndim <= 3 else 1 - ndim


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

    def mark(self, tensor: Tensor, origin: Origin) -> None:
        """Remember something of a tensor."""
        self._origins[id(tensor)] = (weakref.ref(tensor), origin)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Follow one call."""
        given = (*args, *kwargs.values()) if kwargs else args
        known = [(t, origin) for t in _tensors(given) if (origin := self.of(t)) is not None] if self._origins else []
        if func in _PRODUCERS:
            for tensor, origin in known:
                self._read(func, args, kwargs, tensor, origin)
            self.mark(out, self._produced(func, args, kwargs))
            return
        if not known or out.ndim == 0:
            return
        tensor, source = known[0]
        moved = _moved(func, args, kwargs, tensor, source, out)
        merged = any(other != source for _, other in known[1:])
        if merged:
            # a sum or product of several: the axis is known if they agree, what made it is not
            agree = moved is not None and all(o.unit_dim == source.unit_dim and o.repeat == 1 for _, o in known)
            moved = Origin(source.unit_dim) if agree else None
        if func in _MIXING or moved is None or merged:
            for _, origin in known:
                if origin.site is not None:
                    origin.site.unknown_readers = True
        if moved is not None:
            if func in _NORMS:
                moved = replace(moved, norm=(*moved.norm, *self._names_of(func, args, kwargs)))
            self.mark(out, moved)
        elif self.of(out) is not None:
            del self._origins[id(out)]  # changed in place

    def _produced(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        # every output of a grouped convolution reads only a part of the inputs
        known = func in _READ_DIM and _groups(func, args, kwargs) == 1
        name = self.parameters.get(id(weight)) if known else None
        if func in _MATMUL and (not isinstance(weight, Tensor) or weight.ndim != 2):
            name = None
        bias = None if func not in _READ_DIM or func in _MATMUL else args[2] if len(args) > 2 else kwargs.get("bias")
        return Origin(_PRODUCERS[func], name, 1 - _READ_DIM.get(func, 1), self.parameters.get(id(bias)))

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, source: Origin) -> None:
        if source.site is None:
            return
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        name, dim = self.parameters.get(id(weight)), _READ_DIM.get(func, 1)
        if (
            name is not None
            and isinstance(weight, Tensor)
            and func in _READ_DIM
            and source.unit_dim == _PRODUCERS[func]
            and weight.ndim > dim
            and weight.shape[dim] == tensor.shape[source.unit_dim]
            and _groups(func, args, kwargs) == 1
        ):
            source.site.readers.add(Reader(name, source.repeat, dim))
        else:
            source.site.unknown_readers = True

    def _names_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        first = _NORMS[func]
        affine = [*args[first : first + 2], kwargs.get("weight"), kwargs.get("bias")]
        return [self.parameters[id(p)] for p in affine if isinstance(p, nn.Parameter) and id(p) in self.parameters]


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found.extend(item for item in argument if isinstance(item, Tensor))
    return found


def _groups(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if func not in _CONVOLUTIONS:
        return 1
    return int(args[6] if len(args) > 6 else kwargs.get("groups", 1))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=256)
def _shape_after(func: Any, sizes: Sequence[int], args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> tuple[int, ...]:
    """The same on a tensor without data, whose unit axis can be told from the others by its length."""
    out: Tensor = func(torch.empty(sizes, device="meta"), *args, **dict(kwargs))
    return tuple(out.shape)


def _moved(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, source: Origin, out: Tensor
) -> Origin | None:
    """The origin after a function without weights; None if the axes are no longer known."""
    if func in _SHUFFLES:
        return None
    unit = tensor.ndim + source.unit_dim
    if func in _AXES:
        if not args or args[0] is not tensor:
            return None
        sizes = tuple(3 if i == unit else 1 if size == 1 else 2 for i, size in enumerate(tensor.shape))
        options = (tuple(_frozen(value) for value in args[1:]), tuple((k, _frozen(v)) for k, v in kwargs.items()))
        shape = _shape_after(func, sizes, *options)
        found = len(shape) == out.ndim and 3 in shape
        return replace(source, unit_dim=shape.index(3) - len(shape)) if found else None
    if func in _VIEWS:
        if out.shape == tensor.shape:
            return source
        if source.unit_dim == -1 and out.ndim > 0 and out.shape[-1] == tensor.shape[-1]:
            return source
        if unit == 1 and out.ndim == 2 < tensor.ndim and out.shape[0] == tensor.shape[0] and tensor.numel():
            return replace(source, unit_dim=-1, repeat=tensor[0, 0].numel() * source.repeat)
        # (B, C, L) and (B, T, D) look alike, but a vector that is unflattened becomes channels
        a_map = out.ndim >= 4 or (out.ndim == 3 and func in (torch.unflatten, Tensor.unflatten))
        if unit == 1 and tensor.ndim == 2 and a_map and len(out) == len(tensor) and _is_fresh(source):
            return replace(source, unit_dim=1 - out.ndim, rows=out[0, 0].numel()) if out.numel() else None
        long, there = ([i for i, size in enumerate(t.shape) if size != 1] for t in (tensor, out))
        if unit in long and [tensor.shape[i] for i in long] == [out.shape[i] for i in there]:
            return replace(source, unit_dim=there[long.index(unit)] - out.ndim)  # axes of length 1 came or went
        return None
    same = out.ndim == tensor.ndim and out.shape[source.unit_dim] == tensor.shape[source.unit_dim]
    return source if same else None


def _is_fresh(source: Origin) -> bool:
    """Whether it is as its weight made it."""
    return source.site is None and not source.norm and source.repeat == 1
