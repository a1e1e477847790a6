"""Recognising how a model is wired."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_ae.diagnostics.watch import Watch


class Eye:
    def __init__(self):
        self.patterns = []

    def on_pattern(self, pattern):
        self.patterns.append(pattern)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def look(network, x, grad=True, loss=None):
    eye = Eye()
    with Watch().open(network, [eye], None, (x,)), torch.set_grad_enabled(grad):
        y = network(x)
        if loss is not None:
            loss(y)
    return eye.patterns


def kinds(network, x, **options):
    return [(pattern.kind, pattern.frame) for pattern in look(network, x, **options)]


def told(y):
    """A loss that is heard, whatever the prediction's shape."""
    return functional.mse_loss(y, torch.zeros(y.shape))


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
        found = look(network, torch.randn(8, 4))
        last = str(len(between) + 1)
        assert [(pattern.kind, pattern.frame) for pattern in found] == [("chain", last), ("linear stack", last)]
        for pattern in found:
            inner, outer = pattern.layers
            assert (inner.frame, outer.frame) == ("0", last)
            assert torch.equal(inner.weight, network[0].weight)
            assert torch.equal(outer.weight, network[-1].weight)

    @pytest.mark.parametrize(
        "between", [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Softmax(1), nn.LayerNorm(5), nn.GroupNorm(1, 5)]
    )
    def test_an_activation_or_a_normalisation_of_each_example_between(self, between):
        network = nn.Sequential(nn.Linear(4, 5), between, nn.Linear(5, 3))
        (pattern,) = look(network, torch.randn(8, 4))
        assert (pattern.kind, pattern.frame) == ("chain", "2")
        assert torch.equal(pattern.layers[0].weight, network[0].weight)
        assert torch.equal(pattern.layers[1].weight, network[2].weight)

    def test_a_gap_between(self):
        network = nn.Sequential(Wired(lambda m, x: m.layer(x).cos(), layer=nn.Linear(4, 5)), nn.Linear(5, 3))
        assert kinds(network, torch.randn(8, 4)) == []

    def test_convolutions(self):
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3))
        assert kinds(network, torch.randn(2, 1, 9, 9)) == [
            ("chain", "1"),
            ("linear stack", "1"),
            ("chain", "3"),
        ]

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
        network, x = nn.Sequential(Wired(run, layer=nn.Linear(4, 4))), torch.randn(8, 4)
        (pattern,) = look(network, x, loss=told)
        assert (pattern.kind, pattern.frame) == ("skip", "0")
        assert any(torch.equal(pattern.tensors[0], data) for data in (x, x * 2))
        assert not pattern.tensors[0].requires_grad

    def test_a_part_of_the_data_is_what_is_joined(self):
        """Such as the time of a step; whether it is the target is for the cause to see."""
        network, x = Wired(lambda m, x: m.layer(x) + x[:, :1], layer=nn.Linear(4, 4)), torch.randn(8, 4)
        (pattern,) = look(network, x, loss=told)
        assert pattern.kind == "skip"
        assert torch.equal(pattern.tensors[0], x[:, :1])

    def test_only_with_a_prediction_that_comes_of_it(self):
        network = Wired(lambda m, x: (m.layer(x) + x, m.other(x)), layer=nn.Linear(4, 4), other=nn.Linear(4, 4))
        x = torch.randn(8, 4)
        assert kinds(network, x) == []
        assert kinds(network, x, loss=lambda y: told(y[1])) == []
        assert kinds(network, x, loss=lambda y: told(y[0])) == [("skip", "")]
        # through whatever comes after, up to the prediction
        assert kinds(network, x, loss=lambda y: told((y[0].sigmoid() * 2).flatten(1))) == [("skip", "")]

    def test_it_is_told_just_before_the_loss(self):
        order = []

        class Notes(Eye):
            def on_pattern(self, pattern):
                order.append(pattern.kind)

            def on_loss(self, comparison):
                order.append(comparison.loss)

        network, x = Wired(lambda m, x: m.layer(x) + x, layer=nn.Linear(4, 4)), torch.randn(8, 4)
        with Watch().open(network, [Notes()], None, (x,)):
            y = network(x)
            functional.l1_loss(m := network.layer(x), torch.zeros(8, 4))
            assert m.requires_grad
            functional.mse_loss(y, torch.zeros(8, 4))
        assert order == ["l1_loss", "skip", "mse_loss"]

    @pytest.mark.parametrize(
        "run",
        [
            lambda m, x: m.layer(x) + 1,
            lambda m, x: m.layer(x) + torch.ones(8, 4),
            lambda m, x: m.layer(x) + x.mean(),  # a number for all
            lambda m, x: m.layer(x) + x[0],
            lambda m, x: x + m.layer.bias,  # nothing that was computed
            lambda m, x: x + torch.randn_like(x),  # noise
            lambda m, x: (h := m.layer(x)) + h.relu(),
        ],
    )
    def test_what_is_none(self, run):
        assert kinds(Wired(run, layer=nn.Linear(4, 4)), torch.randn(8, 4), loss=told) == []


