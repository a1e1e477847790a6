"""Likelihoods as reconstruction losses, and those of a location and a scale, in nats with all constants."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, distributions, nn

from lightning_ae.checks import check_flag, check_positive
from lightning_ae.limits import soft_limit
from lightning_ae.losses.base import PointwiseLoss, full_precision
from lightning_ae.losses.cells import log_laplace_cell, log_normal_cell

#: Where a learned scale is held back, as a share of the one it starts from: about the resolution of single precision.
_SMALLEST = 1e-6


class Likelihood(PointwiseLoss):
    r"""A loss :math:`-\ln p(x \mid a)` in nats: a subclass adds :meth:`sample` to the pointwise terms.

    The density is normalised over the support of ``x``, so likelihoods of different models, and of different
    losses on the same data, can be compared.

    Bits are lengths only of what is discrete. A likelihood of counts, of bits or of bins
    (:class:`DiscretizedLogisticMixtureNLL`) is a probability, and the loss divided by :math:`\ln 2` the length of an
    arithmetic code. A density is none: it can exceed 1, and :math:`-\log_2 p(x) - \log_2\delta` is the length of ``x``
    rounded to :math:`\delta` only where the density is flat over a cell, :math:`\sigma \gg \delta`; below that it goes
    on to :math:`-\infty`. :meth:`description_length` is a length either way.
    """

    #: Whether the loss is minus the logarithm of a probability, and not of a density.
    discrete: bool = False

    @abstractmethod
    def sample(self, params: Tensor) -> Tensor:
        """Draw one ``x`` for each example, ``(B, *event)``."""

    def cell_nll(self, params: Tensor, x: Tensor, width: float) -> Tensor:
        r"""Minus the logarithm of the probability of the cell :math:`x \pm \delta/2`, of the shape of ``x``.

        A density that does not know its integral is taken to be flat over a cell, where that may be.

        Args:
            params: the decoder's output; float32 or wider, as ``x``.
            x: the data.
            width: :math:`\delta`.
        """
        nats = self.pointwise(params, x)
        return nats if self.discrete else nats - math.log(width)

    def description_length(self, params: Tensor, x: Tensor, resolution: float = 1.0) -> Tensor:
        r"""Bits of ``x`` recorded with spacing :math:`\delta`: :math:`-\sum_i \log_2 P(x_i \pm \delta/2 \mid a)`.

        The probability is that of the whole cell, so the length is never negative, whatever :math:`\sigma`, and an
        arithmetic coder that knows ``params`` needs this many bits. For :math:`\sigma \gg \delta` it is
        :math:`-\log_2 p(x \mid a) - d \log_2 \delta`.

        Args:
            params: the decoder's output.
            x: the data, ``(B, *event)`` with ``d`` numbers per example.
            resolution: :math:`\delta`, the spacing of the recorded values (1/255 for bytes scaled to [0, 1]). A loss
                that is ``discrete`` has its own, and takes 1.

        Returns:
            Code length of each example in bits, ``(B,)``.

        Raises:
            ValueError: if ``resolution`` is not positive, or not 1 for a loss that is discrete.

        Source: Rissanen 1978, Modeling by shortest data description.
        """
        resolution = check_positive("resolution", resolution)
        if self.discrete and resolution != 1:
            raise ValueError(
                f"resolution: {type(self).__name__} gives probabilities of whole values, which have no resolution "
                f"other than 1, got {resolution}."
            )
        params, x = self._prepare(params, x)
        return self.cell_nll(params, x, resolution).flatten(1).sum(1) / math.log(2)


class _ScaledLikelihood(Likelihood):
    """A location family with one scale for all numbers, fixed or learned as its logarithm."""

    log_scale: Tensor

    def __init__(self, scale: float = 1.0, learn_scale: bool = False, *, min_scale: float | None = None) -> None:
        super().__init__()
        scale = check_positive("scale", scale)
        if min_scale is not None and not check_positive("min_scale", min_scale) <= scale:
            raise ValueError(f"min_scale: expected a positive number of at most scale={scale}, got {min_scale}.")
        self.min_scale = _SMALLEST * scale if min_scale is None else float(min_scale)
        log_scale = torch.tensor(math.log(scale))
        if check_flag("learn_scale", learn_scale):
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def limited_log_scale(self) -> Tensor:
        """The logarithm of the scale, without dimensions: ``log_scale``, held back if it is learned."""
        log_scale = full_precision(self.log_scale)
        if not isinstance(self.log_scale, nn.Parameter):
            return log_scale
        return soft_limit(log_scale, low=math.log(self.min_scale))

    @property
    def scale(self) -> Tensor:
        """The scale, in units of ``x``; a tensor without dimensions."""
        return self.limited_log_scale.exp()

    def mean(self, params: Tensor) -> Tensor:
        """The decoder's output itself."""
        return full_precision(params)


