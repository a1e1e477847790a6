"""The Gaussian window of structural similarity, and two ways to blur with it and with its adjoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

#: Longest side for which, uncompiled, a dense banded matrix beats a sum of shifted copies (two Zen 3 cores).
BANDED_UP_TO = 96


def gaussian_window(size: int, sigma: float) -> tuple[float, ...]:
    r"""Weights :math:`\propto e^{-k^2 / 2\sigma^2}` that sum to one.

    Args:
        size: number of weights, odd.
        sigma: standard deviation in pixels.

    Example:
        >>> [round(weight, 3) for weight in gaussian_window(3, 1.0)]
        [0.274, 0.452, 0.274]
    """
    weights = [math.exp(-((k - size // 2) ** 2) / (2 * sigma**2)) for k in range(size)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


class Blur(NamedTuple):
    """Separable blur of maps ``(N, *space)`` with a symmetric window of odd size, and the adjoint of that blur.

    Two paths give the same numbers. ``banded``: one product per axis with a matrix that holds the window, and the
    reflection at the ends, in its rows; fastest for short sides without a compiler. Otherwise a sum of shifted copies,
    which ``torch.compile`` fuses and vectorises: fastest for all sizes when compiled.

    Args:
        weights: the window, the same for all axes.
        same: reflect at the ends and keep the size; otherwise only where the window fits, ``len(weights) - 1`` less.
        banded: which path.

    Example:
        >>> Blur((0.25, 0.5, 0.25), same=True, banded=True)([torch.tensor([[0.0, 4.0, 0.0, 0.0]])])
        [tensor([[2., 2., 1., 0.]])]
    """

    weights: tuple[float, ...]
    same: bool
    banded: bool

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Blurred maps, along all axes but the first."""
        if self.banded:
            return self._matmul(maps, transpose=False)
        if self.same:
            maps = [_pad(m, len(self.weights) // 2, "reflect") for m in maps]
        return [_materialize(self._shift_and_add(m)) for m in maps]

    def adjoint(self, maps: Sequence[Tensor]) -> list[Tensor]:
        r"""The adjoint blur: :math:`\langle Kx, g \rangle = \langle x, K^* g \rangle`.

        Without reflection it is the same blur of zero-padded maps. With it, an end sees only one half of its mirrored
        surroundings: with :math:`C` = ½ at both ends and 1 between, :math:`KC^{-1}` is symmetric, so
        :math:`K^* = C K C^{-1}`.
        """
        if self.banded:
            return self._matmul(maps, transpose=True)
        if not self.same:
            return [self._shift_and_add(_pad(m, len(self.weights) - 1, "constant")) for m in maps]
        ends = _ends(maps[0])
        padded = [_pad(_materialize(m / ends), len(self.weights) // 2, "reflect") for m in maps]
        return [ends * self._shift_and_add(m) for m in padded]

    def _matmul(self, maps: Sequence[Tensor], transpose: bool) -> list[Tensor]:
        first = maps[0]
        with torch.autocast(first.device.type, enabled=False):
            for dim in range(1, first.ndim):
                size = first.shape[dim] + (len(self.weights) - 1 if transpose and not self.same else 0)
                band = banded_matrix(size, self.weights, self.same, first.dtype, first.device)
                maps = [_along(m, dim, band.t() if transpose else band) for m in maps]
        return list(maps)

    def _shift_and_add(self, padded: Tensor) -> Tensor:
        reach = len(self.weights) // 2
        for dim in range(1, padded.ndim):
            if dim > 1:
                padded = _materialize(padded)
            size = padded.shape[dim] - 2 * reach
            total = self.weights[reach] * padded.narrow(dim, reach, size)
            for k in range(reach):
                pair = padded.narrow(dim, k, size) + padded.narrow(dim, 2 * reach - k, size)
                total = torch.add(total, pair, alpha=self.weights[k])
            padded = total
        return padded


def blur_for(x: Tensor, window_size: int, sigma: float, same: bool) -> Blur:
    """The blur for images ``(B, C, *space)``, by the path that is fastest for their size, here and now."""
    banded = not torch.compiler.is_compiling() and max(x.shape[2:]) <= BANDED_UP_TO and _products_are_exact(x.dtype)
    return Blur(gaussian_window(window_size, sigma), same, banded)


@lru_cache(maxsize=128)
def banded_matrix(
    size: int, weights: tuple[float, ...], same: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The blur of a line of ``size`` pixels as a matrix, ``(size, size)`` or ``(size - len(weights) + 1, size)``."""
    # an inference tensor, cached, would break a later training step
    with torch.inference_mode(False), torch.no_grad():
        lines = torch.eye(size, dtype=torch.float64)
        return Blur(weights, same, banded=False)([lines])[0].t().contiguous().to(device, dtype)


def _products_are_exact(dtype: torch.dtype) -> bool:
    # a variance is a small difference of large squares: TensorFloat-32 would lose it
    try:
        return dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer switches, one per backend, beside which it refuses to answer
        return False


def _along(maps: Tensor, dim: int, matrix: Tensor) -> Tensor:
    if dim == maps.ndim - 1:
        return maps @ matrix.t()
    product = matrix @ maps.flatten(dim + 1)
    return product.view(*product.shape[:-1], *maps.shape[dim + 1 :])


def _pad(maps: Tensor, reach: int, mode: str) -> Tensor:
    return _materialize(functional.pad(maps, [reach, reach] * (maps.ndim - 1), mode=mode))


def _ends(maps: Tensor) -> Tensor:
    weights = maps.new_ones(())
    for dim, size in enumerate(maps.shape[1:], start=1):
        index = torch.arange(size, device=maps.device)
        halves = torch.where((index == 0) | (index == size - 1), 0.5, 1.0).to(maps.dtype)
        weights = weights * halves.view(-1, *[1] * (maps.ndim - 1 - dim))
    return weights


def _materialize(maps: Tensor) -> Tensor:
    """Have the compiler write this map to memory; it would evaluate it anew for every shift (3-5 times slower)."""
    if not torch.compiler.is_compiling():
        return maps
    return maps.contiguous().as_strided(maps.shape, maps.contiguous().stride())
