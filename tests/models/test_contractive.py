"""The contractive autoencoder's objective by hand."""

import pytest
import torch

from lightning_ae import ContractiveAutoencoder, JacobianPenalty, WeightPrior


def by_hand(model, x):
    """Reconstruction error and ‖∂z/∂x‖² of one sigmoid layer, in double precision."""
    encoder, decoder = model.encoder.layers[0], model.decoder.layers[-1]
    w, b = encoder.weight.detach().double(), encoder.bias.detach().double()
    d, c = decoder.weight.detach().double(), decoder.bias.detach().double()
    h = 1 / (1 + torch.exp(-(x.double() @ w.t() + b)))
    error = (h @ d.t() + c - x).square().sum(1)
    jacobian = (h * (1 - h))[:, :, None] * w
    return error.mean().item(), jacobian.square().sum((1, 2)).mean().item()


def test_objective_is_the_error_plus_the_weighted_squared_jacobian():
    model = ContractiveAutoencoder(6, latent_dim=4, contraction=0.7)
    x = torch.randn(5, 6)
    error, contraction = by_hand(model, x)
    step = model.training_step(x, 0)
    assert step["terms"]["reconstruction"].item() == pytest.approx(error, rel=1e-5)
    assert step["terms"]["contractive"].item() == pytest.approx(contraction, rel=1e-5)
    assert step["loss"].item() == pytest.approx(error + 0.7 * contraction, rel=1e-5)


def test_contraction_may_be_changed_while_training():
    model = ContractiveAutoencoder(6, latent_dim=4, contraction=0.7)
    x = torch.randn(5, 6)
    error, contraction = by_hand(model, x)
    for weight in (0.0, 3.0):
        model.penalties["contractive"].weight = weight
        assert model.training_step(x, 0)["loss"].item() == pytest.approx(error + weight * contraction, rel=1e-5)


def test_training_contracts_the_code():
    sizes = {}
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    for weight in (0.0, 10.0):
        torch.manual_seed(1)
        model = ContractiveAutoencoder(6, latent_dim=4, contraction=weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            model.training_step(x, 0)["loss"].backward()
            optimizer.step()
        sizes[weight] = by_hand(model, x)[1]
    assert sizes[10.0] < 0.3 * sizes[0.0]


def test_deep_encoders_and_random_projections_are_arguments():
    model = ContractiveAutoencoder(
        (2, 3), latent_dim=4, hidden=(5,), num_projections=2, penalties={"prior": WeightPrior(num_examples=3)}
    )
    assert isinstance(model.penalties["contractive"], JacobianPenalty)
    assert model.penalties["contractive"].num_projections == 2
    step = model.training_step(torch.randn(7, 2, 3), 0)
    assert set(step["terms"]) == {"loss", "reconstruction", "contractive", "prior"}
    assert step["loss"].isfinite()
