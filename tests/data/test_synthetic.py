import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from lightning_ae.data import linear_gaussian, sparse_dictionary


def test_pca_finds_the_loadings_and_the_eigenvalues():
    x, loadings = linear_gaussian(20_000, in_features=10, latent_dim=3, noise=0.1)
    pca = PCA().fit(x.double().numpy())
    assert np.rad2deg(subspace_angles(pca.components_[:3].T, loadings.numpy()).max()) < 0.2
    expected = np.array([3, 2, 1] + 7 * [0]) + 0.1**2
    np.testing.assert_allclose(pca.explained_variance_, expected, rtol=0.05)


def test_loadings_are_orthogonal_with_decaying_lengths():
    _, loadings = linear_gaussian(1, in_features=10, latent_dim=3)
    torch.testing.assert_close(loadings.T @ loadings, torch.diag(torch.tensor([3.0, 2.0, 1.0])))


def test_without_noise_the_examples_lie_in_the_span():
    x, loadings = linear_gaussian(50, in_features=10, latent_dim=3, noise=0)
    assert np.linalg.matrix_rank(np.hstack([x.numpy().T, loadings.numpy()]), tol=1e-4) == 3


def test_the_seed_decides_the_examples():
    draws = [linear_gaussian(5, 4, 2, seed=seed) for seed in (0, 0, 1)]
    assert draws[0].x.equal(draws[1].x)
    assert draws[0].loadings.equal(draws[1].loadings)
    assert not draws[0].x.equal(draws[2].x)
    assert draws[0].x.dtype == draws[0].loadings.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples: expected a positive whole number, got 0"),
        ({"latent_dim": 5}, "latent_dim: expected at most in_features=4, got 5"),
        ({"noise": -1.0}, r"noise: expected a finite number >= 0, got -1\.0"),
        ({"noise": float("nan")}, "noise: expected a finite number >= 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_gaussian(**{"num_examples": 3, "in_features": 4, "latent_dim": 2} | arguments)


def test_sparse_examples_are_sums_of_exactly_so_many_atoms_of_norm_1():
    x, atoms, z = sparse_dictionary(50, 6, 20, 3, seed=1)
    np.testing.assert_allclose(np.linalg.norm(atoms.numpy(), axis=1), 1, rtol=1e-6)
    for row in range(50):
        on = np.flatnonzero(z[row].numpy())
        assert len(on) == 3
        expected = sum(z[row, i].item() * atoms[i].numpy() for i in on)
        np.testing.assert_allclose(x[row].numpy(), expected, atol=1e-6)
    values = z[z != 0]
    assert values.min() >= 0.5
    assert values.max() <= 1.5


def test_atoms_are_on_alike_or_the_later_the_rarer():
    even = (sparse_dictionary(20_000, 4, 10, 1).z != 0).float().mean(0)
    np.testing.assert_allclose(even.numpy(), 0.1, atol=0.01)
    odds = (sparse_dictionary(20_000, 4, 10, 1, decay=1.0).z != 0).float().mean(0)
    expected = 1 / np.arange(1, 11)
    np.testing.assert_allclose(odds.numpy(), expected / expected.sum(), atol=0.01)


def test_noise_of_the_dictionary_has_the_deviation_asked_for():
    data = sparse_dictionary(20_000, 4, 10, 2, noise=0.3)
    assert (data.x - data.z @ data.atoms).std().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"active": 11}, "active: expected at most num_atoms=10"), ({"noise": -1.0}, "noise"), ({"decay": -1.0}, "decay")],
)
def test_a_dictionary_that_cannot_be_is_an_error(options, error):
    with pytest.raises(ValueError, match=error):
        sparse_dictionary(**{"num_examples": 5, "in_features": 4, "num_atoms": 10, "active": 2, **options})
