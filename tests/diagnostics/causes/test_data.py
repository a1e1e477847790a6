"""Causes in the data, planted and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


class TestNonfiniteData:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_in_one_of_two_batches(self, mlp, causes, value):
        batches = list(torch.rand(2, 64, 8))
        batches[1][:3, 2] = value
        report = ae.diagnose(mlp(8, 8), batches, functional.mse_loss)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "nonfinite_data", "data")
        assert finding.evidence.startswith("3 numbers")
        assert "in 1 of 2 batches" in finding.evidence
        assert "remove or replace" in finding.advice
        assert "learning_rate_high" not in causes(report)  # the data are why

    def test_finite_numbers(self, mlp, causes):
        report = ae.diagnose(mlp(8, 8), [torch.rand(64, 8), 1e4 * torch.rand(64, 8)], functional.mse_loss)
        assert "nonfinite_data" not in causes(report)


class TestConstantData:
    def test_one_example_again_and_again(self, mlp):
        x = torch.rand(1, 8).expand(64, 8).clone()
        finding = ae.diagnose(mlp(8, 8), [x], functional.mse_loss).findings[0]
        assert (finding.severity, finding.cause) == ("error", "constant_data")
        assert "all 64 examples are the same" in finding.evidence

    def test_one_feature_that_varies(self, mlp, causes):
        x = torch.rand(1, 8).repeat(64, 1)
        x[:, 3] = torch.rand(64)
        assert "constant_data" not in causes(ae.diagnose(mlp(8, 8), [x], functional.mse_loss))

    def test_targets_of_a_classifier_are_no_data(self, mlp, causes):
        report = ae.diagnose(
            mlp(), [(torch.rand(64, 8), torch.ones(64, 1))], lambda y, batch: functional.mse_loss(y, batch[1])
        )
        assert "constant_data" not in causes(report)


class TestInputScale:
    planted = pytest.mark.parametrize(
        ("distort", "words"),
        [
            (lambda x: 100 * x, "of size"),
            (lambda x: x + 50, "of size"),
            (lambda x: 0.1 * x + 10, "times their spread"),
            (lambda x: x * torch.tensor([400.0] + [0.5] * 7), "of size"),
            (lambda x: 0.03 * x * torch.tensor([400.0] + [1.0] * 7), "One feature"),
        ],
    )

    @staticmethod
    def look(network, x, y):
        return ae.diagnose(network, [(x, y)], lambda p, batch: functional.mse_loss(p, batch[1]))

    @planted
    def test_inputs_that_are_not_of_size_one(self, mlp, regression, distort, words):
        x, y = regression
        x = distort(x)
        finding = self.look(mlp(), x, y).findings[0]
        assert (finding.cause, finding.site) == ("input_scale", "data")
        assert words in finding.evidence
        assert finding.value == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-4)
        assert "subtract each feature's mean" in finding.advice

    def test_inputs_that_are_nearly_zero(self, mlp, regression):
        x, y = regression
        finding = self.look(mlp(), 1e-3 * x, y).findings[0]
        assert finding.cause == "input_scale"
        assert finding.value == pytest.approx(1e-3 * x.double().square().mean().sqrt().item(), rel=1e-4)

    @pytest.mark.parametrize(
        "distort", [lambda x: x, lambda x: 5 * x, lambda x: 0.1 * x, lambda x: x + 2, lambda x: x.sigmoid()]
    )
    def test_inputs_of_about_size_one(self, mlp, regression, causes, distort):
        x, y = regression
        assert "input_scale" not in causes(self.look(mlp(), distort(x), y))

    @planted
    @pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
    def test_a_normalisation_first(self, mlp, regression, causes, distort, words, norm):
        x, y = regression
        assert "input_scale" not in causes(self.look(nn.Sequential(norm(8), mlp()), distort(x), y))

    def test_what_was_learnt_all_the_same_is_no_error(self, regression):
        x = regression[0] * 100
        network = nn.Linear(8, 8)
        with torch.no_grad():
            network.weight.copy_(torch.eye(8))
        finding = ae.diagnose(network, [x], functional.mse_loss).findings[0]
        assert (finding.cause, finding.severity) == ("input_scale", "info")


class TestNarrowRange:
    @pytest.mark.parametrize(("end", "centre"), [(nn.Sigmoid, 0.4), (nn.Tanh, -0.2)])
    def test_a_corner_of_the_range(self, mlp, end, centre):
        x = centre + 0.01 * torch.rand(256, 8)
        report = ae.diagnose(mlp(8, 8, end()), [x], functional.mse_loss)
        finding = report.findings[0]
        assert finding.cause == "narrow_range"
        reach = 1 if end is nn.Sigmoid else 2
        assert finding.value == pytest.approx(6 * x.std().item() / reach, rel=0.01)
        assert "fill the range" in finding.advice

    def test_data_that_fill_it_and_an_output_without_bounds(self, mlp, causes):
        x = 0.4 + 0.01 * torch.rand(256, 8)
        assert "narrow_range" not in causes(ae.diagnose(mlp(8, 8), [x], functional.mse_loss))
        assert "narrow_range" not in causes(
            ae.diagnose(mlp(8, 8, nn.Sigmoid()), [torch.rand(256, 8)], functional.mse_loss)
        )
