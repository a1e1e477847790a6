"""Recognising in a step how a model is wired: layers with nothing between them, data past the code, a posterior."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.watch.lineage import Lineage, Made

_JOINS = {torch.cat, torch.concat, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_EXPONENTIALS = {torch.exp, Tensor.exp}


class Pattern(NamedTuple):
    """Something that was recognised.

    Attributes:
        kind: ``"linear stack"``: a layer reads another's output, with nothing in between that is not linear;
            ``"skip"``: data as large as the batch's first tensor are added or joined to what is computed from them;
            ``"posterior"``: noise is scaled by the exponential of what a layer gives.
        frame: name of the module in which it happened.
        layers: of a stack the inner and the outer layer.
        tensors: of a posterior mean and log-variance, detached.
    """

    kind: Literal["linear stack", "skip", "posterior"]
    frame: str
    layers: tuple[Made, ...] = ()
    tensors: tuple[Tensor, ...] = ()


class Patterns:
    """Looks at each call of a step.

    Args:
        lineage: what is known of the step's tensors.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.lineage = lineage
        #: tensors computed from data by what learns
        self._learned: dict[int, weakref.ref[Tensor]] = {}
        #: exponentials, with the mean and log-variance that they could be of
        self._scales: dict[int, tuple[weakref.ref[Tensor], Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget all tensors."""
        self._learned.clear()
        self._scales.clear()

    def of(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor, frame: str, made: Made | None
    ) -> Iterator[Pattern]:
        """What a call completes."""
        if not out.requires_grad:
            return
        listed = args[0] if args and isinstance(args[0], (list, tuple)) else args
        given = [a for a in listed if isinstance(a, Tensor)]
        learned = [a for a in given if self._is_learned(a)]
        data = [a for a in given if self.lineage.is_data(a)]
        if learned or data:
            self._learned[id(out)] = weakref.ref(out)
        if func in _JOINS and learned and any(a.numel() == self.lineage.input_size for a in data):
            yield Pattern("skip", frame)
        if made is not None and made.name == "layer" and made.weight is not None:
            below = self.lineage.before(made)
            # a batch normalisation and a dropout are linear where it counts: at prediction
            if below and below[-1].name == "layer" and all(m.name in ("dropout", "norm") for m in below[:-1]):
                yield Pattern("linear stack", frame, (below[-1], made))
        if func in _EXPONENTIALS and given:
            self._scale(given[0], out)
        elif func in _PRODUCTS and len(given) == 2 and self._scales:
            scale, noise = given if id(given[0]) in self._scales else given[::-1]
            found = self._scales.get(id(scale))
            if found is not None and found[0]() is scale and not noise.requires_grad and noise.shape == scale.shape:
                yield Pattern("posterior", frame, (), found[1:])

    def _is_learned(self, tensor: Tensor) -> bool:
        found = self._learned.get(id(tensor))
        return found is not None and found() is tensor and not isinstance(tensor, nn.Parameter)

    def _scale(self, source: Tensor, out: Tensor) -> None:
        """Remember an exponential whose argument is what a layer gives, perhaps halved."""
        at = source.detach()
        for made in self.lineage.of(source):
            if made.name in ("scale", "divide", "clamp", "tanh"):
                at = made.source
        mean = self.lineage.sister(at)
        if mean is not None:
            self._scales[id(out)] = (weakref.ref(out), mean, at)
