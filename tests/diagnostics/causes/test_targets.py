"""Causes in the targets, planted and not."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


def look(network, x, y, loss=functional.mse_loss):
    return ae.diagnose(network, [(x, y)], lambda prediction, batch: loss(prediction, batch[1]))


class TestBceTargetRange:
    def test_pictures_that_were_not_scaled(self, mlp, flat):
        x = 3 * flat
        finding = ae.diagnose(mlp(12, 12), [x], functional.binary_cross_entropy_with_logits).findings[0]
        assert (finding.severity, finding.cause) == ("error", "bce_target_range")
        assert finding.value == pytest.approx((x > 1).float().mean().item(), abs=1e-3)
        assert "scale images to [0, 1]" in finding.advice

    def test_labels_of_minus_one_and_one(self, mlp, regression):
        x, y = regression
        finding = look(mlp(), x, y.sign(), functional.binary_cross_entropy_with_logits).findings[0]
        assert finding.cause == "bce_target_range"
        assert "labels of 0 and 1" in finding.advice

    def test_grey_numbers_and_labels(self, mlp, flat, regression, causes):
        loss = functional.binary_cross_entropy_with_logits
        assert "bce_target_range" not in causes(ae.diagnose(mlp(12, 12), [flat], loss))
        x, y = regression
        assert "bce_target_range" not in causes(look(mlp(), x, (y > 0).float() * (1 + 1e-6), loss))
        assert "bce_target_range" not in causes(look(mlp(), x, 3 * y))  # a squared error takes any number


class TestTargetOutOfReach:
    @pytest.mark.parametrize(
        ("end", "scale", "words"),
        [(nn.Sigmoid, 3, "[0, 1]"), (nn.Tanh, 3, "[-1, 1]"), (nn.ReLU, 1, "an output without bounds")],
    )
    def test_numbers_that_the_activation_cannot_give(self, mlp, regression, end, scale, words):
        x, y = regression[0], scale * regression[0] @ torch.randn(8, 4)
        finding = look(mlp(8, 4, end()), x, y).findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "target_out_of_reach", "targets")
        low, high = {nn.Sigmoid: (0, 1), nn.Tanh: (-1, 1), nn.ReLU: (0, float("inf"))}[end]
        assert finding.value == pytest.approx(((y < low) | (y > high)).float().mean().item(), abs=0.01)
        assert words in finding.advice

    def test_numbers_that_it_can_give(self, mlp, regression, causes):
        x, y = regression[0], regression[0] @ torch.randn(8, 4)
        assert "target_out_of_reach" not in causes(look(mlp(8, 4), x, y))
        for end, target in ((nn.Sigmoid(), y.sigmoid()), (nn.Tanh(), y.tanh()), (nn.ReLU(), y.relu())):
            assert "target_out_of_reach" not in causes(look(mlp(8, 4, end), x, target))

    @pytest.mark.parametrize(
        "ends",
        [
            [nn.ReLU(), nn.LayerNorm(4)],
            [nn.Sigmoid(), nn.BatchNorm1d(4)],
            [nn.ReLU(), nn.GroupNorm(1, 4), nn.Dropout(0.1)],
        ],
    )
    def test_a_normalisation_after_the_activation(self, mlp, regression, causes, ends):
        x, y = regression[0], 3 * regression[0] @ torch.randn(8, 4)
        report = look(mlp(8, 4, *ends), x, y)
        assert report.output["outside"] == 0
        assert "target_out_of_reach" not in causes(report)

    def test_bytes_are_told_to_be_divided(self, mlp, flat):
        finding = ae.diagnose(mlp(12, 12, nn.Sigmoid()), [255 * flat], functional.mse_loss).findings
        finding = next(f for f in finding if f.cause == "target_out_of_reach")
        assert "divide images by 255" in finding.advice


class TestOneClass:
    def test_an_index_that_is_always_the_same(self, mlp, labels):
        x, y = labels
        finding = look(mlp(8, 3), x, torch.full_like(y, 2), functional.cross_entropy).findings[0]
        assert (finding.severity, finding.cause) == ("error", "one_class")
        assert "All 256 labels" in finding.evidence

    @pytest.mark.parametrize("label", [0.0, 1.0])
    def test_one_number_that_is_always_the_same(self, mlp, labels, label):
        y = torch.full((256, 1), label)
        finding = look(mlp(), labels[0], y, functional.binary_cross_entropy_with_logits).findings[0]
        assert finding.cause == "one_class"

    @pytest.mark.parametrize(("steps", "looks", "said"), [(40, 1, 1280), (40, 2, 0), (80, 2, 1280), (20, 1, 640)])
    def test_of_a_run_a_thousand_labels_or_an_epoch_are_needed(self, train, mlp, labels, steps, looks, said):
        y = torch.full_like(labels[1], 2)
        report = train(mlp(8, 3), functional.cross_entropy, labels[0], y, steps=steps, looks=looks)
        assert [f"All {said:,} labels" in f.evidence for f in report.findings if f.cause == "one_class"] == (
            [True] if said else []
        )

    def test_data_sorted_by_class_are_of_two_in_the_whole_run(self, make_trainer, mlp, causes):
        class Classifier(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.network = mlp(8, 3)

            def training_step(self, batch, batch_idx):
                return functional.cross_entropy(self.network(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 1e-4)

        def report_on(y):
            report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
            data = torch.utils.data.TensorDataset(torch.randn(2560, 8), y)
            trainer = make_trainer(callbacks=report, log_every_n_steps=5)
            trainer.fit(Classifier(), torch.utils.data.DataLoader(data, 32))
            return report

        # in the later part of the run, on which other verdicts rest, there is one class alone
        assert "one_class" not in causes(report_on((torch.arange(2560) >= 256).long()))
        assert "one_class" in causes(report_on(torch.ones(2560, dtype=torch.long)))

    def test_an_input_that_tells_the_label(self, train):
        y = torch.randint(3, (256,))
        x = 4 * functional.one_hot(y, 3).float()
        report = train(nn.Linear(3, 3), functional.cross_entropy, x, y, lr=1.0, steps=100)
        (finding,) = [f for f in report.findings if f.cause == "one_class"]
        assert (finding.severity, finding.measure) == ("info", "zero_at_once")
        assert "look for a leak" in finding.advice

    def test_classes_that_take_a_while(self, train, mlp, labels, causes):
        report = train(mlp(8, 3), functional.cross_entropy, *labels, steps=100)
        assert report.report.output["relative"] < 0.5
        assert "one_class" not in causes(report)

    def test_two_classes_of_which_one_is_rare(self, mlp, labels, causes):
        x, y = labels[0], torch.zeros(256, dtype=torch.long)
        y[0] = 1
        assert "one_class" not in causes(look(mlp(8, 3), x, y, functional.cross_entropy))
        y = y.float().unsqueeze(1)
        assert "one_class" not in causes(look(mlp(), x, y, functional.binary_cross_entropy_with_logits))


class TestTargetScale:
    def test_prices(self, mlp, regression):
        x, y = regression
        y = 1000 * y
        finding = look(mlp(), x, y).findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "target_scale", "targets")
        assert finding.value == pytest.approx(y.double().square().mean().sqrt().item(), rel=1e-4)
        assert "standardise the targets" in finding.advice

    def test_size_one_and_prices_that_were_learnt(self, mlp, regression, causes):
        x, y = regression
        assert "target_scale" not in causes(look(mlp(), x, y))
        network = nn.Linear(8, 1)
        with torch.no_grad():
            network.weight.copy_(1000 * torch.linalg.lstsq(x, y).solution.T)
            network.bias.zero_()
        assert "target_scale" not in causes(look(network, x, 1000 * y))


class TestMisalignedPair:
    def test_inputs_in_another_order(self, mlp, flat):
        finding = ae.diagnose(mlp(12, 12), [flat], lambda y, x: functional.mse_loss(y, x.roll(1, 0))).findings[0]
        assert (finding.severity, finding.cause) == ("error", "misaligned_pair")
        assert "in another order" in finding.evidence

    def test_targets_that_have_nothing_to_do_with_the_inputs(self, train, mlp):
        x, y = torch.randn(4096, 8), torch.randn(4096, 1)
        report = train(mlp(), functional.mse_loss, x, y, batch=64, steps=60)
        finding = report.findings[0]
        assert (finding.cause, finding.measure) == ("misaligned_pair", "correlation")
        assert "shuffled, filtered and joined together" in finding.advice

    def test_targets_that_a_line_predicts_but_were_not_learnt(self, train, mlp, regression, causes):
        report = train(mlp(), functional.mse_loss, *regression, lr=1e-6, batch=64, steps=60)
        assert report.report.output["relative"] > 0.9
        assert "misaligned_pair" not in causes(report)

    def test_inputs_in_their_order(self, mlp, flat, causes):
        for target in (lambda x: x, lambda x: 2 * x - 1, lambda x: (x - x.mean(0)) / x.std(0)):
            report = ae.diagnose(mlp(12, 12), [flat], lambda y, x, t=target: functional.mse_loss(y, t(x)))
            assert "misaligned_pair" not in causes(report)

    def test_other_data_of_the_same_distribution(self, mlp, flat, causes):
        assert "misaligned_pair" not in causes(look(mlp(12, 12), flat, flat.flip(1) ** 2))


class TestBroadcastPair:
    def test_a_column_and_a_row_are_said_by_torch_too(self, mlp, regression):
        x, y = regression
        with pytest.warns(UserWarning, match="broadcasting"):
            finding = look(mlp(), x, y[:, 0]).findings[0]
        assert (finding.severity, finding.cause) == ("error", "broadcast_pair")
        assert "(256, 1)" in finding.evidence
        assert "(256,)" in finding.evidence
        assert "view_as" in finding.advice

    def test_a_column_and_a_row_where_torch_is_silent(self, mlp, regression):
        x, y = regression
        assert look(mlp(), x, y[:, 0], lambda p, t: ((p - t) ** 2).mean()).findings[0].cause == "broadcast_pair"
        assert look(mlp(), x, y[:, 0], lambda p, t: (t - p).abs().mean()).findings[0].cause == "broadcast_pair"

    def test_distances_of_all_points_to_all(self, mlp, regression, causes):
        x, y = regression[0][:64], torch.randn(48, 3)

        def chamfer(p, t):
            far = (p[:, None] - t[None]).square().sum(-1)
            return far.amin(0).mean() + far.amin(1).mean()

        report = look(mlp(8, 3), x, y, chamfer)
        assert list(report.compared) == ["squared difference"]
        assert "broadcast_pair" not in causes(report)

    def test_one_shape(self, mlp, regression, causes):
        x, y = regression
        assert "broadcast_pair" not in causes(look(mlp(), x, y))
        squeezed = nn.Sequential(mlp(), nn.Flatten(0))
        assert "broadcast_pair" not in causes(look(squeezed, x, y[:, 0]))
        # a target that is the same for all examples is spread over them on purpose
        spread = look(mlp(), x, y[:1], lambda p, t: ((p - t) ** 2).mean())
        assert "broadcast_pair" not in causes(spread)
