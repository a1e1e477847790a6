"""Likelihoods of counts: sequencing reads, photons, words."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributions, nn
from torch.nn import functional

from lightning_ae.checks import check_flag, check_positive, check_whole
from lightning_ae.limits import soft_limit
from lightning_ae.losses.base import full_precision, value_range, widest
from lightning_ae.losses.likelihoods import Likelihood

#: Where the logarithm of an inverse dispersion is held back: far in the Poisson limit, and far from it.
_LIMIT = 40.0
#: From this inverse dispersion on Stirling's series is exact in double precision.
_STIRLING = 32.0


class _CountLikelihood(Likelihood):
    output_activation = "exp"
    output_range = (0.0, math.inf)
    discrete = True

    lower_bound = 0.0  # probabilities of whole numbers are at most 1

    def check(self, x: Tensor) -> None:
        """Targets must be whole numbers, none negative."""
        low, high = (end.float() for end in value_range(x))
        if low < 0 or (x.is_floating_point() and (x != x.round()).any()):
            raise ValueError(
                f"x: {type(self).__name__}: targets must be counts 0, 1, 2, …, got values from {low:.4g} to "
                f"{high:.4g}. Pass raw counts, neither normalised nor log-transformed."
            )


class PoissonNLL(_CountLikelihood):
    r"""Poisson likelihood: :math:`\sum e^a - x a + \ln x!` nats, with the log-rate :math:`a`.

    The exponential and the logarithm cancel in the gradient: :math:`\partial L / \partial a = \hat x - x`.

    Shapes:
        ``params`` (log-rates) and ``x`` (counts): ``(B, *event)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: from :meth:`check`, if targets are no counts.

    Source: McCullagh & Nelder 1989, Generalized Linear Models, chapter 6.

    Example:
        >>> PoissonNLL()(torch.zeros(1, 1), torch.zeros(1, 1))
        tensor([1.])
    """

    def mean(self, params: Tensor) -> Tensor:
        """The rate."""
        return full_precision(params).exp()

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Negative log-probability of each count."""
        # for large counts a small difference of large numbers
        log_rate, counts = params.to(widest(x)), x.to(widest(x))
        return (log_rate.exp() - counts * log_rate + torch.lgamma(counts + 1)).to(x.dtype)

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        r""":math:`\hat x - x + x\ln\tfrac{x}{\hat x}`."""
        log_rate, counts = params.to(widest(x)), x.to(widest(x))
        d = log_rate - counts.clamp(min=1).log()
        some = counts * (d.expm1() - d)
        return torch.where(counts == 0, log_rate.exp(), some).to(x.dtype)

    def sample(self, params: Tensor) -> Tensor:
        """Draw counts."""
        return torch.poisson(full_precision(params).exp())


