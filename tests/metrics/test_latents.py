"""Use of dense and quantised codes, against NumPy, SciPy and torch.distributions in double precision."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from lightning_ae.metrics import active_units, codebook_usage, effective_rank, kl_per_dimension, perplexity

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
EACH_DTYPE = pytest.mark.parametrize(("dtype", "rtol"), TOLERANCE.items(), ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def erank_of_data(z):
    """Roy & Vetterli's definition for the covariance, whose singular values are those of the centred data, squared."""
    s = np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2
    p = s[s > 0] / s.sum()
    return np.exp(-(p * np.log(p)).sum())


@EACH_DTYPE
@pytest.mark.parametrize(("n", "d", "rank"), [(100, 8, 8), (100, 8, 3), (5, 8, 8), (300, 64, 5), (50, 1, 1)])
def test_effective_rank_is_that_of_the_centred_data(n, d, rank, dtype, rtol):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, rank)) * np.arange(1, rank + 1) @ rng.normal(size=(rank, d)) + 3
    covariance = torch.tensor(np.cov(z.T).reshape(d, d), dtype=dtype)
    found = effective_rank(covariance)
    assert (found.dtype, found.shape) == (dtype, ())
    assert found.item() == pytest.approx(erank_of_data(z), rel=10 * rtol)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_effective_rank_of_equal_variances_is_their_number_at_any_scale(scale):
    q = torch.linalg.qr(torch.randn(10, 10)).Q
    covariance = scale * (q[:, :4] @ q[:, :4].T)
    assert effective_rank(covariance).item() == pytest.approx(4, rel=1e-4)


def test_effective_rank_of_nothing_is_zero_and_of_nan_is_nan():
    assert effective_rank(torch.zeros(4, 4)).item() == 0
    for broken in (torch.nan, torch.inf):
        covariance = torch.eye(4)
        covariance[0, 3] = broken  # the triangle that is not read
        assert effective_rank(covariance).isnan()
        assert effective_rank(covariance.T).isnan()


@HALF
def test_effective_rank_widens_half_precision(dtype):
    covariance = torch.diag(torch.tensor([1.0, 2.0, 4.0, 0.0])).to(dtype)
    assert effective_rank(covariance).dtype == torch.float32
    assert effective_rank(covariance).item() == pytest.approx(np.exp(stats.entropy([1, 2, 4])), rel=1e-6)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 3), (0, 0)])
def test_effective_rank_of_no_square_matrix_is_an_error(shape):
    with pytest.raises(ValueError, match=r"covariance: expected \(D, D\), got \("):
        effective_rank(torch.ones(shape))


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.5])
def test_active_units_are_the_posterior_means_that_vary(threshold):
    means = np.random.default_rng(0).normal(size=(200, 6)) * [0, 0.05, 0.15, 0.5, 1, 2] + 7
    found = active_units(torch.tensor(means).var(0, correction=0), threshold)
    assert (found.dtype, found.shape) == (torch.int64, ())
    assert found.item() == sum(np.var(column) > threshold for column in means.T)


def test_active_units_must_exceed_the_threshold():
    assert active_units(torch.tensor([0.25, 0.2500001, torch.nan]), 0.25).item() == 1
    assert active_units(torch.tensor([0.0099, 0.0101])).item() == 1  # by default, as published
    half = torch.tensor([0.01], dtype=torch.bfloat16)
    assert half.double().item() > 0.01
    assert active_units(half).item() == 1  # compared with 0.01, not with what bfloat16 makes of it


def test_active_units_of_a_matrix_or_below_a_negative_threshold_are_an_error():
    with pytest.raises(ValueError, match=r"variance: expected \(D,\), got \(2, 3\)"):
        active_units(torch.ones(2, 3))
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold: expected a finite number >= 0, got"):
            active_units(torch.ones(2), threshold)


@EACH_DTYPE
def test_kl_is_that_of_the_distributions(dtype, rtol):
    mean, log_variance = torch.randn(2, 40, 5, dtype=dtype)
    m, s = mean.double(), log_variance.double().mul(0.5).exp()
    found = kl_per_dimension(mean, log_variance)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, kl_divergence(Normal(m, s), Normal(0.0, 1.0)).mean(0), rtol=rtol)


