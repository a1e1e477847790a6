"""Causes in the wiring, planted and not."""

from __future__ import annotations

from typing import ClassVar

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


class Manual(L.LightningModule):
    """Optimizes by hand, and zeroes gradients or does not."""

    def __init__(self, network, zero):
        super().__init__()
        self.network, self.zero = network, zero
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if self.zero:
            optimizer.zero_grad()
        self.manual_backward(functional.mse_loss(self.network(batch[0]), batch[1]))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


class Automatic(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


class Forgetful(Automatic):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


class TestGradientsPileUp:
    @pytest.mark.parametrize("make", [lambda n: Manual(n, False), Forgetful])
    def test_zero_grad_that_is_never_called(self, train, mlp, regression, make):
        finding = train(make(mlp()), None, *regression, steps=40).findings[0]
        assert (finding.severity, finding.cause, finding.site) == ("error", "gradients_pile_up", "optimizer")
        assert "call optimizer.zero_grad()" in finding.advice

    @pytest.mark.parametrize("make", [lambda n: Manual(n, True), Automatic])
    def test_zero_grad_that_is(self, train, mlp, regression, causes, make):
        assert "gradients_pile_up" not in causes(train(make(mlp()), None, *regression, steps=40))

    def test_accumulation_on_purpose(self, train, mlp, regression, causes):
        report = train(Automatic(mlp()), None, *regression, steps=60, looks=1, accumulate_grad_batches=4)
        assert report.report.output["samples"] > 0
        assert "gradients_pile_up" not in causes(report)


class TestNoGradient:
    @pytest.mark.parametrize("flatten", [lambda p: p.round(), lambda p: p * 0, lambda p: p.sign()])
    def test_a_step_through_which_none_passes(self, train, mlp, regression, flatten):
        report = train(mlp(), lambda p, y: functional.mse_loss(flatten(p), y), *regression, steps=30)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.value) == ("error", "no_gradient", 0)
        assert "exactly 0 in every layer" in finding.evidence
        assert "rounding" in finding.advice

    def test_one_that_is_small(self, train, mlp, regression, causes):
        report = train(mlp(), lambda p, y: 1e-8 * functional.mse_loss(p, y), *regression, steps=30)
        assert "no_gradient" not in causes(report)

    def test_a_perfect_prediction_needs_none(self, causes):
        network = nn.Linear(4, 4)
        with torch.no_grad():
            network.weight.copy_(torch.eye(4))
            network.bias.zero_()
        x = torch.randint(-4, 5, (64, 4)).float()
        assert "no_gradient" not in causes(ae.diagnose(network, [x], functional.mse_loss))


class Parts(L.LightningModule):
    """An encoder and a decoder of 12 numbers, wired as is asked for."""

    def __init__(self, why=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 12))
        self.why = why
        if why == "frozen":
            self.encoder.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        z = self.encoder(batch[0])
        return functional.mse_loss(self.decoder(z.detach() if self.why == "detached" else z), batch[0])

    def configure_optimizers(self):
        held = self.decoder if self.why == "forgotten" else self
        return torch.optim.SGD(held.parameters(), 0.0 if self.why == "unchanged" else 1e-2)