class NegativeBinomialNLL(_CountLikelihood):
    r"""Negative binomial with mean :math:`\mu`, inverse dispersion :math:`\theta`, variance :math:`\mu+\mu^2/\theta`.

    .. math:: -\ln p(x) = \ln\Gamma(\theta) + \ln x! - \ln\Gamma(x + \theta)
              + \theta \ln\tfrac{\theta + \mu}{\theta} + x \ln\tfrac{\theta + \mu}{\mu}

    in nats, with :math:`\mu = e^a`, or with ``library_size`` :math:`\mu = \ell \operatorname{softmax}(a)`
    where :math:`\ell = \sum x` is the example's total. :math:`\theta` is learned, one per feature.
    The gradient is :math:`\partial L/\partial a = (\mu - x)\,\theta / (\theta + \mu)` for :math:`\mu = e^a`;
    :math:`\theta \to \infty` is the Poisson, which is what data without overdispersion lead to: beyond
    :math:`e^{\pm 40}` the parameter :math:`\ln\theta` counts only by its logarithm
    (:func:`~lightning_ae.limits.soft_limit`).

    Args:
        num_features: length of the last dimension of ``x``, to learn one :math:`\theta` for each;
            None shares one among all.
        inverse_dispersion: where :math:`\theta > 0` starts.
        library_size: whether the total of each example is taken as known. Then :meth:`mean` is the share of
            each feature, which sums to one, and :meth:`prediction` multiplies by the total. With a mask total and
            shares are those of what is there.

    Shapes:
        ``params`` and ``x`` (counts): ``(B, *event)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: if ``inverse_dispersion`` is not positive; from :meth:`check`, if targets are no counts.

    Source: Lopez et al. 2018 (scVI), https://doi.org/10.1038/s41592-018-0229-2;
    Robinson & Smyth 2008, https://doi.org/10.1093/biostatistics/kxm030.

    Example:
        >>> NegativeBinomialNLL(inverse_dispersion=1.0)(torch.zeros(1, 1), torch.zeros(1, 1))  # geometric: ln 2
        tensor([0.6931], grad_fn=<SumBackward1>)
    """

    def __init__(
        self, num_features: int | None = None, inverse_dispersion: float = 1.0, library_size: bool = False
    ) -> None:
        super().__init__()
        inverse_dispersion = check_positive("inverse_dispersion", inverse_dispersion)
        shape = () if num_features is None else (check_whole("num_features", num_features),)
        self.log_inverse_dispersion = nn.Parameter(torch.full(shape, math.log(inverse_dispersion)))
        self.library_size = check_flag("library_size", library_size)
        if self.library_size:
            self.output_activation = "softmax"

    @property
    def inverse_dispersion(self) -> Tensor:
        r""":math:`\theta`, ``(num_features,)`` or without dimensions."""
        return self._log_theta().exp()

    def _log_theta(self) -> Tensor:
        return soft_limit(full_precision(self.log_inverse_dispersion), -_LIMIT, _LIMIT)

    def log_mean(self, params: Tensor, library: Tensor | None = None) -> Tensor:
        r""":math:`\ln\mu`; with ``library_size`` the log-share plus, where given, the log of the total ``(B,)``."""
        if not self.library_size:
            return params
        log_share = params.flatten(1).log_softmax(1).view_as(params)
        if library is None:
            return log_share
        # an empty example has no share to speak of; the floor keeps its gradient finite
        return log_share + library.clamp(min=1e-8).log().reshape(-1, *(1,) * (params.ndim - 1))

    def mean(self, params: Tensor) -> Tensor:
        r""":math:`\mu`, or the shares with ``library_size``."""
        return self.log_mean(full_precision(params)).exp()

    def prediction(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Expected counts, given the total of ``x`` where it is taken as known: with a mask that of what is there."""
        return self.mean(params) * self._library(params, x, mask) if self.library_size else self.mean(params)

    def _library(self, params: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return _total(x, x)
        zero = torch.zeros((), device=x.device)
        share = torch.where(mask, self.log_mean(full_precision(params)).exp(), zero)
        seen = _total(torch.where(mask, full_precision(x), zero), x)
        return seen / _total(share, x).clamp_min(torch.finfo(share.dtype).tiny)

    def _leave_out(self, params: Tensor, mask: Tensor) -> Tensor:
        # shares are of the total of what is there
        return torch.where(mask, params, torch.finfo(params.dtype).min / 4) if self.library_size else params

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Negative log-probability of each count."""
        return self._nll(self.log_mean(params, x.flatten(1).sum(1)), x)

    def _nll(self, log_mean: Tensor, x: Tensor) -> Tensor:
        # small differences of large numbers, in the value and in the gradient
        log_mean, counts = log_mean.to(widest(x)), x.to(widest(x))
        log_theta = self._log_theta().to(log_mean.dtype)
        spread = torch.logaddexp(log_mean - log_theta, torch.zeros_like(log_mean))  # ln(1 + μ/θ)
        theta = log_theta.exp()
        nll = (theta + counts) * spread - counts * log_mean + torch.lgamma(counts + 1) - _rising(counts, theta)
        return nll.to(x.dtype)

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        r""":math:`x\ln\tfrac{x}{\mu} - (x + \theta)\ln\tfrac{x + \theta}{\mu + \theta}`."""
        return self._excess(self.log_mean(params, x.flatten(1).sum(1)), x)

    def _excess(self, log_mean: Tensor, x: Tensor) -> Tensor:
        log_mean, counts = log_mean.to(widest(x)), x.to(widest(x))
        log_theta = self._log_theta().to(log_mean.dtype)
        theta, log_total = log_theta.exp(), torch.logaddexp(log_mean, log_theta)
        # ln (x + θ)/(μ + θ): by what is left of 1 where that is little, as in the Poisson limit
        change = counts * (-log_total).exp() - (log_mean - log_total).exp()
        near = change > -0.5
        ratio = torch.where(
            near, torch.where(near, change, torch.zeros_like(change)).log1p(), (counts + theta).log() - log_total
        )
        some = torch.special.xlogy(counts, counts) - counts * log_mean
        excess: Tensor = some - (counts + theta) * ratio
        return excess.clamp(min=0).to(x.dtype)

    def sample(self, params: Tensor, library: Tensor | None = None) -> Tensor:
        """Draw counts; with ``library_size`` pass the totals ``(B,)``, else they are one."""
        logits = self.log_mean(full_precision(params), library) - self._log_theta()
        drawn: Tensor = distributions.NegativeBinomial(self.inverse_dispersion, logits=logits).sample()  # type: ignore[no-untyped-call]
        return drawn


class ZeroInflatedNegativeBinomialNLL(NegativeBinomialNLL):
    r"""Negative binomial with extra zeros: with probability :math:`\pi = \sigma(b)` a count drops out to 0.

    .. math:: p(0) = \pi + (1 - \pi)\,\mathrm{NB}(0), \qquad p(x) = (1 - \pi)\,\mathrm{NB}(x)\ \text{for}\ x > 0

    The decoder gives two blocks along the first event dimension: :math:`a` (as in :class:`NegativeBinomialNLL`)
    and then the dropout logits :math:`b`; :math:`\hat x = (1 - \pi)\mu`.

    Args:
        num_features: as in :class:`NegativeBinomialNLL`.
        inverse_dispersion: as in :class:`NegativeBinomialNLL`.
        library_size: as in :class:`NegativeBinomialNLL`.

    Shapes:
        ``params``: ``(B, 2·C, *rest)`` for ``x`` ``(B, C, *rest)``; the loss ``(B,)`` in nats.

    Raises:
        ValueError: as :class:`NegativeBinomialNLL`.

    Source: Lopez et al. 2018 (scVI), https://doi.org/10.1038/s41592-018-0229-2; Lambert 1992 for the mixture.

    Example:
        >>> loss = ZeroInflatedNegativeBinomialNLL(inverse_dispersion=1.0)
        >>> loss.mean(torch.zeros(1, 2))  # half of the counts drop out
        tensor([[0.5000]])
    """

    params_per_feature = 2

    def mean(self, params: Tensor) -> Tensor:
        r""":math:`(1 - \pi)\mu`."""
        log_mean, dropout = self._split(full_precision(params))
        return log_mean.exp() * (-dropout).sigmoid()

    def _library(self, params: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super()._library(params.chunk(2, dim=1)[0], x, mask)

    def _leave_out(self, params: Tensor, mask: Tensor) -> Tensor:
        counts, dropout = params.chunk(2, dim=1)
        return torch.cat([super()._leave_out(counts, mask), dropout], 1)

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Negative log-probability of each count."""
        log_mean, dropout = self._split(params, x.flatten(1).sum(1))
        nll = self._nll(log_mean, x)
        at_zero = functional.softplus(dropout) - torch.logaddexp(dropout, -nll)
        return torch.where(x == 0, at_zero, functional.softplus(dropout) + nll)

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        r"""Over the best of mean and dropout: none drops out, and a zero costs nothing."""
        log_mean, dropout = self._split(params, x.flatten(1).sum(1))
        return torch.where(x == 0, self.pointwise(params, x), functional.softplus(dropout) + self._excess(log_mean, x))

    def _split(self, params: Tensor, library: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if params.ndim < 2 or params.shape[1] % 2:
            raise ValueError(f"params: expected two blocks (B, 2 * C, ...), got {tuple(params.shape)}.")
        counts, dropout = params.chunk(2, dim=1)
        return self.log_mean(counts, library), dropout

    def sample(self, params: Tensor, library: Tensor | None = None) -> Tensor:
        """Draw counts, then drop some; ``library`` as in :class:`NegativeBinomialNLL`."""
        counts, dropout = full_precision(params).chunk(2, dim=1)
        kept = torch.bernoulli((-dropout).sigmoid())
        return super().sample(counts, library) * kept


def _rising(x: Tensor, theta: Tensor) -> Tensor:
    r""":math:`\ln\Gamma(\theta + x) - \ln\Gamma(\theta) - x \ln\theta = \sum_{i < x} \ln(1 + i/\theta)`.

    For large :math:`\theta` by Stirling's series, in which the large terms are gone.
    """
    large = theta > _STIRLING
    t = torch.where(large, theta, _STIRLING)
    stirling = (t + x - 0.5) * torch.log1p(x / t) - x + _stirling_rest(t + x) - _stirling_rest(t)
    t = torch.where(large, _STIRLING, theta)
    return torch.where(large, stirling, torch.lgamma(t + x) - torch.lgamma(t) - x * t.log())


def _stirling_rest(t: Tensor) -> Tensor:
    """What is left of ln Γ(t) after (t - ½) ln t - t + ½ ln 2π; below 1e-17 for t > 32 after five terms."""
    square = t.square().reciprocal()
    return (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188)))) / t


def _total(x: Tensor, like: Tensor) -> Tensor:
    return full_precision(x).flatten(1).sum(1).reshape(-1, *(1,) * (like.ndim - 1))
