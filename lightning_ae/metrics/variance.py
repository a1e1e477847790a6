"""How much of the data's variance a reconstruction leaves unexplained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ae.metrics.sparsity import check_pair


class FractionVarianceUnexplained(Metric):
    r"""Squared error over total variance: :math:`\sum_i \|x_i - \hat x_i\|^2 / \sum_i \|x_i - \bar x\|^2`.

    Both sums run over all examples and features, with :math:`\bar x` the mean example of the whole set: 0 is
    perfect, 1 is as good as answering with the mean. Features that never vary do no harm, unlike in an average
    of ratios per feature. One less this is the explained variance.

    Variances are about the mean of each batch and merged (Chan et al. 1983), so that data may lie anywhere. Where
    examples have several sizes, each size has its own mean example, and the sums run over all.

    Shapes:
        updates with ``(B, *event)`` twice; the result has no dimensions and no unit.

    Raises:
        ValueError: if the two have different shapes.

    Source: Gao et al. 2024, https://arxiv.org/abs/2406.04093, section 2 (normalised MSE).

    Example:
        >>> metric = FractionVarianceUnexplained()
        >>> metric.update(torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [2.0]]))
        >>> metric.compute()
        tensor(1.)
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    moments: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        # for each number of features d: [d, examples, squared error, squared distance from the mean, mean …]
        self.add_state("moments", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of reconstructions and what they should be."""
        check_pair(preds, target)
        if not len(target):
            return
        wide = torch.float32 if target.device.type == "mps" else torch.float64
        target, preds = target.flatten(1).to(wide), preds.flatten(1).to(wide)
        mean = target.mean(0)
        sums = [(target - preds).square().sum(), (target - mean).square().sum()]
        sizes = [mean.new_full((), size) for size in (target.shape[1], len(target))]
        self.moments = _merge([*self.moments, torch.cat([torch.stack([*sizes, *sums]), mean])])

    def compute(self) -> Tensor:
        """The fraction over all examples; infinite or NaN if the data do not vary at all."""
        rows = _merge(_split(self.moments) if isinstance(self.moments, Tensor) else self.moments)
        if not rows:
            return torch.tensor(torch.nan, device=self.device)
        _, _, error, variance = torch.stack([row[:4] for row in rows]).sum(0).unbind()
        return (error / variance).float()

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        super()._reduce_states(incoming_state)
        self.moments = _merge(self.moments)


def _split(flat: Tensor) -> list[Tensor]:
    """Rows that were put one behind the other, of all processes."""
    rows = []
    while len(flat):
        size = 4 + int(flat[0])
        rows.append(flat[:size])
        flat = flat[size:]
    return rows


def _merge(rows: Any) -> list[Tensor]:
    """One row for each number of features."""
    merged: dict[int, Tensor] = {}
    for row in rows:
        one = merged.get(len(row))
        if one is None:
            merged[len(row)] = row
            continue
        share = row[1] / (one[1] + row[1])
        apart = row[4:] - one[4:]
        between = apart.square().sum() * one[1] * share
        sums = torch.stack([one[0], one[1] + row[1], one[2] + row[2], one[3] + row[3] + between])
        merged[len(row)] = torch.cat([sums, one[4:] + share * apart])
    return list(merged.values())
