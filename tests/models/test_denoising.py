"""Denoising sees the corrupted input and is scored on the clean one."""

import pytest
import torch

from lightning_ae import DenoisingAutoencoder, GaussianNoise, MaskingNoise, SaltAndPepper


def error(model, seen, target):
    """Squared error of what the model makes of ``seen``, against ``target``."""
    return (model.decoder(model.encoder(seen)) - target).square().sum(1).mean().item()


def test_the_target_is_clean_though_everything_is_masked():
    model = DenoisingAutoencoder(6, latent_dim=3, corruption=MaskingNoise(1.0), bias_init=0.1)
    x = torch.randn(8, 6)
    loss = model.training_step(x, 0)["loss"].item()
    assert loss == pytest.approx(error(model, torch.zeros(8, 6), x), rel=1e-6)
    assert loss != pytest.approx(error(model, torch.zeros(8, 6), torch.zeros(8, 6)), rel=0.1)
    assert loss != pytest.approx(error(model, x, x), rel=1e-3)


@pytest.mark.parametrize("step", ["validation_step", "test_step"])
def test_there_is_no_corruption_in_evaluation_unless_asked(step):
    x = torch.randn(8, 6)
    for in_eval, seen in ((False, x), (True, torch.zeros(8, 6))):
        model = DenoisingAutoencoder(6, latent_dim=3, corruption=MaskingNoise(1.0, in_eval=in_eval)).eval()
        assert getattr(model, step)(x, 0)["loss"].item() == pytest.approx(error(model, seen, x), rel=1e-6)
        prediction = model.predict_step(x, 0)
        torch.testing.assert_close(prediction["reconstruction"], model.decoder(model.encoder(seen)))


def test_encode_and_reconstruct_do_not_corrupt():
    model = DenoisingAutoencoder(6, latent_dim=3, corruption=GaussianNoise(1.0)).train()
    x = torch.randn(8, 6)
    assert torch.equal(model.encode(x), model.encoder(x))
    assert torch.equal(model.reconstruct(x), model.decoder(model.encoder(x)))


@pytest.mark.parametrize("corruption", [None, GaussianNoise(0.3), MaskingNoise(0.5), SaltAndPepper(0.2)])
def test_training_sees_another_corruption_each_time(corruption):
    model = DenoisingAutoencoder(6, latent_dim=3, corruption=corruption).train()
    x = torch.rand(32, 6)
    losses = {model.training_step(x, 0)["loss"].item() for _ in range(3)}
    assert len(losses) == 3


def test_the_default_erases_a_quarter():
    corruption = DenoisingAutoencoder(6, latent_dim=3).corruption
    assert isinstance(corruption, MaskingNoise)
    assert corruption.p == 0.25


def test_a_linear_denoiser_shrinks_each_direction_by_its_signal_to_noise():
    # E[x|x̃] = s/(s + σ²) x̃ for Gaussian data of variance s: trained on noise, the map is a Wiener filter
    variances = torch.tensor([4.0, 1.0, 0.25])
    model = DenoisingAutoencoder(3, latent_dim=3, hidden=(), corruption=GaussianNoise(1.0))
    x = torch.randn(5000, 3) * variances.sqrt()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        model.training_step(x, 0)["loss"].backward()
        optimizer.step()
    gain = torch.func.jacrev(lambda v: model.reconstruct(v[None])[0])(torch.zeros(3))
    torch.testing.assert_close(gain, torch.diag(variances / (variances + 1)), atol=0.05, rtol=0)
