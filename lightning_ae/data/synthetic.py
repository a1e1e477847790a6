"""Data whose truth is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ae.checks import check_non_negative, check_seed, check_whole


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
    num_examples, in_features = check_whole("num_examples", num_examples), check_whole("in_features", in_features)
    latent_dim, seed = check_whole("latent_dim", latent_dim), check_seed("seed", seed)
    noise = check_non_negative("noise", noise)
    if latent_dim > in_features:
        raise ValueError(f"latent_dim: expected at most in_features={in_features}, got {latent_dim}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.arange(latent_dim, 0, -1, dtype=torch.float64).sqrt()
    loadings = torch.linalg.qr(normal(in_features, latent_dim)).Q * lengths
    x = normal(num_examples, latent_dim) @ loadings.T + noise * normal(num_examples, in_features)
    return LinearGaussian(x.float(), loadings.float())


class SparseDictionary(NamedTuple):
    """Examples that are sums of a few atoms, and the atoms.

    Attributes:
        x: the examples, float32 of shape ``(N, in_features)``.
        atoms: float32 of shape ``(num_atoms, in_features)``, each of norm 1.
        z: the coefficients, float32 of shape ``(N, num_atoms)``; 0 where an atom is off.
    """

    x: Tensor
    atoms: Tensor
    z: Tensor


def sparse_dictionary(
    num_examples: int,
    in_features: int,
    num_atoms: int,
    active: int,
    *,
    noise: float = 0.0,
    decay: float = 0.0,
    seed: int = 0,
) -> SparseDictionary:
    r"""Draw :math:`x = D z + \sigma\varepsilon` with exactly ``active`` coefficients that are not 0.

    Atoms are uniform on the unit sphere, coefficients uniform in :math:`[\tfrac12, \tfrac32]`, and which are on is
    drawn without replacement: all atoms alike, or with odds :math:`\propto (i + 1)^{-\alpha}`, so that the later an
    atom the rarer it is.

    Args:
        num_examples: :math:`N`.
        in_features: :math:`d`.
        num_atoms: more than ``in_features`` for an overcomplete dictionary.
        active: how many are on in each example.
        noise: :math:`\sigma \ge 0`, the standard deviation of each feature's noise.
        decay: :math:`\alpha \ge 0`.
        seed: decides atoms and examples.

    Returns:
        Examples, atoms and coefficients.

    Raises:
        TypeError: if a number that should be an integer is not.
        ValueError: if a number is out of range.

    Source: Olshausen & Field 1996, https://doi.org/10.1038/381607a0; for dictionaries of features, Sharkey et al. 2022,
    https://www.alignmentforum.org/posts/z6QQJbtpkEAX3Aojj.

    Example:
        >>> data = sparse_dictionary(100, in_features=8, num_atoms=16, active=2)
        >>> data.x.shape, int(data.z.count_nonzero()), torch.allclose(data.z @ data.atoms, data.x, atol=1e-6)
        (torch.Size([100, 8]), 200, True)
    """
    num_examples, in_features = check_whole("num_examples", num_examples), check_whole("in_features", in_features)
    num_atoms, active = check_whole("num_atoms", num_atoms), check_whole("active", active)
    noise, decay, seed = (
        check_non_negative("noise", noise),
        check_non_negative("decay", decay),
        check_seed("seed", seed),
    )
    if active > num_atoms:
        raise ValueError(f"active: expected at most num_atoms={num_atoms}, got {active}")
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(num_atoms, in_features, generator=generator)
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    # the largest of log-odds plus Gumbel noise are a draw without replacement
    uniform = torch.rand(num_examples, num_atoms, generator=generator).clamp_min(1e-12)
    odds = -decay * torch.arange(1, num_atoms + 1).log()
    on = (odds - (-uniform.log()).log()).topk(active, dim=1).indices
    coefficients = 0.5 + torch.rand(num_examples, active, generator=generator)
    z = torch.zeros(num_examples, num_atoms).scatter(1, on, coefficients)
    x = z @ atoms + noise * torch.randn(num_examples, in_features, generator=generator)
    return SparseDictionary(x, atoms, z)
