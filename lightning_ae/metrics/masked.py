"""Metrics over the numbers that are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric


class Masked(WrapperMetric):
    """A metric over pairs of numbers, of those that are there.

    Args:
        metric: takes ``(predictions, targets)`` of any shape, each pair for itself, such as a mean error.

    Shapes:
        updates with ``(B, *event)`` twice and booleans of that shape; None for all.

    Example:
        >>> import torch
        >>> metric = Masked(MeanSquaredError())
        >>> metric.update(torch.tensor([1.0, 5.0]), torch.tensor([0.0, float("nan")]), torch.tensor([True, False]))
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch."""
        self.metric.update(*((preds, target) if mask is None else (preds[mask], target[mask])))

    def compute(self) -> Any:
        """The metric of all that was there."""
        return self.metric.compute()

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.metric.reset()


class MaskedVarianceUnexplained(Metric):
    r"""Squared error over variance of the numbers that are there, each feature about its own mean.

    :math:`\sum_{ij} m_{ij} (x_{ij} - \hat x_{ij})^2 / \sum_{ij} m_{ij} (x_{ij} - \bar x_j)^2` with
    :math:`\bar x_j = \sum_i m_{ij} x_{ij} / \sum_i m_{ij}`. Means are those of each batch, merged (Chan et al. 1983).

    Shapes:
        updates with ``(B, *event)`` twice and booleans of that shape.

    Raises:
        ValueError: if examples are of several sizes.

    Example:
        >>> import torch
        >>> metric = MaskedVarianceUnexplained()
        >>> there = torch.tensor([[True], [True], [False]])
        >>> metric.update(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([[1.0], [3.0], [0.0]]), there)
        >>> metric.compute()
        tensor(1.)
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    moments: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        # of each feature: how many, their mean, their squared distance from it, and the squared error; (1, 4, d)
        self.add_state("moments", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch."""
        wide = torch.float32 if target.device.type == "mps" else torch.float64
        x, x_hat = target.flatten(1).to(wide), preds.flatten(1).to(wide)
        there = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.flatten(1)
        if self.moments and self.moments[0].shape[-1] != x.shape[1]:
            raise ValueError(f"target: expected {self.moments[0].shape[-1]} numbers an example, got {x.shape[1]}.")
        zero = x.new_zeros(())
        count = there.sum(0).to(wide)
        mean = torch.where(there, x, zero).sum(0) / count.clamp(min=1)
        off = torch.where(there, x - mean, zero).square().sum(0)
        error = torch.where(there, x - x_hat, zero).square().sum(0)
        row = torch.stack([count, mean, off, error])[None]
        self.moments = [_merged([*self.moments, row])]

    def compute(self) -> Tensor:
        """The fraction over all examples; NaN if there was none."""
        if not len(self.moments):
            return torch.tensor(torch.nan, device=self.device)
        rows = self.moments if isinstance(self.moments, Tensor) else torch.cat(list(self.moments))
        _, _, off, error = _merged([row[None] for row in rows])[0]
        found: Tensor = error.sum() / off.sum()
        return found.float()


def _merged(rows: list[Tensor]) -> Tensor:
    """Moments of all, from those of parts."""
    whole = rows[0]
    for row in rows[1:]:
        count = whole[:, 0] + row[:, 0]
        share = row[:, 0] / count.clamp(min=1)
        apart = row[:, 1] - whole[:, 1]
        off = whole[:, 2] + row[:, 2] + apart.square() * whole[:, 0] * share
        whole = torch.stack([count, whole[:, 1] + share * apart, off, whole[:, 3] + row[:, 3]], 1)
    return whole


def masked_metrics() -> MetricCollection:
    """``mse``, ``mae`` and ``fvu`` of ``(reconstruction, x, mask=...)``, over the numbers that are there.

    Example:
        >>> sorted(masked_metrics())
        ['fvu', 'mae', 'mse']
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "mse": Masked(MeanSquaredError()),
        "mae": Masked(MeanAbsoluteError()),
        "fvu": MaskedVarianceUnexplained(),
    }
    return MetricCollection(metrics, compute_groups=False)
