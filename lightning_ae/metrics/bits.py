"""Code length of the data under a likelihood."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ae.checks import check_positive, check_tensor, check_whole


class BitsPerDim(Metric):
    r"""Bits per dimension: :math:`\frac{1}{nd}\sum_i -\log_2 p(x_i) - \log_2 \delta`.

    Turns nats per example, as the likelihoods here give them, into bits of one number recorded with spacing
    :math:`\delta`. That is the length of a code

    * for probabilities, with :math:`\delta = 1`: counts, bits, and bytes under a
      :class:`~lightning_ae.DiscretizedLogisticMixtureNLL`;
    * for densities on average, if the data were dequantised (:func:`~lightning_ae.dequantize`, :math:`\delta` = 1/256),
      as an upper bound;
    * for densities at the recorded values only as long as they are flat over a cell, :math:`\sigma \gg \delta`. Below
      that it is none and sinks under any code, at last under 0, which is told. The length is then that of the cells:
      update with ``loss.description_length(params, x, delta) * math.log(2)`` and leave ``resolution`` at 1.

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
        """Bits per dimension over all examples, without dimensions; a warning if they are no length."""
        bits = (self.nats / self.dims / math.log(2) - math.log2(self.resolution)).float()
        if bits < 0:
            warnings.warn(
                f"bits per dimension: {float(bits):.4g} is no length of a code: the density is narrower than the "
                f"resolution of {self.resolution:.4g}. Take a discretised likelihood, dequantize the data, or sum up "
                "loss.description_length.",
                stacklevel=2,
            )
        return bits
