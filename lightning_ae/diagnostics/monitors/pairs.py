"""Sums over a prediction and its target, and what they say: how much better than the best constant it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_ae.diagnostics.monitors.labels import add_classes, add_kind, class_figures
from lightning_ae.diagnostics.watch.comparisons import BINARY, BY_HAND, CLASSES, REAL, Comparison
from lightning_ae.diagnostics.watch.counters import Key
from lightning_ae.losses.base import full_precision

#: Where the output of an activation can lie.
RANGES = {
    "bernoulli": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "softsign": (-1.0, 1.0),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "softplus": (0.0, math.inf),
    "logsigmoid": (-math.inf, 0.0),
    "log_softmax": (-math.inf, 0.0),
}
#: Numbers of an event of which sums are kept; of more every n-th.
MOST_COLUMNS = 2**14
#: Numbers of a batch of which it is seen of what kind they are.
HEAD_ELEMENTS = 2**14
_ROBUST = {"l1_loss", "absolute difference", "smooth_l1_loss", "huber_loss"}
Add = Callable[..., None]


def keeps(activation: str, before: str) -> bool:
    """Whether an activation leaves the output of another as it is: a ReLU what is never negative."""
    low, high = RANGES.get(before, (-math.inf, math.inf))
    return low >= 0 and (activation == "relu" or (activation == "relu6" and high <= 6))


@dataclass
class Pair:
    """What is known of a comparison without looking at numbers.

    Attributes:
        loss: as in :class:`Comparison`; for a model of ours the name of its loss.
        path: names of the functions through which the prediction has come since the last layer, the last one first.
        frames: names of the modules in which they were called, in the same order.
        width: over how many numbers its softmax normalises; 0 if there is none.
        dropped: share of the prediction that a dropout drops.
        prediction_shape: with the batch.
        target_shape: with the batch.
        weighted: whether classes or elements have weights of their own, or labels are smoothed.
        reduction: that of torch's loss; empty where it is written out.
        columns: numbers of a target; ragged: 1 if that changes, as for sequences of several lengths, 2 if the
            length of the last axis does.
        classes: whether the target is an index of a class.
        is_data: whether the target is of the batch.
        learns: whether the target depends on what learns.
    """

    loss: str
    path: list[str] = field(default_factory=list)
    width: int = 0
    dropped: float = 0.0
    prediction_shape: list[int] = field(default_factory=list)
    target_shape: list[int] = field(default_factory=list)
    weighted: bool = False
    classes: bool = False
    is_data: bool = True
    learns: bool = False
    columns: int = 0
    ragged: int = 0
    reduction: str = ""
    frames: list[str] = field(default_factory=list)

    @property
    def activation(self) -> str:
        """The activation that gives the prediction; ``"identity"`` for a layer, and where it is not known."""
        if self.loss == "binary_cross_entropy_with_logits":
            return "bernoulli"
        if self.loss in ("cross_entropy", "target × log_softmax", "nll_loss", "kl_div"):
            return "softmax"
        first = next((name for name in self.path if name != "dropout"), "identity")
        return first if first in RANGES else "identity"

    @property
    def range(self) -> tuple[float, float]:
        """Where the prediction can lie."""
        return RANGES.get(self.activation, (-math.inf, math.inf))

    @property
    def broadcast(self) -> bool:
        """Whether each prediction is compared with several targets: (B, 1) against (B,)."""
        if self.classes or not self.prediction_shape or not self.target_shape:
            return False
        if self.loss in BY_HAND and len(self.prediction_shape) == len(self.target_shape):
            return False  # distances of all to all
        if self.prediction_shape == self.target_shape:
            return False
        try:
            whole: Any = torch.broadcast_shapes(self.prediction_shape, self.target_shape)  # type: ignore[no-untyped-call]
        except RuntimeError:
            return False
        return bool(math.prod(whole) > max(math.prod(self.prediction_shape), math.prod(self.target_shape)))

    def changes(self, target: Tensor) -> bool:
        """Note the shape of a target; whether sums by column are no longer of the same columns."""
        if target.ndim < 2 or self.classes:
            return False
        columns, before = target.numel() // max(1, len(target)), self.columns
        ragged = 2 if target.shape[-1] != self.target_shape[-1] else 1
        self.columns = columns
        if not before or columns == before or self.ragged >= ragged:
            return False
        self.ragged = ragged
        return True

    @classmethod
    def of(cls, heard: Comparison) -> Pair:
        """What is known of a comparison."""
        options = heard.options
        weighted = (
            options.get("weight") is not None
            or options.get("pos_weight") is not None
            or bool(options.get("label_smoothing"))
        )
        classes = heard.loss in CLASSES and not heard.target.is_floating_point()
        softmax = next((made for made in heard.path if made.name in ("softmax", "log_softmax")), None)
        dropout = next((made for made in heard.path[:2] if made.name == "dropout"), None)
        path = [made for made in heard.path if made.name != "dropout" or made.rate > 0]
        return cls(
            heard.loss,
            [made.name for made in path],
            0 if softmax is None else softmax.width,
            0.0 if dropout is None else dropout.rate,
            list(heard.prediction.shape),
            list(heard.target.shape),
            weighted,
            classes,
            heard.target_is_data,
            heard.target_learns,
            reduction="" if heard.loss in BY_HAND else str(options.get("reduction", "mean")),
            frames=[made.frame for made in path],
        )


def add_pair(add: Add, site: str, heard: Comparison, pair: Pair) -> Tensor | None:
    """Add a comparison; returns the squared error of a row, or the loss of classes, for a curve."""
    prediction, target = heard.prediction, heard.target
    if target.numel() == 0 or prediction.numel() == 0:
        return None
    _add_value(add, site, heard)
    if pair.classes:
        return add_classes(add, site, prediction, target, heard)
    if pair.broadcast or prediction.numel() != target.numel() or not prediction.is_floating_point():
        return None
    if heard.loss in ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"):
        prediction = full_precision(prediction).sigmoid()
    elif heard.loss in ("cross_entropy", "target × log_softmax"):
        prediction = full_precision(prediction).softmax(1 if prediction.ndim > 1 and heard.loss[0] == "c" else -1)
    elif heard.loss in ("nll_loss", "kl_div") or (
        heard.loss == "poisson_nll_loss" and heard.options.get("log_input", True)
    ):
        prediction = full_precision(prediction).exp()
    elif heard.loss == "target × log" and prediction.ndim > 1:
        # shares of what claims to be probabilities: without a softmax the logarithm alone is least where all are 1
        prediction = full_precision(prediction)
        prediction = prediction / prediction.sum(-1, keepdim=True).clamp(min=1e-12)
    if heard.loss == "kl_div" and heard.options.get("log_target"):
        target = full_precision(target).exp()
    if heard.loss == "cross_entropy" and target.ndim > 2:
        # a row for each position: classes are on axis 1
        target, prediction = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (target, prediction))
    elif pair.ragged and target.ndim > 1:
        width = target.shape[-1] if pair.ragged == 1 and target.ndim > 2 else 1
        target, prediction = target.reshape(-1, width), prediction.reshape(-1, width)
    rows = (len(target), -1) if target.ndim > 1 else (-1, 1)
    y, y_hat = full_precision(target.float()).reshape(rows), full_precision(prediction).reshape(rows)
    if y.shape[1] > MOST_COLUMNS:
        step = -(-y.shape[1] // MOST_COLUMNS)
        y, y_hat = y[:, ::step], y_hat[:, ::step]
    if heard.loss in _ROBUST and len(y) >= 8:
        _add_robust(add, site, heard, y, y_hat)
    if heard.loss in BINARY or heard.loss in CLASSES:
        inside = y.clamp(0, 1)
        entropy = -(torch.xlogy(inside, inside))
        if heard.loss in BINARY:
            entropy = entropy - torch.xlogy(1 - inside, 1 - inside)
        add(site, "entropy", entropy.sum(), torch.float64)
    if heard.loss in REAL and pair.path[:1] in (["sigmoid"], ["tanh"]):
        # of what is wrong by more than 0.01, who gets less than 1 % of it as gradient of a squared error
        slope = y_hat * (1 - y_hat) if pair.path[0] == "sigmoid" else 1 - y_hat.square()
        wrong = (y_hat - y).abs() > 0.01
        add(site, "wrong", wrong.sum())
        add(site, "starved", (wrong & (2 * slope < 0.01)).sum())
    return add_numbers(add, site, y, y_hat, pair.range)


def _add_value(add: Add, site: str, heard: Comparison) -> None:
    if heard.value is None:
        return
    value = heard.value.float()
    if heard.loss in ("cross_entropy", "nll_loss") and not heard.target.is_floating_point():
        if heard.options.get("reduction", "mean") != "mean":
            value = value.sum() / heard.target.ne(int(heard.options.get("ignore_index", -100))).sum().clamp(min=1)
    elif value.ndim:
        # one number for each element where it is written out, one for each example where torch gives them
        per_row = heard.loss in ("target × log", "target × log_softmax")
        value = value.sum() / max(1, value.numel() // value.shape[-1]) if per_row else value.mean()
    elif heard.options.get("reduction") == "sum":
        soft = heard.loss in CLASSES and heard.target.is_floating_point() and heard.target.ndim > 1
        size = heard.target.numel() // (heard.target.shape[1] if soft else 1)
        value = value / max(1, size)
    finite = value.isfinite()
    add(site, "value", torch.where(finite, value, 0.0), torch.float64)
    add(site, "values", finite)


def _add_robust(add: Add, site: str, heard: Comparison, y: Tensor, y_hat: Tensor) -> None:
    """Add the loss of the prediction and of each batch's median, for losses that outliers do not rule."""
    width = float(heard.options.get("beta", heard.options.get("delta", 1.0)))
    for name, guess in (("own", y_hat), ("median", y.median(0).values.expand_as(y))):
        if heard.loss in ("l1_loss", "absolute difference") or width == 0:
            value = (guess - y).abs().sum()
        else:
            value = functional.huber_loss(guess, y, reduction="sum", delta=width)
        add(site, name, value, torch.float64)


