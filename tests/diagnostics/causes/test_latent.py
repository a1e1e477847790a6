"""Causes in the latent, planted and not."""

from __future__ import annotations

from typing import ClassVar

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


class VAE(L.LightningModule):
    """A variational autoencoder of 12 numbers as it is written by hand."""

    def __init__(self, beta=0.01, log_variance=0.0, lr=1e-2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(16, 3), nn.Linear(16, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 12))
        self.beta, self.lr = beta, lr
        with torch.no_grad():
            self.log_variance.bias.fill_(log_variance)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        h = self.body(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return functional.mse_loss(self.decoder(z), x, reduction="sum") / len(x) + self.beta * kl

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


named = {"mean": "mean", "log_variance": "log_variance"}


class TestPosteriorCollapse:
    @pytest.mark.parametrize("latent", [None, named])
    def test_a_kl_term_that_wins(self, train, flat, latent):
        report = train(VAE(beta=30.0), None, flat, steps=200, latent=latent)
        finding = next(f for f in report.findings if f.cause == "posterior_collapse")
        assert finding.severity == "error"
        assert finding is report.findings[0]
        assert "3 of 3 latents is the prior" in finding.evidence
        assert "lower β" in finding.advice
        assert finding.change == ("weight of kl", -1)

    @pytest.mark.parametrize("latent", [None, named])
    def test_a_posterior_that_says_something(self, train, flat, causes, latent):
        assert "posterior_collapse" not in causes(train(VAE(), None, flat, steps=150, latent=latent))


class TestLogVarianceExplodes:
    @pytest.mark.parametrize("latent", [None, named])
    def test_a_log_variance_of_thirty(self, train, flat, causes, latent):
        report = train(VAE(log_variance=30.0, lr=1e-4), None, flat, steps=30, latent=latent)
        assert "log_variance_explodes" in causes(report)
        found = [f for f in report.findings if f.cause == "log_variance_explodes"]
        if found:
            assert "log-variance of the posterior reaches 3" in found[0].evidence
            assert "clamp it to [-10, 10]" in found[0].advice

    def test_a_log_variance_of_one(self, train, flat, causes):
        assert "log_variance_explodes" not in causes(train(VAE(log_variance=1.0), None, flat, steps=60))


def quantised(codes, **options):
    encoder = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4))
    decoder = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 12))
    return ae.QuantizedAutoencoder(encoder, decoder, ae.SquaredError(), ae.VectorQuantizer(codes, 4, **options))


class Chosen(nn.Module):
    """Chooses one of ``used`` codes by the first number."""

    def __init__(self, used):
        super().__init__()
        self.used = used

    def forward(self, x):
        return (x[:, 0] * self.used).long().clamp(0, self.used - 1)


class Codebook(nn.Module):
    def __init__(self, used):
        super().__init__()
        self.choose, self.codes, self.body = Chosen(used), nn.Embedding(16, 4), nn.Linear(4, 12)

    def forward(self, x):
        return self.body(self.codes(self.choose(x)).relu())


class TestCodebookCollapse:
    latent: ClassVar = {"indices": "choose", "num_codes": 16}

    @pytest.mark.parametrize(("used", "severity"), [(2, "error"), (6, "warning")])
    def test_codes_that_are_not_used(self, used, severity):
        x = torch.rand(400, 12)
        report = ae.diagnose(Codebook(used), [x], functional.mse_loss, latent=self.latent)
        (finding,) = [f for f in report.findings if f.cause == "codebook_collapse"]
        assert (finding.severity, finding.value, finding.n) == (severity, used / 16, 400)
        share = torch.bincount((x[:, 0] * used).long()).double() / 400
        perplexity = torch.distributions.Categorical(share).entropy().exp().item()
        assert f"({used} of 16, perplexity {perplexity:.1f})" in finding.evidence
        assert "k-means" in finding.advice

    def test_codes_that_are_and_too_few_examples_to_tell(self, causes):
        report = ae.diagnose(Codebook(16), [torch.rand(400, 12)], functional.mse_loss, latent=self.latent)
        assert "codebook_collapse" not in causes(report)
        report = ae.diagnose(Codebook(2), [torch.rand(40, 12)], functional.mse_loss, latent=self.latent)
        assert "codebook_collapse" not in causes(report)


def encoder(*rows):
    """Gives the numbers of the input that are listed; None for one that is always 0."""
    layer = nn.Linear(12, len(rows), bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        for unit, row in enumerate(rows):
            if row is not None:
                layer.weight[unit, row] = 1.0
    return layer


def coded(*layers, read=True):
    code = nn.Sequential(*layers)
    decoder = nn.Linear(layers[0].out_features, 12)
    if not read:
        with torch.no_grad():
            decoder.weight[:, :2] = 0.0
    return nn.Sequential(code, decoder)


class TestDeadLatents:
    @staticmethod
    def network(dead):
        first = encoder(*range(8))
        first.bias = nn.Parameter(torch.tensor([-9.0] * dead + [-1.0] * (8 - dead)))
        return coded(first, nn.ReLU())

    def test_latents_of_a_sparse_code_that_are_never_on(self):
        x = torch.randn(2000, 12)
        report = ae.diagnose(self.network(3), [x], functional.mse_loss, latent="0")
        (finding,) = [f for f in report.findings if f.cause == "dead_latents"]
        assert (finding.severity, finding.value, finding.n) == ("warning", 3 / 8, 2000)
        assert "37.5% of the 8 latents were never on" in finding.evidence
        assert "auxiliary-k" in finding.advice

    def test_latents_that_are_on_at_times(self, causes):
        x = torch.randn(2000, 12)
        assert "dead_latents" not in causes(ae.diagnose(self.network(0), [x], functional.mse_loss, latent="0"))


class TestConstantLatents:
    def test_latents_that_never_vary(self):
        first = encoder(0, 1, 2, None, None)
        first.bias = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
        report = ae.diagnose(coded(first), [torch.randn(256, 12)], functional.mse_loss, latent="0")
        (finding,) = [f for f in report.findings if f.cause == "constant_latents"]
        assert (finding.severity, finding.value) == ("warning", 2 / 5)
        assert "2 of 5 latents never vary" in finding.evidence

    def test_latents_that_do(self, causes):
        report = ae.diagnose(coded(encoder(*range(5))), [torch.randn(256, 12)], functional.mse_loss, latent="0")
        assert "constant_latents" not in causes(report)


class TestUnreadLatents:
    def test_latents_of_which_the_decoder_takes_nothing(self):
        network = coded(encoder(*range(5)), read=False)
        report = ae.diagnose(network, [torch.randn(256, 12)], functional.mse_loss, latent="0")
        (finding,) = [f for f in report.findings if f.cause == "unread_latents"]
        assert finding.value == 2 / 5
        assert "2 of 5 latents vary" in finding.evidence
        assert "first layer sees the whole code" in finding.advice

    def test_latents_that_are_read(self, causes):
        report = ae.diagnose(coded(encoder(*range(5))), [torch.randn(256, 12)], functional.mse_loss, latent="0")
        assert "unread_latents" not in causes(report)
