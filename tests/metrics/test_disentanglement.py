"""MIG, DCI and SAP have the values that their definitions give by hand."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_ae.metrics import dci, mutual_information_gap, sap

V = torch.cartesian_prod(torch.arange(4), torch.arange(3))  # two independent, uniform factors
MANY = V.repeat(30, 1)


# -- MIG ------------------------------------------------------------------------------------------------------


def test_a_latent_for_each_factor_has_a_gap_of_1():
    assert mutual_information_gap(V, V) == pytest.approx(1, abs=1e-12)
    assert mutual_information_gap(5 - V.double() ** 2, V) == pytest.approx(1, abs=1e-12)


def test_two_latents_that_tell_the_same_have_a_gap_of_0():
    assert mutual_information_gap(torch.cat([V, V], 1), V) == pytest.approx(0, abs=1e-12)
    assert mutual_information_gap(torch.cat([V, V[:, :1]], 1), V) == pytest.approx(0.5, abs=1e-12)  # the second's is 1


def test_latents_that_tell_nothing_change_nothing():
    other = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(5))
    assert mutual_information_gap(other, other[:, :2]) == pytest.approx(1, abs=1e-12)
    constant = torch.full((12, 1), 3.3)
    assert mutual_information_gap(torch.cat([constant, V], 1), V) == pytest.approx(1, abs=1e-12)
    assert mutual_information_gap(constant, V) == pytest.approx(0, abs=1e-12)


def test_part_of_the_information_is_a_part_of_the_gap():
    v = torch.arange(4)[:, None]
    assert mutual_information_gap(v // 2, v) == pytest.approx(math.log(2) / math.log(4))
    assert mutual_information_gap(torch.cat([v, v // 2], 1), v) == pytest.approx(1 - math.log(2) / math.log(4))
    uneven = torch.tensor([0, 0, 0, 1, 1, 2])[:, None]  # told: whether it is 0
    p = np.array([3, 2, 1]) / 6
    expected = math.log(2) / -(p * np.log(p)).sum()
    assert mutual_information_gap((uneven > 0).int(), uneven) == pytest.approx(expected)


def test_mixed_latents_have_a_small_gap():
    v = torch.cartesian_prod(torch.arange(10), torch.arange(10)).double()
    angle = math.pi / 4
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    assert mutual_information_gap(v, v) == pytest.approx(1)
    assert mutual_information_gap(v @ turn, v) < 0.05


def entropies(*columns):
    """Entropy of the joint distribution of columns by their counts."""
    _, counts = np.unique(np.stack(columns, 1), axis=0, return_counts=True)
    return scipy.stats.entropy(counts)


def test_the_gap_is_that_of_entropies_of_counts():
    bins = 7
    generator = np.random.default_rng(0)
    v = np.stack([generator.integers(0, 4, 500), generator.integers(2, 5, 500)], 1)
    z = v @ generator.normal(size=(2, 3)) + generator.normal(size=(500, 3))
    binned = [np.searchsorted(np.linspace(c.min(), c.max(), bins + 1)[1:-1], c, side="right") for c in z.T]
    gaps = []
    for k in range(2):
        known = sorted(entropies(v[:, k]) + entropies(b) - entropies(v[:, k], b) for b in binned)
        gaps.append((known[-1] - known[-2]) / entropies(v[:, k]))
    assert mutual_information_gap(z, v, bins=bins) == pytest.approx(np.mean(gaps), rel=1e-9)


def test_real_factors_are_put_into_bins():
    v = torch.linspace(0, 1, 400)[:, None]
    assert mutual_information_gap(v.exp(), v, continuous=True) < 1 - 1e-3  # bins of equal width, in other places
    assert mutual_information_gap(3 * v + 1, v, continuous=True) == pytest.approx(1)
    coarse = (v * 2).floor().clamp(max=1)
    assert mutual_information_gap(coarse, v, continuous=True) == pytest.approx(math.log(2) / math.log(20))


@pytest.mark.parametrize("measure", [mutual_information_gap, lambda z, v: sap(z, v, continuous=True)])
@pytest.mark.parametrize("unit", [2.0**-52, 5e-324])
def test_differences_may_be_as_small_as_numbers_have_them(measure, unit):
    origin = 1.0 if unit > 1e-300 else 0.0
    tiny, large = origin + unit * V.double(), V.double()
    assert (tiny[:, 0] == origin + unit).any()
    assert measure(tiny, V) == pytest.approx(measure(large, V))
    assert measure(torch.cat([tiny, large], 1), V) == pytest.approx(0)


# -- DCI ------------------------------------------------------------------------------------------------------


def test_a_latent_for_each_factor_is_all_that_dci_asks_for():
    assert dci(MANY.double() ** 2, MANY) == (1, 1, 1)
    noise = torch.rand(len(MANY), 3, generator=torch.Generator().manual_seed(0))
    assert dci(torch.cat([noise, MANY], 1), MANY) == (1, 1, 1)


def test_one_latent_with_everything_is_complete_and_not_disentangled():
    both = torch.stack([MANY[:, 0] * 3 + MANY[:, 1], torch.zeros(len(MANY))], 1)
    assert dci(both, MANY) == (pytest.approx(0), pytest.approx(1), 1)


def test_two_latents_for_each_factor_are_disentangled_and_not_complete():
    found = dci(torch.cat([MANY, MANY], 1), MANY, trees=200)
    assert found.disentanglement == 1
    assert found.completeness == pytest.approx(1 - math.log(2) / math.log(4), abs=0.02)  # a tree takes either
    assert found.informativeness == 1


def test_turned_latents_are_neither():
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(1500, 2, generator=generator)
    turned = v @ torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    straight, mixed = dci(v, v, continuous=True), dci(turned, v, continuous=True)
    assert min(straight) > 0.99
    assert mixed.disentanglement < 0.05
    assert mixed.completeness < 0.05
    assert mixed.informativeness > 0.9


def test_noise_informs_as_chance_does():
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    found = dci(z, torch.randint(0, 4, (2000, 1), generator=torch.Generator().manual_seed(2)))
    assert found.informativeness == pytest.approx(0.25, abs=0.05)
    assert found.disentanglement == 1  # there is but one factor


def test_the_formulas_are_those_of_the_paper(monkeypatch):
    importance = np.array([[0.7, 0.1], [0.3, 0.1], [0.0, 0.8], [0.0, 0.0]])
    columns, scores = iter(importance.T), iter([0.9, 0.4])

    class Forest:
        def __init__(self, **options):
            assert options["max_features"] is None

        def fit(self, z, v):
            self.feature_importances_ = next(columns)
            return self

        def score(self, z, v):
            return next(scores)

    monkeypatch.setattr("sklearn.ensemble.RandomForestClassifier", Forest)
    found = dci(torch.rand(len(MANY), 4), MANY)
    rows = importance[:3]
    weights = rows.sum(1) / rows.sum()
    disentanglement = 1 - scipy.stats.entropy(rows, base=2, axis=1)
    completeness = 1 - scipy.stats.entropy(importance, base=4, axis=0)
    assert found.disentanglement == pytest.approx((weights * disentanglement).sum())
    assert found.completeness == pytest.approx(completeness.mean())
    assert found.informativeness == pytest.approx(0.65)


def test_informativeness_is_of_examples_held_out():
    """A forest knows by heart a code that names each example, and nothing of the others."""
    generator = torch.Generator().manual_seed(0)
    z, v = torch.randperm(400, generator=generator)[:, None], torch.randint(0, 2, (400, 1), generator=generator)
    assert dci(z, v).informativeness < 0.65


# -- SAP ------------------------------------------------------------------------------------------------------


def test_real_factors_are_scored_by_their_squared_correlation():
    generator = np.random.default_rng(0)
    v = generator.normal(size=(300, 2))
    z = v @ generator.normal(size=(2, 3)) + generator.normal(size=(300, 3))
    gaps = []
    for k in range(2):
        scores = sorted(scipy.stats.pearsonr(z[:, j], v[:, k]).statistic ** 2 for j in range(3))
        gaps.append(scores[-1] - scores[-2])
    assert sap(z, v, continuous=True) == pytest.approx(np.mean(gaps), rel=1e-9)
    assert sap(V, V, continuous=True) == pytest.approx(1)
    assert sap(1e-9 * V, V, continuous=True) == pytest.approx(1)
    constant = torch.full((12, 1), 3.3)
    assert sap(torch.cat([constant, V], 1), V, continuous=True) == pytest.approx(1)


def test_classes_are_scored_against_chance():
    assert sap(V, V) == pytest.approx(((1 - 1 / 4) + (1 - 1 / 3)) / 2)
    assert sap(torch.cat([V, V], 1), V) == 0
    constant = torch.full((12, 1), 3.3)
    assert sap(torch.cat([constant, V[:, :1]], 1), V[:, :1]) == pytest.approx(1 - 1 / 4)
    assert sap(V[:, :1], V[:, :1]) == pytest.approx(1 - 1 / 4)
    assert sap(constant, V) == pytest.approx(0)


def test_a_threshold_between_two_classes_is_at_the_largest_difference_of_their_distributions():
    generator = np.random.default_rng(0)
    v = (np.arange(4000) % 4 == 0).astype(int)  # one of four: accuracy that is not balanced would be another
    z = np.stack([generator.normal(size=4000) + 1.5 * v, generator.normal(size=4000) - 0.5 * v], 1)
    best = [(1 + scipy.stats.ks_2samp(c[v == 0], c[v == 1]).statistic) / 2 for c in z.T]
    assert sap(z, v[:, None]) == pytest.approx(abs(best[0] - best[1]), abs=0.01)


# -- all ------------------------------------------------------------------------------------------------------

MEASURES = [
    mutual_information_gap,
    lambda z, v: dci(z, v, trees=50).completeness,
    lambda z, v: dci(z, v, trees=50).disentanglement,
    sap,
]


@pytest.mark.parametrize(("measure", "tolerance"), list(zip(MEASURES, [0, 0.05, 0.05, 0], strict=True)))
def test_order_scale_and_sign_do_not_matter(measure, tolerance):
    generator = torch.Generator().manual_seed(0)
    z = torch.cat([MANY, MANY.sum(1, keepdim=True)], 1) + 2 * torch.rand(len(MANY), 3, generator=generator)
    # the order decides which examples a tree is drawn, so a forest is another one
    near = {"abs": tolerance or 1e-9}
    expected = measure(z, MANY)
    assert 0.05 < expected < 0.95
    rows = torch.randperm(len(z), generator=generator)
    assert measure(z[rows], MANY[rows]) == pytest.approx(expected, **near)
    assert measure(z[:, [2, 0, 1]], MANY[:, [1, 0]]) == pytest.approx(expected, **near)
    assert measure(z * torch.tensor([1.0, 128.0, 0.5]) + 8, 3 * MANY - 5) == pytest.approx(expected, **near)
    assert measure(-z, MANY) == pytest.approx(expected, **near)


@pytest.mark.parametrize("measure", MEASURES)
def test_tensors_of_any_dtype_and_arrays_are_the_same(measure):
    z = torch.randn(len(MANY), 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = measure(z.float().numpy(), MANY.numpy())
    assert measure(z.requires_grad_(), MANY.float()) == expected
    assert isinstance(expected, float)


@pytest.mark.parametrize("measure", [mutual_information_gap, dci, sap])
def test_errors_at_the_door(measure):
    with pytest.raises(ValueError, match=r"z: expected \(N, D\), got \(12,\)"):
        measure(V[:, 0], V)
    with pytest.raises(ValueError, match=r"factors: expected \(N, K\), got \(12, 0\)"):
        measure(V, V[:, :0])
    with pytest.raises(ValueError, match=r"factors: expected \(12, K\) as z has 12 rows, got \(11, 2\)"):
        measure(V, V[1:])
    with pytest.raises(ValueError, match="z: expected finite numbers"):
        measure(V / 0, V)
    with pytest.raises(ValueError, match="factors: number 1 has one value only, 2; leave it out"):
        measure(V, torch.stack([V[:, 0], torch.full((12,), 2)], 1))
    with pytest.raises(ValueError, match=r"factors: number 0 is not whole.*continuous=True"):
        measure(V, V + 0.5)


def test_other_errors():
    with pytest.raises(ValueError, match="bins: expected at least 2, got 1"):
        mutual_information_gap(V, V, bins=1)
    with pytest.raises(ValueError, match="test_fraction: expected a number in"):
        dci(V, V, test_fraction=1.0)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-ae\[recipes\]"'):
        mutual_information_gap(V, V)
