"""Places where activations are applied, one call of one, and who hears of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.watch.activations import Activation
from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.flow import Origin, Reader
from lightning_ae.diagnostics.watch.part import ALL, part_of
from lightning_ae.diagnostics.watch.patterns import Pattern

#: What compilers and wrappers put into the names of modules.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def clean_name(name: str) -> str:
    """A module's name without what compilers and wrappers put into it.

    Example:
        >>> clean_name("encoder._orig_mod.0._checkpoint_wrapped_module")
        'encoder.0'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def structure(root: nn.Module) -> tuple[Any, ...]:
    """What changes if a module or parameter of a model is added, taken away or replaced; cheaper than their names."""
    found: list[Any] = []
    seen: set[int] = set()
    todo = [root]
    while todo:
        module = todo.pop()
        found.append(id(module))
        if id(module) in seen:
            continue
        seen.add(id(module))
        found += map(id, module._parameters.values())
        found += module._modules.keys()  # that of a scripted module is no dict
        todo += [child for child in module._modules.values() if child is not None]
    return tuple(found)


@dataclass(eq=False)
class Site:
    """A place in the model where an activation is applied.

    Attributes:
        name: the activation module's name, or that of the module around a call and the function's, as
            ``decoder.relu``; ``#1``, ``#2`` … after it where the same comes again.
        activation: which function.
        units: how many: channels for a convolution, features otherwise.
        unit_dim: their axis, counted from the end.
        origin: weight, bias and normalisation that make the pre-activation, as far as known.
        interval: outputs strictly inside have a slope; None if there is no hard zero.
        readers: weights that read the output.
        unknown_readers: whether something that is no parameter of the model reads it too.
    """

    name: str
    activation: Activation
    units: int
    unit_dim: int
    origin: Origin | None = None
    interval: tuple[float, float] | None = None
    readers: set[Reader] = field(default_factory=set)
    unknown_readers: bool = False

    def part(self, shape: Sequence[int], number: int | None) -> slice:
        """The examples of an output, or of its gradient, that are counted in a step."""
        return part_of(shape, number) if len(shape) + self.unit_dim > 0 else ALL

    def other_dims(self, y: Tensor) -> list[int]:
        """All axes of an output but that of the units."""
        return [dim for dim in range(y.ndim) if dim != self.unit_dim + y.ndim]


class SiteInfo(NamedTuple):
    """What a report says of a site: its name, its activation, how many units, whether it can be exactly zero."""

    name: str
    activation: str
    units: int
    hard: bool


