"""Causes in the pairing of the last activation with the loss, planted and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


def look(network, x, y, loss=functional.mse_loss):
    return ae.diagnose(network, [(x, y)], lambda prediction, batch: loss(prediction, batch[1]))


@pytest.fixture
def several():
    """Inputs, and four labels that do not exclude each other."""
    x = torch.randn(256, 8)
    return x, (x @ torch.randn(8, 4) > 0).float()


class TestConstantSoftmax:
    @pytest.mark.parametrize("loss", [functional.mse_loss, functional.binary_cross_entropy])
    def test_over_one_number(self, mlp, regression, loss):
        x, y = regression
        finding = look(mlp(8, 1, nn.Softmax(1)), x, (y > 0).float(), loss).findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "constant_softmax", "output")
        assert "one number" in finding.evidence
        assert "use a sigmoid" in finding.advice

    def test_over_two_and_a_sigmoid_over_one(self, mlp, regression, causes):
        x, y = regression
        y = (y > 0).float()
        two = torch.cat([y, 1 - y], 1)
        assert "constant_softmax" not in causes(look(mlp(8, 2, nn.Softmax(1)), x, two))
        assert "constant_softmax" not in causes(look(mlp(8, 1, nn.Sigmoid()), x, y, functional.binary_cross_entropy))


class TestDoubleActivation:
    @pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid(), nn.ReLU(), nn.Tanh()])
    def test_before_cross_entropy(self, mlp, labels, end):
        finding = look(mlp(8, 3, end), *labels, functional.cross_entropy).findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "double_activation", "loss")
        name = type(end).__name__.lower()
        assert f"passes {name} before cross_entropy, which applies softmax" in finding.evidence
        assert f"Remove the {name}" in finding.advice

    def test_sigmoid_before_the_losss_own(self, mlp, several):
        finding = look(mlp(8, 4, nn.Sigmoid()), *several, functional.binary_cross_entropy_with_logits).findings[0]
        assert finding.cause == "double_activation"
        assert "applies sigmoid itself" in finding.evidence

    @pytest.mark.parametrize(("end", "words"), [([], "no log_softmax has passed"), ([nn.Softmax(1)], "a softmax")])
    def test_no_logarithm_before_nll_loss(self, mlp, labels, end, words):
        report = look(mlp(8, 3, *end), *labels, functional.nll_loss)
        finding = report.findings[0]
        assert (finding.severity, finding.cause) == ("error", "double_activation")
        assert words in finding.evidence
        assert "Use cross_entropy" in finding.advice

    def test_two_inside_a_network(self, regression):
        network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Sigmoid(), nn.Linear(16, 1))
        finding = look(network, *regression).findings[0]
        assert (finding.cause, finding.site) == ("double_activation", "2")
        assert "output of 1" in finding.evidence

    def test_what_each_loss_expects(self, mlp, labels, several, causes):
        for network, data, loss in (
            (mlp(8, 3), labels, functional.cross_entropy),
            (mlp(8, 3, nn.Dropout(0.1)), labels, functional.cross_entropy),
            (mlp(8, 3, nn.BatchNorm1d(3)), labels, functional.cross_entropy),
            (mlp(8, 3, nn.LogSoftmax(1)), labels, functional.cross_entropy),  # once more changes nothing
            (mlp(8, 3, nn.LogSoftmax(1)), labels, functional.nll_loss),
            (mlp(8, 3, nn.Softmax(1)), labels, lambda p, y: functional.nll_loss(p.log(), y)),
            (mlp(8, 4), several, functional.binary_cross_entropy_with_logits),
            (mlp(8, 4, nn.Sigmoid()), several, functional.binary_cross_entropy),
        ):
            assert "double_activation" not in causes(look(network, *data, loss))

    def test_scores_that_are_capped_or_scaled(self, mlp, labels, causes):
        for make in (
            lambda p: 30 * torch.tanh(p / 30),
            lambda p: (p / 5).tanh() * 5,
            lambda p: 10 * functional.normalize(p, dim=1),
            lambda p: functional.normalize(p, dim=1) * 10,
            lambda p: functional.normalize(p, dim=1) / 0.07,
        ):
            report = look(mlp(8, 3), *labels, lambda p, y, make=make: functional.cross_entropy(make(p), y))
            assert list(report.compared) == ["cross_entropy"]
            assert "double_activation" not in causes(report)

    def test_a_slice_of_logarithms_before_nll_loss(self, mlp, labels, causes):
        x, y = labels
        for take in (
            lambda p: p.log_softmax(1)[:, :3],
            lambda p: functional.log_softmax(p, 1)[:, 2:],
            lambda p: p.log_softmax(1)[:, [0, 2, 4]],
        ):
            report = look(mlp(8, 5), x, y, lambda p, t, take=take: functional.nll_loss(take(p), t))
            assert list(report.compared) == ["nll_loss"]
            assert "double_activation" not in causes(report)

    def test_gates_of_a_recurrent_cell(self, causes):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.gates, self.out = nn.Linear(8, 32), nn.Linear(16, 1)

            def forward(self, x):
                gate, value = self.gates(x).chunk(2, 1)
                return self.out(gate.sigmoid() * value.tanh())

        assert "double_activation" not in causes(look(Gated(), torch.randn(128, 8), torch.randn(128, 1)))


class TestSoftmaxMultilabel:
    def test_labels_that_hold_together(self, mlp, several):
        x, y = several
        together = (y.sum(1) > 1).float().mean().item()
        for network, loss in (
            (mlp(8, 4, nn.Softmax(1)), functional.binary_cross_entropy),
            (mlp(8, 4), functional.cross_entropy),
        ):
            finding = look(network, x, y, loss).findings[0]
            assert (finding.severity, finding.cause) == ("error", "softmax_multilabel")
            assert finding.value == pytest.approx(together)
            assert "each need a sigmoid" in finding.advice

    def test_labels_that_exclude_each_other_and_sigmoids(self, mlp, several, labels, causes):
        one_hot = functional.one_hot(labels[1], 3).float()
        assert "softmax_multilabel" not in causes(look(mlp(8, 3), labels[0], one_hot, functional.cross_entropy))
        assert "softmax_multilabel" not in causes(look(mlp(8, 3), *labels, functional.cross_entropy))
        report = look(mlp(8, 4), *several, functional.binary_cross_entropy_with_logits)
        assert "softmax_multilabel" not in causes(report)


class TestClassActivation:
    @pytest.mark.parametrize(
        ("end", "loss", "words"),
        [
            ([nn.Sigmoid()], functional.mse_loss, "through sigmoid"),
            ([], functional.mse_loss, "through identity"),
            ([nn.Softmax(1)], functional.mse_loss, "flat where"),
            ([nn.Sigmoid()], lambda p, y: -(y * p.log()).sum(1).mean(), "come from sigmoid"),
        ],
    )
    def test_classes_without_a_softmax_or_by_squared_error(self, mlp, labels, end, loss, words):
        x, y = labels[0], functional.one_hot(labels[1], 3).float()
        finding = look(mlp(8, 3, *end), x, y, loss).findings[0]
        assert (finding.severity, finding.cause, finding.value) == ("error", "class_activation", 3)
        assert words in finding.evidence
        assert "cross_entropy on what the last layer puts out" in finding.advice

    def test_cross_entropy_and_a_softmax_with_its_logarithm(self, mlp, labels, causes):
        x, y = labels[0], functional.one_hot(labels[1], 3).float()
        for network, loss in (
            (mlp(8, 3), functional.cross_entropy),
            (mlp(8, 3, nn.Softmax(1)), lambda p, y: -(y * p.log()).sum(1).mean()),
        ):
            assert "class_activation" not in causes(look(network, x, y, loss))

    def test_real_numbers_and_a_reconstruction(self, mlp, labels, causes):
        assert "class_activation" not in causes(look(mlp(8, 3), labels[0], torch.rand(256, 3)))
        y = functional.one_hot(labels[1], 3).float()
        assert "class_activation" not in causes(ae.diagnose(mlp(3, 3), [y], functional.mse_loss))


class TestLabelLoss:
    @pytest.mark.parametrize(("loss", "severity"), [(functional.mse_loss, "warning"), (functional.l1_loss, "error")])
    def test_labels_by_squared_and_absolute_error(self, mlp, regression, loss, severity):
        x, y = regression
        report = look(mlp(8, 1, nn.Sigmoid()), x, (y > 0).float(), loss)
        (finding,) = [f for f in report.findings if f.cause == "label_loss"]
        assert finding.severity == severity
        assert finding.value == pytest.approx(report.output["relative"])
        assert "binary_cross_entropy_with_logits with no activation" in finding.advice

    def test_real_numbers_and_labels_by_cross_entropy(self, mlp, regression, causes):
        x, y = regression
        assert "label_loss" not in causes(look(mlp(), x, y))
        report = look(mlp(), x, (y > 0).float(), functional.binary_cross_entropy_with_logits)
        assert "label_loss" not in causes(report)

    def test_labels_that_were_learnt(self, causes):
        x = (torch.rand(256, 1) > 0.5).float()
        network = nn.Linear(1, 1)
        with torch.no_grad():
            network.weight.fill_(1.0)
            network.bias.fill_(0.1)
        assert "label_loss" not in causes(look(network, x, x[:, 0:1].clone()))


class TestSquaredErrorSigmoid:
    @staticmethod
    def network(mlp, end, bias):
        network = mlp(12, 12, end())
        with torch.no_grad():
            network[2].bias.fill_(bias)
        return network

    @pytest.mark.parametrize("end", [nn.Sigmoid, nn.Tanh])
    def test_confidently_wrong(self, mlp, flat, end):
        network = self.network(mlp, end, -9.0)
        report = ae.diagnose(network, [flat], functional.mse_loss, output="3")
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "squared_error_sigmoid", "output")
        x_hat = network(flat).detach().requires_grad_()
        slope = x_hat * (1 - x_hat) if end is nn.Sigmoid else 1 - x_hat**2
        starved = 2 * slope < 0.01  # of the error, which is left out on both sides
        assert finding.value == pytest.approx(starved.float().mean().item(), abs=0.05)
        assert f"through a {end.__name__.lower()}" in finding.advice
        instead = "binary_cross_entropy_with_logits and no sigmoid" if end is nn.Sigmoid else "with no tanh"
        assert instead in finding.advice

    def test_of_ours(self):
        model = ae.MLPAutoencoder(12, 4, hidden=(16,), loss=ae.SquaredError("sigmoid"))
        with torch.no_grad():
            model.decoder.layers[-1].bias.fill_(-9.0)
        finding = ae.diagnose(model, [torch.rand(256, 12)]).findings[0]
        assert finding.cause == "squared_error_sigmoid"
        assert "Use BernoulliNLL()" in finding.advice

    def test_in_the_middle_of_the_sigmoid_and_through_logits(self, mlp, flat, causes):
        report = ae.diagnose(self.network(mlp, nn.Sigmoid, 0.0), [flat], functional.mse_loss, output="3")
        assert "squared_error_sigmoid" not in causes(report)
        network = self.network(mlp, nn.Identity, -9.0)
        report = ae.diagnose(network, [flat], functional.binary_cross_entropy_with_logits, output="2")
        assert report.output["starved_fraction"] == 0
        assert "squared_error_sigmoid" not in causes(report)


class TestDropoutOnOutput:
    @pytest.mark.parametrize(("rate", "severity"), [(0.5, "error"), (0.1, "warning")])
    def test_between_the_last_layer_and_the_loss(self, mlp, regression, rate, severity):
        x, y = regression[0], torch.randn(256, 4)
        (finding,) = [f for f in look(mlp(8, 4, nn.Dropout(rate)), x, y).findings if f.cause == "dropout_on_output"]
        assert (finding.severity, finding.cause, finding.value) == (severity, "dropout_on_output", rate)
        assert f"{rate:.0%} of the prediction" in finding.evidence
        assert "before the last layer" in finding.advice

    def test_before_the_last_layer_and_in_evaluation(self, mlp, regression, causes):
        x, y = regression[0], regression[0] @ torch.randn(8, 4)
        inside = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))
        assert "dropout_on_output" not in causes(look(inside, x, y))
        assert "dropout_on_output" not in causes(look(mlp(8, 4, nn.Dropout(0.5)).eval(), x, y))
