"""Sparsity measures against their published definitions in NumPy, and the axioms of Hurley & Rickard 2009."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_ae import SparseCode
from lightning_ae.metrics import gini, hoyer, l0, lifetime_sparsity, population_sparsity

SAME_EACH_RUN = settings(derandomize=True, deadline=None, max_examples=50)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
EACH_DTYPE = pytest.mark.parametrize(("dtype", "atol"), TOLERANCE.items(), ids=str)


def hoyer_2004(row):
    n = len(row)
    return (np.sqrt(n) - np.linalg.norm(row, 1) / np.linalg.norm(row)) / (np.sqrt(n) - 1)


def gini_by_mean_difference(row):
    """Half of the relative mean absolute difference between all pairs."""
    c = np.abs(row)
    return np.abs(c[:, None] - c[None, :]).mean() / (2 * c.mean())


def gini_hurley_rickard(row):
    c = np.sort(np.abs(row))
    n = len(c)
    return 1 - 2 * sum(c[k - 1] / c.sum() * (n - k + 0.5) / n for k in range(1, n + 1))


def treves_rolls(row):
    n = len(row)
    return (1 - np.abs(row).mean() ** 2 / (row**2).mean()) / (1 - 1 / n)


DEFINITIONS = [
    (hoyer, hoyer_2004),
    (gini, gini_by_mean_difference),
    (gini, gini_hurley_rickard),
    (population_sparsity, treves_rolls),
]
RATIOS = (hoyer, gini, population_sparsity)
EACH_RATIO = pytest.mark.parametrize("measure", RATIOS, ids=lambda measure: measure.__name__)


def codes(b=12, n=9):
    """Signed codes, some sparse and some dense."""
    z = np.random.default_rng(0).laplace(size=(b, n))
    z[: b // 2] *= np.random.default_rng(1).random((b // 2, n)) > 0.6
    z[:, 0] += 0.5  # no row is all zero
    return z


@pytest.mark.parametrize(("measure", "definition"), DEFINITIONS, ids=lambda function: function.__name__)
@EACH_DTYPE
@pytest.mark.parametrize("n", [2, 9, 3000])
def test_is_its_published_definition(measure, definition, dtype, atol, n):
    z = torch.tensor(codes(n=n), dtype=dtype)
    found = measure(z)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, [definition(row) for row in z.double().numpy()], atol=atol)


@pytest.mark.parametrize("eps", [0, 0.25, 1])
def test_l0_counts_what_exceeds_eps(eps):
    z = codes()
    z[0, :2] = eps, -eps
    found = l0(torch.tensor(z), eps)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found, [np.count_nonzero(np.abs(row) > eps) for row in z])


def test_l0_leaves_nan_out_and_zero_codes_in():
    assert l0(torch.tensor([[torch.nan, torch.inf, 1.0], [0.0, -0.0, 0.0]])).tolist() == [2, 0]


def test_l0_compares_half_precision_with_the_eps_asked_for():
    eps = 0.1  # in bfloat16 it would be the latent itself
    z = torch.tensor([[eps]], dtype=torch.bfloat16)
    assert z.double().item() > eps
    assert l0(z, eps).item() == 1


@EACH_DTYPE
def test_lifetime_sparsity_is_the_definition_for_each_latent(dtype, atol):
    z = torch.tensor(codes(50, 7), dtype=dtype)
    found = lifetime_sparsity(z.abs().mean(0), z.square().mean(0), len(z))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, [treves_rolls(column) for column in z.double().numpy().T], atol=atol)


def test_lifetime_sparsity_takes_a_count_on_the_device():
    m1, m2 = torch.tensor([0.5, 0.2, 0.0]), torch.tensor([0.5, 0.2, 0.0])
    torch.testing.assert_close(
        lifetime_sparsity(m1, m2, torch.tensor(40)), lifetime_sparsity(m1, m2, 40), equal_nan=True
    )
    for none in (0, 1):
        assert lifetime_sparsity(m1, m2, torch.tensor(none)).isnan().all()


def test_lifetime_sparsity_of_a_dead_latent_is_nan_of_a_steady_one_zero_of_a_lone_spike_one():
    z = torch.zeros(10, 3)
    z[:, 1], z[4, 2] = -2, 5
    found = lifetime_sparsity(z.abs().mean(0), z.square().mean(0), 10)
    assert found[0].isnan()
    assert found[1:].tolist() == pytest.approx([0, 1], abs=1e-6)


@EACH_RATIO
def test_an_all_zero_code_is_nan_and_the_others_are_as_without_it(measure):
    z = torch.tensor(codes())
    found = measure(torch.cat([z[:5], torch.zeros(1, 9), z[5:]]))
    assert found[5].isnan()
    assert torch.equal(found[torch.arange(13) != 5], measure(z))
    assert found.nanmean().item() == pytest.approx(measure(z).mean().item(), rel=1e-12)


@EACH_RATIO
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_code_that_is_not_finite_is_nan(measure, broken):
    z = torch.ones(2, 4)
    z[0, 2] = broken
    assert measure(z).isnan().tolist() == [True, False]


@EACH_RATIO
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(measure, dtype):
    z = torch.tensor(codes(n=300)).mul(1000).to(dtype)  # squares and sums beyond float16
    assert measure(z).dtype == torch.float32
    torch.testing.assert_close(measure(z).double(), measure(z.double()), atol=2e-6, rtol=0)


@EACH_RATIO
def test_squares_neither_overflow_nor_vanish(measure):
    z = torch.tensor(codes(), dtype=torch.float32)
    for scale in (1e-37, 1e-25, 1e25, 1e37):
        torch.testing.assert_close(measure(z * scale), measure(z), atol=2e-6, rtol=0)


@pytest.mark.parametrize("measure", [*RATIOS, l0], ids=lambda measure: measure.__name__)
def test_maps_are_flattened_and_integers_taken(measure):
    z = torch.randint(-3, 4, (5, 2, 3, 4))
    expected = measure(z.reshape(5, 24).float())
    assert torch.equal(measure(z), expected)
    assert torch.equal(measure(z.float().to(memory_format=torch.channels_last)), expected)
    assert measure(z[:0]).shape == (0,)


@pytest.mark.parametrize("measure", [*RATIOS, l0], ids=lambda measure: measure.__name__)
def test_nothing_is_read_back_from_the_device(measure):
    # a tensor without data refuses whatever asks for its values or for a shape that depends on them
    for dtype in (torch.float32, torch.bfloat16):
        found = measure(torch.empty(6, 5, device="meta", dtype=dtype))
        assert (found.device.type, found.shape) == ("meta", (6,))


def test_lifetime_sparsity_reads_nothing_back_from_the_device():
    m = torch.empty(6, device="meta")
    for n in (10, torch.empty((), device="meta", dtype=torch.int64)):
        found = lifetime_sparsity(m, m, n)
        assert (found.device.type, found.shape) == ("meta", (6,))


@pytest.mark.parametrize(
    ("measure", "least", "shape"),
    [
        (l0, 1, (3,)),
        (l0, 1, (3, 0)),
        (gini, 1, ()),
        (gini, 1, (3, 2, 0)),
        (hoyer, 2, (3, 1)),
        (hoyer, 2, (4,)),
        (population_sparsity, 2, (3, 1, 1)),
    ],
)
def test_too_few_latents_are_an_error_that_names_the_shape(measure, least, shape):
    with pytest.raises(
        ValueError, match=rf"z: expected \(B, n\) with n >= {least}, got \({', '.join(map(str, shape))}"
    ):
        measure(torch.ones(shape))


@pytest.mark.parametrize("eps", [-0.1, float("nan")])
def test_an_eps_that_is_no_threshold_is_an_error(eps):
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0, got"):
        l0(torch.ones(2, 2), eps)


def test_moments_that_differ_in_shape_or_come_from_one_example_are_an_error():
    with pytest.raises(ValueError, match=r"expected moments alike, got \(3,\) and \(1,\)"):
        lifetime_sparsity(torch.ones(3), torch.ones(1), 5)
    with pytest.raises(ValueError, match="n: expected at least two examples, got 1"):
        lifetime_sparsity(torch.ones(3), torch.ones(3), 1)


# The axioms, with the names of Hurley & Rickard, section III, on codes c >= 0 that are not all zero. Whole numbers keep
# every strict inequality far above rounding.

WEALTH = st.lists(st.integers(0, 50), min_size=2, max_size=8).filter(any)


def score(measure, *values):
    return measure(torch.tensor([values], dtype=torch.float64)).item()


@EACH_RATIO
@SAME_EACH_RUN
@given(c=WEALTH)
def test_lies_between_zero_and_one(measure, c):
    assert 0 <= score(measure, *c) <= 1
    assert 0 <= measure(torch.tensor([c], dtype=torch.float32)).item() <= 1


@EACH_RATIO
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 7, 1000])
def test_is_zero_for_equal_latents_and_largest_for_one_alone(measure, dtype, n):
    flat, lone = torch.full((1, n), -0.3, dtype=dtype), torch.zeros(1, n, dtype=dtype)
    lone[0, n // 2] = -0.3
    largest = 1 - 1 / n if measure is gini else 1
    assert 0 <= measure(flat).item() <= 1e-6
    assert measure(lone).item() == pytest.approx(largest, abs=1e-6)
    assert measure(lone).item() <= 1


@EACH_RATIO
@SAME_EACH_RUN
@given(c=WEALTH, signs=st.integers(0, 255), shuffle=st.randoms(use_true_random=False))
def test_neither_order_nor_sign_matters(measure, c, signs, shuffle):
    other = [-value if signs >> i & 1 else value for i, value in enumerate(c)]
    shuffle.shuffle(other)
    assert score(measure, *other) == pytest.approx(score(measure, *c), abs=1e-12)


@EACH_RATIO
@SAME_EACH_RUN
@given(c=WEALTH, share=st.integers(1, 9))
def test_d1_robin_hood_lowers_it(measure, c, share):
    rich, poor = c.index(max(c)), c.index(min(c))
    assume(c[rich] > c[poor])
    alpha = share / 20 * (c[rich] - c[poor])  # less than half of the difference
    given_away = [value - alpha * (i == rich) + alpha * (i == poor) for i, value in enumerate(c)]
    assert score(measure, *given_away) < score(measure, *c) - 1e-9


@EACH_RATIO
@SAME_EACH_RUN
@given(c=WEALTH, alpha=st.floats(1e-6, 1e6))
def test_d2_scaling_leaves_it(measure, c, alpha):
    assert score(measure, *(alpha * value for value in c)) == pytest.approx(score(measure, *c), abs=1e-12)


@EACH_RATIO
@SAME_EACH_RUN
@given(c=WEALTH, alpha=st.integers(1, 50))
def test_d3_rising_tide_lowers_it(measure, c, alpha):
    assume(len(set(c)) > 1)
    assert score(measure, *(value + alpha for value in c)) < score(measure, *c) - 1e-9


@SAME_EACH_RUN
@given(c=WEALTH, times=st.integers(2, 4))
def test_d4_cloning_leaves_gini(c, times):
    assert score(gini, *(c * times)) == pytest.approx(score(gini, *c), abs=1e-12)


@pytest.mark.parametrize("measure", [hoyer, population_sparsity], ids=lambda measure: measure.__name__)
@SAME_EACH_RUN
@given(c=WEALTH)
def test_d4_cloning_lowers_what_is_normalised_by_width(measure, c):
    # as the paper's table says of Hoyer's, and as follows for Treves and Rolls's from the factor 1/(1 - 1/n)
    assume(len(set(c)) > 1)
    assert score(measure, *c, *c) < score(measure, *c) - 1e-9


@EACH_RATIO
@SAME_EACH_RUN
@given(c=WEALTH, who=st.integers(0, 7), alpha=st.integers(1, 50))
def test_p1_bill_gates_raises_it(measure, c, who, alpha):
    who %= len(c)
    assume(any(c[:who] + c[who + 1 :]))  # alone already, one cannot get lonelier
    rich = [value + max(c) * (i == who) for i, value in enumerate(c)]
    richer = [value + alpha * (i == who) for i, value in enumerate(rich)]
    assert score(measure, *richer) > score(measure, *rich) + 1e-9


@EACH_RATIO
@SAME_EACH_RUN
@given(c=WEALTH)
def test_p2_babies_raise_it(measure, c):
    assume(measure is gini or sum(map(bool, c)) > 1)  # one alone is 1 already for the others
    assert score(measure, *c, 0) > score(measure, *c) + 1e-9


@SAME_EACH_RUN
@given(c=WEALTH, alpha=st.integers(1, 50))
def test_l0_only_counts(c, alpha):
    assert score(l0, *c) == sum(map(bool, c)) == score(l0, *(alpha * value for value in c)) == score(l0, *c, 0)


def test_sparse_codes_are_measured_as_what_they_stand_for():
    z = SparseCode(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([[0, 3], [1, 2]]), 5)
    for measure in (l0, hoyer, gini, population_sparsity):
        assert torch.equal(measure(z), measure(z.to_dense()))
    assert l0(z).tolist() == [2, 1]
