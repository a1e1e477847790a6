import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from lightning_ae.data import linear_gaussian


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
        ({"num_examples": 0}, "num_examples: expected an integer >= 1, got 0"),
        ({"latent_dim": 5}, "latent_dim: expected at most in_features=4, got 5"),
        ({"noise": -1.0}, r"noise: expected a standard deviation >= 0, got -1\.0"),
        ({"noise": float("nan")}, "noise: expected a standard deviation >= 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_gaussian(**{"num_examples": 3, "in_features": 4, "latent_dim": 2} | arguments)