def test_kl_near_the_prior_keeps_its_digits():
    # (e^v - 1 - v) / 2 = v^2 / 4 + ..., far below the spacing of single precision near one
    found = kl_per_dimension(torch.zeros(1, 1), torch.full((1, 1), 1e-3))
    assert found.item() == pytest.approx(1e-6 / 4 * (1 + 1e-3 / 3), rel=1e-3)
    assert kl_per_dimension(torch.zeros(3, 2), torch.zeros(3, 2)).tolist() == [0, 0]


@HALF
def test_kl_widens_half_precision(dtype):
    mean, log_variance = torch.randn(2, 40, 5).to(dtype).mul(4)
    mean[0] = 300  # its square is beyond float16
    found = kl_per_dimension(mean, log_variance)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), kl_per_dimension(mean.double(), log_variance.double()), rtol=1e-5, atol=0
    )


def test_kl_of_maps_is_flattened():
    mean, log_variance = torch.randn(2, 4, 2, 3, 5)
    found = kl_per_dimension(mean, log_variance)
    assert torch.equal(found, kl_per_dimension(mean.reshape(4, 30), log_variance.reshape(4, 30)))


@pytest.mark.parametrize("shapes", [((4, 2), (4, 3)), ((4, 2), (4, 1)), ((4,), (4,)), ((0, 2), (0, 2))])
def test_kl_of_other_shapes_is_an_error_that_names_both(shapes):
    with pytest.raises(ValueError, match=r"expected \(B, D\) twice with B >= 1, got \(.*\) and \("):
        kl_per_dimension(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("counts", [[5, 5, 0, 0], [7], [1, 2, 3, 4, 0], list(range(1000)), [2**40, 2**41, 1]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_perplexity_is_the_exponential_of_scipys_entropy(counts, dtype):
    counts = torch.tensor(counts, dtype=dtype)
    found = perplexity(counts)
    assert (found.dtype, found.shape) == (torch.float64 if dtype == torch.float64 else torch.float32, ())
    assert found.item() == pytest.approx(np.exp(stats.entropy(counts.double().numpy())), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16, torch.bfloat16])
def test_usage_is_the_fraction_of_codes_that_were_chosen(dtype):
    counts = torch.arange(3000).remainder(3).to(dtype)
    found = codebook_usage(counts)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(2 / 3, rel=1e-6)


@HALF
def test_perplexity_widens_half_precision(dtype):
    counts = torch.full((3000,), 100.0, dtype=dtype)  # the sum is beyond float16
    assert perplexity(counts).dtype == torch.float32
    assert perplexity(counts).item() == pytest.approx(3000, rel=1e-5)


@pytest.mark.parametrize("measure", [perplexity, codebook_usage])
def test_of_no_counts_is_zero_and_of_no_codes_an_error(measure):
    for dtype in (torch.int64, torch.float32):
        assert measure(torch.zeros(4, dtype=dtype)).item() == 0
    for shape in ((0,), (2, 3), ()):
        with pytest.raises(ValueError, match=r"counts: expected \(K,\), got \("):
            measure(torch.ones(shape))


def test_perplexity_of_a_nan_is_nan():
    assert perplexity(torch.tensor([1.0, torch.nan])).isnan()


@pytest.mark.parametrize(
    ("measure", "shapes", "expected"),
    [
        (effective_rank, [(5, 5)], ()),
        (active_units, [(5,)], ()),
        (kl_per_dimension, [(4, 5), (4, 5)], (5,)),
        (perplexity, [(5,)], ()),
        (codebook_usage, [(5,)], ()),
    ],
)
def test_nothing_is_read_back_from_the_device(measure, shapes, expected):
    # a tensor without data refuses whatever asks for its values or for a shape that depends on them
    found = measure(*(torch.empty(shape, device="meta") for shape in shapes))
    assert (found.device.type, found.shape) == ("meta", expected)
