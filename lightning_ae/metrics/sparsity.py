"""How sparse codes are, per example and per latent.

Pure functions of device tensors that never wait for the device. Whatever is narrower than single precision is
widened first. What does not exist, the sparsity of an all-zero code (0/0), is NaN, so that means leave it out
without a copy to the host: ``gini(z).nanmean()``. A code with a NaN or an infinity in it is NaN as well; count
those apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ae.checks import check_non_negative, check_tensor, check_whole


def widen(tensor: Tensor) -> Tensor:
    """The tensor in single precision, or in double if that is what it has."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def check_pair(preds: Tensor, target: Tensor) -> None:
    """An error unless these are reconstructions and what they should be, ``(B, *event)`` both."""
    check_tensor("preds", preds)
    check_tensor("target", target, least_dims=1)
    if preds.shape != target.shape:
        raise ValueError(f"preds: expected reconstructions {tuple(target.shape)}, got {tuple(preds.shape)}.")


def _magnitudes(z: Tensor, least: int = 1) -> Tensor:
    """Absolute values, one flat row per example; of a ``SparseCode`` too."""
    z = z.to_dense() if hasattr(z, "values") and hasattr(z, "num_latents") else z
    check_tensor("z", z)
    latents = math.prod(z.shape[1:])
    if z.ndim < 2 or latents < least:
        raise ValueError(f"z: expected (B, n) with n >= {least}, got {tuple(z.shape)}.")
    return widen(z).reshape(len(z), latents).abs()


def _relative(z: Tensor, least: int = 1) -> Tensor:
    """Absolute values over the largest of their row: their squares neither overflow nor vanish."""
    magnitudes = _magnitudes(z, least)
    return magnitudes / magnitudes.amax(1, keepdim=True)


def l0(z: Tensor, eps: float = 0.0) -> Tensor:
    r"""Active latents per example: :math:`\#\{i : |z_i| > \epsilon\}`.

    Args:
        z: codes, ``(B, n)``, or ``(B, ...)`` to be flattened.
        eps: what still counts as zero, in units of ``z``.

    Returns:
        Counts, ``(B,)``, int64. An infinite latent counts, a NaN does not.

    Raises:
        ValueError: if ``z`` has no latents, or ``eps`` is negative.

    Source: Hurley & Rickard 2009, https://arxiv.org/abs/0811.4706.

    Example:
        >>> l0(torch.tensor([[0.0, 3.0, -0.1], [0.0, 0.0, 0.0]]))
        tensor([2, 0])
    """
    eps = check_non_negative("eps", eps)
    return (_magnitudes(z) > eps).sum(1)


def hoyer(z: Tensor) -> Tensor:
    r"""Hoyer's sparseness: :math:`\frac{\sqrt n - \|z\|_1 / \|z\|_2}{\sqrt n - 1}`.

    0 if all latents are equally large, 1 if one alone is active. It depends on ``n``: the same code twice over
    scores lower.

    Args:
        z: codes, ``(B, n)``, or ``(B, ...)`` to be flattened; at least two latents.

    Returns:
        From 0 to 1, no unit, ``(B,)``; NaN where all latents are zero.

    Raises:
        ValueError: if ``z`` has fewer than two latents.

    Source: Hoyer 2004, https://www.jmlr.org/papers/v5/hoyer04a.html, section 3.1.

    Example:
        >>> hoyer(torch.tensor([[0.0, -3.0, 0.0], [1.0, 1.0, -1.0], [0.0, 0.0, 0.0]])).round(decimals=4)
        tensor([1., 0., nan])
    """
    size = _relative(z, least=2)
    return _hoyer(size.sum(1) / size.square().sum(1).sqrt(), size.shape[1])


def _hoyer(ratio: Tensor, n: int) -> Tensor:
    root = math.sqrt(n)
    return ((root - ratio) / (root - 1)).clamp(0, 1)


def gini(z: Tensor) -> Tensor:
    r"""Gini index: :math:`1 - 2\sum_{k=1}^n \frac{|z|_{(k)}}{\|z\|_1} \cdot \frac{n - k + 1/2}{n}`, sorted ascending.

    0 if all latents are equally large, :math:`1 - 1/n` if one alone is active. The one measure here with all six
    properties that Hurley & Rickard ask for, so it compares codes of different widths. Costs a sort.

    Args:
        z: codes, ``(B, n)``, or ``(B, ...)`` to be flattened.

    Returns:
        From 0 to :math:`1 - 1/n`, no unit, ``(B,)``; NaN where all latents are zero.

    Raises:
        ValueError: if ``z`` has no latents.

    Source: Hurley & Rickard 2009, https://arxiv.org/abs/0811.4706.

    Example:
        >>> gini(torch.tensor([[0.0, -3.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0], [1.0, 2.0, 3.0, 4.0]]))
        tensor([0.7500, 0.0000, 0.2500])
    """
    size = _relative(z)
    return _gini(size, size.sum(1))


