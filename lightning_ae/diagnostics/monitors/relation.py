"""Whether targets have anything to do with inputs, as far as correlations tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.counters import Key

#: Inputs and targets whose correlations are looked at.
MOST_FEATURES, MOST_TARGETS = 256, 64
Add = Callable[..., None]


def add_relation(add: Add, x: Tensor, heard: Comparison) -> None:
    """Add products of inputs and targets, of as many features and targets as is cheap."""
    target = heard.target
    if not x.is_floating_point() or x.ndim < 2 or target.ndim == 0 or len(target) != len(x) or heard.target_learns:
        return
    if not target.is_floating_point():
        number = heard.prediction.shape[1] if heard.prediction.ndim > 1 else 0
        if target.ndim != 1 or not 1 < number <= MOST_TARGETS:
            return
        y = target[:, None].eq(torch.arange(number, device=target.device)).double()
    else:
        y = target.flatten(1).double() if target.ndim > 1 else target[:, None].double()
    rows = x.flatten(1)
    rows = rows[:, :: max(1, rows.shape[1] // MOST_FEATURES)].double()
    if y.shape[1] > MOST_TARGETS:
        return
    add("relation", "n", len(rows))
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
    kept_x = var_x > 0.05 * var_x.max().clamp(min=1e-30)
    kept_y = var_y > 0.05 * var_y.max().clamp(min=1e-30)
    if not kept_x.any() or not kept_y.any() or float(var_x.max()) == 0 or float(var_y.max()) == 0:
        return None
    cross = (sums["relation", "xy"] / n - mean_x[:, None] * mean_y)[kept_x][:, kept_y]
    found = cross / (var_x[kept_x].sqrt()[:, None] * var_y[kept_y].sqrt())
    return float(found.abs().max()), math.sqrt(2 * math.log(2 * found.numel()) / n), n
