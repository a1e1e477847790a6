"""Likelihoods of continuous and binary data as reconstruction losses, in nats with all constants."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, distributions, nn
from torch.nn import functional

from lightning_ae.losses.base import PointwiseLoss, full_precision

#: How far beyond [0, 1] numbers in single precision get by rounding.
_ROUNDING = 1e-5


class Likelihood(PointwiseLoss):
    r"""A loss :math:`-\ln p(x \mid a)` in nats: a subclass adds :meth:`sample` to the pointwise terms.

    The density is normalised over the support of ``x``, so likelihoods of different models, and of different
    losses on the same data, can be compared.
    """

    @abstractmethod
    def sample(self, params: Tensor) -> Tensor:
        """Draw one ``x`` for each example, ``(B, *event)``."""

    def description_length(self, params: Tensor, x: Tensor, resolution: float = 1.0) -> Tensor:
        r"""Bits to write ``x`` down at a given resolution: :math:`-\log_2 p(x \mid a) - d \log_2 \delta`.

        Args:
            params: the decoder's output.
            x: the data, ``(B, *event)`` with ``d`` numbers per example.
            resolution: :math:`\delta`, the spacing of the recorded values (1/255 for bytes scaled to [0, 1]);
                1 for counts and binary data.

        Returns:
            Code length of each example in bits, ``(B,)``.

        Source: Rissanen 1978, Modeling by shortest data description.
        """
        nats: Tensor = self(params, x)
        return nats / math.log(2) - x[0].numel() * math.log2(resolution)


class _ScaledLikelihood(Likelihood):
    """A location family with one scale for all numbers, fixed or learned as its logarithm."""

    log_scale: Tensor

    def __init__(self, scale: float = 1.0, learn_scale: bool = False) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}.")
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """The scale, in units of ``x``; a tensor without dimensions."""
        return full_precision(self.log_scale).exp()

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
        log_scale = full_precision(self.log_scale)
        return 0.5 * ((x - params) * (-log_scale).exp()).square() + log_scale + 0.5 * math.log(2 * math.pi)

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
        log_scale = full_precision(self.log_scale)
        return (x - params).abs() * (-log_scale).exp() + log_scale + math.log(2)

    def sample(self, params: Tensor) -> Tensor:
        """Draw from the Laplace distribution around the decoder's output."""
        drawn: Tensor = distributions.Laplace(full_precision(params), self.scale).sample()
        return drawn


class _UnitInterval(Likelihood):
    """A likelihood of data in [0, 1] with logits as parameters."""

    output_activation = "sigmoid"
    output_range = (0.0, 1.0)

    def check(self, x: Tensor) -> None:
        """Targets must lie in [0, 1]."""
        low, high = x.amin(), x.amax()
        # what rounding leaves, of a division or a resize, is no other value
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise ValueError(
                f"{type(self).__name__}: targets must lie in [0, 1], got values from {low:.4g} to {high:.4g}. "
                "Scale the data, or use GaussianNLL."
            )


class BernoulliNLL(_UnitInterval):
    r"""Bernoulli likelihood on logits: :math:`-\sum x\ln\hat x + (1-x)\ln(1-\hat x)` nats, :math:`\hat x=\sigma(a)`.

    Sigmoid and logarithm cancel: the gradient is :math:`\partial L / \partial a = \hat x - x`, as large as the
    error however saturated the output is. Soft targets in [0, 1] are allowed; the loss is then the cross-entropy
    to a Bernoulli with that mean, which is no density of ``x`` (see :class:`ContinuousBernoulliNLL`).

    Shapes:
        ``params`` (logits) and ``x`` (in [0, 1]): ``(B, *event)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: from :meth:`check`, if targets lie outside [0, 1].

    Source: Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.2.

    Example:
        >>> BernoulliNLL()(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))  # 2 ln 2
        tensor([1.3863])
    """

    lower_bound = 0.0  # a cross-entropy

    def mean(self, params: Tensor) -> Tensor:
        """Probability of a one."""
        return full_precision(params).sigmoid()

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy of each number."""
        return functional.binary_cross_entropy_with_logits(params, x, reduction="none")

    def sample(self, params: Tensor) -> Tensor:
        """Draw zeros and ones."""
        return torch.bernoulli(full_precision(params).sigmoid())


class ContinuousBernoulliNLL(_UnitInterval):
    r"""Continuous Bernoulli: :math:`p(x) = \eta\, e^{\eta x} / (e^\eta - 1)` on [0, 1], with logit :math:`\eta = a`.

    The density that the binary cross-entropy of grey values lacks: :math:`-\ln p = A(\eta) - \eta x` nats, with
    :math:`A(\eta) = \ln\frac{e^\eta - 1}{\eta}`. It is an exponential family, so the gradient is again
    :math:`\hat x - x`, with the mean :math:`\hat x = A'(\eta) = \frac{1}{1 - e^{-\eta}} - \frac1\eta`.
    Near :math:`\eta = 0` (:math:`\lambda = \tfrac12`) both are summed as series. Unlike a cross-entropy the loss
    can be negative.

    Shapes:
        ``params`` (logits) and ``x`` (in [0, 1]): ``(B, *event)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: from :meth:`check`, if targets lie outside [0, 1].

    Source: Loaiza-Ganem & Cunningham 2019, https://arxiv.org/abs/1907.06845.

    Example:
        >>> ContinuousBernoulliNLL()(torch.zeros(1, 3), torch.rand(1, 3))  # uniform: density 1
        tensor([0.])
    """

    output_activation = "continuous_bernoulli_mean"

    def mean(self, params: Tensor) -> Tensor:
        r""":math:`A'(\eta)`, which is not the sigmoid."""
        half, near_zero, safe = self._split(full_precision(params))
        # A'(η) = ½ + ½ L(η/2) with the Langevin function L(h) = coth h − 1/h
        langevin = torch.where(near_zero, half * _series(half, _LANGEVIN), 1 / safe.tanh() - 1 / safe)
        return 0.5 + 0.5 * langevin

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Negative log-density of each number."""
        half, near_zero, safe = self._split(params)
        # A(η) = η/2 + ln(sinh h / h), h = η/2, even in h
        h = safe.abs()
        log_sinhc = torch.where(
            near_zero, half.square() * _series(half, _LOG_SINHC), h + torch.log(-torch.expm1(-2 * h) / (2 * h))
        )
        return half + log_sinhc - params * x

    @staticmethod
    def _split(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = params / 2
        near_zero = half.abs() < 0.25
        # where() differentiates both branches: keep the closed form away from its 0/0
        return half, near_zero, torch.where(near_zero, torch.ones_like(half), half)

    def sample(self, params: Tensor) -> Tensor:
        """Draw numbers in [0, 1]."""
        # the inverse of the distribution function for η < 0, mirrored for η > 0; torch's own clamps λ, and so |η| to 16
        eta = full_precision(params)
        negative = -eta.abs().clamp(min=1e-6)
        x = (torch.log1p(torch.rand_like(eta) * torch.expm1(negative)) / negative).clamp(0, 1)
        return torch.where(eta > 0, 1 - x, x)


# Taylor coefficients in h²: ln(sinh h / h) / h² and its derivative / h; the first left out is below 1e-11 for h < ¼
_LOG_SINHC = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775)
_LANGEVIN = (1 / 3, -1 / 45, 2 / 945, -1 / 4725, 2 / 93555)


def _series(h: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    square = h.square()
    total = torch.full_like(square, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * square + coefficient
    return total
