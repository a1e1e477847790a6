"""What targets have to do with inputs: whether they are the inputs, and whether they correlate with them at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.counters import Key
from lightning_ae.losses.base import full_precision

#: Inputs and targets whose correlations are looked at.
MOST_FEATURES, MOST_TARGETS = 256, 64
Add = Callable[..., None]


def add_relation(add: Add, x: Tensor, heard: Comparison) -> None:
    """Add products of inputs and targets, of as many features and targets as is cheap."""
    target, wide = heard.target, torch.float32 if x.device.type == "mps" else torch.float64
    if not x.is_floating_point() or x.ndim < 2 or target.ndim == 0 or len(target) != len(x) or not heard.target_is_data:
        return
    if not target.is_floating_point():
        number = heard.prediction.shape[1] if heard.prediction.ndim > 1 else 0
        if target.ndim != 1 or not 1 < number <= MOST_TARGETS:
            return
        y = target[:, None].eq(torch.arange(number, device=target.device)).to(wide)
    else:
        y = target.flatten(1).to(wide) if target.ndim > 1 else target[:, None].to(wide)
    rows = x.flatten(1)
    rows = rows[:, :: max(1, rows.shape[1] // MOST_FEATURES)].to(wide)
    if y.shape[1] > MOST_TARGETS:
        return
    add("relation", "n", len(rows))
    off = rows - rows.mean(0)
    add("relation", "fourth", off.pow(4).sum(0), torch.float64)
    for name, value in (("x", rows.sum(0)), ("y", y.sum(0)), ("xx", (rows * rows).sum(0)), ("yy", (y * y).sum(0))):
        add("relation", name, value, torch.float64)
    add("relation", "xy", rows.T @ y, torch.float64)


def relation(sums: Mapping[Key, Tensor]) -> tuple[float, float, int] | None:
    """Largest absolute correlation of a feature with a target, and the largest of as many that chance would give.

    Of m independent pairs of n examples the largest is about :math:`(2 ln(2m) / n)^{1/2}`.
    """
    n = int(sums.get(("relation", "n"), torch.tensor(0)))
    if n < 200:
        return None
    mean_x, mean_y = sums["relation", "x"] / n, sums["relation", "y"] / n
    var_x = (sums["relation", "xx"] / n - mean_x.square()).clamp(min=0)
    var_y = (sums["relation", "yy"] / n - mean_y.square()).clamp(min=0)
    # rare ones are far from normal, and their correlations too
    tails = sums["relation", "fourth"] / n / var_x.square().clamp(min=1e-300)
    kept_x = (var_x > 1e-9 * (var_x + mean_x.square())) & (tails < 15)
    kept_y = var_y > 0.05 * var_y.max().clamp(min=1e-30)
    if not kept_x.any() or not kept_y.any() or float(var_x.max()) == 0 or float(var_y.max()) == 0:
        return None
    cross = (sums["relation", "xy"] / n - mean_x[:, None] * mean_y)[kept_x][:, kept_y]
    found = cross / (var_x[kept_x].sqrt()[:, None] * var_y[kept_y].sqrt())
    return float(found.abs().max()), math.sqrt(2 * math.log(2 * found.numel()) / n), n


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Of all numbers of two tensors of one size; 0 if one is constant."""
    a, b = (
        full_precision(x).flatten() - full_precision(x).mean(),
        full_precision(y).flatten() - full_precision(y).mean(),
    )
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-30)


def add_likeness(add: Add, site: str, y: Tensor, x: Tensor | None, read: Tensor | None) -> None:
    """Whether a target is the input, perhaps rescaled, or the input with its rows in another order.

    Args:
        add: to a counter.
        site: name of the comparison.
        y: the target.
        x: the batch's first tensor.
        read: what the first layer with weights has read; the first tensor is the input if that is the same, or the same
            with noise.
    """
    given = [t for t in (read, x) if t is not None and t.is_floating_point() and t.numel() == y.numel()]
    if not given or y.ndim < 2 or y.numel() == len(y):
        return
    like = correlation(given[0], y) > 0.9999
    if len(given) == 2:
        like = like | ((correlation(given[1], y) > 0.9999) & (correlation(*given) > 0.3))
    elif read is not None and given[0] is not read:
        like = like & (read.numel() == 0)  # the layers read something else
    rows, others = full_precision(y).reshape(len(y), -1), full_precision(given[0]).reshape(len(y), -1)
    spread = (others - others.mean()).square().mean().sqrt()
    permuted = (rows.mean(0) - others.mean(0)).abs().max() < 1e-4 * spread
    add(site, "like_input", like)
    add(site, "permuted", permuted & ~like)
    add(site, "likeness", 1)
