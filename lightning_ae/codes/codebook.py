"""What a codebook needs: the nearest of its vectors, k-means to start from, and places spread over a range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ae.exporting import exporting

#: Distances held at once.
_CHUNK = 2**24
#: 2³² over the golden ratio.
_GOLDEN = 2654435769


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    r"""Index of the nearest code, :math:`\arg\min_i \|x - e_i\|^2 = \arg\min_i \tfrac12\|e_i\|^2 - x \cdot e_i`.

    In the precision of its arguments also under autocast; memory does not grow with the number of rows.

    Args:
        x: rows ``(n, d)``.
        codebook: ``(K, d)``.

    Returns:
        ``(n,)``, whole numbers below ``K``; the first of several that are equally near.

    Example:
        >>> nearest(torch.tensor([[0.9], [-3.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    with torch.autocast(x.device.type, enabled=False):
        centre = codebook.mean(0)  # far from the origin differences would be lost in rounding
        codes = codebook - centre
        half = codes.square().sum(1) / 2
        # a graph for any number of rows has one part
        parts = (x,) if exporting() else torch.split(x, max(1, _CHUNK // len(codebook)))
        found = [torch.addmm(half, part - centre, codes.T, alpha=-1).argmin(1) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)


def spread(order: Tensor, size: Tensor | int) -> Tensor:
    """Places in ``range(size)`` for the numbers 0, 1, 2, …: each next one falls into one of the largest gaps.

    The golden ratio's multiples without their whole parts, in whole numbers. Nothing is random.

    Example:
        >>> spread(torch.arange(5), 100)
        tensor([ 0, 61, 23, 85, 47])
    """
    fraction = (order * _GOLDEN) & 0xFFFFFFFF
    return (fraction * size) >> 32


def in_fixed_order(rows: Tensor, valid: Tensor) -> Tensor:
    """Rows sorted by a projection, those that are not ``valid`` last: the order in which they came does not matter."""
    direction = torch.sin(1.0 + 2.0 * torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype))
    with torch.autocast(rows.device.type, enabled=False):
        key = torch.where(valid, (rows @ direction).nan_to_num(), torch.inf)
    return rows[key.argsort()]


def kmeans(x: Tensor, k: int, iterations: int = 20) -> Tensor:
    r"""Centres that make :math:`\sum_i \min_j \|x_i - e_j\|^2` small: Lloyd's iterations from greedy k-means++ seeds.

    Each seed is the best of a few candidates, drawn with probability proportional to the squared distance from the
    seeds so far. The "random" numbers are multiples of the golden ratio, so the result is a function of ``x``.

    Args:
        x: rows ``(n, d)`` with ``n >= k``.
        k: number of centres.
        iterations: of Lloyd's.

    Returns:
        Centres, ``(k, d)``; one that has lost all its rows stays where it was.

    Source: Lloyd 1982, https://doi.org/10.1109/TIT.1982.1056489; Arthur & Vassilvitskii 2007, k-means++.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
        >>> kmeans(x, 2).sort(0).values
        tensor([[ 0.5000],
                [11.0000]])
    """
    with torch.autocast(x.device.type, enabled=False):
        centres = _seeds(x, k)
        for _ in range(iterations):
            owner = nearest(x, centres)
            number = torch.bincount(owner, minlength=k)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, owner, x)
            centres = torch.where(number > 0, sums / number.clamp_min(1), centres)
        return centres


def _seeds(x: Tensor, k: int) -> Tensor:
    trials = 2 + int(math.log(k))
    numbers = spread(torch.arange(k * trials, device=x.device), 2**31).view(k, trials) / 2**31
    distance = x.new_full((len(x),), torch.inf)
    chosen = []
    for i in range(k):
        mass = (distance if i else torch.ones_like(distance)).cumsum(0)
        candidates = torch.searchsorted(mass, numbers[i].to(mass) * mass[-1], right=True).clamp_max(len(x) - 1)
        closer = torch.cdist(x[candidates], x).square().minimum(distance)
        best = closer.sum(1).argmin()
        distance = closer[best]
        chosen.append(x[candidates[best]])
    return torch.stack(chosen)
