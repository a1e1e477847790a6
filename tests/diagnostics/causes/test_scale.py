"""Causes in initialisation and depth, planted and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional


def deep(activation, depth=6, gain=1.0, hidden=16):
    layers = [nn.Linear(8, hidden), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(hidden, hidden), activation()]
    network = nn.Sequential(*layers, nn.Linear(hidden, 1))
    with torch.no_grad():
        for layer in network[:-1]:
            if isinstance(layer, nn.Linear):
                (nn.init.kaiming_normal_ if activation is nn.ReLU else nn.init.xavier_normal_)(layer.weight)
                layer.weight.mul_(gain)
                layer.bias.zero_()
    return network


def sgd(module):
    return torch.optim.SGD(module.parameters(), 1e-3)


class TestVanishingGradient:
    def test_through_sigmoids(self, train, regression):
        report = train(deep(nn.Sigmoid), functional.mse_loss, *regression, optimizer=sgd, steps=60)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.measure) == ("error", "vanishing_gradient", "transmission")
        assert "squashing activations" in finding.evidence
        passed = {site: row["transmission"] for site, row in report.report.sites.items()}
        assert all(share < 0.3 for share in passed.values())
        assert finding.site == min(passed, key=passed.get)
        assert f"ReLU or GELU, {finding.site} first" in finding.advice

    def test_through_weights_that_are_too_small(self, train, regression):
        network = deep(nn.ReLU, depth=8, gain=0.2)
        report = train(network, functional.mse_loss, *regression, optimizer=sgd, steps=60)
        finding = next(f for f in report.findings if f.cause == "vanishing_gradient")
        assert finding.measure == "gradient_norm"
        norms = {name: row["gradient norm"] for name, row in report.report.layers.items()}
        assert finding.site == min(norms, key=norms.get)
        assert finding.value < 1e-3
        assert "He initialisation" in finding.advice

    def test_through_weights_of_zero(self, train, regression):
        network = deep(nn.ReLU, depth=3, gain=0.0)
        report = train(network, functional.mse_loss, *regression, optimizer=sgd, steps=60)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.measure) == ("error", "vanishing_gradient", "weight_norm")
        assert "3 of 4 layers are zero" in finding.evidence
        assert "draw weights at random" in finding.advice

    @pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
    def test_weights_that_fit_their_activation(self, train, regression, causes, activation):
        report = train(deep(activation), functional.mse_loss, *regression, optimizer=sgd, steps=60)
        assert "vanishing_gradient" not in causes(report)


class Recurrent(nn.Module):
    """A linear recurrence, whose gradient grows by a factor in each of 20 steps."""

    def __init__(self, factor):
        super().__init__()
        self.cell, self.out = nn.RNN(2, 8, nonlinearity="relu", batch_first=True), nn.Linear(8, 1)
        with torch.no_grad():
            self.cell.weight_hh_l0.copy_(factor * torch.eye(8))
            self.cell.weight_ih_l0.abs_()

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class TestExplodingGradient:
    x = staticmethod(lambda: torch.rand(128, 20, 2))

    @staticmethod
    def still(module):
        return torch.optim.SGD(module.parameters(), 1e-12)

    @pytest.mark.parametrize(("clip", "severity"), [(None, "error"), (1.0, "warning")])
    def test_in_time(self, train, clip, severity):
        x = self.x()
        report = train(
            Recurrent(2.0),
            functional.mse_loss,
            x,
            x.sum((1, 2))[:, None] / 20,
            optimizer=self.still,
            steps=30,
            gradient_clip_val=clip,
        )
        finding = next(f for f in report.findings if f.cause == "exploding_gradient")
        assert finding.severity == severity
        assert finding.value > 1e3
        assert ("gradient_clip_val=1.0" in finding.advice) is (clip is None)

    def test_a_recurrence_that_forgets_and_no_recurrence(self, train, mlp, causes):
        x = self.x()
        y = x.sum((1, 2))[:, None] / 20
        report = train(Recurrent(0.5), functional.mse_loss, x, y, optimizer=self.still, steps=30)
        assert "exploding_gradient" not in causes(report)
        wide = nn.Sequential(nn.Flatten(), nn.Linear(40, 1))
        report = train(wide, lambda p, y: 1e4 * functional.mse_loss(p, y), x, y, optimizer=self.still, steps=30)
        assert max(row["gradient norm"] for row in report.report.layers.values()) > 1e3
        assert "exploding_gradient" not in causes(report)