class Event:
    """One call of an activation in a forward pass; what several listeners need is computed once.

    Counts are of the examples in :attr:`part`.

    Attributes:
        site: where.
        z: pre-activation, None if it was overwritten; detached.
        y: output; detached.
        options: arguments of the call.
        mask: 1 where a position counts, broadcastable to ``y``; or None.
        part: the examples that are counted, all or every k-th: see :func:`part_of`.
    """

    def __init__(
        self,
        site: Site,
        z: Tensor | None,
        y: Tensor,
        options: dict[str, Any],
        mask: Tensor | None,
        scratch: dict[Any, Tensor] | None = None,
        number: int | None = None,
    ) -> None:
        self.site, self.z, self.y, self.options, self.mask = site, z, y, options, mask
        self.part = site.part(y.shape, number)
        self._y = self.of_part(y)
        self._scratch = {} if scratch is None else scratch
        self._live: Tensor | None = None

    def of_part(self, tensor: Tensor) -> Tensor:
        """Of the output, or of what is like it, the examples that are counted."""
        return tensor if self.part is ALL or len(tensor) != len(self.y) else tensor[self.part]

    def counted_mask(self) -> Tensor | None:
        """The mask of the examples that are counted."""
        return None if self.mask is None else self.of_part(self.mask)

    def live(self) -> Tensor:
        """Elements of each unit that have a slope, ``(units,)`` int64, for an activation with a hard zero."""
        if self._live is None:
            assert self.site.interval is not None
            low, high = self.site.interval
            if low == 0 and high == float("inf"):
                # the sign of a ReLU's output is 1 where it fires, and 0 for NaN; summing it is fastest by far
                fires = torch.sign(self._y, out=self._room())
            else:
                fires = (self._y.gt(low) & self._y.lt(high)).to(torch.float32)
            self._live = self.sum(fires)
        return self._live

    def _room(self) -> Tensor | None:
        """Memory as large as the output, used again on the CPU, where fresh pages cost more than the sum itself."""
        y = self._y
        if y.device.type != "cpu":
            return None  # kept between steps it would be missing where memory is scarce
        key = (y.device, y.dtype)
        room = self._scratch.get(key)
        if room is None or room.numel() < y.numel():
            with torch.inference_mode(False):
                room = self._scratch[key] = torch.empty(y.numel(), device=y.device, dtype=y.dtype)
        if y.ndim == 4 and self.y.is_contiguous(memory_format=torch.channels_last):
            return room[: y.numel()].view(*(y.shape[i] for i in (0, 2, 3, 1))).permute(0, 3, 1, 2)
        return room[: y.numel()].view(y.shape)

    def sum(self, elements: Tensor) -> Tensor:
        """Sum of 0s and 1s, of the examples that are counted, over all but the units, ``(units,)`` int64."""
        if (mask := self.counted_mask()) is not None:
            elements = elements * mask
        return self._add_up(elements, whole=True)

    def magnitude(self) -> Tensor:
        """Sum of absolute outputs over all but the units, ``(units,)``, float32 or float64."""
        name = self.site.activation.name
        size = self._y if name in ("relu", "relu6", "sigmoid", "softplus") else torch.abs(self._y, out=self._room())
        if (mask := self.counted_mask()) is not None:
            size = torch.where(mask > 0, size, 0.0)  # padding may hold NaN
        return self._add_up(size, whole=False)

    def _add_up(self, elements: Tensor, whole: bool) -> Tensor:
        dims = self.site.other_dims(elements)
        if not dims:
            return elements.round().long() if whole else elements.float()
        # float32 is exact up to 2²⁴; what has more positions is added up in two stages, whole numbers in the second,
        # and so is a map, since one sum over batch and space is slower
        staged = elements.ndim > 2 and dims[0] == 0 and dims[-1] == elements.ndim - 1
        inner = dims[1:] if staged or elements.numel() >= 2**24 * self.site.units else dims
        total = elements.sum(inner, dtype=torch.float32) if inner else elements
        total = total.long() if whole else total
        return total if inner == dims else total.sum(0 if dims[0] < elements.ndim + self.site.unit_dim else 1)

    def positions(self) -> int | Tensor:
        """Elements that each unit has in this call, of the examples that are counted."""
        mask = self.counted_mask()
        if mask is None:
            return self._y.numel() // self.site.units
        shape = [size if dim != self._y.ndim + self.site.unit_dim else 1 for dim, size in enumerate(self._y.shape)]
        return mask.expand(shape).sum(dtype=torch.float64).long()

    def examples(self) -> int | Tensor:
        """Examples in this call that are counted, those without a position that counts left out."""
        first = self._y.shape[0] if self._y.ndim + self.site.unit_dim > 0 else 1
        mask = self.counted_mask()
        if mask is None:
            return first
        return (mask.expand(first, *mask.shape[1:]).flatten(1) > 0).any(1).sum()


#: What a listener may be told of: names of its methods.
EVENTS = ("on_activation", "on_gradient", "on_module", "on_loss", "on_entry", "on_pattern")


def hears(listener: Any, event: str) -> bool:
    """Whether a listener is told of an event: of all that it has a method for, unless its method ``hears`` says no."""
    asked = getattr(type(listener), "hears", None)
    return hasattr(listener, event) if asked is None else bool(asked(listener, event))


class Listener(Protocol):
    """What hears of a step.

    One that does not need all that it could be told may have a method ``hears(event) -> bool`` beside these: what
    nobody wants to hear is not looked for.
    """

    def on_activation(self, event: Event) -> None:
        """An activation was applied in a forward pass."""

    def on_gradient(self, site: Site, grad_z: Tensor, grad_y: Tensor) -> None:
        """A gradient has passed an activation, from its output to its input."""

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A module of the model has returned, in a forward pass."""

    def on_loss(self, comparison: Comparison) -> None:
        """A loss has compared a prediction with a target."""

    def on_entry(self, name: str, module: nn.Module, x: Tensor) -> None:
        """A module with weights has read data."""

    def on_pattern(self, pattern: Pattern) -> None:
        """Something was recognised in how the model is wired."""
