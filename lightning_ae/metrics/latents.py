"""How much of a dense or quantised code is used."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ae.checks import check_non_negative, check_tensor
from lightning_ae.metrics.sparsity import widen


def _exp_entropy(weights: Tensor) -> Tensor:
    """Exponential of the entropy of weights once they sum to one; 0 if all are zero."""
    total = weights.sum()
    nothing = total == 0
    p = weights / torch.where(nothing, 1, total)
    return torch.where(nothing, 0, (-torch.xlogy(p, p).sum()).exp())


def effective_rank(covariance: Tensor) -> Tensor:
    r"""Number of directions a code varies in: :math:`\exp(-\sum_i p_i \ln p_i), p_i = \lambda_i / \sum_j \lambda_j`.

    Roy & Vetterli define it by a matrix's singular values. The matrix here is the covariance, whose singular values
    are its eigenvalues :math:`\lambda_i`: variances along the principal axes, the *squares* of the singular
    values of the centred codes. It goes from 1, all codes on a line, to ``D``, the same variance everywhere.

    This is the one function here for which CUDA waits (:func:`torch.linalg.eigvalsh` does), and its cost grows with
    :math:`D^3`: call it once a log. Where the device lacks it (MPS), pass the covariance on the CPU.

    Args:
        covariance: symmetric and positive semi-definite, ``(D, D)``; its lower triangle is read.

    Returns:
        From 1 to ``D``, no unit, ``()``; 0 for a zero matrix, NaN if any entry is not finite.

    Raises:
        ValueError: if it is no square matrix.

    Source: Roy & Vetterli 2007, https://ieeexplore.ieee.org/document/7098875.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0, 2.0])))
        tensor(3.)
    """
    check_tensor("covariance", covariance)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not covariance.numel():
        raise ValueError(f"covariance: expected (D, D), got {tuple(covariance.shape)}.")
    matrix = widen(covariance)
    finite = matrix.isfinite().all()
    # rounding makes small eigenvalues negative; LAPACK raises at what is not finite
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, matrix, 0)).clamp(min=0)
    return torch.where(finite, _exp_entropy(eigenvalues), torch.nan)


def active_units(variance: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Latents that tell examples apart: :math:`\#\{i : \operatorname{Var}_x(\mathbb{E}_{q(z|x)}[z_i]) > t\}`.

    Args:
        variance: of each latent's posterior mean over the data, ``(D,)``.
        threshold: :math:`t`, in squared units of ``z``; the default suits a prior of variance 1.

    Returns:
        Count, ``()``, int64; a NaN does not count.

    Raises:
        ValueError: if ``variance`` is no vector, or ``threshold`` is negative.

    Source: Burda et al. 2016, https://arxiv.org/abs/1509.00519.

    Example:
        >>> active_units(torch.tensor([0.9, 0.0003, 0.02]))
        tensor(2)
    """
    check_tensor("variance", variance)
    if variance.ndim != 1:
        raise ValueError(f"variance: expected (D,), got {tuple(variance.shape)}.")
    threshold = check_non_negative("threshold", threshold)
    return (widen(variance) > threshold).sum()


def kl_per_dimension(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""What each latent costs: :math:`\frac1B\sum_b \frac12(\mu_b^2 + \sigma_b^2 - 1 - \ln\sigma_b^2)`.

    The divergence of the posterior :math:`\mathcal N(\mu, \sigma^2)` from the prior :math:`\mathcal N(0, 1)`; it is
    zero for a latent that has collapsed onto the prior, and its sum over latents is the rate.

    Args:
        mean: :math:`\mu`, ``(B, D)``, or ``(B, ...)`` to be flattened.
        log_variance: :math:`\ln\sigma^2`, of the same shape.

    Returns:
        Nats, ``(D,)``.

    Raises:
        ValueError: if the shapes differ, or there are no examples.

    Source: Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, appendix B.

    Example:
        >>> kl_per_dimension(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2, 2))
        tensor([0.5000, 0.0000])
    """
    check_tensor("mean", mean)
    check_tensor("log_variance", log_variance)
    if mean.shape != log_variance.shape or mean.ndim < 2 or not len(mean):
        raise ValueError(
            f"mean and log_variance: expected (B, D) twice with B >= 1, got {tuple(mean.shape)} and "
            f"{tuple(log_variance.shape)}."
        )
    mean, log_variance = widen(mean).flatten(1), widen(log_variance).flatten(1)
    # a posterior near the prior has a variance near one, whose difference from one expm1 keeps
    return (mean.square() + log_variance.expm1() - log_variance).mean(0) / 2


def perplexity(counts: Tensor) -> Tensor:
    r"""Number of codes in use, had all equal shares: :math:`\exp(-\sum_k p_k \ln p_k), p_k = c_k / \sum_j c_j`.

    Args:
        counts: how often each code was chosen, ``(K,)``, none negative.

    Returns:
        From 1 to ``K``, no unit, ``()``; 0 if nothing was counted, NaN for counts that are NaN or negative.

    Raises:
        ValueError: if ``counts`` is no vector, or empty.

    Source: Jelinek et al. 1977, https://doi.org/10.1121/1.2016299.

    Example:
        >>> perplexity(torch.tensor([5, 5, 0, 0]))
        tensor(2.)
    """
    counts = widen(_checked(counts))
    return torch.where((counts >= 0).all(), _exp_entropy(counts), torch.nan)


def codebook_usage(counts: Tensor) -> Tensor:
    r"""Fraction of codes in use: :math:`\#\{k : c_k > 0\} / K`.

    Args:
        counts: how often each code was chosen, ``(K,)``, none negative.

    Returns:
        From 0 to 1, no unit, ``()``; 0 if nothing was counted, NaN for counts that are NaN or negative.

    Raises:
        ValueError: if ``counts`` is no vector, or empty.

    Example:
        >>> codebook_usage(torch.tensor([5, 1, 0, 0]))
        tensor(0.5000)
    """
    counts = widen(_checked(counts))
    return torch.where((counts >= 0).all(), widen(counts > 0).mean(), torch.nan)


def _checked(counts: Tensor) -> Tensor:
    check_tensor("counts", counts)
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"counts: expected (K,), got {tuple(counts.shape)}.")
    return counts
