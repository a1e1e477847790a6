"""Code length of the data under a likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ae.checks import check_positive, check_tensor, check_whole


class BitsPerDim(Metric):
    r"""Bits per dimension: :math:`\frac{1}{nd}\sum_i -\log_2 p(x_i) - \log_2 \delta`.

    Turns nats per example, as the likelihoods here give them, into the code length of one number recorded with
    spacing :math:`\delta`.

    Args:
        resolution: :math:`\delta` in the units of ``x``: 1 for counts and binary data, 1/255 for bytes
            scaled to [0, 1].

    Raises:
        ValueError: if ``resolution`` is not positive.

    Source: Theis, van den Oord & Bethge 2016, https://arxiv.org/abs/1511.01844, section 3.1.

    Example:
        >>> metric = BitsPerDim()
        >>> metric.update(torch.tensor([math.log(2) * 10]), dims=5)
        >>> metric.compute()
        tensor(2.)
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    nats: Tensor
    dims: Tensor

    def __init__(self, resolution: float = 1.0) -> None:
        super().__init__()
        self.resolution = check_positive("resolution", resolution)
        self.add_state("nats", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("dims", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, dims: int) -> None:
        """Add examples.

        Args:
            nll: negative log-likelihood of each example in nats, ``(B,)``.
            dims: how many numbers an example has.
        """
        check_tensor("nll", nll)
        dims = check_whole("dims", dims)
        # float64, where there is one, so that a data set of any size adds up
        wide = torch.float32 if nll.device.type == "mps" else torch.float64
        self.nats = self.nats + nll.detach().to(wide).sum()
        self.dims = self.dims + dims * nll.numel()

    def compute(self) -> Tensor:
        """Bits per dimension over all examples, without dimensions."""
        return (self.nats / self.dims / math.log(2) - math.log2(self.resolution)).float()
