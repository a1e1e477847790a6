"""Causes that activations show, planted and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


def look(network, x, y):
    return ae.diagnose(network, [(x, y)], lambda p, batch: functional.mse_loss(p, batch[1]))


class TestNonfiniteUnits:
    def test_units_that_give_infinity(self, mlp, regression, causes):
        network = mlp(activation=nn.Softplus)
        with torch.no_grad():
            network[0].bias[:3] = float("inf")
        report = look(network, *regression)
        assert "nonfinite_units" in causes(report)
        assert any("3 units gave values that are NaN or infinite" in str(f) for f in report.findings)

    def test_finite_ones(self, mlp, regression, causes):
        assert "nonfinite_units" not in causes(look(mlp(activation=nn.Softplus), *regression))


class TestDeadUnits:
    @staticmethod
    def network(dead, layers=1):
        body = [nn.Linear(8, 16), nn.ReLU()]
        for _ in range(layers - 1):
            body += [nn.Linear(16, 16), nn.ReLU()]
        with torch.no_grad():
            for number, layer in enumerate(body[::2]):
                layer.bias.fill_(1.0)
                layer.bias[[(unit + number) % 16 for unit in range(dead)]] = -100.0
        return nn.Sequential(*body, nn.Linear(16, 1))

    @pytest.mark.parametrize(("dead", "severity"), [(12, "error"), (5, "info"), (1, "info")])
    def test_some_of_a_layer(self, regression, dead, severity):
        (finding,) = [f for f in look(self.network(dead), *regression).findings if f.cause == "dead_units"]
        assert (finding.severity, finding.site, finding.value, finding.n) == (severity, "1", dead / 16, 256)
        assert f"{dead} of 16 units never fired in 256 samples (rate < {3 / 256:.1g})" in finding.evidence
        assert "LeakyReLU" in finding.advice

    def test_all_of_a_layer(self, regression):
        finding = look(self.network(16), *regression).findings[0]
        assert (finding.severity, finding.cause) == ("error", "dead_units")
        assert "All 16 units never fired" in finding.evidence
        assert finding.change == ("learning_rate", -1)

    def test_in_many_layers_is_said_once(self, regression):
        found = [f for f in look(self.network(8, 5), *regression).findings if f.cause == "dead_units"]
        assert len(found) == 1
        assert "In 5 of 5 ReLU layers 50% to 50%" in found[0].evidence

    def test_none_and_too_few_samples(self, regression, causes):
        assert "dead_units" not in causes(look(self.network(0), *regression))
        x, y = regression
        assert "dead_units" not in causes(look(self.network(12), x[:64], y[:64]))


class TestDormantUnits:
    @staticmethod
    def network(dormant):
        network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
        with torch.no_grad():
            network[0].bias[:dormant] = -30.0
        return network

    def test_half_of_a_gelu(self, regression):
        (finding,) = [f for f in look(self.network(8), *regression).findings if f.cause == "dormant_units"]
        assert (finding.severity, finding.site, finding.value) == ("info", "1", 0.5)
        assert "50% of the units are dormant" in finding.evidence

    def test_none(self, regression, causes):
        assert "dormant_units" not in causes(look(self.network(0), *regression))


class TestSaturated:
    @staticmethod
    def network(scale, activation=nn.Tanh):
        network = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 1))
        with torch.no_grad():
            network[0].weight.mul_(scale)
        return network

    @pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
    def test_a_hidden_layer_whose_inputs_are_too_large(self, regression, causes, activation):
        x, y = regression
        network = self.network(200, activation)
        report = look(network, x, y)
        assert "saturated" in causes(report)
        h = network[0](x).detach()
        slope = 1 - h.tanh() ** 2 if activation is nn.Tanh else h.sigmoid() * (1 - h.sigmoid())
        share = (slope < 0.01).float().mean().item()
        assert any(f"{share:.0%} of its elements are flat" in str(f) for f in report.findings)

    def test_one_whose_inputs_are_not_and_an_output(self, mlp, regression, causes):
        x, y = regression
        assert "saturated" not in causes(look(self.network(1), x, y))
        output = mlp(8, 1, nn.Tanh())
        with torch.no_grad():
            output[2].bias.fill_(20.0)
        report = look(output, x, y.tanh())
        assert report.sites["3"]["flat"] == 1  # of which the output's own causes speak
        assert "saturated" not in causes(report)
