"""Sparse inference against scikit-learn's LASSO and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import sparse_encode as sklearn_sparse_encode
from torch.nn import functional

from lightning_ae import soft_threshold, sparse_encode
from lightning_ae.networks.fista import _gap


def problem(count=40, features=16, atoms=48, dtype=torch.float64):
    dictionary = functional.normalize(torch.randn(features, atoms, dtype=dtype), dim=0)
    return torch.randn(count, features, dtype=dtype), dictionary


@pytest.mark.parametrize("algorithm", ["lasso_cd", "lasso_lars"])
@pytest.mark.parametrize("weight", [0.2, 1.0])
@pytest.mark.parametrize("positive", [False, True])
def test_codes_equal_scikit_learn_at_half_the_weight(algorithm, weight, positive):
    x, dictionary = problem()
    # scikit-learn's is ½‖x − Dz‖² + α‖z‖₁
    options = {"alpha": weight / 2, "positive": positive, "max_iter": 100_000}
    theirs = sklearn_sparse_encode(x.numpy(), dictionary.T.numpy(), algorithm=algorithm, **options)
    ours = sparse_encode(x, dictionary, weight, positive=positive, max_steps=20_000, tolerance=1e-13).numpy()
    # coordinate descent stops at a tolerance of its own
    np.testing.assert_allclose(ours, theirs, atol=5e-3 if algorithm == "lasso_cd" else 1e-6)

    def objective(z):
        return ((x.numpy() - z @ dictionary.T.numpy()) ** 2).sum(1) + weight * np.abs(z).sum(1)

    assert (objective(ours) <= objective(theirs) + 1e-10).all()
    if algorithm == "lasso_lars":
        assert ((ours != 0) == (np.abs(theirs) > 1e-9)).all()


def test_an_orthonormal_dictionary_has_a_closed_form():
    x, _ = problem(features=12)
    dictionary = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    torch.testing.assert_close(sparse_encode(x, dictionary, 0.7), soft_threshold(x @ dictionary, 0.35))


def test_single_precision_reaches_its_tolerance_and_half_is_widened():
    x, dictionary = problem()
    exact = sparse_encode(x, dictionary, 0.5, max_steps=20_000, tolerance=1e-13)

    def objective(z):
        return (x - z @ dictionary.T).square().sum(1) + 0.5 * z.abs().sum(1)

    single = sparse_encode(x.float(), dictionary.float(), 0.5)
    assert single.dtype == torch.float32
    excess = objective(single.double()) - objective(exact)
    assert (excess <= 2e-6 * x.square().sum(1)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse_encode(x.float(), dictionary.float(), 0.5), single)
    assert sparse_encode(x.bfloat16(), dictionary.bfloat16(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("positive", [False, True])
def test_the_gap_bounds_the_distance_from_the_minimum_and_closes(positive):
    x, dictionary = problem()
    best = sparse_encode(x, dictionary, 0.5, positive=positive, max_steps=20_000, tolerance=1e-13)

    def objective(z):
        return (x - z @ dictionary.T).square().sum(1) + 0.5 * z.abs().sum(1)

    assert (_gap(x, dictionary, best, 0.5, positive).abs() < 1e-11 * x.square().sum(1)).all()
    for steps in (0, 3, 10):
        z = sparse_encode(x, dictionary, 0.5, positive=positive, max_steps=steps)
        assert (_gap(x, dictionary, z, 0.5, positive) >= objective(z) - objective(best) - 1e-10).all()


def test_above_the_largest_correlation_all_is_zero_and_at_no_weight_the_residual_is():
    x, dictionary = problem()
    largest = 2 * (x @ dictionary).abs().amax().item()
    assert (sparse_encode(x, dictionary, 1.001 * largest) == 0).all()
    assert (sparse_encode(x, dictionary, 0.99 * largest) != 0).any()
    z = sparse_encode(x, dictionary, 0.0, max_steps=20_000, tolerance=0.0)
    torch.testing.assert_close(z @ dictionary.T, x, atol=1e-6, rtol=0)


def test_nothing_in_nothing_out():
    _, dictionary = problem()
    assert sparse_encode(torch.zeros(0, 16), dictionary, 1.0).shape == (0, 48)
    assert (sparse_encode(torch.zeros(3, 16), dictionary.float(), 1.0) == 0).all()
    assert (sparse_encode(torch.ones(3, 16), torch.zeros(16, 4), 1.0) == 0).all()


def test_bad_arguments_are_named():
    x, dictionary = problem()
    with pytest.raises(ValueError, match=r"dictionary: expected x \(B, d\) and a dictionary \(d, k\)"):
        sparse_encode(x, dictionary.T, 1.0)
    with pytest.raises(ValueError, match="weight: expected a finite number >= 0, got -1"):
        sparse_encode(x, dictionary, -1.0)
