"""At which scale a reconstruction is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ae.checks import check_whole, describe_type
from lightning_ae.metrics.sparsity import check_pair, widen


class ScaleError(Metric):
    r"""Mean squared error of each scale: :math:`\frac1{Nd} \sum_i \|P_l(x_i - \hat x_i)\|^2`, as ``mse_scale_<l>``.

    For orthogonal projections the sum over scales is the mean squared error, so each is the share of it that the
    scale has; the parts of a Laplacian pyramid overlap, and theirs only says where the error is.

    Args:
        parts: linear, from ``(B, *event)`` to the parts of it, ``(B, *event)`` each, finest first: ``scales.parts`` of
            any :class:`lightning_ae.Scales`.
        num_scales: how many parts there are.

    Shapes:
        updates with ``(B, *event)`` twice; the results have no dimensions, in units of ``x`` squared.

    Example:
        >>> from lightning_ae import BlockMean
        >>> metric = ScaleError(BlockMean(2).parts, num_scales=2)
        >>> metric.update(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[0.0, 0.0]]]))
        >>> metric.compute()
        {'mse_scale_0': tensor(1.), 'mse_scale_1': tensor(4.)}
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    error: Tensor
    count: Tensor

    def __init__(self, parts: Callable[[Tensor], Sequence[Tensor]], num_scales: int) -> None:
        super().__init__()
        if not callable(parts):
            raise TypeError(f"parts: expected a function, such as scales.parts, got {describe_type(parts)}.")
        self.parts = parts
        self.num_scales = check_whole("num_scales", num_scales)
        self.add_state("error", torch.zeros(self.num_scales), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of reconstructions and what they should be."""
        check_pair(preds, target)
        # long sums: float64, where the device has it
        wide = torch.float32 if target.device.type == "mps" else torch.float64
        parts = self.parts(widen(target) - widen(preds))
        if len(parts) != self.num_scales:
            raise ValueError(f"num_scales: expected {len(parts)}, as there are parts, got {self.num_scales}.")
        self.error = self.error + torch.stack([part.to(wide).square().sum() for part in parts])
        self.count = self.count + target.numel()

    def compute(self) -> dict[str, Tensor]:
        """The error of each scale over all examples."""
        means = (self.error / self.count).float()
        return {f"mse_scale_{index}": mean for index, mean in enumerate(means)}
