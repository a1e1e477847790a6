"""Splittings that halve the size again and again: Haar bands, and the Laplacian pyramid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ae.checks import check_share, check_whole
from lightning_ae.networks.scales import Scales, widen


class HaarBands(Scales):
    r"""Bands of the orthonormal Haar transform: along each axis :math:`(x_{2i} \pm x_{2i+1}) / \sqrt 2`.

    The sums are transformed again. A band holds all coefficients of a level that have a difference in them (of an
    image vertical, horizontal and diagonal, as channels), so there are as many numbers in all bands as in the data.
    The projections are those of :class:`BlockMean` with sizes 2, 4, …; only the form of the bands is another.

    Args:
        levels: how often the size is halved; there is one scale more.

    Shapes:
        ``(B, C, *space)`` with ``d`` axes in space, each a multiple of ``2 ** levels``; the bands
        ``(B, (2 ** d - 1) * C, *(space / 2))``, …, and the coarsest ``(B, C, *(space / 2 ** levels))``.

    Raises:
        ValueError: if a side cannot be halved so often.

    Source: Haar 1910, https://doi.org/10.1007/BF01456326; Mallat 1989, https://doi.org/10.1109/34.192463.

    Example:
        >>> fine, coarse = HaarBands(1).split(torch.tensor([[[1.0, 3.0, 5.0, 5.0]]]))
        >>> fine, coarse
        (tensor([[[-1.4142,  0.0000]]]), tensor([[[2.8284, 7.0711]]]))
    """

    def __init__(self, levels: int = 1) -> None:
        super().__init__()
        self.levels = check_whole("levels", levels, most=62)
        self.num_scales = self.levels + 1

    def shapes(self, event_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Differences at half the size and smaller, and the sums at the smallest."""
        space = self._space(event_shape)
        if any(n % 2**self.levels for n in space):
            raise ValueError(
                f"levels: expected sides that are multiples of 2 ** {self.levels}, got an event_shape "
                f"{tuple(event_shape)}. BlockMean and LaplacianPyramid take any size."
            )
        channels = (2 ** len(space) - 1) * event_shape[0]
        fine = [(channels, *(n // 2 ** (level + 1) for n in space)) for level in range(self.levels)]
        return [*fine, (event_shape[0], *(n // 2**self.levels for n in space))]

    def event_shape(self, finest: Sequence[int]) -> tuple[int, ...]:
        """Twice the size."""
        return finest[0] // (2 ** len(finest[1:]) - 1), *(2 * n for n in finest[1:])

    def split(self, x: Tensor) -> list[Tensor]:
        """The coefficients."""
        self._check(x)
        x = widen(x)
        bands = []
        for _ in range(self.levels):
            pieces = [x]
            for dim in range(2, x.ndim):
                pieces = [piece for whole in pieces for piece in _sum_and_difference(whole, dim)]
            x = pieces[0]
            bands.append(torch.cat(pieces[1:], 1))
        return [*bands, x]

    def part(self, band: Tensor, index: int, event_shape: Sequence[int]) -> Tensor:
        """The inverse transform with all other coefficients 0."""
        x = widen(band)
        others = 2 ** (band.ndim - 2) - 1
        if index < self.levels:
            pieces = x.chunk(others, 1)
            x = _merge([torch.zeros_like(pieces[0]), *pieces])
        for _ in range(index):
            x = _merge([x, *[torch.zeros_like(x)] * others])
        return x

    def extra_repr(self) -> str:
        """Halvings."""
        return f"levels={self.levels}"


def _every_second(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, stop, 2),)]


def _sum_and_difference(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    even, odd = _every_second(x, dim, 0, x.shape[dim]), _every_second(x, dim, 1, x.shape[dim])
    return (even + odd) * math.sqrt(0.5), (even - odd) * math.sqrt(0.5)


def _merge(pieces: list[Tensor]) -> Tensor:
    """Undo the sums and differences along all axes."""
    for dim in range(pieces[0].ndim - 1, 1, -1):
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        pieces = [torch.stack([a + b, a - b], dim + 1).flatten(dim, dim + 1) * math.sqrt(0.5) for a, b in pairs]
    return pieces[0]


class LaplacianPyramid(Scales):
    r"""Differences of a Gaussian pyramid: :math:`L_l = G_l - \mathrm{expand}(G_{l+1})`, the last :math:`L_N = G_N`.

    .. math::
        G_{l+1}(i) = \sum_{m=-2}^2 w_m G_l(2i + m), \qquad
        \mathrm{expand}(G)(i) = 2 \sum_{m=-2}^2 w_m G\big(\tfrac{i - m}{2}\big) \text{ over whole } \tfrac{i - m}{2},

    along each axis, with :math:`w = (\tfrac14 - \tfrac a2, \tfrac14, a, \tfrac14, \tfrac14 - \tfrac a2)`; beyond the
    border stands the last pixel. Expanding all of them again and summing gives ``x`` back, whatever the size and depth.
    Parts overlap, and are no projections: smooth pictures at all sizes for the price of a third more numbers. Decoders
    of such bands can stand in for each other, so what a coarse one ends with depends on how it got there.

    Args:
        levels: :math:`N`, how often the size is halved (rounded up); there is one scale more.
        a: the weight of the pixel itself; 0.4 is nearly Gaussian, 0.375 binomial.

    Shapes:
        ``(B, C, *space)``; the bands ``(B, C, *space)``, ``(B, C, *⌈space / 2⌉)``, …

    Raises:
        ValueError: if there is no more than a pixel left to halve.

    Source: Burt & Adelson 1983, https://doi.org/10.1109/TCOM.1983.1095851.

    Example:
        >>> x = torch.rand(2, 3, 17, 30)
        >>> parts = LaplacianPyramid(3).parts(x)
        >>> torch.allclose(sum(parts), x, atol=1e-6), LaplacianPyramid(3).split(x)[-1].shape
        (True, torch.Size([2, 3, 3, 4]))
    """

    orthogonal = False

    def __init__(self, levels: int = 2, a: float = 0.4) -> None:
        super().__init__()
        self.levels = check_whole("levels", levels, most=62)
        self.a = check_share("a", a, "()")
        self.num_scales = self.levels + 1

    def shapes(self, event_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Half the size each, rounded up."""
        sizes = [self._space(event_shape)]
        for _ in range(self.levels):
            if max(sizes[-1]) == 1:
                raise ValueError(f"levels: an event_shape {tuple(event_shape)} cannot be halved {self.levels} times.")
            sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
        return [(event_shape[0], *size) for size in sizes]

    def split(self, x: Tensor) -> list[Tensor]:
        """The differences, and the smallest image."""
        self._check(x)
        gaussian = [widen(x)]
        for _ in range(self.levels):
            gaussian.append(self._reduce(gaussian[-1]))
        pairs = itertools.pairwise(gaussian)
        return [*(fine - self._expand(coarse, fine.shape[1:]) for fine, coarse in pairs), gaussian[-1]]

    def part(self, band: Tensor, index: int, event_shape: Sequence[int]) -> Tensor:
        """The band, expanded as often as it was reduced."""
        x = widen(band)
        for shape in self.shapes(event_shape)[:index][::-1]:
            x = self._expand(x, shape)
        return x

    def _reduce(self, x: Tensor) -> Tensor:
        for dim in range(2, x.ndim):
            size = x.shape[dim]
            first, last = x.narrow(dim, 0, 1), x.narrow(dim, size - 1, 1)
            padded = torch.cat([first, first, x, last, last], dim)
            taps = [_every_second(padded, dim, m, m + size) for m in range(5)]
            x = self.a * taps[2] + 0.25 * (taps[1] + taps[3]) + (0.25 - self.a / 2) * (taps[0] + taps[4])
        return x

    def _expand(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        for dim in range(2, x.ndim):
            size = x.shape[dim]
            padded = torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, size - 1, 1)], dim)
            before, after = padded.narrow(dim, 0, size), padded.narrow(dim, 2, size)
            even = 2 * self.a * x + (0.5 - self.a) * (before + after)
            odd = 0.5 * (x + after)
            x = torch.stack([even, odd], dim + 1).flatten(dim, dim + 1).narrow(dim, 0, shape[dim - 1])
        return x

    def extra_repr(self) -> str:
        """Halvings."""
        return f"levels={self.levels}, a={self.a}"
