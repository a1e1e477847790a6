"""Where data lie and how far they reach from there, estimated batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    r"""Mean :math:`m` of rows and their mean distance :math:`\mathbb E\|x - m\|` from it.

    The distance is the same wherever the data lie, and it is not squared, so that outliers count once.

    Attributes:
        mean: ``(d,)``, float64, or float32 on devices without it; as the others.
        distance: ``()``.
        examples: finite rows so far on a process, on average, ``()``.
    """

    mean: Tensor
    distance: Tensor
    examples: Tensor

    @classmethod
    def of(cls, x: Tensor, before: Spread | None = None, reduce: Callable[[Tensor], Tensor] | None = None) -> Spread:
        r"""Of a batch, and of those before, whose distances are those from the mean as it was then.

        Nothing is read from the device.

        Args:
            x: ``(B, d)``; rows that are not finite are left out.
            before: of the batches so far.
            reduce: averages a tensor over the ranks.

        Example:
            >>> spread = Spread.of(torch.tensor([[100.0, 0.0], [106.0, 8.0]]))
            >>> spread.mean.tolist(), spread.distance.item()
            ([103.0, 4.0], 5.0)
        """
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        finite = x.isfinite().all(1)
        sums = torch.cat([torch.where(finite[:, None], x, 0).sum(0, dtype=wide), finite.sum(dtype=wide)[None]])
        sums = sums if reduce is None else reduce(sums)
        count = sums[-1].clamp(min=1e-30)
        nothing = sums.new_zeros(x.shape[1]), sums.new_zeros(()), sums.new_zeros(())
        old = cls(*(value.to(sums) for value in before or nothing))
        examples = old.examples + sums[-1]
        share = sums[-1] / examples.clamp(min=1e-30)
        mean = old.mean + share * (sums[:-1] / count - old.mean)
        distance = torch.where(finite, torch.linalg.vector_norm(x - mean.to(x.dtype), dim=1), 0).sum(dtype=wide)
        distance = (distance if reduce is None else reduce(distance)) / count
        return cls(mean, old.distance + share * (distance - old.distance), examples)