def add_numbers(add: Add, site: str, y: Tensor, y_hat: Tensor, reach: tuple[float, float]) -> Tensor:
    """Add real numbers, ``(rows, columns)`` each; returns the squared error of a row."""
    low, high = reach
    add(site, "rows", len(y))
    # variances about each batch's own mean: exact for data far from 0, where a difference of sums is not
    for name, values in (("x", y), ("x_hat", y_hat)):
        mean = values.mean(0)
        off = (values - mean).square_().sum(0)
        wide = mean if mean.device.type == "mps" else mean.double()
        add(site, name, wide * len(values), torch.float64)
        add(site, f"{name}_square", off + wide.square() * len(values), torch.float64)
        add(site, f"{name}_within", off.sum(), torch.float64)
    error = (y_hat - y).square_().sum()
    add(site, "error", error, torch.float64)
    if low > -math.inf:
        add(site, "at_low", y_hat.clone().le_(low).sum(0).long())  # far faster than a sum of booleans
    # of what kind the numbers are shows in a part of a large batch
    add_kind(add, site, y[: max(8, HEAD_ELEMENTS // y.shape[1])], low, high)
    return error / len(y)


def variance(results: Mapping[Key, Tensor], site: str, name: str) -> Tensor:
    """Of each column over all rows, ``(columns,)``, float64."""
    rows = results[site, "rows"].double()
    mean = results[site, name] / rows
    square = results[site, f"{name}_square"] / rows
    found = (square - mean.square()).clamp(min=0)
    return torch.where(found > 1e-14 * square, found, torch.zeros_like(found))


def _get(results: Mapping[Key, Tensor], site: str, name: str) -> float:
    found = results.get((site, name))
    return 0.0 if found is None else float(found)


def figures(results: Mapping[Key, Tensor], site: str, pair: Pair | None = None) -> dict[str, float]:
    """What the sums of a comparison say, by name; empty if there are too few rows.

    ``relative`` is the loss over that of the best constant, less what no prediction could save: 1 for a model that
    knows no more than label frequencies or means, 0 for a perfect one.
    """
    rows = _get(results, site, "rows")
    values: dict[str, float] = {}
    if _get(results, site, "values"):
        values["value"] = _get(results, site, "value") / _get(results, site, "values")
    if rows < 1:
        return values
    if (site, "classes") in results:
        values |= class_figures(
            results, site, values.get("value", math.nan), pair.weighted if pair is not None else False
        )
    if (site, "error") not in results or rows < 2:
        return values
    spread, x_mean = variance(results, site, "x"), results[site, "x"] / rows
    x_hat_mean = results[site, "x_hat"] / rows
    total, columns = float(spread.sum()), len(x_mean)
    numbers = rows * columns
    head, head_rows = max(1.0, _get(results, site, "head")), max(1.0, _get(results, site, "head_rows"))
    mean = float(x_mean.mean())
    values |= {
        "samples": rows,
        "x_mean": mean,
        "x_std": math.sqrt(max(0.0, float(spread.mean()) + float((x_mean - mean).square().mean()))),
        "x_hat_mean": float(x_hat_mean.mean()),
        "contrast": float(x_hat_mean.std(correction=0) / x_mean.std(correction=0).clamp(min=1e-12)),
        "outside": _get(results, site, "outside") / head,
        "beyond": _get(results, site, "beyond") / head,
        "far": _get(results, site, "far") / head,
        "nonfinite_data": _get(results, site, "nonfinite_data") / head,
        "binary": _get(results, site, "binary") / head,
        "below_zero": _get(results, site, "below") / head,
        "above_one": _get(results, site, "above") / head,
        "one_in_a_row": _get(results, site, "one") / head_rows if columns > 1 else 0.0,
        "starved": _get(results, site, "starved") / max(1.0, _get(results, site, "wrong")),
        "several_in_a_row": _get(results, site, "several") / head_rows if columns > 1 else 0.0,
        "x_variance": total,
        "columns": float(columns),
    }
    if total > 0:
        values["fvu"] = _get(results, site, "error") / (rows * total)
        values["relative"] = values["fvu"]
    within = _get(results, site, "x_within")
    if within > 0:
        values["spread"] = _get(results, site, "x_hat_within") / within
    proper = pair is not None and (pair.loss != "target × log" or "softmax" in pair.path)
    if _get(results, site, "median") > 0:
        values["relative"] = _get(results, site, "own") / _get(results, site, "median")
    if pair is not None and pair.weighted:
        values.pop("relative", None)  # that of the best constant depends on the weights
    if (site, "entropy") in results and pair is not None and proper and "value" in values and not pair.weighted:
        share = x_mean.clamp(1e-12, 1 - 1e-12)
        constant = -(share * share.log())
        if pair.loss in BINARY:
            constant = constant - (1 - share) * (1 - share).log()
        per = numbers if pair.loss in BINARY else rows
        best = float(constant.sum()) / (columns if pair.loss in BINARY else 1)
        floor = _get(results, site, "entropy") / per
        if best - floor > 1e-9 and values["above_one"] == 0 and values["below_zero"] == 0:
            values["relative"] = max(0.0, (values["value"] - floor) / (best - floor))
    return values
