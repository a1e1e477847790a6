"""Causes in the objective, planted and not."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


class CodeSize(ae.Penalty):
    def forward(self, x, output, model):
        return output.z.square().flatten(1).sum(1)


def ours(weight=None, **options):
    penalties = {} if weight is None else {"size": CodeSize(weight)}
    return ae.MLPAutoencoder(12, 4, hidden=(16,), activation="gelu", penalties=penalties, **options)


def relu_coded(bias, **options):
    """A model of ours whose code is what a ReLU lets through."""
    model = ae.Autoencoder(nn.Sequential(nn.Linear(12, 4), nn.ReLU()), nn.Linear(4, 12), **options)
    with torch.no_grad():
        model.encoder[0].bias.fill_(bias)
    return model


def fit(make_trainer, model, x, epochs=12):
    report = ae.DiagnosticsReport(every_n_steps=2, quiet=True)
    data = ae.TensorDataModule(x, batch_size=32, val_fraction=0.0)
    make_trainer(max_epochs=epochs, callbacks=report).fit(model, data)
    return report


class Penalised(L.LightningModule):
    """The sum of a reconstruction error and of the code's size."""

    def __init__(self, weight):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 12))
        self.weight = weight

    def training_step(self, batch, batch_idx):
        z = self.encoder(batch[0])
        return functional.mse_loss(self.decoder(z), batch[0]) + self.weight * (z - 1).abs().sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class TestPenaltyDominates:
    def test_a_weight_that_leaves_nothing_to_the_reconstruction(self, make_trainer, flat):
        report = fit(make_trainer, ours(1e5, lr=1e-3), flat)
        finding = report.findings[0]
        assert (finding.severity, finding.cause) == ("error", "penalty_dominates")
        assert "'size'" in finding.evidence
        assert "divide the weight of 'size' by 10" in finding.advice
        assert finding.change == ("weight of size", -1)

    def test_a_code_of_zeros(self, make_trainer, flat):
        model = relu_coded(-50.0, penalties={"size": CodeSize(100.0)})
        finding = fit(make_trainer, model, flat, epochs=2).findings[0]
        assert (finding.cause, finding.measure, finding.value) == ("penalty_dominates", "zero_code", 100.0)

    def test_a_weight_that_does_nothing(self, make_trainer, flat):
        (finding,) = [f for f in fit(make_trainer, ours(1e-9), flat).findings if f.cause == "penalty_dominates"]
        assert finding.severity == "info"
        assert finding.change == ("weight of size", +1)

    def test_in_a_model_that_is_not_ours(self, train, flat):
        finding = train(Penalised(100.0), None, flat, steps=120).findings[0]
        assert (finding.severity, finding.cause, finding.measure) == ("error", "penalty_dominates", "share")
        assert "of the loss" in finding.evidence
        assert 0 < finding.value < 0.2
        assert "largest penalty" in finding.advice

    @pytest.mark.parametrize("weight", [0.0, 1e-3])
    def test_a_weight_that_serves(self, make_trainer, train, flat, causes, weight):
        assert "penalty_dominates" not in causes(fit(make_trainer, ours(weight, lr=1e-2), flat))
        assert "penalty_dominates" not in causes(train(Penalised(weight), None, flat, steps=120))


class TestZeroCode:
    def test_nothing_leaves_the_encoder(self, make_trainer, flat, causes):
        report = fit(make_trainer, relu_coded(-50.0), flat, epochs=3)
        assert report.report.latent["dead_fraction"] == 1
        assert {"zero_code", "dead_units"} & causes(report) == {"zero_code", "dead_units"}

    def test_a_code(self, make_trainer, flat, causes):
        assert "zero_code" not in causes(fit(make_trainer, relu_coded(0.5), flat, epochs=3))
