"""How much of the data's variance a reconstruction leaves unexplained."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class FractionVarianceUnexplained(Metric):
    r"""Squared error over total variance: :math:`\sum_i \|x_i - \hat x_i\|^2 / \sum_i \|x_i - \bar x\|^2`.

    Both sums run over all examples and features, with :math:`\bar x` the mean example of the whole set: 0 is
    perfect, 1 is as good as answering with the mean. Features that never vary do no harm, unlike in an average
    of ratios per feature. One less this is the explained variance.

    Shapes:
        updates with ``(B, *event)`` twice; the result has no dimensions and no unit.

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
    error: Tensor
    square: Tensor
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # one number until the first batch says how many features there are
        self.add_state("error", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("square", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of reconstructions and what they should be; with a mask, of what is there alone."""
        # the variance is a difference of sums of squares: float64, where the device has it
        wide = torch.float32 if target.device.type == "mps" else torch.float64
        target, preds = target.flatten(1).to(wide), preds.flatten(1).to(wide)
        if mask is not None:
            there = mask.flatten(1)
            zero = torch.zeros((), dtype=wide, device=target.device)
            target, preds = torch.where(there, target, zero), torch.where(there, preds, zero)
        self.error = self.error + (target - preds).square().sum()
        self.square = self.square + target.square().sum()
        self.total = self.total + target.sum(0)
        self.count = self.count + (len(target) if mask is None else there.sum(0))

    def compute(self) -> Tensor:
        """The fraction over all examples; infinite or NaN if the data do not vary at all."""
        explained = (self.total.square() / self.count.clamp(min=1)).sum()
        return (self.error / (self.square - explained)).float()
