"""Linear splittings of images and signals into scales: block means, Haar and DCT bands."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_floating, check_sequence, check_share, check_type, check_whole, describe_type
from lightning_ae.networks.mlp import MLPDecoder
from lightning_ae.networks.shapes import check_shape
from lightning_ae.rebuildable import Rebuildable


class Scales(Rebuildable, nn.Module, ABC):
    r"""Base of all splittings :math:`x = \sum_l P_l x` into linear parts, the finest scale first, the coarsest last.

    A *band* holds what one scale has to say in a form of its own (coarse ones are small); :meth:`part` brings a band
    into the space of the data. ``part(split(x)[l], l, x.shape[1:])`` is :math:`P_l x`, and these sum to ``x``. Any
    tensor of a band's shape is a band, so that a decoder may put one out: where :math:`P_l` is an orthogonal
    projection, :meth:`part` never leaves its range.

    Nothing is learned, and no size is fixed: one splitting serves data of any shape that it takes.

    Shapes:
        ``x`` and parts: ``(B, C, *space)`` with at least one axis in space; channels are split each for itself.
    """

    #: How many scales there are.
    num_scales: int
    #: Whether the parts are orthogonal projections: :math:`P_l^2 = P_l = P_l^\top`.
    orthogonal: bool = True

    @abstractmethod
    def shapes(self, event_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of each band, without the batch dimension; a ``ValueError`` if such data cannot be split so."""

    @abstractmethod
    def split(self, x: Tensor) -> list[Tensor]:
        """The bands of data, finest first."""

    @abstractmethod
    def part(self, band: Tensor, index: int, event_shape: Sequence[int]) -> Tensor:
        """What a band of scale ``index`` is in the space of the data, ``(B, *event_shape)``; linear."""

    def event_shape(self, finest: Sequence[int]) -> tuple[int, ...]:
        """The shape of the data whose finest band has this shape."""
        return tuple(finest)

    def parts(self, x: Tensor) -> list[Tensor]:
        """The components of data, finest first, which sum to ``x``."""
        return [self.part(band, index, x.shape[1:]) for index, band in enumerate(self.split(x))]

    def _check(self, x: Tensor) -> None:
        check_floating("x", x, least_dims=2)
        self.shapes(x.shape[1:])

    def _space(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        sizes = check_shape(tuple(event_shape), "event_shape")
        if len(sizes) < 2:
            raise ValueError(f"event_shape: {type(self).__name__} expects (channels, *space), got {sizes}.")
        return sizes[1:]


def scale_decoders(
    scales: Scales,
    out_shape: Sequence[int],
    latent_dim: int,
    kind: Callable[..., nn.Module] = MLPDecoder,
    **options: Any,
) -> list[nn.Module]:
    """One decoder for each scale, all reading the same latent.

    Args:
        scales: the splitting.
        out_shape: ``(channels, *space)`` of an example, or ``loss.params_shape`` of it.
        latent_dim: size of ``z``.
        kind: called as ``kind(latent_dim, band_shape, **options)``: :class:`MLPDecoder`, :class:`ConvDecoder`, or
            anything of yours.
        **options: passed on.

    Returns:
        The decoders, finest scale first.

    Raises:
        ValueError: if the data cannot be split so.

    Example:
        >>> [decoder.out_shape for decoder in scale_decoders(BlockMean([2, 4]), (1, 8, 8), 3, hidden=(16,))]
        [(1, 8, 8), (1, 4, 4), (1, 2, 2)]
    """
    check_type("scales", scales, Scales)
    latent_dim = check_whole("latent_dim", latent_dim)
    if not callable(kind):
        raise TypeError(f"kind: expected something to call, such as MLPDecoder, got {describe_type(kind)}.")
    return [kind(latent_dim, shape, **options) for shape in scales.shapes(check_shape(out_shape, "out_shape"))]


def widen(x: Tensor) -> Tensor:
    """Half-precision tensors as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class NestedScales(Scales):
    r"""Orthogonal projections :math:`Q_1, Q_2, \dots` onto ever coarser images; the parts are :math:`Q_l - Q_{l+1}`.

    A subclass says how data become a coarse image (:meth:`reduce`) and how that is seen at full size (:meth:`expand`),
    with :math:`Q = \mathrm{expand} \circ \mathrm{reduce}`. A band is an image of its scale's size.
    """

    @abstractmethod
    def reduce(self, x: Tensor, index: int) -> Tensor:
        """Data as an image of the size of scale ``index``."""

    @abstractmethod
    def expand(self, image: Tensor, index: int, event_shape: Sequence[int]) -> Tensor:
        """Such an image at full size."""

    def split(self, x: Tensor) -> list[Tensor]:
        """Images of what is seen at a scale and not at the next coarser one."""
        return [self.reduce(part, index) for index, part in enumerate(self.parts(x))]

    def part(self, band: Tensor, index: int, event_shape: Sequence[int]) -> Tensor:
        """The band at full size, less what of it belongs to coarser scales."""
        full = self.expand(widen(band), index, event_shape)
        return full if index == self.num_scales - 1 else full - self._project(full, index + 1)

    def parts(self, x: Tensor) -> list[Tensor]:
        """The components of data, finest first, which sum to ``x``."""
        self._check(x)
        seen = [widen(x), *(self._project(widen(x), index) for index in range(1, self.num_scales))]
        return [*(fine - coarse for fine, coarse in itertools.pairwise(seen)), seen[-1]]

    def _project(self, x: Tensor, index: int) -> Tensor:
        return self.expand(self.reduce(x, index), index, x.shape[1:])


class BlockMean(NestedScales):
    r"""Means over blocks of pixels, and what is left: :math:`P_C x` repeats the mean of each block.

    Blocks start at the first pixel; where a side is no multiple of them, the last is smaller. With several sizes
    :math:`s_1 < s_2 < \dots` there is a scale for the detail within blocks of :math:`s_1`, one for the means of those
    within blocks of :math:`s_2`, …, and the means of the largest.

    Args:
        sizes: side of a block in pixels, or sides, each a multiple of the one before.

    Shapes:
        ``(B, C, *space)``; the bands ``(B, C, *space)``, ``(B, C, *⌈space / s_1⌉)``, …

    Raises:
        ValueError: for sizes that are no multiples of each other; if one before the last is as large as the data.

    Source: Haar 1910, https://doi.org/10.1007/BF01456326: the multiresolution of piecewise constants.

    Example:
        >>> fine, coarse = BlockMean(2).parts(torch.tensor([[[1.0, 3.0, 5.0, 5.0]]]))
        >>> fine, coarse
        (tensor([[[-1.,  1.,  0.,  0.]]]), tensor([[[2., 2., 5., 5.]]]))
    """

    def __init__(self, sizes: int | Sequence[int]) -> None:
        super().__init__()
        given = check_sequence("sizes", sizes) if isinstance(sizes, Sequence) else [sizes]
        blocks = [check_whole("sizes", size) for size in given]
        if not blocks or any(b <= a or b % a for a, b in zip([1, *blocks], blocks, strict=False)):
            raise ValueError(f"sizes: expected numbers above 1, each a multiple of the one before, got {sizes}.")
        self.sizes = (1, *blocks)
        self.num_scales = len(self.sizes)

    def shapes(self, event_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Those of images with a pixel for each block."""
        space = self._space(event_shape)
        if self.sizes[-2] >= max(space):
            raise ValueError(f"sizes: blocks of {self.sizes[-2]} hold all of an event_shape {tuple(event_shape)}.")
        return [(event_shape[0], *(-(-n // size) for n in space)) for size in self.sizes]

    def reduce(self, x: Tensor, index: int) -> Tensor:
        """Means over blocks."""
        for dim in range(2, x.ndim):
            x = _mean_along(x, dim, self.sizes[index])
        return x

    def expand(self, image: Tensor, index: int, event_shape: Sequence[int]) -> Tensor:
        """Each pixel, as often as its block has some."""
        for dim in range(2, image.ndim):
            image = image.repeat_interleave(self.sizes[index], dim).narrow(dim, 0, event_shape[dim - 1])
        return image

    def extra_repr(self) -> str:
        """Sides of the blocks."""
        return f"sizes={list(self.sizes[1:])}"


def _mean_along(x: Tensor, dim: int, size: int) -> Tensor:
    if size == 1:
        return x
    whole, rest = divmod(x.shape[dim], size)
    blocks = x.narrow(dim, 0, whole * size).reshape(*x.shape[:dim], whole, size, *x.shape[dim + 1 :])
    means = [blocks.mean(dim + 1)] if whole else []
    if rest:
        means.append(x.narrow(dim, whole * size, rest).mean(dim, keepdim=True))
    return means[0] if len(means) == 1 else torch.cat(means, dim)


class DCTBands(NestedScales):
    r"""Bands of the orthonormal cosine transform: :math:`P_C x` keeps the lowest :math:`k` frequencies of each axis.

    .. math:: X_k = \sqrt{2/n}\, c_k \sum_j x_j \cos\frac{\pi (2j + 1) k}{2n}, \quad c_0 = \sqrt{1/2},\ c_{k > 0} = 1.

    A band is an image of as many pixels as frequencies are kept, with the same grey levels, so that a decoder of any
    kind can put it out.

    Args:
        cutoffs: share of the frequencies of an axis that the coarse scale keeps, or shares, each less than the one
            before, for several scales. Of ``n`` frequencies ``max(1, round(cutoff * n))`` are kept.

    Shapes:
        ``(B, C, *space)``; the bands ``(B, C, *space)``, ``(B, C, *(cutoffs[0] * space))``, …

    Raises:
        ValueError: for cut-offs that do not fall, or lie outside (0, 1); for data too small to tell two of them apart.

    Source: Ahmed, Natarajan & Rao 1974, https://doi.org/10.1109/T-C.1974.223784.

    Example:
        >>> x = torch.linspace(0, 1, 8).view(1, 1, 8)
        >>> fine, coarse = DCTBands(0.25).parts(x)
        >>> torch.allclose(fine + coarse, x), float((fine * coarse).sum().abs()) < 1e-6
        (True, True)
    """

    def __init__(self, cutoffs: float | Sequence[float]) -> None:
        super().__init__()
        given = check_sequence("cutoffs", cutoffs) if isinstance(cutoffs, Sequence) else [cutoffs]
        shares = [float(check_share("cutoffs", share, "()")) for share in given]
        if not shares or any(not 0 < b < a for a, b in zip([1.0, *shares], shares, strict=False)):
            raise ValueError(f"cutoffs: expected numbers in (0, 1), each less than the one before, got {cutoffs}.")
        self.cutoffs = (1.0, *shares)
        self.num_scales = len(self.cutoffs)

    def shapes(self, event_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Those of images with a pixel for each frequency kept."""
        space = self._space(event_shape)
        shapes = [(event_shape[0], *(self._kept(n, index) for n in space)) for index in range(self.num_scales)]
        if len(set(shapes)) < len(shapes):
            raise ValueError(f"cutoffs: {self.cutoffs[1:]} are the same for an event_shape {tuple(event_shape)}.")
        return shapes

    def _kept(self, n: int, index: int) -> int:
        return max(1, round(self.cutoffs[index] * n))

    def reduce(self, x: Tensor, index: int) -> Tensor:
        """Low-pass and resampled."""
        if index == 0:
            return x
        with torch.autocast(x.device.type, enabled=False):
            for dim in range(2, x.ndim):
                n = x.shape[dim]
                x = _apply_along(self._resample(n, self._kept(n, index), x), x, dim)
        return x

    def expand(self, image: Tensor, index: int, event_shape: Sequence[int]) -> Tensor:
        """Frequencies that are not there are 0."""
        if index == 0:
            return image
        with torch.autocast(image.device.type, enabled=False):
            for dim in range(2, image.ndim):
                n, kept = event_shape[dim - 1], image.shape[dim]
                image = _apply_along(self._resample(n, kept, image).T * (n / kept), image, dim)
        return image

    @staticmethod
    def _resample(n: int, kept: int, like: Tensor) -> Tensor:
        """``(kept, n)``: forward with n points, back with as many as are kept, grey levels unchanged."""
        return math.sqrt(kept / n) * _cosines(kept, like).T @ _cosines(n, like)[:kept]

    def extra_repr(self) -> str:
        """Shares of the frequencies."""
        return f"cutoffs={list(self.cutoffs[1:])}"


def _cosines(n: int, like: Tensor) -> Tensor:
    """The orthonormal transform as a matrix, frequencies in rows."""
    j = torch.arange(n, device=like.device)
    # reduced while it is a whole number: the cosine of a large float32 is not exact
    angle = ((2 * j + 1) * j[:, None] % (4 * n)).to(like.dtype) * (math.pi / (2 * n))
    scale = math.sqrt(1 / n) + (j > 0).to(like.dtype) * (math.sqrt(2 / n) - math.sqrt(1 / n))
    return angle.cos() * scale[:, None]


def _apply_along(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
