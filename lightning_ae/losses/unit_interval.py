"""Likelihoods of data in [0, 1], binary or continuous."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_ae.losses.base import full_precision, value_range, widest
from lightning_ae.losses.likelihoods import Likelihood

#: How far beyond [0, 1] numbers in single precision get by rounding.
_ROUNDING = 1e-5
#: Logits of a continuous Bernoulli beyond which an excess is not told.
_STEEPEST = 256.0


class _UnitInterval(Likelihood):
    """A likelihood of data in [0, 1] with logits as parameters."""

    output_activation = "sigmoid"
    output_range = (0.0, 1.0)

    def check(self, x: Tensor) -> None:
        """Targets must lie in [0, 1]."""
        low, high = (float(end) for end in value_range(x))
        # what rounding leaves, of a division or a resize, is no other value
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(
                f"x: {type(self).__name__}: targets must lie in [0, 1], got values from {low:.4g} to {high:.4g}. "
                "Scale the data, or use GaussianNLL."
            )


class BernoulliNLL(_UnitInterval):
    r"""Bernoulli likelihood on logits: :math:`-\sum x\ln\hat x + (1-x)\ln(1-\hat x)` nats, :math:`\hat x=\sigma(a)`.

    Sigmoid and logarithm cancel: the gradient is :math:`\partial L / \partial a = \hat x - x`, as large as the
    error however saturated the output is. Soft targets in [0, 1] are allowed; the loss is then the cross-entropy
    to a Bernoulli with that mean, which is no density of ``x`` (see :class:`ContinuousBernoulliNLL`), nor the length of
    a code for anything but zeros and ones.

    Shapes:
        ``params`` (logits) and ``x`` (in [0, 1]): ``(B, *event)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: from :meth:`check`, if targets lie outside [0, 1].

    Source: Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.2.

    Example:
        >>> BernoulliNLL()(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))  # 2 ln 2
        tensor([1.3863])
    """

    discrete = True
    lower_bound = 0.0  # a cross-entropy

    def mean(self, params: Tensor) -> Tensor:
        """Probability of a one."""
        return full_precision(params).sigmoid()

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy of each number."""
        return functional.binary_cross_entropy_with_logits(params, x, reduction="none")

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        r"""Divergence :math:`x\ln\tfrac{x}{\hat x} + (1 - x)\ln\tfrac{1 - x}{1 - \hat x}`."""
        x = x.clamp(0, 1)
        entropy = torch.special.entr(x) + torch.special.entr(1 - x)
        divergence: Tensor = self.pointwise(params, x) - entropy
        return divergence.clamp(min=0)

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
        # A(η) = η/2 + ln(sinh h / h), h = η/2
        return params / 2 + self._log_sinhc(params) - params * x

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        r"""Over the best logit for ``x``, both held to :math:`|\eta| \le 256`.

        The density of an ``x`` of 0 or 1 grows with :math:`|\eta|` without limit; at 256 it falls to 1/e within the
        spacing of bytes, below which there is nothing to be told.
        """
        x_wide, held = x.clamp(0, 1).to(widest(x)), params.clamp(-_STEEPEST, _STEEPEST).to(widest(x))
        best = _logit_of_mean(x_wide)
        return (self.pointwise(held, x_wide) - self.pointwise(best, x_wide)).clamp(min=0).to(x.dtype)

    def cell_nll(self, params: Tensor, x: Tensor, width: float) -> Tensor:
        """By the integral over what lies in [0, 1] of the cell."""
        low, high = (x - width / 2).clamp(min=0), (x + width / 2).clamp(max=1)
        inside = high - low
        return self.pointwise(params, (low + high) / 2) - inside.log() - self._log_sinhc(params * inside)

    def _log_sinhc(self, params: Tensor) -> Tensor:
        """ln(sinh h / h) with h = η/2, which is even in h."""
        half, near_zero, safe = self._split(params)
        h = safe.abs()
        return torch.where(
            near_zero, half.square() * _series(half, _LOG_SINHC), h + torch.log(-torch.expm1(-2 * h) / (2 * h))
        )

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


def _logit_of_mean(x: Tensor) -> Tensor:
    r"""The :math:`\eta` with :math:`A'(\eta) = x`, at most 256 in size: Cohen's inverse of Langevin's, by Newton's."""
    end = 1 - 2 / _STEEPEST
    y = (2 * x - 1).clamp(-end, end)
    h = y * (3 - y.square()) / (1 - y.square())
    for _ in range(5):
        near_zero = h.abs() < 0.25
        safe = torch.where(near_zero, torch.ones_like(h), h)
        value = torch.where(near_zero, h * _series(h, _LANGEVIN), 1 / safe.tanh() - 1 / safe)
        slope = safe.square().reciprocal() - safe.sinh().square().reciprocal()
        h = h - (value - y) / torch.where(near_zero, 1 / 3 - h.square() / 15, slope)
    return (2 * h).clamp(-_STEEPEST, _STEEPEST)


def _series(h: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    square = h.square()
    total = torch.full_like(square, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * square + coefficient
    return total
