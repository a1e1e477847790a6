"""Metrics over the numbers that are there."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_ae.metrics.variance import FractionVarianceUnexplained


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


def masked_metrics() -> MetricCollection:
    """``mse``, ``mae`` and ``fvu`` of ``(reconstruction, x, mask=...)``, over the numbers that are there.

    Example:
        >>> sorted(masked_metrics())
        ['fvu', 'mae', 'mse']
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "mse": Masked(MeanSquaredError()),
        "mae": Masked(MeanAbsoluteError()),
        "fvu": FractionVarianceUnexplained(),
    }
    return MetricCollection(metrics, compute_groups=False)
