"""What a step's tensors are made of: which are data, and through which functions each has come."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.diagnostics.watch.activations import FUNCTIONS
from lightning_ae.diagnostics.watch.trace import Trace

_LAYERS = (
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
#: Functions whose result is remembered, by the name under which it is.
_NAMES: dict[Any, str] = {
    **{func: activation.name for func, activation in FUNCTIONS.items()},
    **dict.fromkeys([functional.softmax, torch.softmax, Tensor.softmax], "softmax"),
    **dict.fromkeys([functional.log_softmax, torch.log_softmax, Tensor.log_softmax], "log_softmax"),
    **dict.fromkeys(_LAYERS, "layer"),
    **dict.fromkeys(_DROPOUTS, "dropout"),
    functional.batch_norm: "batch_norm",
    **dict.fromkeys([functional.layer_norm, functional.group_norm, functional.instance_norm], "norm"),
    **dict.fromkeys([torch.log, Tensor.log, torch.log_], "log"),
    **dict.fromkeys([torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, Tensor.clamp_], "clamp"),
    **dict.fromkeys([Tensor.div, torch.div, Tensor.__truediv__, torch.true_divide], "divide"),
    **dict.fromkeys([Tensor.__add__, Tensor.add, torch.add], "add"),
    **dict.fromkeys([Tensor.__mul__, Tensor.__rmul__, Tensor.mul, torch.mul], "scale"),
}
#: What has the shape of its argument and nothing else of it.
_RANDOM = {
    torch.randn_like,
    torch.rand_like,
    torch.randint_like,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    torch.empty_like,
    Tensor.new_ones,
    Tensor.new_zeros,
    Tensor.new_full,
    Tensor.new_empty,
    Tensor.new_tensor,
}
#: What takes no more than shape, type or device of its second argument.
_LIKE = {Tensor.type_as, Tensor.to, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
#: What may stand between a probability and its logarithm.
_GUARDS = {"clamp", "divide", "add"}
#: Functions whose argument may be asked for: what a logarithm is of.
_KEEPS_SOURCE = {"log", "log_softmax", *_GUARDS}
#: What is applied to the output of a layer that is no code.
_ENDS_LAYER = {activation.name for activation in FUNCTIONS.values()}


class Made(NamedTuple):
    """A result of one of the functions that are remembered.

    Attributes:
        name: of the function.
        tensor: the result; its numbers are kept if a layer has made it, until an activation is applied to it.
        source: the function's first argument; its numbers are kept if they may be what a logarithm is of.
        weight: its second argument, if that is a parameter.
        width: length of the axis over which a softmax normalises; 0 for others.
        rate: share of elements that a dropout drops; 0 for others.
        groups: of a convolution.
        frame: name of the module that called it.
    """

    name: str
    tensor: Trace
    source: Trace
    weight: Tensor | None
    width: int
    rate: float
    groups: int
    frame: str


class Lineage:
    """Follows data and the last results of a step.

    Args:
        batch: tensors, or tuples, lists or dicts of them; what is computed from them alone, without a parameter that
            learns, is data too.
        memory: how many results are remembered, and kept in memory.
    """

    def __init__(self, batch: Any = None, memory: int = 32) -> None:
        self._storages: dict[int, Tensor] = {}
        self._data: dict[int, weakref.ref[Tensor]] = {}
        self._made: deque[Made] = deque(maxlen=memory)
        for tensor in _all_tensors(batch):
            if (storage := _storage(tensor)) >= 0:
                self._storages[storage] = tensor

    def clear(self) -> None:
        """Forget all tensors."""
        self._data.clear()
        self._made.clear()
        self._storages.clear()

    def is_data(self, tensor: Any) -> bool:
        """Whether a tensor is of the batch, or made of it without anything that learns."""
        if not isinstance(tensor, Tensor) or tensor.requires_grad:
            return False
        found = self._data.get(id(tensor))
        if found is None or found() is not tensor:
            return bool(self._storages) and _storage(tensor) in self._storages and not isinstance(tensor, nn.Parameter)
        return not isinstance(tensor, nn.Parameter)

    def called(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor, frame: str
    ) -> Made | None:
        """Follow one call; returns what is remembered of it."""
        listed = args[0][:4] if args and isinstance(args[0], (list, tuple)) else ()
        drawn = func in _RANDOM
        if (
            not out.requires_grad
            and not drawn
            and any(self.is_data(a) for a in (args[:1] if func in _LIKE else (*args, *listed)))
        ):
            self._data[id(out)] = weakref.ref(out)
        name = _NAMES.get(func)
        if name is None or out.layout is not torch.strided:
            return None
        source = args[0] if args else kwargs.get("input")
        if not isinstance(source, Tensor) or (name == "scale" and any(isinstance(a, Tensor) for a in args[1:2])):
            return None
        width, rate, groups, weight = 0, 0.0, 1, None
        if name == "softmax" or name == "log_softmax":
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            dim = dim if isinstance(dim, int) else 0 if out.ndim in (0, 1, 3) else 1
            width = out.shape[dim] if out.ndim else 1
        elif name == "dropout":
            training = args[2] if len(args) > 2 else kwargs.get("training", True)
            rate = float(args[1] if len(args) > 1 else kwargs.get("p", 0.5)) if training else 0.0
        elif name == "layer":
            second = args[1] if len(args) > 1 else kwargs.get("weight")
            weight = second.detach() if isinstance(second, Tensor) else None
            if func is not functional.linear:
                groups = int(args[6] if len(args) > 6 else kwargs.get("groups", 1))
        made = Made(
            name, Trace(out, name == "layer"), Trace(source, name in _KEEPS_SOURCE), weight, width, rate, groups, frame
        )
        if name in _ENDS_LAYER or (name in ("batch_norm", "norm") and out.ndim > 2):
            self._release(made.source)
        self._made.append(made)
        return made

    def _release(self, source: Trace) -> None:
        for made in reversed(self._made):
            if made.tensor.kept is not None and made.tensor.is_of(source):
                made.tensor.release()
                return

    def parts(self, args: tuple[Any, ...], out: Any) -> None:
        """Follow a call that gives several tensors, such as a split."""
        if isinstance(out, (tuple, list)) and any(self.is_data(a) for a in args):
            for part in out:
                if isinstance(part, Tensor) and not part.requires_grad:
                    self._data[id(part)] = weakref.ref(part)

    def of(self, tensor: Tensor | Trace) -> list[Made]:
        """The functions that a tensor has come through, the last one first, as far back as a layer or a gap."""
        found: list[Made] = []
        at: Tensor | Trace = tensor
        for made in reversed(self._made):
            if made.tensor.is_of(at):
                found.append(made)
                if made.name == "layer":
                    break
                at = made.source
        return found

    def sister(self, tensor: Tensor | Trace) -> Tensor | None:
        """The other of two outputs of one input: of two layers of the same width, or of the halves of one."""
        tensor = tensor if isinstance(tensor, Trace) else Trace(tensor)
        own = next((m for m in reversed(self._made) if m.name == "layer" and m.tensor.is_of(tensor)), None)
        if own is not None:
            for made in reversed(self._made):
                twin = made.name == "layer" and made is not own and made.tensor.shape == own.tensor.shape
                if twin and made.source.is_of(own.source):
                    return made.tensor.kept
            return None
        for made in reversed(self._made):
            whole = made.tensor.kept
            if whole is None or made.name != "layer" or made.tensor.storage != tensor.storage:
                continue
            if whole.ndim == len(tensor.shape) and 2 * tensor.shape.numel() == whole.numel():
                dim = next(d for d in range(whole.ndim) if whole.shape[d] != tensor.shape[d])
                parts = whole.chunk(2, dim)
                return next((part for part in parts if not tensor.is_of(part)), None)
        return None

    def probability(self, tensor: Tensor) -> Tensor | None:
        """What a tensor is the logarithm of, without what guards it from 0; None if it is no logarithm."""
        path = self.of(tensor)
        if not path or path[0].name != "log":
            return None
        at = path[0].source
        for made in path[1:]:
            if made.name not in _GUARDS:
                break
            at = made.source
        return at.kept


def _all_tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from _all_tensors(item)
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from _all_tensors(item)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or -1
    except (RuntimeError, NotImplementedError):
        return -1  # sparse tensors, and those of functorch, have none
