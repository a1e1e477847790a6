"""Splittings into scales: projections as matrices, against NumPy, SciPy and the formulas of their papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import fft

from lightning_ae import (
    BlockMean,
    ConvDecoder,
    DCTBands,
    HaarBands,
    LaplacianPyramid,
    MLPDecoder,
    Rebuildable,
    scale_decoders,
)
from lightning_ae.rebuildable import describe, rebuild

ORTHOGONAL = [
    (BlockMean(2), (1, 8)),
    (BlockMean(3), (2, 7, 5)),
    (BlockMean([2, 4]), (1, 9, 6)),
    (BlockMean(4), (1, 3, 5)),
    (BlockMean(2), (1, 3, 4, 5)),
    (DCTBands(0.5), (1, 9)),
    (DCTBands([0.5, 0.2]), (2, 8, 7)),
    (DCTBands(0.4), (1, 3, 4, 5)),
    (HaarBands(3), (2, 8)),
    (HaarBands(2), (2, 8, 4)),
    (HaarBands(1), (1, 2, 4, 6)),
]
PYRAMIDS = [
    (LaplacianPyramid(1), (1, 8)),
    (LaplacianPyramid(4), (2, 9, 13)),
    (LaplacianPyramid(2, a=0.375), (1, 4, 1)),
    (LaplacianPyramid(2), (1, 3, 4, 5)),
]
NAMES = [f"{type(scales).__name__} {shape}" for scales, shape in [*ORTHOGONAL, *PYRAMIDS]]


def matrices(scales, shape):
    """Each linear map as a matrix, by what it does to the unit vectors, in float64."""
    size = math.prod(shape)
    units = torch.eye(size, dtype=torch.float64).view(size, *shape)
    return [part.flatten(1).T for part in scales.parts(units)], torch.eye(size, dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=0, atol=1e-12)


# -- what all promise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scales", "shape"), ORTHOGONAL, ids=NAMES[: len(ORTHOGONAL)])
def test_orthogonal_scales_are_projections_that_sum_to_one(scales, shape):
    projections, one = matrices(scales, shape)
    assert len(projections) == scales.num_scales
    assert scales.orthogonal
    for p in projections:
        close(p @ p, p)
        close(p.T, p)
        assert torch.linalg.matrix_rank(p) > 0
    close(sum(projections), one)
    for p, q in itertools.combinations(projections, 2):
        close(p @ q, torch.zeros_like(p))


@pytest.mark.parametrize(("scales", "shape"), PYRAMIDS, ids=NAMES[len(ORTHOGONAL) :])
def test_pyramids_sum_to_the_data_and_are_no_projections(scales, shape):
    parts, one = matrices(scales, shape)
    assert len(parts) == scales.num_scales
    close(sum(parts), one)
    assert not scales.orthogonal
    assert max((p @ p - p).abs().max() for p in parts) > 0.01


@pytest.mark.parametrize(("scales", "shape"), [*ORTHOGONAL, *PYRAMIDS], ids=NAMES)
def test_parts_are_made_of_the_bands_and_shapes_are_told_beforehand(scales, shape):
    x = torch.randn(3, *shape, dtype=torch.float64)
    bands = scales.split(x)
    assert [tuple(band.shape[1:]) for band in bands] == scales.shapes(shape)
    assert scales.event_shape(scales.shapes(shape)[0]) == shape
    for index, (band, part) in enumerate(zip(bands, scales.parts(x), strict=True)):
        close(scales.part(band, index, shape), part)


@pytest.mark.parametrize(("scales", "shape"), ORTHOGONAL, ids=NAMES[: len(ORTHOGONAL)])
def test_whatever_a_decoder_puts_out_stays_in_its_scale(scales, shape):
    projections, _ = matrices(scales, shape)
    for index, band in enumerate(scales.shapes(shape)):
        part = scales.part(torch.randn(4, *band, dtype=torch.float64), index, shape).flatten(1).T
        assert part.abs().max() > 0.1
        for other, p in enumerate(projections):
            close(p @ part, part if other == index else torch.zeros_like(part))


@pytest.mark.parametrize(("scales", "shape"), [*ORTHOGONAL, *PYRAMIDS], ids=NAMES)
def test_data_come_back_in_single_precision_too(scales, shape):
    x = torch.rand(5, *shape)
    torch.testing.assert_close(sum(scales.parts(x)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scales", [BlockMean(2), DCTBands(0.5), HaarBands(1), LaplacianPyramid(1)])
def test_half_precision_and_autocast_are_computed_in_single(scales):
    x = torch.rand(2, 1, 8, 8).bfloat16()
    exact = [part.float() for part in scales.parts(x.double())]
    with torch.autocast("cpu", torch.bfloat16):
        parts = scales.parts(x)
        again = [scales.part(band, index, (1, 8, 8)) for index, band in enumerate(scales.split(x.float()))]
    for got, known, expected in zip(parts, again, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(known, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "scales", [BlockMean([2, 4]), DCTBands([0.5, 0.25]), HaarBands(2), LaplacianPyramid(2, a=0.375)]
)
def test_they_are_written_down_and_rebuilt(scales):
    assert isinstance(scales, Rebuildable)
    again = rebuild(describe(scales))
    x = torch.rand(2, 1, 8, 8)
    for got, expected in zip(again.parts(x), scales.parts(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# -- block means ------------------------------------------------------------------------------------------------------


def test_block_means_are_those_of_numpy():
    x = np.random.default_rng(0).normal(size=(3, 2, 8, 12))
    means = x.reshape(3, 2, 2, 4, 3, 4).mean((3, 5))
    fine, coarse = BlockMean(4).split(torch.as_tensor(x))
    close(coarse, means)
    close(fine, x - means.repeat(4, 2).repeat(4, 3))


def test_blocks_at_the_end_are_smaller_where_the_side_is_no_multiple():
    x = np.random.default_rng(0).normal(size=(2, 1, 7, 5))
    expected = np.empty_like(x)
    for i, j in itertools.product(range(0, 7, 3), range(0, 5, 3)):
        block = (..., slice(i, i + 3), slice(j, j + 3))
        expected[block] = x[block].mean((2, 3), keepdims=True)
    close(BlockMean(3).parts(torch.as_tensor(x))[1], expected)


def test_several_block_sizes_are_differences_of_means():
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 8))
    means = {n: x.reshape(2, 1, 8 // n, n, 8 // n, n).mean((3, 5)).repeat(n, 2).repeat(n, 3) for n in (1, 2, 8)}
    for got, expected in zip(
        BlockMean([2, 8]).parts(torch.as_tensor(x)),
        [means[1] - means[2], means[2] - means[8], means[8]],
        strict=True,
    ):
        close(got, expected)


# -- cosines ----------------------------------------------------------------------------------------------------------


def test_dct_bands_are_scipys():
    x = np.random.default_rng(0).normal(size=(2, 3, 10, 7))
    coefficients = fft.dctn(x, axes=(2, 3), norm="ortho")
    kept = [(10, 7), (5, 4), (2, 1)]  # halves of 10 and 7, a fifth of each, rounded
    low = []
    for rows, columns in kept:
        mask = np.zeros((10, 7))
        mask[:rows, :columns] = 1
        low.append(fft.idctn(coefficients * mask, axes=(2, 3), norm="ortho"))
    parts = DCTBands([0.5, 0.2]).parts(torch.as_tensor(x))
    for got, expected in zip(parts, [low[0] - low[1], low[1] - low[2], low[2]], strict=True):
        close(got, expected)
    small = fft.idctn(coefficients[..., :2, :1], axes=(2, 3), norm="ortho") * math.sqrt(2 * 1 / (10 * 7))
    close(DCTBands([0.5, 0.2]).split(torch.as_tensor(x))[2], small)


def test_a_coarse_band_has_the_grey_levels_of_the_data():
    x = torch.full((1, 1, 9, 6), 0.7, dtype=torch.float64)
    for scales in (BlockMean(4), DCTBands(0.3), LaplacianPyramid(2)):
        *fine, coarse = scales.split(x)
        close(coarse, torch.full_like(coarse, 0.7))
        for band in fine:
            close(band, torch.zeros_like(band))


def test_cosines_of_long_signals_are_exact_in_single_precision():
    x = torch.randn(2, 1, 3000, generator=torch.Generator().manual_seed(0))
    coefficients = fft.dct(x.double().numpy(), norm="ortho")
    coefficients[..., 750:] = 0
    expected = torch.as_tensor(fft.idct(coefficients, norm="ortho")).float()
    torch.testing.assert_close(DCTBands(0.25).parts(x)[1], expected, rtol=0, atol=1e-5)


# -- Haar -------------------------------------------------------------------------------------------------------------


def haar_matrices(n):
    """Sums and differences of neighbours, ``(n / 2, n)`` each."""
    return [np.kron(np.eye(n // 2), [[1.0, sign]]) / math.sqrt(2) for sign in (1.0, -1.0)]


def test_haar_bands_are_those_of_the_matrices():
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 4))
    (low8, high8), (low4, high4) = haar_matrices(8), haar_matrices(4)
    first = np.concatenate([low8 @ x @ high4.T, high8 @ x @ low4.T, high8 @ x @ high4.T], 1)
    x2 = low8 @ x @ low4.T
    (low4, high4), (low2, high2) = haar_matrices(4), haar_matrices(2)
    second = np.concatenate([low4 @ x2 @ high2.T, high4 @ x2 @ low2.T, high4 @ x2 @ high2.T], 1)
    for got, expected in zip(HaarBands(2).split(torch.as_tensor(x)), [first, second, low4 @ x2 @ low2.T], strict=True):
        close(got, expected)


@pytest.mark.parametrize("shape", [(2, 8), (1, 8, 16), (1, 8, 8, 8)])
def test_haar_coefficients_are_orthonormal_coordinates(shape):
    x = torch.randn(3, *shape, dtype=torch.float64)
    bands = HaarBands(3).split(x)
    assert sum(band[0].numel() for band in bands) == x[0].numel()
    close(sum(band.flatten(1).square().sum(1) for band in bands), x.flatten(1).square().sum(1))
    band = torch.randn(3, *bands[1].shape[1:], dtype=torch.float64)
    part = HaarBands(3).part(band, 1, shape)
    close(part.flatten(1).norm(dim=1), band.flatten(1).norm(dim=1))


def test_haar_scales_are_those_of_block_means():
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    for got, expected in zip(HaarBands(2).parts(x), BlockMean([2, 4]).parts(x), strict=True):
        close(got, expected)


# -- the Laplacian pyramid --------------------------------------------------------------------------------------------


def burt_adelson(image, levels, a):
    """The pyramid by the formulas of the paper, one pixel after the other; the last pixel goes on past the border."""
    w = {-2: 0.25 - a / 2, -1: 0.25, 0: a, 1: 0.25, 2: 0.25 - a / 2}

    def reduce(g):
        rows, columns = g.shape
        out = np.zeros(((rows + 1) // 2, (columns + 1) // 2))
        for (i, j), m, n in itertools.product(np.ndindex(out.shape), w, w):
            out[i, j] += w[m] * w[n] * g[np.clip(2 * i + m, 0, rows - 1), np.clip(2 * j + n, 0, columns - 1)]
        return out

    def expand(g, shape):
        out = np.zeros(shape)
        for (i, j), m, n in itertools.product(np.ndindex(shape), w, w):
            if (i - m) % 2 == 0 and (j - n) % 2 == 0:
                at = np.clip((i - m) // 2, 0, g.shape[0] - 1), np.clip((j - n) // 2, 0, g.shape[1] - 1)
                out[i, j] += 4 * w[m] * w[n] * g[at]
        return out

    bands = []
    for _ in range(levels):
        small = reduce(image)
        bands.append(image - expand(small, image.shape))
        image = small
    return [*bands, image]


@pytest.mark.parametrize("a", [0.4, 0.375])
def test_the_pyramid_is_that_of_the_paper(a):
    image = np.random.default_rng(0).normal(size=(7, 10))
    for got, expected in zip(
        LaplacianPyramid(3, a).split(torch.as_tensor(image)[None, None]), burt_adelson(image, 3, a), strict=True
    ):
        close(got[0, 0], expected)


@pytest.mark.parametrize("shape", [(1, 17, 30), (3, 1, 5), (1, 33)])
def test_a_pyramid_may_be_as_deep_as_there_are_pixels_to_halve(shape):
    levels = math.ceil(math.log2(max(shape[1:])))
    x = torch.rand(2, *shape, dtype=torch.float64)
    assert LaplacianPyramid(levels).split(x)[-1][0, 0].numel() == 1
    close(sum(LaplacianPyramid(levels).parts(x)), x)
    with pytest.raises(ValueError, match=f"cannot be halved {levels + 1} times"):
        LaplacianPyramid(levels + 1).split(x)


# -- decoders, and errors at the door ---------------------------------------------------------------------------------


def test_a_decoder_for_each_scale():
    decoders = scale_decoders(HaarBands(2), (2, 8, 4), 5, hidden=(7,))
    assert [decoder.out_shape for decoder in decoders] == [(6, 4, 2), (6, 2, 1), (2, 2, 1)]
    assert all(isinstance(decoder, MLPDecoder) and decoder.layers[0].out_features == 7 for decoder in decoders)
    decoders = scale_decoders(LaplacianPyramid(1), (1, 7, 5), 5, ConvDecoder, channels=(4,))
    z = torch.rand(2, 5)
    assert [decoder(z).shape for decoder in decoders] == [(2, 1, 7, 5), (2, 1, 4, 3)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMean([2, 3]), r"sizes: expected numbers above 1, each a multiple .* got \[2, 3\]"),
        (lambda: BlockMean(1), "sizes: expected numbers above 1"),
        (lambda: BlockMean([]), "sizes: expected numbers above 1"),
        (lambda: DCTBands(1.0), r"cutoffs: expected a number in \(0, 1\)"),
        (lambda: DCTBands([0.2, 0.5]), r"cutoffs: expected numbers in \(0, 1\), each less"),
        (lambda: DCTBands([]), "cutoffs: expected numbers"),
        (lambda: HaarBands(0), "levels: expected a positive whole number, got 0"),
        (lambda: LaplacianPyramid(0), "levels: expected a positive whole number, got 0"),
        (lambda: LaplacianPyramid(a=1.5), r"a: expected a number in \(0, 1\), got 1.5"),
        (lambda: BlockMean([4, 8]).shapes((1, 4, 3)), r"sizes: blocks of 4 hold all of an event_shape \(1, 4, 3\)"),
        (lambda: DCTBands([0.5, 0.45]).shapes((1, 4)), r"cutoffs: \(0.5, 0.45\) are the same"),
        (lambda: HaarBands(2).split(torch.zeros(1, 1, 8, 6)), r"multiples of 2 \*\* 2, got an event_shape \(1, 8, 6\)"),
        (lambda: BlockMean(2).parts(torch.zeros(1, 64)), r"expects \(channels, \*space\), got \(64,\)"),
        (lambda: scale_decoders(LaplacianPyramid(), (64,), 3), r"expects \(channels, \*space\), got \(64,\)"),
    ],
)
def test_what_cannot_be_split_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
