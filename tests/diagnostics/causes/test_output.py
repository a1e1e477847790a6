"""Causes that the output shows, planted and not."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


class TestStuckOutputs:
    @staticmethod
    def network(mlp, stuck):
        network = mlp(12, 12, nn.ReLU())
        with torch.no_grad():
            network[2].bias.fill_(0.5)
            network[2].bias[:stuck] = -50.0
        return network

    def test_all_numbers_are_zero_for_ever(self, mlp, flat):
        finding = ae.diagnose(self.network(mlp, 12), [flat], functional.mse_loss).findings[0]
        assert (finding.severity, finding.cause, finding.value) == ("error", "stuck_outputs", 12)
        assert "low end (0)" in finding.evidence
        assert "no activation after the last layer" in finding.advice

    def test_some_numbers(self, mlp, flat):
        report = ae.diagnose(self.network(mlp, 4), [flat], functional.mse_loss)
        assert [f.value for f in report.findings if f.cause == "stuck_outputs"] == [4]

    def test_none(self, mlp, flat, causes):
        assert "stuck_outputs" not in causes(ae.diagnose(self.network(mlp, 0), [flat], functional.mse_loss))


class TestConstantOutput:
    @staticmethod
    def network(mlp, scale):
        network = mlp(12, 12)
        with torch.no_grad():
            network[2].weight.mul_(scale)
        return network

    def test_the_same_for_every_input(self, mlp, flat):
        network = self.network(mlp, 0.05)
        report = ae.diagnose(network, [flat], functional.mse_loss)
        finding = report.findings[0]
        assert (finding.severity, finding.cause) == ("error", "constant_output")
        spread = network(flat).var(0).sum() / flat.var(0).sum()
        torch.testing.assert_close(finding.value, spread.item(), rtol=1e-3, atol=0)
        assert "Every input gives the same output" in finding.evidence

    def test_a_shade_is_named(self, mlp):
        network = self.network(mlp, 1e-3)
        network.append(nn.Sigmoid())
        x = (torch.rand(256, 12) > 0.5).float() * torch.linspace(0.2, 1, 12)
        for bias, shade in ((-3.5, "all black"), (3.5, "all white"), (0.0, "all grey")):
            with torch.no_grad():
                network[2].bias.fill_(bias)
            text = str(ae.diagnose(network, [x], functional.mse_loss))
            assert shade in text

    def test_one_that_follows_its_input(self, mlp, flat, causes):
        assert "constant_output" not in causes(ae.diagnose(self.network(mlp, 3.0), [flat], functional.mse_loss))
