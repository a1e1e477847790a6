"""Finite scalar quantisation: the grid, its indices, its gradient."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_ae import FiniteScalarQuantizerCode

#: Mentzer et al. 2023, table 1: the size of codebook aimed at, and the levels
TABLE = {8: [8, 6, 5], 10: [8, 5, 5, 5], 12: [7, 5, 5, 5, 5], 14: [8, 8, 8, 6, 5], 16: [8, 8, 8, 5, 5, 5]}


def paper(h, levels):
    """Appendix A.1 in NumPy: ``(n, d)`` to what is rounded, and its scale."""
    levels = np.asarray(levels)
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    return np.tanh(h + np.tan(offset / half)) * half - offset, levels // 2


@pytest.mark.parametrize("bits", TABLE)
def test_the_papers_levels_give_about_the_codebooks_of_its_table(bits):
    code = FiniteScalarQuantizerCode(TABLE[bits])
    assert code.num_codes == math.prod(TABLE[bits])
    assert abs(math.log2(code.num_codes) - bits) < 0.1
    every = torch.arange(code.num_codes)[:, None]
    vectors = code.lookup(every)
    assert len(vectors.unique(dim=0)) == code.num_codes
    assert vectors.amin() == -1
    assert vectors.amax() <= 1
    # to h and back: each point of the grid is reached, from the middle of its cell
    bounds, width = paper(np.zeros((1, len(TABLE[bits]))), TABLE[bits])
    assert bounds.shape == (1, code.dim)
    levels = np.asarray(TABLE[bits])
    half, offset = (levels - 1) * (1 - 1e-3) / 2, np.where(levels % 2 == 1, 0.0, 0.5)
    target = np.clip((vectors.double().numpy() * width + offset) / half, -0.9999, 0.9999)
    h = torch.as_tensor(np.arctanh(target) - np.tan(offset / half))
    assert torch.equal(code.indices(h), every)
    torch.testing.assert_close(code(h).z.float(), vectors)


@pytest.mark.parametrize("levels", [[8, 6, 5], [2, 3, 4, 7]])
def test_values_are_the_papers(levels):
    code = FiniteScalarQuantizerCode(levels)
    h = 3 * torch.randn(400, len(levels), dtype=torch.float64)
    bounded, width = paper(h.numpy(), levels)
    np.testing.assert_allclose(code(h).z.numpy(), np.round(bounded) / width, atol=1e-12)
    for i, size in enumerate(levels):
        assert len(code(h).z[:, i].unique()) == size


def test_indices_are_mixed_radix_numbers_with_the_first_digit_fastest():
    code = FiniteScalarQuantizerCode([3, 2, 4])
    grid = [digits[::-1] for digits in itertools.product(range(4), range(2), range(3))]
    expected = (torch.tensor(grid) - torch.tensor([1, 1, 2])) / torch.tensor([1, 1, 2])
    assert torch.equal(code.lookup(torch.arange(24)[:, None]), expected)


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 7), (2, 9, 3, 2)])
def test_maps_and_groups_have_an_index_for_each_vector(shape):
    code = FiniteScalarQuantizerCode([5, 4, 3])
    h = torch.randn(shape)
    z, indices = code(h).z, code.indices(h)
    assert z.shape == shape
    assert indices.shape == (shape[0], shape[1] // 3, *shape[2:])
    assert torch.equal(code.lookup(indices), z)
    assert torch.equal(code.encode(h), z)
    alone = code(h[1:2, :3].reshape(1, 3, -1)[:, :, 0]).z
    assert torch.equal(alone[0], z[1, :3].reshape(3, -1)[:, 0])


def test_the_gradient_is_that_of_the_bound_by_finite_differences():
    levels = [8, 5, 2]
    code = FiniteScalarQuantizerCode(levels)
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64)
    torch.sin(code(h).z * weight).sum().backward()
    # dL/dz at the rounded value, times the slope of what is rounded
    z = code(h).z.detach().numpy()
    step = 1e-6
    slope = (paper(h.detach().numpy() + step, levels)[0] - paper(h.detach().numpy() - step, levels)[0]) / (2 * step)
    expected = weight.numpy() * np.cos(z * weight.numpy()) * slope / paper(z, levels)[1]
    np.testing.assert_allclose(h.grad.numpy(), expected, rtol=1e-6)


def test_there_is_nothing_to_learn_or_to_save():
    code = FiniteScalarQuantizerCode([8, 5])
    assert not list(code.parameters())
    assert not code.state_dict()
    assert code.weights() == {}
    assert code(torch.zeros(2, 2)).penalties == {}


def test_half_precision_is_quantised_in_single():
    code = FiniteScalarQuantizerCode([7, 7])
    h = torch.randn(500, 2).to(torch.bfloat16)
    assert code(h).z.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code.indices(h), code.indices(h.float()))


@pytest.mark.parametrize("levels", [[7, 6], [1001, 1000]])
def test_the_bounds_do_not_depend_on_the_default_dtype(levels):
    """Lightning makes bfloat16 the default while it trains a model in that precision."""
    code, h = FiniteScalarQuantizerCode(levels), 3 * torch.randn(4000, 2, dtype=torch.float64)
    bounded, width = paper(h.numpy(), levels)
    expected = (np.round(bounded) + width).astype(int) @ [1, levels[0]]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert code.indices(h).flatten().tolist() == expected.tolist()
        single = code.indices(h.float())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(single, code.indices(h.float()))


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [[7, 6], [1003, 1000]])
def test_indices_give_the_very_numbers_of_the_direct_path(levels, dtype, default):
    h = (3 * torch.randn(2000, 2)).to(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        code = FiniteScalarQuantizerCode(levels).to(dtype)
        found, direct = code.lookup(code.indices(h)), code(h).z
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found.to(dtype), direct)
    # and these are the grid's, to the last digit
    wide = np.float64 if dtype == torch.float64 else np.float32
    bounded, width = paper(h.numpy() if dtype == torch.float64 else h.float().numpy().astype(np.float64), levels)
    grid = np.round(bounded).astype(wide) / width.astype(wide)
    off = np.abs(bounded - np.floor(bounded) - 0.5) > 1e-3  # single precision may round others the other way
    assert off.mean() > 0.9
    assert np.array_equal(found.numpy()[off], grid[off])


def test_levels_may_be_an_array():
    code = FiniteScalarQuantizerCode(np.array([5, 4]))
    assert code.levels == (5, 4)
    assert code.num_codes == 20


@pytest.mark.parametrize("levels", [[], [5, 1], [0], [2**40, 2**40]])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(ValueError, match=r"^levels: expected"):
        FiniteScalarQuantizerCode(levels)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^h: expected \(B, g \* 2"):
        FiniteScalarQuantizerCode([5, 5])(torch.zeros(2, 3))


def test_a_level_that_is_not_whole_is_refused():
    with pytest.raises(TypeError, match=r"^levels: expected a positive whole number, got 2.5 of type float"):
        FiniteScalarQuantizerCode([5, 2.5])


def test_one_number_is_no_sequence_of_levels():
    with pytest.raises(TypeError, match="levels: expected a sequence of numbers, one for each channel, got 8"):
        FiniteScalarQuantizerCode(8)
