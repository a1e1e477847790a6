"""Causes in the steps, planted and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_ae.diagnostics.monitors.training import Held


def sgd(lr, **options):
    return lambda module: torch.optim.SGD(module.parameters(), lr, **options)


def adamw(lr, decay):
    return lambda module: torch.optim.AdamW(module.parameters(), lr, weight_decay=decay)


class TestLearningRateHigh:
    def test_the_loss_becomes_infinite(self, train, regression):
        report = train(nn.Linear(8, 1), functional.mse_loss, *regression, optimizer=sgd(50.0))
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.measure) == ("error", "learning_rate_high", "exploded")
        assert "The loss is not finite in" in finding.evidence
        assert finding.change == ("learning_rate", -1)
        assert "divide the learning rate by 10" in finding.advice

    def test_the_loss_grows(self, train, regression):
        report = train(nn.Linear(8, 1), functional.mse_loss, *regression, optimizer=sgd(1.5), steps=30)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.measure) == ("error", "learning_rate_high", "exploded")
        assert "The loss grew from" in finding.evidence
        assert finding.value > 10

    def test_steps_that_throw_the_network_about(self, train, mlp, regression):
        report = train(mlp(), functional.mse_loss, *regression, lr=3.0, steps=120)
        assert report.findings[0].cause == "learning_rate_high"

    def test_steps_that_kill_a_network(self, train, labels):
        network = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
        finding = train(network, functional.cross_entropy, *labels, lr=2.0, steps=120).findings[0]
        assert (finding.severity, finding.cause) == ("error", "learning_rate_high")

    @pytest.mark.parametrize("optimizer", [sgd(0.05), sgd(0.01, momentum=0.9), adamw(1e-2, 0.01)])
    def test_steps_of_a_size_that_serves(self, train, mlp, regression, causes, optimizer):
        report = train(mlp(), functional.mse_loss, *regression, optimizer=optimizer, steps=150)
        assert report.report.output["relative"] < 0.5
        assert "learning_rate_high" not in causes(report)


class TestNonfiniteLoss:
    @pytest.mark.parametrize(
        "loss",
        [
            lambda p, y: (p - p).square().sum(1).sqrt().mean() + functional.mse_loss(p, y),  # its gradient is 0/0
            lambda p, y: -(y * (0 * p).log()).mean(),
            lambda p, y: functional.mse_loss(p, y) / (0 * p).sum(),
        ],
    )
    @pytest.mark.parametrize("lr", [1e-2, 1e-6])
    def test_before_a_step_was_made(self, train, mlp, regression, loss, lr):
        finding = train(mlp(), loss, *regression, lr=lr, steps=20).findings[0]
        assert (finding.severity, finding.cause) == ("error", "nonfinite_loss")
        assert "in the first step" in finding.evidence
        assert "square root of 0" in finding.advice
        assert finding.change is None

    def test_after_steps_it_is_the_steps(self, train, regression, causes):
        report = train(nn.Linear(8, 1), functional.mse_loss, *regression, optimizer=sgd(50.0))
        assert "nonfinite_loss" not in causes(report)


class TestWeightDecay:
    @pytest.mark.parametrize(
        ("optimizer", "decay", "share"),
        [(adamw(1e-2, 50.0), 50, 0.5), (sgd(0.01, momentum=0.9, weight_decay=5.0), 5, 0.5)],
    )
    def test_weights_pulled_to_zero(self, train, mlp, regression, optimizer, decay, share):
        report = train(mlp(), functional.mse_loss, *regression, optimizer=optimizer, steps=150)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "weight_decay", "optimizer")
        assert finding.value == pytest.approx(share)
        assert f"weight decay ({decay})" in finding.evidence
        assert finding.change == ("weight_decay", -1)

    def test_a_decay_of_the_usual_size_and_one_that_does_no_harm(self, train, mlp, regression, causes):
        report = train(mlp(), functional.mse_loss, *regression, optimizer=adamw(1e-2, 0.01), steps=100)
        assert "weight_decay" not in causes(report)
        report = train(mlp(), functional.mse_loss, *regression, optimizer=adamw(1e-2, 1.0), steps=200)
        assert report.report.output["relative"] < 0.5
        assert "weight_decay" not in causes(report)

    @pytest.mark.parametrize(
        ("held", "share"),
        [
            (Held("SGD", 0.1, 0.0, 0.01, False, False), 1e-3),
            (Held("SGD", 0.1, 0.9, 0.01, False, False), 1e-2),
            (Held("AdamW", 0.1, 0.0, 0.01, True, True), 1e-3),
            (Held("AdamW", 0.1, 0.0, 0.0, True, True), 0.0),
        ],
    )
    def test_share_that_a_step_takes(self, held, share):
        assert held.shrinkage == pytest.approx(share)

    def test_share_that_steps_of_sgd_with_momentum_take_indeed(self):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], 1e-3, momentum=0.9, weight_decay=0.1)
        for _ in range(1000):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        share = 1 - weight.item() ** (1 / 1000)
        assert Held("SGD", 1e-3, 0.9, 0.1, False, False).shrinkage == pytest.approx(share, rel=0.05)


class TestOscillation:
    def test_batches_of_two_with_noise_for_targets(self, train, mlp, causes):
        x, y = torch.randn(512, 8), torch.randn(512, 1)
        report = train(mlp(), functional.mse_loss, x, y, batch=2, lr=0.1, steps=120)
        assert "oscillation" in causes(report)

    def test_batches_of_64(self, train, mlp, regression, causes):
        report = train(mlp(), functional.mse_loss, *regression, batch=64, steps=120)
        assert "oscillation" not in causes(report)


class TestLearningRateLow:
    @pytest.mark.parametrize(
        ("optimizer", "words"),
        [(adamw(1e-6, 0.0), "raise the learning rate by 10."), (sgd(1e-6), "use Adam in place of plain SGD")],
    )
    def test_steps_that_move_nothing(self, train, mlp, regression, optimizer, words):
        report = train(mlp(), functional.mse_loss, *regression, optimizer=optimizer, steps=60)
        finding = report.findings[0]
        assert (finding.severity, finding.cause) == ("error", "learning_rate_low")
        assert finding.change == ("learning_rate", +1)
        assert "after 60 steps" in finding.evidence
        assert words in finding.advice

    def test_steps_that_move_something(self, train, mlp, regression, causes):
        report = train(mlp(), functional.mse_loss, *regression, steps=100)
        assert "learning_rate_low" not in causes(report)

    def test_not_where_something_else_is_wrong(self, train, mlp, regression, causes):
        x, y = regression
        report = train(mlp(), functional.mse_loss, 1000 * x, y, lr=1e-6, steps=60)
        assert report.findings[0].cause == "input_scale"
        assert "learning_rate_low" not in causes(report)


class TestTooShort:
    def test_a_run_that_is_still_learning(self, train, mlp, regression):
        report = train(mlp(), functional.mse_loss, *regression, lr=5e-4, steps=120, batch=256)
        finding = report.findings[0]
        assert finding.cause == "too_short"
        assert "After 120 steps" in finding.evidence
        assert "the loss was still falling" in finding.evidence
        assert "Train longer first" in finding.advice
        assert finding.change == ("learning_rate", +1)

    def test_a_few_steps_before_anything_falls(self, train, mlp, regression):
        report = train(mlp(), functional.mse_loss, *regression, lr=1e-3, steps=20)
        (finding,) = [f for f in report.findings if f.cause == "too_short"]
        assert "After 20 steps" in finding.evidence

    def test_a_run_that_has_learnt(self, train, mlp, regression, causes):
        report = train(mlp(), functional.mse_loss, *regression, lr=3e-2, steps=150)
        assert report.report.output["relative"] < 0.3
        assert "too_short" not in causes(report)

    def test_a_run_that_has_settled_with_much_left(self, train, regression, causes):
        x, y = regression
        y = y + 2 * torch.randn(256, 1)
        report = train(nn.Linear(8, 1), functional.mse_loss, x, y, lr=3e-2, batch=128, steps=300, looks=4)
        assert report.report.output["relative"] > 0.3
        assert "too_short" not in causes(report)
