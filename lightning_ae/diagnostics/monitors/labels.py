"""What kind targets are of, and those that are classes: how often each is seen, and how often it is hit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.counters import Key

#: Elements of a batch in which hits of a classifier are counted, and classes up to which they are.
HIT_ELEMENTS, MOST_CLASSES = 2**18, 4096
Add = Callable[..., None]


def add_classes(add: Add, site: str, prediction: Tensor, target: Tensor, heard: Comparison) -> Tensor | None:
    """Add targets that are indices of classes, and hits; returns the loss, for a curve."""
    value, ignored = heard.value, int(heard.options.get("ignore_index", -100))
    number = prediction.shape[1 if prediction.ndim > 1 else 0]
    flat = target.reshape(-1)
    if number <= MOST_CLASSES:
        inside = flat.ge(0) & flat.lt(number) & flat.ne(ignored)
        counts = torch.zeros(number, dtype=torch.int64, device=flat.device)
        add(site, "classes", counts.scatter_add_(0, flat.clamp(0, number - 1).long(), inside.long()))
        if prediction.ndim == 2 and len(prediction) == len(flat):
            head = max(1, HIT_ELEMENTS // number)
            add(site, "hits", ((prediction[:head].argmax(1) == flat[:head]) & inside[:head]).sum())
            add(site, "tries", inside[:head].sum())
    add(site, "rows", len(target) if target.ndim else 1)
    return None if value is None or value.ndim else value.float()


def class_figures(results: Mapping[Key, Tensor], site: str, value: float, weighted: bool) -> dict[str, float]:
    """Of targets that are indices of classes."""
    counts = results[site, "classes"].double()
    share = counts / counts.sum().clamp(min=1)
    entropy = float(-torch.xlogy(share, share).sum())
    tries = float(results.get((site, "tries"), 0))
    found: dict[str, Any] = {
        "samples": float(results[site, "rows"]),
        "classes": float((counts > 0).sum()),
        "largest_class": float(share.max()),
        "label_entropy": entropy,
    }
    if tries:
        found["accuracy"] = float(results[site, "hits"]) / tries
    if entropy > 0:
        if weighted:
            return found  # the loss of the best constant depends on the weights
        if value >= 0:
            found["relative"] = value / entropy
        elif tries:
            found["relative"] = (1 - found["accuracy"]) / (1 - found["largest_class"])
    return found


def add_labels(add: Add, heard: Comparison) -> None:
    """Add how often each class is the target: of an index, of rows with one 1, of 0 and 1."""
    target, prediction = heard.target, heard.prediction
    if target.ndim == 0:
        return
    if not target.is_floating_point():
        number = prediction.shape[1] if prediction.ndim > 1 else 0
        if 0 < number <= MOST_CLASSES:
            flat = target.reshape(-1)
            inside = flat.ge(0) & flat.lt(number) & flat.ne(int(heard.options.get("ignore_index", -100)))
            counts = torch.zeros(number, dtype=torch.int64, device=flat.device)
            add("labels", "counts", counts.scatter_add_(0, flat.clamp(0, number - 1).long(), inside.long()))
    elif target.numel() == len(target):
        flat = target.reshape(-1)
        add("labels", "counts", torch.stack([flat.eq(0).sum(), flat.eq(1).sum(), (flat.ne(0) & flat.ne(1)).sum()]))
    elif target.ndim == 2 and target.shape[1] <= MOST_CLASSES:
        add("labels", "counts", torch.cat([target.eq(1).sum(0), (target.ne(0) & target.ne(1)).sum().reshape(1)]))


def nonfinite(x: Tensor) -> Tensor:
    """How many numbers are NaN or infinite, as a number without dimensions; in passes that make no booleans."""
    return torch.sub(x, x).ne_(0).sum(dtype=torch.float32)


def below(y: Tensor, bound: float | Tensor) -> Tensor:
    """How many numbers are below a bound; as numbers, of which a sum is far faster than that of booleans."""
    return y.clone().lt_(bound).sum().long()


def above(y: Tensor, bound: float | Tensor) -> Tensor:
    """How many numbers are above a bound."""
    return y.clone().gt_(bound).sum().long()


def add_kind(add: Add, site: str, y: Tensor, low: float, high: float) -> None:
    """Add how many numbers are 0 or 1, finite, or beyond what the output can reach."""
    add(site, "head", y.numel())
    add(site, "head_rows", len(y))
    # of at most HEAD_ELEMENTS each, which float32 counts exactly
    add(site, "nonfinite_data", nonfinite(y).long())
    add(site, "binary", torch.mul(y, y).eq_(y).sum().long())
    under, over = below(y, -1e-4), above(y, 1 + 1e-4)
    add(site, "below", under)
    add(site, "above", over)
    if y.shape[1] > 1:
        total = y.sum(1)
        add(site, "one", (total - 1).abs_().lt_(1e-3).sum().long())
        add(site, "several", total.gt_(1.5).sum().long())
    if low == -math.inf and high == math.inf:
        return
    width = high - low if high - low < math.inf else math.nan
    slack = 1e-4 * (width if width == width else 1.0)  # what rounding puts outside is not
    unit = low == 0 and high == 1  # of which the ends have been counted
    add(site, "outside", under + over if unit else _outside(y, low - slack, high + slack))
    size = 0.05 * (width if width == width else y.square().mean().sqrt())
    add(site, "beyond", _outside(y, low - size, high + size))
    if width == width:
        add(site, "far", (y - y.mean()).abs_().gt_(0.05 * width).sum().long())


def _outside(y: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    ends = [below(y, low)] if isinstance(low, Tensor) or low > -math.inf else []
    ends += [above(y, high)] if isinstance(high, Tensor) or high < math.inf else []
    return ends[0] if len(ends) == 1 else ends[0] + ends[1]
