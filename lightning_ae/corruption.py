"""Corruptions of the input for denoising: the loss still scores the clean input."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_finite, check_flag, check_floating, check_non_negative, check_share
from lightning_ae.rebuildable import Rebuildable


class Corruption(Rebuildable, nn.Module, ABC):
    """Base of all corruptions: random in training, nothing in evaluation unless asked.

    Args:
        in_eval: corrupt in evaluation too, to measure denoising rather than reconstruction.
    """

    def __init__(self, in_eval: bool = False) -> None:
        super().__init__()
        self.in_eval = check_flag("in_eval", in_eval)

    @abstractmethod
    def corrupt(self, x: Tensor) -> Tensor:
        """A corrupted copy of ``x``, of the same shape; ``x`` itself is left alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Corrupt ``x`` in training mode, or if ``in_eval``; else return it."""
        check_floating("x", x)
        return self.corrupt(x) if self.training or self.in_eval else x


class GaussianNoise(Corruption):
    r"""Add white noise: :math:`\tilde x = x + \epsilon`, :math:`\epsilon \sim N(0, \sigma^2 I)`.

    The optimal denoiser points along the score of the noisy data: :math:`\hat x - \tilde x = \sigma^2\,
    \nabla \ln p(\tilde x)`.

    Args:
        std: :math:`\sigma \ge 0`, in units of ``x``.
        in_eval: corrupt in evaluation too.

    Shapes:
        ``(B, *event)`` to the same.

    Raises:
        TypeError: if ``std`` is no number.
        ValueError: if it is negative or not finite.

    Source: Vincent 2011, https://doi.org/10.1162/NECO_a_00142; Alain & Bengio 2014, https://arxiv.org/abs/1211.4246.

    Example:
        >>> GaussianNoise(0.1).eval()(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    def __init__(self, std: float, in_eval: bool = False) -> None:
        super().__init__(in_eval)
        self.std = check_non_negative("std", std)

    def corrupt(self, x: Tensor) -> Tensor:
        """Add noise."""
        return x + self.std * torch.randn_like(x)


class MaskingNoise(Corruption):
    r"""Set each number to zero with probability ``p``, independently.

    Args:
        p: share of the numbers that is erased, in [0, 1].
        in_eval: corrupt in evaluation too.

    Shapes:
        ``(B, *event)`` to the same.

    Raises:
        ValueError: if ``p`` lies outside [0, 1].

    Source: Vincent et al. 2010, https://www.jmlr.org/papers/v11/vincent10a.html.

    Example:
        >>> MaskingNoise(1.0)(torch.ones(1, 2))
        tensor([[0., 0.]])
    """

    def __init__(self, p: float, in_eval: bool = False) -> None:
        super().__init__(in_eval)
        self.p = check_share("p", p)

    def corrupt(self, x: Tensor) -> Tensor:
        """Erase."""
        return x * (_uniform(x) >= self.p)


class SaltAndPepper(Corruption):
    r"""Set each number with probability ``p`` to one of two extremes, each as likely.

    Args:
        p: share of the numbers that is replaced, in [0, 1].
        low: pepper, in units of ``x``.
        high: salt, in units of ``x``.
        in_eval: corrupt in evaluation too.

    Shapes:
        ``(B, *event)`` to the same.

    Raises:
        ValueError: if ``p`` lies outside [0, 1].

    Source: Vincent et al. 2010, https://www.jmlr.org/papers/v11/vincent10a.html.

    Example:
        >>> SaltAndPepper(1.0, low=7.0, high=7.0)(torch.ones(1, 2))
        tensor([[7., 7.]])
    """

    def __init__(self, p: float, low: float = 0.0, high: float = 1.0, in_eval: bool = False) -> None:
        super().__init__(in_eval)
        self.p = check_share("p", p)
        self.low = check_finite("low", low)
        self.high = check_finite("high", high)

    def corrupt(self, x: Tensor) -> Tensor:
        """Replace."""
        u = _uniform(x)
        return torch.where(u < self.p / 2, self.low, torch.where(u < self.p, self.high, x))


def _uniform(x: Tensor) -> Tensor:
    """Numbers in [0, 1) for each of ``x``, in float32: bf16 has only 256 of them."""
    return torch.rand(x.shape, device=x.device)