def noise(mean, log_variance):
    return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)


class TestPosterior:
    # what is drawn, and the log-variance of it
    ways = pytest.mark.parametrize(
        ("draw", "of"),
        [
            (noise, lambda v: v),
            (lambda m, v: m + (v / 2).exp() * torch.randn_like(v), lambda v: v),
            (lambda m, v: torch.randn_like(m) * (v * 0.5).exp() + m, lambda v: v),
            (lambda m, v: torch.randn_like(m) * torch.exp(v.clamp(-0.1, 0.1) * 0.5) + m, lambda v: v.clamp(-0.1, 0.1)),
            (lambda m, v: torch.randn_like(m) * torch.exp(v.tanh() * 0.5) + m, lambda v: v.tanh()),
            (lambda m, v: m + torch.mul(torch.randn_like(v), torch.exp(v)), lambda v: 2 * v),
            (lambda m, v: m + torch.randn_like(v) * v.clamp(-0.1, 0.1).exp(), lambda v: 2 * v.clamp(-0.1, 0.1)),
        ],
    )

    @ways
    def test_two_layers(self, draw, of):
        network = Wired(lambda m, x: draw(m.a(x), m.b(x)), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
        x = torch.randn(8, 4)
        (pattern,) = look(network, x)
        assert pattern.kind == "posterior"
        mean, log_variance = pattern.tensors
        assert torch.equal(mean, network.a(x))
        assert torch.equal(log_variance, of(network.b(x)))
        assert not mean.requires_grad

    @ways
    def test_two_halves_of_one(self, draw, of):
        network = Wired(lambda m, x: draw(*m.a(x).chunk(2, 1)), a=nn.Linear(4, 6))
        x = torch.randn(8, 4)
        (pattern,) = look(network, x)
        mean, log_variance = network.a(x).chunk(2, 1)
        assert torch.equal(pattern.tensors[0], mean)
        assert torch.equal(pattern.tensors[1], of(log_variance))

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

    def test_data_that_are_scaled_are_no_noise(self):
        parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
        for run in (
            lambda m, x: m.a(x) + x * (0.5 * m.b(x)).exp(),
            lambda m, x: m.a(x) + (x + torch.randn_like(x)) * (0.5 * m.b(x)).exp(),
            lambda m, x: m.a(x) + torch.exp(m.b(x)) * x.flip(0),
        ):
            assert "posterior" not in [kind for kind, _ in kinds(Wired(run, **parts), torch.randn(8, 4))]

    def test_couplings_of_a_real_nvp(self):
        class Coupling(nn.Module):
            def __init__(self, flip):
                super().__init__()
                self.flip, self.body = flip, nn.Linear(2, 8)
                self.scale, self.shift = nn.Linear(8, 2), nn.Linear(8, 2)

            def forward(self, x):
                a, b = x.chunk(2, 1)[:: -1 if self.flip else 1]
                h = self.body(a).relu()
                b = b * self.scale(h).tanh().exp() + self.shift(h)
                return torch.cat([b, a] if self.flip else [a, b], 1)

        network = nn.Sequential(Coupling(False), Coupling(True), Coupling(False))
        assert "posterior" not in [kind for kind, _ in kinds(network, torch.randn(8, 4))]
        assert "chain" in [kind for kind, _ in kinds(network, torch.randn(8, 4))]
