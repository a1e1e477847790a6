"""Exact selection of the largest of each row, in groups."""

from __future__ import annotations

import torch
from torch import Tensor

#: From this many numbers a row on, and this many for each one kept, it is worth looking at groups first.
_WIDE, _SPARSE, _GROUP = 2048, 64, 16


def largest(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""The ``k`` largest numbers of each row and where they are, in no order.

    Long rows are seen as groups: each of the k largest lies in one of the k groups with the largest maxima, so these
    groups are the only ones to sort. The result is exact; among equal numbers at the border the choice is arbitrary.

    Args:
        h: ``(B, n)``.
        k: how many, ``0 < k <= n``.

    Returns:
        Values and int64 indices, ``(B, k)`` each.

    Raises:
        ValueError: if ``k`` is larger than ``n``.

    Example:
        >>> sorted(largest(torch.tensor([[1.0, 3.0, 2.0]]), 2)[1][0].tolist())
        [1, 2]
    """
    rows, n = h.shape
    if k > n:
        raise ValueError(f"k: expected at most the {n} latents there are, got {k}.")
    if n < _WIDE or n < _SPARSE * k or n % _GROUP:
        values, indices = h.topk(k, dim=1, sorted=False)
        return values, indices
    # members of a group are n / 16 apart: their maximum is one of whole rows, which vectorises
    groups = n // _GROUP
    best = h.view(rows, _GROUP, groups).amax(1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, n, groups, device=h.device)
    candidates = (best[:, None, :] + offsets[None, :, None]).flatten(1)
    values, chosen = h.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, chosen)
