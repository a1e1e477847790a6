"""Causes that validation shows, planted and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional


class TestValidationScale:
    @pytest.mark.parametrize("scale", [255.0, 1 / 255])
    def test_one_preprocessing_for_training_and_another_for_validation(self, train, mlp, regression, scale):
        x, y = regression
        report = train(mlp(), functional.mse_loss, x, y, validation=(scale * x, y), steps=40)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "validation_scale", "data")
        assert finding.value == pytest.approx(scale, rel=0.2)
        assert "Scale both in the same way" in finding.advice

    def test_one_for_both(self, train, mlp, regression, causes):
        x, y = regression
        assert "validation_scale" not in causes(
            train(mlp(), functional.mse_loss, x, y, validation=(2 * x, y), steps=40)
        )


class TestTrainEvalMismatch:
    @staticmethod
    def network(momentum):
        norm = nn.BatchNorm1d(16, momentum=momentum)
        return nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 1))

    def test_running_statistics_that_lag_behind(self, train, regression):
        x, y = regression
        x = 3 * x + 2
        report = train(self.network(1e-4), functional.mse_loss, x, y, validation=(x, y), steps=120, lr=2e-2)
        finding = report.findings[0]
        assert (finding.cause, finding.site, finding.measure) == (
            "train_eval_mismatch",
            "network.1",
            "running_statistics",
        )
        assert "In evaluation mode" in finding.evidence
        assert "momentum to 0.1" in finding.advice

    def test_batches_of_three(self, train, regression):
        x, y = regression[0], regression[1] + torch.randn(256, 1)
        report = train(self.network(0.1), functional.mse_loss, x, y, validation=(x, y), steps=80, batch=3)
        (finding,) = [f for f in report.findings if f.cause == "train_eval_mismatch"]
        assert "3 rows" in finding.evidence
        assert "LayerNorm or GroupNorm" in finding.advice

    def test_running_statistics_that_do_not(self, train, regression, causes):
        x, y = regression
        x = 3 * x + 2
        report = train(self.network(0.1), functional.mse_loss, x, y, validation=(x, y), steps=120, lr=2e-2)
        assert "train_eval_mismatch" not in causes(report)

    def test_overfitting_is_none(self, train, regression, causes):
        x, y = regression
        report = train(
            self.network(0.1), functional.mse_loss, x[:32], y[:32], validation=(x, y.flip(0)), steps=120, lr=2e-2
        )
        assert "train_eval_mismatch" not in causes(report)


class TestOverfitting:
    def test_forty_examples_by_heart(self, train, mlp, regression):
        x, y = regression
        y = y + torch.randn_like(y)
        report = train(
            mlp(hidden=128, activation=nn.ReLU),
            functional.mse_loss,
            x[:40],
            y[:40],
            validation=(x[128:], y[128:]),
            steps=240,
            batch=40,
            val_check_interval=20,
        )
        (finding,) = [f for f in report.findings if f.cause == "overfitting"]
        assert finding.severity == "warning"
        assert finding is report.findings[0]
        assert finding.site == "val_loss"
        assert finding.value > 1.2
        assert "EarlyStopping" in finding.advice

    def test_as_many_examples_as_it_takes(self, train, mlp, regression, causes):
        x, y = regression
        report = train(
            mlp(),
            functional.mse_loss,
            x[:200],
            y[:200],
            validation=(x[200:], y[200:]),
            steps=160,
            val_check_interval=20,
        )
        assert "overfitting" not in causes(report)
