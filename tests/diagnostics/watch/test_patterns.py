"""Recognising how a model is wired."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ae.diagnostics.watch import Watch


class Eye:
    def __init__(self):
        self.patterns = []

    def on_pattern(self, pattern):
        self.patterns.append(pattern)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def look(network, x, grad=True):
    eye = Eye()
    with Watch().open(network, [eye], None, (x,)), torch.set_grad_enabled(grad):
        network(x)
    return eye.patterns


def kinds(network, x, **options):
    return [(pattern.kind, pattern.frame) for pattern in look(network, x, **options)]


class Wired(nn.Module):
    """A network that runs as the test says."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class TestLinearStack:
    @pytest.mark.parametrize(
        "between", [[], [nn.Dropout(0.1)], [nn.BatchNorm1d(5)], [nn.BatchNorm1d(5), nn.Dropout(0.1)]]
    )
    def test_two_layers_in_a_row(self, between):
        network = nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3))
        (pattern,) = look(network, torch.randn(8, 4))
        assert (pattern.kind, pattern.frame) == ("linear stack", str(len(between) + 1))
        inner, outer = pattern.layers
        assert (inner.frame, outer.frame) == ("0", str(len(between) + 1))
        assert torch.equal(inner.weight, network[0].weight)
        assert torch.equal(outer.weight, network[-1].weight)

    @pytest.mark.parametrize("between", [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Softmax(1)])
    def test_an_activation_between(self, between):
        assert kinds(nn.Sequential(nn.Linear(4, 5), between, nn.Linear(5, 3)), torch.randn(8, 4)) == []

    def test_convolutions(self):
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3))
        assert kinds(network, torch.randn(2, 1, 9, 9)) == [("linear stack", "1")]

    def test_nothing_without_gradients(self):
        assert kinds(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(8, 4), grad=False) == []


class TestSkip:
    @pytest.mark.parametrize(
        "run",
        [
            lambda m, x: m.layer(x) + x,
            lambda m, x: x + m.layer(x),
            lambda m, x: torch.add(x, m.layer(x)),
            lambda m, x: torch.cat([m.layer(x), x], 1),
            lambda m, x: torch.cat((x * 2, m.layer(x)), dim=1),
        ],
    )
    def test_data_past_a_layer(self, run):
        network = nn.Sequential(Wired(run, layer=nn.Linear(4, 4)))
        assert kinds(network, torch.randn(8, 4)) == [("skip", "0")]

    @pytest.mark.parametrize(
        "run",
        [
            lambda m, x: m.layer(x) + 1,
            lambda m, x: m.layer(x) + torch.ones(8, 4),
            lambda m, x: m.layer(x) + x[:, :1],  # a part, as the time of a step
            lambda m, x: x + m.layer.bias,  # nothing that was computed
            lambda m, x: x + torch.randn_like(x),  # noise
            lambda m, x: (h := m.layer(x)) + h.relu(),
        ],
    )
    def test_what_is_none(self, run):
        assert kinds(Wired(run, layer=nn.Linear(4, 4)), torch.randn(8, 4)) == []


def noise(mean, log_variance):
    return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)


class TestPosterior:
    ways = pytest.mark.parametrize(
        "draw",
        [
            noise,
            lambda m, v: m + (v / 2).exp() * torch.randn_like(v),
            lambda m, v: torch.randn_like(m) * (v * 0.5).exp() + m,
            lambda m, v: torch.randn_like(m) * torch.exp(v.clamp(-10, 10) * 0.5) + m,
            lambda m, v: m + torch.mul(torch.randn_like(v), torch.exp(v)),
        ],
    )

    @ways
    def test_two_layers(self, draw):
        network = Wired(lambda m, x: draw(m.a(x), m.b(x)), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
        x = torch.randn(8, 4)
        (pattern,) = look(network, x)
        assert pattern.kind == "posterior"
        mean, log_variance = pattern.tensors
        assert torch.equal(mean, network.a(x))
        assert torch.equal(log_variance, network.b(x))
        assert not mean.requires_grad

    @ways
    def test_two_halves_of_one(self, draw):
        network = Wired(lambda m, x: draw(*m.a(x).chunk(2, 1)), a=nn.Linear(4, 6))
        x = torch.randn(8, 4)
        (pattern,) = look(network, x)
        mean, log_variance = network.a(x).chunk(2, 1)
        assert torch.equal(pattern.tensors[0], mean)
        assert torch.equal(pattern.tensors[1], log_variance)

    def test_what_is_none(self):
        parts = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}
        x = torch.randn(8, 4)
        # a softmax by hand; a product of two that learn; an exponential of what no layer gives; one noise for all
        for run in (
            lambda m, x: m.a(x).exp() / m.a(x).exp().sum(1, keepdim=True),
            lambda m, x: m.a(x) * m.b(x).exp(),
            lambda m, x: torch.randn(8, 2) * m.a(x).relu().exp(),
            lambda m, x: m.a(x) + torch.randn(8, 1) * m.b(x).exp(),
        ):
            assert "posterior" not in [kind for kind, _ in kinds(Wired(run, **parts), x)]
