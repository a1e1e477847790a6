"""Hearing what a loss compares with what: torch's losses, and those written out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.diagnostics.watch.lineage import Lineage, Made

#: torch's losses between a prediction and a target, which are their first two arguments, by the name that is reported.
LOSSES: dict[Any, str] = {
    functional.mse_loss: "mse_loss",
    functional.l1_loss: "l1_loss",
    functional.smooth_l1_loss: "smooth_l1_loss",
    functional.huber_loss: "huber_loss",
    functional.binary_cross_entropy: "binary_cross_entropy",
    functional.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    functional.cross_entropy: "cross_entropy",
    functional.nll_loss: "nll_loss",
    functional.kl_div: "kl_div",
    functional.poisson_nll_loss: "poisson_nll_loss",
    functional.gaussian_nll_loss: "gaussian_nll_loss",
    functional.multilabel_soft_margin_loss: "multilabel_soft_margin_loss",
}
#: Losses whose prediction is to be a real number like the target.
REAL = {
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "gaussian_nll_loss",
    "squared difference",
    "absolute difference",
}
#: Losses of probabilities, or of what is made into them.
BINARY = {"binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"}
CLASSES = {"cross_entropy", "nll_loss", "target × log", "target × log_softmax"}
#: Losses that are written out.
BY_HAND = {"squared difference", "absolute difference", "target × log", "target × log_softmax"}

_DIFFERENCES = {torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.subtract, torch.rsub}
_SQUARES = {Tensor.square, torch.square, Tensor.pow, torch.pow, Tensor.__pow__}
_NORMS = {torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm}
_SIZES = {Tensor.abs, torch.abs, Tensor.__abs__}
_PRODUCTS = {Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__}


class Comparison(NamedTuple):
    """A prediction and the target with which a loss compares it.

    Attributes:
        loss: the name of torch's function; ``"squared difference"``, ``"absolute difference"`` or ``"target × log"``
            where it is written out.
        prediction: detached.
        target: detached.
        value: what the loss gave, detached; None where it is written out.
        path: the functions through which the prediction has come since the last layer, the last one first.
        options: the arguments of the call after the first two, by name.
        target_is_data: whether the target is of the batch, or made of it alone.
        target_learns: whether the target depends on what learns.
        key: ``id`` of the prediction, while the call lasts.
    """

    loss: str
    prediction: Tensor
    target: Tensor
    value: Tensor | None
    path: list[Made]
    options: Mapping[str, Any]
    target_is_data: bool
    target_learns: bool
    key: int = 0


class Comparisons:
    """Recognises comparisons in the functions that a step calls.

    Args:
        lineage: what is known of the step's tensors.
        evaluating: whether there are no gradients, so that a prediction cannot be told from data by having one; only
            torch's losses are heard then.
    """

    def __init__(self, lineage: Lineage, evaluating: bool = False) -> None:
        self.lineage, self.evaluating = lineage, evaluating
        #: differences that nobody has squared yet, with what they are of; kept, so that their addresses are not reused
        self._differences: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget all tensors."""
        self._differences.clear()

    def of(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Comparison | None:
        """The comparison that a call makes, if it makes one."""
        if func in LOSSES:
            return self._of_torch(func, args, kwargs, out)
        if func in _DIFFERENCES:
            self._difference(args, out)
        elif self._differences and (func in _SQUARES or func in _SIZES or func in _NORMS):
            return self._sized(func, args)
        elif func in _PRODUCTS and len(args) > 1:
            return self._product(args, out)
        return None

    def _of_torch(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Comparison | None:
        prediction = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if not isinstance(prediction, Tensor) or not isinstance(target, Tensor) or not prediction.numel():
            return None
        if not self.evaluating and not out.requires_grad:
            return None  # a figure for a log
        options = dict(kwargs)
        if func in (functional.cross_entropy, functional.nll_loss):
            options.update(
                zip(("weight", "size_average", "ignore_index", "reduce", "reduction"), args[2:], strict=False)
            )
        elif func is functional.kl_div:
            options.update(zip(("size_average", "reduce", "reduction", "log_target"), args[2:], strict=False))
        elif func is functional.poisson_nll_loss:
            options.update(zip(("log_input",), args[2:], strict=False))
        elif func in (functional.binary_cross_entropy_with_logits, functional.binary_cross_entropy):
            options.update(zip(("weight", "size_average", "reduce", "reduction"), args[2:], strict=False))
        return self._compare(LOSSES[func], prediction, target, out.detach(), options)

    def _difference(self, args: tuple[Any, ...], out: Tensor) -> None:
        if len(args) < 2 or not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
            return
        if out.ndim == 0 or not out.requires_grad or not out.numel():
            return
        a, b = args[0], args[1]
        if a.requires_grad and self.lineage.is_data(b):
            prediction, target = a, b
        elif b.requires_grad and self.lineage.is_data(a):
            prediction, target = b, a
        else:
            return
        if not isinstance(prediction, nn.Parameter) and target.numel() > 1 and target.is_floating_point():
            self._differences[id(out)] = (out, prediction, target)

    def _sized(self, func: Any, args: tuple[Any, ...]) -> Comparison | None:
        found = self._differences.get(id(args[0])) if args else None
        if found is None or found[0] is not args[0]:
            return None
        del self._differences[id(args[0])]
        name = "absolute difference" if func in _SIZES else "squared difference"
        return self._compare(name, found[1], found[2], None, {})

    def _product(self, args: tuple[Any, ...], out: Tensor) -> Comparison | None:
        a, b = args[0], args[1]
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or not out.requires_grad:
            return None
        if a is b and id(a) in self._differences and self._differences[id(a)][0] is a:
            _, prediction, target = self._differences.pop(id(a))
            return self._compare("squared difference", prediction, target, None, {})
        if a.requires_grad and self.lineage.is_data(b):
            log, target = a, b
        elif b.requires_grad and self.lineage.is_data(a):
            log, target = b, a
        else:
            return None
        if log.shape != target.shape or target.numel() < 2:
            return None
        path = self.lineage.of(log)
        logits = path[0].source.kept if path and path[0].name == "log_softmax" else None
        if logits is not None:
            options = {"reduction": "none"}
            return self._compare("target × log_softmax", logits, target, -out.detach(), options, log)
        probability = self.lineage.probability(log)
        if probability is None:
            return None
        return self._compare("target × log", probability, target, -out.detach(), {"reduction": "none"}, log)

    def _compare(
        self,
        loss: str,
        prediction: Tensor,
        target: Tensor,
        value: Tensor | None,
        options: Mapping[str, Any],
        grown: Tensor | None = None,
    ) -> Comparison | None:
        learns = prediction if grown is None else grown
        if not learns.requires_grad and not target.requires_grad and not self.evaluating:
            return None  # a figure for a log, or a step without gradients
        if hasattr(prediction, "to_local") or hasattr(target, "to_local"):
            return None  # parts of a tensor that is spread over devices
        swapped = target.requires_grad and self.lineage.is_data(prediction) and loss in REAL
        if swapped:
            prediction, target = target, prediction
        return Comparison(
            loss,
            prediction.detach(),
            target.detach(),
            value,
            self.lineage.of(prediction),
            options,
            self.lineage.is_data(target),
            target.requires_grad,
            id(prediction),
        )
