"""Data whose truth is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ae.data.checks import check_int


class LinearGaussian(NamedTuple):
    """Examples of a linear Gaussian model, and the loadings they were made with.

    Attributes:
        x: the examples, float32 of shape ``(N, in_features)``.
        loadings: ``W``, float32 of shape ``(in_features, latent_dim)``, its columns orthogonal.
    """

    x: Tensor
    loadings: Tensor


def linear_gaussian(
    num_examples: int, in_features: int, latent_dim: int, *, noise: float = 0.1, seed: int = 0
) -> LinearGaussian:
    r"""Draw :math:`x = Wz + \sigma\varepsilon` with :math:`z, \varepsilon` standard normal.

    The columns of :math:`W` are orthogonal with squared lengths :math:`k, k-1, \ldots, 1`, so the covariance
    :math:`WW^\top + \sigma^2 I` has the eigenvalues :math:`k + \sigma^2, \ldots, 1 + \sigma^2`, then
    :math:`\sigma^2`: the principal subspace is the span of :math:`W`, and the best linear autoencoder leaves
    :math:`(d - k)\sigma^2` of squared error per example, in the limit of many examples.

    Args:
        num_examples: :math:`N`.
        in_features: :math:`d`.
        latent_dim: :math:`k \le d`.
        noise: :math:`\sigma \ge 0`, the standard deviation of each feature's noise.
        seed: decides both ``W`` and the examples.

    Returns:
        The examples and the loadings.

    Raises:
        TypeError: if a number that should be an integer is not.
        ValueError: if a number is out of range.

    Source: Tipping and Bishop 1999, https://doi.org/10.1111/1467-9868.00196.

    Example:
        >>> x, loadings = linear_gaussian(100, in_features=8, latent_dim=2)
        >>> x.shape, (loadings.T @ loadings).diagonal().round()
        (torch.Size([100, 8]), tensor([2., 1.]))
    """
    check_int("num_examples", num_examples, least=1)
    check_int("in_features", in_features, least=1)
    check_int("latent_dim", latent_dim, least=1)
    check_int("seed", seed, least=0)
    if latent_dim > in_features:
        raise ValueError(f"latent_dim: expected at most in_features={in_features}, got {latent_dim}")
    if not noise >= 0:
        raise ValueError(f"noise: expected a standard deviation >= 0, got {noise}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.arange(latent_dim, 0, -1, dtype=torch.float64).sqrt()
    loadings = torch.linalg.qr(normal(in_features, latent_dim)).Q * lengths
    x = normal(num_examples, latent_dim) @ loadings.T + noise * normal(num_examples, in_features)
    return LinearGaussian(x.float(), loadings.float())
