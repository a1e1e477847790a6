"""Recognising in a step how a model is wired: layers with nothing between them, data past the code, a posterior."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.watch.lineage import Lineage, Made
from lightning_ae.diagnostics.watch.trace import Trace

_JOINS = {torch.cat, torch.concat, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_EXPONENTIALS = {torch.exp, Tensor.exp}


class Pattern(NamedTuple):
    """Something that was recognised.

    Attributes:
        kind: ``"linear stack"``: a layer reads another's output, with nothing in between that is not linear;
            ``"skip"``: data are added or joined to what is computed from them, and a prediction comes of it;
            ``"chain"``: a layer reads another's output, whatever is in between;
            ``"posterior"``: noise is scaled by the exponential of what a layer gives.
        frame: name of the module in which it happened.
        layers: of a stack or chain the inner and the outer layer.
        tensors: of a posterior mean and log-variance, of a skip the data, detached.
    """

    kind: Literal["linear stack", "chain", "skip", "posterior"]
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
        #: tensors that come of a join with data: where, and the data
        self._skips: dict[int, tuple[weakref.ref[Tensor], str, Tensor]] = {}

    def skip(self, prediction: int) -> Pattern | None:
        """The join with data that a prediction comes of, if it does."""
        found = self._skips.get(prediction)
        return None if found is None or found[0]() is None else Pattern("skip", found[1], (), (found[2],))

    def _past(self, given: list[Tensor]) -> tuple[str, Tensor] | None:
        if not self._skips:
            return None
        known = (self._skips[id(a)] for a in given if id(a) in self._skips and self._skips[id(a)][0]() is a)
        found = next(known, None)
        return None if found is None else found[1:]

    def clear(self) -> None:
        """Forget all tensors."""
        self._learned.clear()
        self._scales.clear()
        self._skips.clear()

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
        joined = [a for a in data if a.is_floating_point() and a.ndim > 1] if func in _JOINS and learned else []
        past = (frame, joined[0].detach()) if joined else self._past(given)
        if past is not None:
            self._skips[id(out)] = (weakref.ref(out), *past)
        if made is not None and made.name == "layer" and made.weight is not None:
            below = self.lineage.of(made.source)
            # a batch normalisation and a dropout are linear where it counts: at prediction
            if below and below[-1].name == "layer":
                yield Pattern("chain", frame, (below[-1], made))
                if all(m.name in ("dropout", "batch_norm") for m in below[:-1]):
                    yield Pattern("linear stack", frame, (below[-1], made))
        if func in _EXPONENTIALS and given:
            self._scale(given[0], out)
        elif func in _PRODUCTS and len(given) == 2 and self._scales:
            scale, noise = given if id(given[0]) in self._scales else given[::-1]
            found = self._scales.get(id(scale))
            drawn = not noise.requires_grad and not self.lineage.is_data(noise) and noise.shape == scale.shape
            if found is not None and found[0]() is scale and drawn:
                yield Pattern("posterior", frame, (), found[1:])

    def _is_learned(self, tensor: Tensor) -> bool:
        found = self._learned.get(id(tensor))
        return found is not None and found() is tensor and not isinstance(tensor, nn.Parameter)

    def _scale(self, source: Tensor, out: Tensor) -> None:
        """Remember an exponential of what a layer gives, as a deviation that noise may be scaled by."""
        at = Trace(source)
        for made in self.lineage.of(source):
            if made.name in ("scale", "divide", "clamp", "tanh", "add"):
                at = made.source
        mean = self.lineage.sister(at)
        if mean is not None:  # a deviation exp(a) is of the log-variance 2a
            self._scales[id(out)] = (weakref.ref(out), mean, 2 * source.detach())