class GaussianNLL(_ScaledLikelihood):
    r"""Gaussian likelihood: :math:`\|x - a\|^2 / 2\sigma^2 + \tfrac d2 \ln 2\pi\sigma^2` nats.

    Its minimiser over the weights is that of squared error; :math:`\sigma` sets the exchange rate with every
    other term in nats (KL, a prior). The gradient is :math:`\partial L / \partial a = (a - x)/\sigma^2`.
    A learned :math:`\sigma^2` converges to the mean residual variance, where the first term is :math:`d/2`.

    Args:
        scale: standard deviation :math:`\sigma > 0`, in units of ``x``; where learning starts if it is learned.
        learn_scale: whether :math:`\ln\sigma` is a parameter.
        min_scale: from here on down a learned :math:`\sigma` shrinks only with its own logarithm
            (:func:`~lightning_ae.limits.soft_limit`), so that an exact reconstruction ends in large numbers and not in
            NaN. None for a millionth of ``scale``. For data with spacing :math:`\delta` take that, as there is nothing
            to gain below it: Rybkin et al. hold :math:`\ln\sigma` at -6 for bytes.

    Shapes:
        ``params`` and ``x``: ``(B, *event)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: if ``scale`` is not positive.

    Source: Bishop 2006, Pattern Recognition and Machine Learning, section 5.2; for the learned scale
    Rybkin et al. 2021, https://arxiv.org/abs/2006.13202.

    Example:
        >>> GaussianNLL(scale=1.0)(torch.zeros(1, 2), torch.zeros(1, 2))  # ln 2π
        tensor([1.8379])
    """

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Negative log-density of each number."""
        log_scale = self.limited_log_scale
        return self.pointwise_excess(params, x) + log_scale + 0.5 * math.log(2 * math.pi)

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        r""":math:`(x - a)^2 / 2\sigma^2`."""
        return 0.5 * ((x - params) * (-self.limited_log_scale).exp()).square()

    def cell_nll(self, params: Tensor, x: Tensor, width: float) -> Tensor:
        """By the distribution function."""
        scale = self.scale
        return -log_normal_cell((x - params) / scale, width / scale)

    def sample(self, params: Tensor) -> Tensor:
        """Draw from the normal around the decoder's output."""
        return full_precision(params) + self.scale.detach() * torch.randn_like(full_precision(params))


class LaplaceNLL(_ScaledLikelihood):
    r"""Laplace likelihood: :math:`\|x - a\|_1 / b + d \ln 2b` nats, the absolute error with its meaning.

    The gradient :math:`\operatorname{sgn}(a - x)/b` does not grow with the error, so outliers count less than
    under a Gaussian, and the minimiser is the conditional median. A learned ``b`` converges to the mean
    absolute error.

    Args:
        scale: :math:`b > 0`, in units of ``x``; where learning starts if it is learned.
        learn_scale: whether :math:`\ln b` is a parameter.
        min_scale: from here on down a learned :math:`b` shrinks only with its own logarithm
            (:func:`~lightning_ae.limits.soft_limit`), so that an exact reconstruction ends in large numbers and not in
            NaN. None for a millionth of ``scale``. For data with spacing :math:`\delta` take that, as there is nothing
            to gain below it: Rybkin et al. hold :math:`\ln\sigma` at -6 for bytes.

    Shapes:
        ``params`` and ``x``: ``(B, *event)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: if ``scale`` is not positive.

    Source: Bishop 2006, section 1.5.5 and exercise 1.27; Laplace 1774.

    Example:
        >>> LaplaceNLL(scale=0.5)(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([4.])
    """

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Negative log-density of each number."""
        log_scale = self.limited_log_scale
        return self.pointwise_excess(params, x) + log_scale + math.log(2)

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        r""":math:`|x - a| / b`."""
        return (x - params).abs() * (-self.limited_log_scale).exp()

    def cell_nll(self, params: Tensor, x: Tensor, width: float) -> Tensor:
        """By the distribution function."""
        scale = self.scale
        return -log_laplace_cell((x - params) / scale, width / scale)

    def sample(self, params: Tensor) -> Tensor:
        """Draw from the Laplace distribution around the decoder's output."""
        drawn: Tensor = distributions.Laplace(full_precision(params), self.scale).sample()
        return drawn