class TestNotTrained:
    words: ClassVar = {
        "frozen": "requires_grad_(True)",
        "forgotten": "give all of self.parameters() to the optimizer",
        "detached": "look for detach()",
    }

    @pytest.mark.parametrize("why", ["frozen", "forgotten", "detached"])
    def test_half_a_network(self, train, flat, why):
        module = Parts(why)
        report = train(module, None, flat, steps=40)
        finding = report.findings[0]
        assert (finding.severity, finding.cause, finding.measure) == ("error", "not_trained", why)
        sizes = [sum(p.numel() for p in part.parameters()) for part in (module.encoder, module)]
        assert finding.value == pytest.approx(sizes[0] / sizes[1])
        assert "encoder.0" in finding.evidence
        assert "decoder" not in finding.evidence
        assert self.words[why] in finding.advice

    def test_a_learning_rate_of_zero(self, train, flat):
        finding = train(Parts("unchanged"), None, flat, steps=20).findings[0]
        assert (finding.cause, finding.measure, finding.value) == ("not_trained", "unchanged", 1.0)

    def test_all_of_it(self, train, flat, causes):
        assert "not_trained" not in causes(train(Parts(), None, flat, steps=40))

    def test_a_pretrained_part_that_is_frozen_and_serves(self, train, flat):
        module = Parts("frozen")
        module.configure_optimizers = lambda: torch.optim.Adam(module.decoder.parameters(), 3e-2)
        report = train(module, None, flat, steps=200)
        assert report.report.output["fvu"] < 0.3
        assert {f.severity for f in report.findings if f.cause == "not_trained"} <= {"info"}

    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_teacher_that_runs_without_gradients(self, train, mlp, regression, causes, frozen, mode):
        class Student(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.student, self.teacher = mlp(), mlp(hidden=64)
                self.teacher.requires_grad_(not frozen)

            def training_step(self, batch, batch_idx):
                with mode():
                    target = self.teacher(batch[0])
                return functional.mse_loss(self.student(batch[0]), target.clone())

            def configure_optimizers(self):
                return torch.optim.Adam(self.student.parameters(), 1e-2)

        assert "not_trained" not in causes(train(Student(), None, *regression, steps=40))

    def test_squared_errors_of_a_judge_and_a_maker(self, train, flat):
        class LeastSquares(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                self.maker = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 12), nn.Sigmoid())
                self.judge = nn.Sequential(nn.Linear(12, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

            def training_step(self, batch, batch_idx):
                makes, judges = self.optimizers()
                x = batch[0]
                one, zero = torch.ones(len(x), 1), torch.zeros(len(x), 1)
                made = self.maker(torch.randn(len(x), 4))
                self.toggle_optimizer(judges)
                judges.zero_grad()
                real, fake = self.judge(x), self.judge(made.detach())
                self.manual_backward(0.5 * (functional.mse_loss(real, one) + functional.mse_loss(fake, zero)))
                judges.step()
                self.untoggle_optimizer(judges)
                self.toggle_optimizer(makes)
                makes.zero_grad()
                self.manual_backward(0.5 * functional.mse_loss(self.judge(made), one))
                makes.step()
                self.untoggle_optimizer(makes)

            def configure_optimizers(self):
                return [torch.optim.Adam(p.parameters(), 1e-3, betas=(0.5, 0.999)) for p in (self.maker, self.judge)]

        report = train(LeastSquares(), None, flat, steps=120)
        assert set(report.report.compared) == {"mse_loss", "mse_loss#1", "mse_loss#2"}
        assert [f for f in report.findings if f.severity == "error"] == []

    def test_a_part_that_does_not_run(self, train, mlp, regression, causes):
        module = Automatic(mlp())
        module.spare = nn.Linear(8, 8).requires_grad_(False)
        assert "not_trained" not in causes(train(module, None, *regression, steps=40))

    def test_two_optimizers_that_take_turns(self, train, flat, causes):
        class Adversarial(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                self.maker = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.Sigmoid())
                self.judge = nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

            def training_step(self, batch, batch_idx):
                makes, judges = self.optimizers()
                x = batch[0]
                one, zero = torch.ones(len(x), 1), torch.zeros(len(x), 1)
                made = self.maker(torch.randn(len(x), 4))
                loss = functional.binary_cross_entropy_with_logits
                self.toggle_optimizer(judges)
                judges.zero_grad()
                self.manual_backward(loss(self.judge(x), one) + loss(self.judge(made.detach()), zero))
                judges.step()
                self.untoggle_optimizer(judges)
                self.toggle_optimizer(makes)
                makes.zero_grad()
                self.manual_backward(loss(self.judge(made), one))
                makes.step()
                self.untoggle_optimizer(makes)

            def configure_optimizers(self):
                return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.maker, self.judge)]

        report = train(Adversarial(), None, flat, steps=60)
        assert not causes(report) & {"not_trained", "no_gradient", "gradients_pile_up", "one_class"}