def _gini(size: Tensor, total: Tensor) -> Tensor:
    n = size.shape[1]
    # the sum and the one before it taken together: equal latents then cancel exactly
    weights = torch.arange(1 - n, n, 2, dtype=size.dtype, device=size.device) / n
    return ((weights * size.sort(1).values).sum(1) / total).clamp(0, 1)


def population_sparsity(z: Tensor) -> Tensor:
    r"""Treves–Rolls sparseness over latents: :math:`\frac{1 - (\frac1n\sum|z_i|)^2 / \frac1n\sum z_i^2}{1 - 1/n}`.

    0 if all latents are equally large, 1 if one alone is active: how few latents speak for an example.

    Args:
        z: codes, ``(B, n)``, or ``(B, ...)`` to be flattened; at least two latents.

    Returns:
        From 0 to 1, no unit, ``(B,)``; NaN where all latents are zero.

    Raises:
        ValueError: if ``z`` has fewer than two latents.

    Source: Treves & Rolls 1991, https://doi.org/10.1088/0954-898X_2_4_004, normalised as in Vinje & Gallant 2000,
    https://doi.org/10.1126/science.287.5456.1273.

    Example:
        >>> population_sparsity(torch.tensor([[0.0, -3.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])).round(decimals=4)
        tensor([1.0000, 0.6667])
    """
    size = _relative(z, least=2)
    return lifetime_sparsity(size.mean(1), size.square().mean(1), size.shape[1])


def sparseness(z: Tensor) -> Tensor:
    """:func:`hoyer`, :func:`gini` and :func:`population_sparsity` of each code ``(3, B)``, for less than one by one.

    Args:
        z: codes, ``(B, n)``, or ``(B, ...)`` to be flattened; at least two latents.
    """
    size = _relative(z, least=2)
    total, n = size.sum(1), size.shape[1]
    ratio = total / size.square().sum(1).sqrt()
    return torch.stack([_hoyer(ratio, n), _gini(size, total), ((1 - ratio.square() / n) / (1 - 1 / n)).clamp(0, 1)])


def lifetime_sparsity(mean_abs: Tensor, mean_square: Tensor, n: int | Tensor) -> Tensor:
    r"""Treves–Rolls sparseness over examples: :math:`\frac{1 - m_1^2 / m_2}{1 - 1/n}`.

    With the running moments :math:`m_1 = \frac1n\sum_j |z_j|` and :math:`m_2 = \frac1n\sum_j z_j^2` of a latent:
    0 if it is equally large for all examples, 1 if it speaks for one alone.

    Args:
        mean_abs: :math:`m_1` of each latent, ``(D,)``.
        mean_square: :math:`m_2` of each latent, ``(D,)``.
        n: examples averaged over, at least two; also a count on the device.

    Returns:
        From 0 to 1, no unit, ``(D,)``; NaN where a latent is always zero, or a count on the device less than two.

    Raises:
        ValueError: if the shapes differ, or the number ``n`` is less than two.

    Source: Vinje & Gallant 2000, https://doi.org/10.1126/science.287.5456.1273.

    Example:
        >>> z = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
        >>> lifetime_sparsity(z.abs().mean(0), z.square().mean(0), len(z))
        tensor([0., 1., nan])
    """
    check_tensor("mean_abs", mean_abs)
    check_tensor("mean_square", mean_square)
    if mean_abs.shape != mean_square.shape:
        raise ValueError(
            f"mean_abs and mean_square: expected moments alike, got {tuple(mean_abs.shape)} and "
            f"{tuple(mean_square.shape)}."
        )
    if isinstance(n, Tensor):
        check_tensor("n", n)
        if n.shape not in ((), mean_abs.shape):
            raise ValueError(f"n: expected one number, or one for each latent, got {tuple(n.shape)}.")
        n = torch.where(n > 1, n, torch.nan)
    elif check_whole("n", n) < 2:
        raise ValueError(f"n: expected at least two examples, got {n}.")
    # the root first: a mean in range may have a square that is not
    share = (widen(mean_abs) / widen(mean_square).sqrt()).square()
    return ((1 - share) / (1 - 1 / n)).clamp(0, 1)
