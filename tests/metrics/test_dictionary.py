"""Metrics of dictionaries against their definitions in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from lightning_ae.codes import SparseCode
from lightning_ae.metrics import (
    FeatureDensity,
    Shrinkage,
    atom_recovery,
    dead_fraction,
    decoder_overlap,
    l0,
    log10_density,
    max_cosine,
)


def codes(n=40, latents=12):
    torch.manual_seed(0)
    z = torch.randn(n, latents) * (torch.rand(n, latents) < torch.linspace(0, 1, latents))
    z[:, 3] = 0
    return z


def sparse(z, width=9):
    """The same code, its entries stored, in another order, and zeros among them."""
    indices = z.abs().argsort(dim=1, descending=True)[:, :width].flip(1)
    return SparseCode(z.gather(1, indices), indices, z.shape[1])


def test_density_is_the_share_of_examples_in_which_a_latent_is_on():
    z = codes()
    metric = FeatureDensity(12)
    for part in z.split([7, 1, 32]):
        metric.update(part)
    np.testing.assert_allclose(metric.compute(), (z.numpy() != 0).mean(0), rtol=1e-6)
    assert metric.compute().sum().item() == pytest.approx(l0(z).double().mean().item())


def test_sparse_codes_count_like_dense_ones():
    z = torch.where(codes() > 0, codes(), 0)
    dense, stored = FeatureDensity(12), FeatureDensity(12)
    dense.update(z)
    assert torch.equal(sparse(z, 12).to_dense(), z)
    stored.update(sparse(z, 12))
    assert torch.equal(dense.compute(), stored.compute())
    assert stored.compute().sum().item() == pytest.approx((z > 0).sum(1).double().mean().item())


def test_the_mean_l0_of_counts_is_exact_where_the_sum_of_frequencies_is_not():
    # six of 1000 examples cannot be told in binary: no sum of such shares is sure to be 4
    z = torch.stack([torch.randperm(64) < 4 for _ in range(1000)]).float()
    metric = FeatureDensity(64)
    for part in z.split(300):
        metric.update(part)
    assert int(metric.fired.sum()) / int(metric.count) == 4
    assert metric.fired.tolist() == z.bool().numpy().sum(0).tolist()


def test_density_is_reduced_over_ranks_by_sums():
    metric = FeatureDensity(2)
    assert {name: fn.__name__ for name, fn in metric._reductions.items()} == {
        "fired": "dim_zero_sum",
        "undefined": "dim_zero_sum",
        "count": "dim_zero_sum",
    }


def test_dead_latents_are_those_that_never_fire_or_hardly():
    density = torch.tensor([0.0, 1e-5, 0.5, 0.0])
    assert dead_fraction(density).item() == 0.5
    assert dead_fraction(density, at_most=1e-4).item() == 0.75
    np.testing.assert_allclose(log10_density(density)[1:3], np.log10([1e-5, 0.5]), rtol=1e-4)
    assert log10_density(density)[0].item() == pytest.approx(-10)


@pytest.mark.parametrize("z", [torch.zeros(3, 4), torch.zeros(5), SimpleNamespace(num_latents=4, shape=(3, 4))])
def test_codes_of_another_width_are_an_error(z):
    with pytest.raises(ValueError, match=r"z: expected codes \(B, 5\), got "):
        FeatureDensity(5).update(z)
    with pytest.raises(ValueError, match="num_latents: expected a positive whole number, got 0"):
        FeatureDensity(0)


def reconstructions():
    torch.manual_seed(3)
    x = torch.randn(30, 2, 4) + 1
    return 0.7 * x + 0.3 * torch.randn(30, 2, 4), x


def test_the_relative_bias_is_the_best_divisor():
    preds, x = reconstructions()
    metric = Shrinkage()
    for parts in zip(preds.split([11, 19]), x.split([11, 19]), strict=True):
        metric.update(*parts)
    p, t = preds.double().numpy(), x.double().numpy()
    best = minimize_scalar(
        lambda g: ((p / g - t) ** 2).sum(), bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}
    )
    assert metric.compute()["relative_bias"].item() == pytest.approx(best.x, rel=1e-5)


def test_the_norm_ratio_is_the_mean_over_examples():
    preds, x = reconstructions()
    x[4] = 0
    metric = Shrinkage()
    metric.update(preds, x)
    p, t = (v.double().flatten(1).numpy() for v in (preds, x))
    ratios = [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(p, t, strict=True) if b.any()]
    assert metric.compute()["norm_ratio"].item() == pytest.approx(np.mean(ratios), rel=1e-6)


def test_a_projection_is_short_but_unbiased():
    x = torch.randn(500, 6)
    metric = Shrinkage()
    metric.update(torch.cat([x[:, :3], torch.zeros(500, 3)], 1), x)
    assert metric.compute()["relative_bias"].item() == pytest.approx(1, rel=1e-6)
    assert metric.compute()["norm_ratio"].item() < 0.8


def test_reconstructions_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"expected reconstructions \(3, 2\), got \(3, 1\)"):
        Shrinkage().update(torch.zeros(3, 1), torch.zeros(3, 2))


def cosines(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return np.array([[abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for y in b.T] for x in a.T])


def test_max_cosine_and_overlap_are_those_of_all_pairs():
    torch.manual_seed(1)
    a, b = torch.randn(5, 30), torch.randn(5, 20)
    np.testing.assert_allclose(max_cosine(a, b), cosines(a, b).max(1), rtol=1e-5)
    pairs = cosines(a, a)
    np.fill_diagonal(pairs, 0)
    np.testing.assert_allclose(decoder_overlap(a), pairs.max(1), rtol=1e-5)


def test_parts_do_not_change_the_overlap():
    torch.manual_seed(1)
    a = torch.randn(3, 2100)  # three parts
    a[:, 2050] = -2 * a[:, 3]
    found = decoder_overlap(a)
    unit = torch.nn.functional.normalize(a.double(), dim=0)
    pairs = (unit.T @ unit).abs()
    pairs.fill_diagonal_(0)
    torch.testing.assert_close(found.double(), pairs.amax(1), atol=1e-6, rtol=0)
    assert found[3].item() == pytest.approx(1)


def test_recovery_counts_true_atoms_and_not_learned_ones():
    torch.manual_seed(2)
    true = torch.linalg.qr(torch.randn(10, 10)).Q
    learned = torch.cat([3 * true[:, :4], -true[:, 4:6], true[:, 4:6], true.sum(1, keepdim=True)], dim=1)
    assert atom_recovery(learned, true).item() == pytest.approx(0.6)
    assert atom_recovery(true, true).item() == 1
    near = torch.tensor([[1.0], [0.48]])  # cosine 0.9015
    assert atom_recovery(near, torch.tensor([[1.0], [0.0]])).item() == 1
    assert atom_recovery(near, torch.tensor([[1.0], [0.0]]), threshold=0.91).item() == 0


def test_atoms_that_are_zero_overlap_with_none():
    decoder = torch.eye(3)
    decoder[:, 1] = 0
    assert decoder_overlap(decoder).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((3,), (3, 4)), ((3, 0), (3, 4))])
def test_atoms_that_do_not_fit_are_an_error(shapes):
    with pytest.raises(ValueError, match=r"expected atoms \(d, n\) and \(d, m\) in columns, got"):
        atom_recovery(*(torch.ones(shape) for shape in shapes))
    with pytest.raises(ValueError, match="decoder: expected"):
        decoder_overlap(torch.ones(3, 1))
