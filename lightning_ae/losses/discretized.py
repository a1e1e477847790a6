"""Likelihoods of numbers recorded with a finite spacing, bytes above all: mixtures whose mass lies on bins."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from lightning_ae.checks import check_finite, check_whole
from lightning_ae.limits import soft_limit
from lightning_ae.losses.base import full_precision
from lightning_ae.losses.cells import log_logistic_cell, log_normal_cell, log_normal_tail
from lightning_ae.losses.likelihoods import Likelihood

#: A scale of this share of a bin puts all mass into one bin: learned scales are held back from there on down.
_NARROWEST = 0.05
#: And from this logarithm on up, in halves of the range.
_WIDEST = 10.0


class DiscretizedMixtureNLL(Likelihood):
    r"""Base of mixtures on bins: :math:`P(x) = \sum_k \pi_k [F_k(x + \tfrac\delta2) - F_k(x - \tfrac\delta2)]`.

    ``levels`` values from ``low`` to ``high``, :math:`\delta` apart; what a component has beyond the ends is in the
    first and the last bin, so that the bins sum to one. The loss is minus the logarithm of a *probability*: it is never
    negative, and divided by :math:`\ln 2` it is the number of bits that an arithmetic coder writes. A density of the
    same data grows without limit as its scale shrinks; this ends at 0 nats, so the loss is its own :meth:`excess`.

    Args:
        num_components: :math:`K` of each number.
        levels: how many values there are.
        low: the smallest.
        high: the largest.

    Raises:
        ValueError: if a number is out of range; from :meth:`check`, if targets are none of the values.
    """

    discrete = True
    lower_bound = 0.0
    output_activation = "mixture_mean"

    def __init__(self, num_components: int = 5, levels: int = 256, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.num_components = check_whole("num_components", num_components)
        self.levels = check_whole("levels", levels, least=2)
        self.low, self.high = low, high = check_finite("low", low), check_finite("high", high)
        if not high > low:
            raise ValueError(f"high: expected a number above low={low}, got {high}.")
        self.output_range = (low, high)
        self.params_per_feature = 3 * self.num_components

    @abstractmethod
    def log_cell(self, z: Tensor, width: Tensor) -> Tensor:
        """Logarithm of a component's mass between ``z - width / 2`` and ``z + width / 2``, both in scales."""

    @abstractmethod
    def log_tail(self, z: Tensor) -> Tensor:
        """Logarithm of a component's mass below ``z``, in scales; components are symmetric."""

    @abstractmethod
    def noise(self, like: Tensor) -> Tensor:
        """Draws from the component with mean 0 and scale 1."""

    def _components(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and scales, ``(B, K, *event)``; the latter two in bins, counted from ``low``."""
        shape = (params.shape[0], 3, self.num_components, -1, *params.shape[2:])
        logits, means, log_scales = full_precision(params).reshape(shape).unbind(1)
        half = (self.levels - 1) / 2
        log_scales = soft_limit(log_scales, math.log(_NARROWEST / half), _WIDEST)
        return logits.log_softmax(1), half * (1 + means), half * log_scales.exp()

    def mean(self, params: Tensor) -> Tensor:
        """The mixture's mean, within the range."""
        log_weights, means, _ = self._components(params)
        mean = (log_weights.exp() * means).sum(1).clamp(0, self.levels - 1)
        return self.low + mean * ((self.high - self.low) / (self.levels - 1))

    def _bins(self, x: Tensor) -> Tensor:
        return (x - self.low) * ((self.levels - 1) / (self.high - self.low))

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Negative log-probability of the bin of each number."""
        log_weights, means, scales = self._components(params)
        bins = self._bins(x).round().clamp(0, self.levels - 1)[:, None]
        z, width = (bins - means) / scales, 1 / scales
        first, last = bins == 0, bins == self.levels - 1
        tail = self.log_tail(torch.where(first, z, -z) + width / 2)
        mass = torch.where(first | last, tail, self.log_cell(z, width))
        return -(log_weights + mass).logsumexp(1)

    def check(self, x: Tensor) -> None:
        """Targets must be of the values."""
        bins = self._bins(full_precision(x))
        nearest = bins.round()
        if ((bins - nearest).abs() > 0.01).any() or nearest.amin() < 0 or nearest.amax() > self.levels - 1:
            raise ValueError(
                f"{type(self).__name__}: targets must be {self.levels} values from {self.low:g} to {self.high:g}, "
                f"{(self.high - self.low) / (self.levels - 1):.4g} apart, got others between {x.amin():.4g} and "
                f"{x.amax():.4g}. Round them, or set levels, low and high; for a density take GaussianNLL."
            )

    def sample(self, params: Tensor) -> Tensor:
        """Draw values."""
        log_weights, means, scales = self._components(params)
        uniform = torch.rand_like(log_weights).clamp(min=torch.finfo(log_weights.dtype).tiny)
        chosen = (log_weights - (-uniform.log()).log()).argmax(1, keepdim=True)
        mean, scale = (part.gather(1, chosen).squeeze(1) for part in (means, scales))
        bins = (mean + scale * self.noise(mean)).round().clamp(0, self.levels - 1)
        return self.low + bins * ((self.high - self.low) / (self.levels - 1))


class DiscretizedLogisticMixtureNLL(DiscretizedMixtureNLL):
    r"""Mixture of logistic distributions on bins, for bytes: PixelCNN++'s, each number on its own.

    .. math:: P(x) = \sum_k \pi_k \Big[\sigma\big(\tfrac{x + \delta/2 - \mu_k}{s_k}\big)
              - \sigma\big(\tfrac{x - \delta/2 - \mu_k}{s_k}\big)\Big]

    in nats, with the first and the last bin open. The difference is taken as
    :math:`\ln\sigma(b) + \ln\sigma(-a) + \ln(1 - e^{a - b})`, exact wherever ``x`` lies, so none of the branches of the
    original are needed. Its gradient is bounded, and the length of its code is the loss: see
    :class:`~lightning_ae.losses.discretized.DiscretizedMixtureNLL`.

    Args:
        num_components: :math:`K`; 1 for a single logistic.
        levels: how many values there are, 256 for bytes.
        low: the smallest: 0 for [0, 1], -1 for [-1, 1].
        high: the largest.

    Shapes:
        ``x``: ``(B, C, *rest)``; ``params``: ``(B, 3·K·C, *rest)``: blocks of :math:`K·C` logits of the weights, means
        and logarithms of scales, in each the first component's channels first. Means and scales are in halves of the
        range, about its middle: 0 is the middle, -1 ``low``, 1 ``high``. The loss ``(B,)`` in nats.

    Raises:
        ValueError: if a number is out of range; from :meth:`check`, if targets are none of the values.

    Source: Salimans et al. 2017 (PixelCNN++), https://arxiv.org/abs/1701.05517, without its dependence on other
    pixels and channels.

    Example:
        >>> loss = DiscretizedLogisticMixtureNLL(num_components=2)
        >>> params = torch.zeros(1, 6)
        >>> params[:, 4:] = -10.0  # scales far below a bin: all mass in the one in the middle
        >>> loss(params, torch.tensor([[128 / 255]])), loss.mean(params)
        (tensor([0.6931]), tensor([[0.5000]]))
    """

    def log_cell(self, z: Tensor, width: Tensor) -> Tensor:
        """Mass of a bin."""
        return log_logistic_cell(z, width)

    def log_tail(self, z: Tensor) -> Tensor:
        """Mass of an end."""
        return functional.logsigmoid(z)

    def noise(self, like: Tensor) -> Tensor:
        """Standard logistic."""
        uniform = torch.rand_like(like).clamp(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps)
        return uniform.log() - (-uniform).log1p()


class DiscretizedGaussianMixtureNLL(DiscretizedMixtureNLL):
    r"""Mixture of Gaussians on bins: what :class:`GaussianNLL` is for numbers recorded with a finite spacing.

    .. math:: P(x) = \sum_k \pi_k \Big[\Phi\big(\tfrac{x + \delta/2 - \mu_k}{\sigma_k}\big)
              - \Phi\big(\tfrac{x - \delta/2 - \mu_k}{\sigma_k}\big)\Big]

    in nats, with the first and the last bin open. For :math:`\sigma \gg \delta` and one component it is the Gaussian
    density times :math:`\delta`; for smaller :math:`\sigma` it stays a probability.

    Args:
        num_components: :math:`K`; 1 for a single Gaussian.
        levels: as for :class:`DiscretizedLogisticMixtureNLL`.
        low: as there.
        high: as there.

    Shapes:
        as for :class:`DiscretizedLogisticMixtureNLL`.

    Raises:
        ValueError: if a number is out of range; from :meth:`check`, if targets are none of the values.

    Source: Ho, Jain & Abbeel 2020, https://arxiv.org/abs/2006.11239, section 3.3 (the discrete decoder).

    Example:
        >>> loss = DiscretizedGaussianMixtureNLL(num_components=1, levels=3, low=-1.0)
        >>> loss(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0]])).neg().exp()  # Φ(½) - Φ(-½)
        tensor([0.3829])
    """

    def log_cell(self, z: Tensor, width: Tensor) -> Tensor:
        """Mass of a bin."""
        return log_normal_cell(z, width)

    def log_tail(self, z: Tensor) -> Tensor:
        """Mass of an end."""
        return log_normal_tail(z)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal."""
        return torch.randn_like(like)