class TestLinearStack:
    @staticmethod
    def look(*layers):
        x, y = torch.randn(128, 8), torch.randn(128, 4)
        return ae.diagnose(nn.Sequential(*layers), [(x, y)], lambda p, batch: functional.mse_loss(p, batch[1]))

    @pytest.mark.parametrize("between", [[], [nn.Dropout(0.1)], [nn.BatchNorm1d(16)], [nn.Identity()]])
    def test_nothing_between_that_bends(self, between):
        finding = self.look(nn.Linear(8, 16), *between, nn.Linear(16, 4)).findings[0]
        last = str(1 + len(between))
        assert (finding.cause, finding.site) == ("linear_stack", last)
        assert "It reads 0 (16 wide) with no activation" in finding.evidence
        assert "after 0, or remove it" in finding.advice

    def test_convolutions(self):
        x = torch.rand(32, 1, 8, 8)
        network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))
        report = ae.diagnose(network, [x], functional.mse_loss)
        assert [f.site for f in report.findings if f.cause == "linear_stack"] == ["1"]

    @pytest.mark.parametrize("between", [nn.LayerNorm(16), nn.GroupNorm(1, 16)])
    def test_a_normalisation_of_each_example_bends(self, causes, between):
        assert "linear_stack" not in causes(self.look(nn.Linear(8, 16), between, nn.Linear(16, 4)))

    def test_an_activation_between_and_a_bottleneck(self, causes):
        assert "linear_stack" not in causes(self.look(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        # one that is narrower than both is a matrix of low rank on purpose
        assert "linear_stack" not in causes(self.look(nn.Linear(8, 2), nn.Linear(2, 4)))

    def test_principal_components_of_ours(self, causes):
        report = ae.diagnose(ae.LinearAutoencoder(8, 8), [torch.randn(128, 8)])
        assert "linear_stack" not in causes(report)


def projection(width, *between, size=12):
    """Keeps the first ``width`` of ``size`` numbers."""
    encoder, decoder = nn.Linear(size, width, bias=False), nn.Linear(width, size, bias=False)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(width, size))
        decoder.weight.copy_(torch.eye(size, width))
    return nn.Sequential(encoder, *between, decoder)


class TestNarrowCode:
    def test_two_numbers_for_twelve(self):
        x = torch.randn(2000, 12)
        finding = ae.diagnose(projection(2), [x], functional.mse_loss).findings[0]
        assert (finding.severity, finding.cause, finding.site, finding.value) == ("warning", "narrow_code", "0", 2)
        assert "12 numbers of the data are to be told by 2" in finding.evidence
        assert "83%" in finding.evidence  # of twelve equal variances two are kept
        assert "wider" in finding.advice

    def test_ten_numbers_and_data_that_two_tell(self, causes):
        x = torch.randn(2000, 12)
        assert "narrow_code" not in causes(ae.diagnose(projection(10), [x], functional.mse_loss))
        assert "narrow_code" not in causes(ae.diagnose(projection(4), [x], functional.mse_loss))
        x = x * torch.tensor([3.0, 3.0] + [0.1] * 10)
        assert "narrow_code" not in causes(ae.diagnose(projection(2), [x], functional.mse_loss))


class TestDropoutOnCode:
    @pytest.mark.parametrize(("rate", "severity"), [(0.5, "error"), (0.3, "warning")])
    def test_numbers_of_the_code_that_are_dropped(self, rate, severity):
        x = torch.randn(2000, 12) * torch.tensor([1.0] * 6 + [0.1] * 6)
        finding = ae.diagnose(projection(6, nn.Dropout(rate)), [x], functional.mse_loss).findings[0]
        assert (finding.severity, finding.cause, finding.site, finding.value) == (
            severity,
            "dropout_on_code",
            "1",
            rate,
        )
        assert f"{rate:.0%} of the code (6 numbers)" in finding.evidence
        assert "denoising" in finding.advice

    def test_a_tenth_of_it_and_the_input(self, causes):
        x = torch.randn(2000, 12) * torch.tensor([1.0] * 6 + [0.1] * 6)
        report = ae.diagnose(projection(6, nn.Dropout(0.1)), [x], functional.mse_loss)
        assert "dropout_on_code" not in causes(report)
        noisy = nn.Sequential(nn.Dropout(0.5), *projection(6))
        assert "dropout_on_code" not in causes(ae.diagnose(noisy, [x], functional.mse_loss))

    def test_a_classifiers(self, labels, causes):
        network = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(3, 3))
        report = ae.diagnose(network, [labels], lambda p, batch: functional.cross_entropy(p, batch[1]))
        assert "dropout_on_code" not in causes(report)


class TestSkipConnection:
    class Past(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(12, 4), nn.Linear(4, 12)
            self.last, self.how = nn.Linear(24, 12), how

        def forward(self, x):
            x_hat = self.decoder(self.encoder(x).tanh())
            if self.how == "join":
                return self.last(torch.cat([x_hat, x], 1))
            return x_hat + x if self.how == "add" else x_hat

    @pytest.mark.parametrize("how", ["add", "join"])
    def test_the_input_reaches_the_output(self, flat, how):
        finding = ae.diagnose(self.Past(how), [flat], functional.mse_loss).findings[0]
        assert (finding.severity, finding.cause) == ("warning", "skip_connection")
        assert "past the code" in finding.evidence
        assert "let the decoder read the code alone" in finding.advice

    def test_the_code_alone_and_a_residual_classifier(self, flat, causes):
        assert "skip_connection" not in causes(ae.diagnose(self.Past(None), [flat], functional.mse_loss))
        y = torch.randint(12, (256,))
        report = ae.diagnose(self.Past("add"), [(flat, y)], lambda p, batch: functional.cross_entropy(p, batch[1]))
        assert "skip_connection" not in causes(report)

    def test_a_code_as_wide_as_the_data_and_other_data(self, flat, causes):
        wide = self.Past("add")
        wide.encoder, wide.decoder = nn.Linear(12, 16), nn.Linear(16, 12)
        assert "skip_connection" not in causes(ae.diagnose(wide, [flat], functional.mse_loss))
        # what is joined is not the target: noise to be taken away, a time that is told
        noisy = flat + 0.5 * torch.randn_like(flat)
        report = ae.diagnose(self.Past("add"), [(noisy, flat)], lambda p, b: functional.mse_loss(p, b[1]))
        assert "skip_connection" not in causes(report)

        class Timed(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.decoder = nn.Linear(12, 4), nn.Linear(5, 12)

            def forward(self, x):
                return self.decoder(torch.cat([self.encoder(x).tanh(), x[:, :1]], 1))

        assert "skip_connection" not in causes(ae.diagnose(Timed(), [flat], functional.mse_loss))

    def test_a_residual_block_inside(self, causes):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(6, 6)

            def forward(self, h):
                return h + self.layer(h).relu()

        network = nn.Sequential(nn.Linear(12, 6), Block(), nn.Linear(6, 12))
        assert "skip_connection" not in causes(ae.diagnose(network, [torch.rand(64, 12)], functional.mse_loss))
