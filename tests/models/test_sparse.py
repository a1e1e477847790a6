"""The textbook's sparse autoencoder: its objective, its optimum, and how its atoms keep their norm."""

import pytest
import torch
from sklearn.decomposition import sparse_encode as sklearn_sparse_encode
from torch.utils.data import DataLoader

from lightning_ae import (
    BernoulliNLL,
    L1Code,
    LinearDecoder,
    LinearEncoder,
    MaskingNoise,
    SoftThresholdCode,
    SparseAutoencoder,
    SquaredError,
    conv_pair,
    load,
    mlp_pair,
)


def test_the_objective_is_squared_error_plus_lambda_times_the_l1_norm():
    model = SparseAutoencoder(LinearEncoder(5, 3), LinearDecoder(3, 5), L1Code(0.7))
    x = torch.randn(4, 5)
    h = x @ model.encoder.weight.T + model.encoder.bias
    x_hat = h @ model.decoder.weight.T + model.decoder.layer.bias
    expected = ((x - x_hat) ** 2).sum(1) + 0.7 * h.abs().sum(1)
    torch.testing.assert_close(model.objective(model.terms(x, model(x))), expected)


def orthonormal(size):
    decoder = LinearDecoder(size, size, bias=False)
    with torch.no_grad():
        decoder.weight.copy_(torch.linalg.qr(torch.randn(size, size)).Q)
    return decoder.requires_grad_(False)


class FreeCodes(torch.nn.Module):
    """An encoder without limits: a table with one code for each example."""

    def __init__(self, count, size):
        super().__init__()
        self.codes = torch.nn.Parameter(torch.randn(count, size))

    def forward(self, x):
        return self.codes


def test_the_best_codes_for_an_orthonormal_decoder_are_soft_thresholded_at_half_lambda():
    x = torch.randn(20, 6)
    decoder = orthonormal(6)
    model = SparseAutoencoder(FreeCodes(20, 6), decoder, L1Code(1.2))
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(1000):
        optimizer.zero_grad()
        model.training_step(x, 0)["loss"].backward()
        optimizer.step()
        schedule.step()
    c = x @ decoder.weight
    expected = c.sign() * (c.abs() - 0.6).clamp_min(0)
    torch.testing.assert_close(model.encode(x), expected, atol=2e-3, rtol=0)
    atoms = decoder.weight.T.double().numpy()
    theirs = torch.from_numpy(sklearn_sparse_encode(x.double().numpy(), atoms, algorithm="lasso_cd", alpha=0.6))
    torch.testing.assert_close(model.encode(x), theirs.float(), atol=2e-3, rtol=0)


def test_an_encoder_that_can_represent_the_optimum_learns_it():
    x = torch.randn(4000, 4)
    decoder = orthonormal(4)
    code = SoftThresholdCode(0.1, weight=1.2, num_latents=4)
    model = SparseAutoencoder(LinearEncoder(4, 4), decoder, code)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        model.training_step(x, 0)["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(code.threshold.detach(), torch.full((4,), 0.6), atol=0.02, rtol=0)
    torch.testing.assert_close(model.encoder.weight.detach(), decoder.weight.T, atol=0.02, rtol=0)


def test_atoms_keep_norm_one_under_the_trainer_and_in_the_checkpoint(make_trainer, tmp_path):
    model = SparseAutoencoder(LinearEncoder(8, 20), LinearDecoder(20, 8), unit_norm=True, lr=0.05)
    torch.testing.assert_close(model.decoder.weight.norm(dim=0), torch.ones(20))
    before = model.decoder.weight.detach().clone()
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(model, DataLoader(torch.randn(64, 8), batch_size=8))
    assert not torch.allclose(model.decoder.weight, before, atol=0.01)
    torch.testing.assert_close(model.decoder.weight.norm(dim=0), torch.ones(20))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = load(tmp_path / "model.ckpt")
    assert isinstance(again, SparseAutoencoder)
    assert again.unit_norm
    assert torch.equal(again.decoder.weight, model.decoder.weight)


def test_without_unit_norm_the_charge_is_evaded_by_growing_atoms():
    x = torch.randn(256, 8)
    norms = {}
    for unit_norm in (False, True):
        torch.manual_seed(0)
        model = SparseAutoencoder(LinearEncoder(8, 16), LinearDecoder(16, 8), L1Code(1.0), unit_norm=unit_norm)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            model.training_step(x, 0)["loss"].backward()
            optimizer.step()
            model._normalise()
        norms[unit_norm] = model.decoder.weight.norm(dim=0).mean().item()
    assert norms[True] == pytest.approx(1, abs=1e-5)
    assert norms[False] > 1.5


def test_boxes_combine_freely():
    encoder, decoder = conv_pair((1, 8, 8), 16)
    model = SparseAutoencoder(encoder, decoder, L1Code(0.1, "relu"), BernoulliNLL(), corruption=MaskingNoise(0.2))
    x = torch.rand(3, 1, 8, 8)
    model.training_step(x, 0)["loss"].backward()
    assert isinstance(model.loss, BernoulliNLL)
    assert (model.encode(x) >= 0).all()
    assert isinstance(SparseAutoencoder(*mlp_pair(4, 2)).loss, SquaredError)
    with pytest.raises(
        ValueError, match="unit_norm: expected a LinearDecoder, whose columns are atoms, got MLPDecoder"
    ):
        SparseAutoencoder(*mlp_pair(4, 2), unit_norm=True)
