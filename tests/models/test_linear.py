"""The linear autoencoder is PCA, whatever its likelihood's constants."""

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from lightning_ae import GaussianNLL, LinearAutoencoder, ZeroInflatedNegativeBinomialNLL

LATENT_DIM = 4


@pytest.fixture(scope="module")
def digits():
    """In [0, 1], with the constant pixels that real data have."""
    return torch.from_numpy(load_digits().data[:500] / 16)


@pytest.fixture(scope="module")
def pca(digits):
    return PCA(LATENT_DIM, svd_solver="full").fit(digits.numpy())


def discarded(x):
    """Eigenvalues of the covariance of the data, not of a sample's estimate of it, that no component explains."""
    return np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[:-LATENT_DIM].sum()


def minimise(model, x):
    """Full-batch LBFGS on the model's own objective, in double precision."""
    model.double()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=300,
        history_size=30,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = model.objective(model.terms(x, model(x))).mean()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return model.objective(model.terms(x, model(x))).mean().item()


def angle(model, pca):
    return linalg.subspace_angles(model.components().numpy(), pca.components_.T).max()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_spans_the_principal_subspace_and_leaves_the_discarded_eigenvalues(tied, seed, digits, pca):
    torch.manual_seed(seed)
    model = LinearAutoencoder(64, LATENT_DIM, tied=tied)
    loss = minimise(model, digits)
    assert angle(model, pca) < 1e-3
    assert loss == pytest.approx(discarded(digits), rel=2e-5)
    # so are the reconstructions, not only the span
    expected = pca.inverse_transform(pca.transform(digits.numpy()))
    assert np.sqrt(np.mean((model.reconstruct(digits).detach().numpy() - expected) ** 2)) < 2e-3


def test_tied_rows_become_orthonormal(digits):
    model = LinearAutoencoder(64, LATENT_DIM)
    minimise(model, digits)
    w = model.encoder.weight.detach()
    torch.testing.assert_close(w @ w.t(), torch.eye(LATENT_DIM, dtype=torch.float64), atol=1e-4, rtol=0)


def test_without_biases_the_data_have_to_be_centred(digits, pca):
    model = LinearAutoencoder(64, LATENT_DIM, bias=False)
    assert minimise(model, digits - digits.mean(0)) == pytest.approx(discarded(digits), rel=1e-6)
    assert angle(model, pca) < 1e-3
    uncentred = LinearAutoencoder(64, LATENT_DIM, bias=False)
    assert minimise(uncentred, digits) > 1.01 * discarded(digits)


def test_gaussian_likelihood_has_the_minimiser_of_squared_error(digits, pca):
    sigma = 0.5
    model = LinearAutoencoder(64, LATENT_DIM, loss=GaussianNLL(sigma))
    loss = minimise(model, digits)
    assert angle(model, pca) < 1e-3
    expected = discarded(digits) / (2 * sigma**2) + 64 / 2 * np.log(2 * np.pi * sigma**2)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_learned_variance_becomes_the_mean_residual_variance(digits, pca):
    model = LinearAutoencoder(64, LATENT_DIM, loss=GaussianNLL(learn_scale=True))
    loss = minimise(model, digits)
    variance = discarded(digits) / 64
    assert angle(model, pca) < 1e-3
    assert model.loss.scale.item() ** 2 == pytest.approx(variance, rel=1e-5)
    assert loss == pytest.approx(64 / 2 * (1 + np.log(2 * np.pi * variance)), rel=1e-6)


@pytest.mark.parametrize(
    ("tied", "bias", "expected"),
    [
        (True, False, 64 * 8),
        (False, False, 2 * 64 * 8),
        (True, True, 64 * 8 + 64 + 8),
        (False, True, 2 * 64 * 8 + 64 + 8),
    ],
)
def test_there_are_dk_weights_tied_and_2dk_untied(tied, bias, expected):
    model = LinearAutoencoder((1, 8, 8), latent_dim=8, tied=tied, bias=bias)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_components_are_an_orthonormal_basis_of_the_decoders_span():
    model = LinearAutoencoder(9, latent_dim=3, tied=False)
    basis = model.components()
    torch.testing.assert_close(basis.t() @ basis, torch.eye(3))
    atoms = model.decoder.layer.weight.detach()
    torch.testing.assert_close(basis @ (basis.t() @ atoms), atoms)


def test_shapes_go_in_and_come_out():
    model = LinearAutoencoder((2, 3, 5), latent_dim=4)
    x = torch.randn(6, 2, 3, 5)
    assert model.encode(x).shape == (6, 4)
    assert model.reconstruct(x).shape == x.shape


def test_a_loss_of_two_blocks_has_its_decoder_untied():
    loss = ZeroInflatedNegativeBinomialNLL()
    model = LinearAutoencoder(6, latent_dim=2, tied=False, loss=loss)
    assert model(torch.ones(3, 6)).params.shape == (3, 12)
    assert model.reconstruct(torch.ones(3, 6)).shape == (3, 6)
    with pytest.raises(ValueError, match=r"tied_to: expected an encoder with weight \(2, 12\), got \(2, 6\)"):
        LinearAutoencoder(6, latent_dim=2, loss=loss)


@pytest.mark.parametrize("latent_dim", [0, -3])
def test_a_latent_without_dimensions_is_an_error(latent_dim):
    with pytest.raises(ValueError, match="latent_dim: expected a positive whole number, got"):
        LinearAutoencoder(6, latent_dim=latent_dim)
