"""Fits that cannot succeed are ended, those that can are not, and nobody feels who watches."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import optuna
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.nn import functional

import lightning_ae as ae
from lightning_ae.diagnostics.stop import _falls

STEPS = 200


class Plain(L.LightningModule):
    """Somebody's network: six numbers to six numbers."""

    def __init__(self, lr=1e-2, decay=1.0, optimizer=torch.optim.SGD):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 6)
        self.lr, self.decay, self.optimizer = lr, decay, optimizer

    def forward(self, x):
        return self.head(self.backbone(x))

    def loss(self, batch):
        return functional.mse_loss(self(batch), batch)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def parameters_to_train(self):
        return self.parameters()

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters_to_train(), self.lr)
        if self.decay == 1:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TurnsToNaN(Plain):
    def loss(self, batch):
        return super().loss(batch) * (math.nan if self.global_step >= 40 else 1.0)


class Masks(Plain):
    """Data with holes, and a loss that leaves them out."""

    def loss(self, batch):
        there = batch.isfinite()
        x = torch.where(there, batch, 0.0)
        return functional.mse_loss(self(x) * there, x)


class Broadcasts(Plain):
    def loss(self, batch):
        return functional.mse_loss(self(batch)[:, :1], batch[:, 0])


class SoftmaxOverOne(Plain):
    def loss(self, batch):
        return functional.binary_cross_entropy(self(batch)[:, :1].softmax(1), (batch[:, :1] > 0).float())


class Rounds(Plain):
    def loss(self, batch):
        return functional.mse_loss(self(batch).round(), batch)


class Forgets(Plain):
    """The optimizer holds what gets no gradient."""

    def forward(self, x):
        return self.head(self.backbone(x).detach()) * 0.001

    def parameters_to_train(self):
        return self.backbone.parameters()


class Manual(Plain):
    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers(), self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def numbers(kind="normal", examples=16 * 50):
    x = torch.randn(examples, 6, generator=torch.Generator().manual_seed(0))
    if kind == "low rank":  # so that it can be learnt
        x = torch.stack([x[:, 0], -x[:, 0], x[:, 1], x[:, 1], 0.1 * x[:, 2], x[:, 0] + x[:, 1]], 1)
    if kind == "holes":
        x[::40, 2] = math.nan
    if kind == "constant":
        x = x[:1].repeat(examples, 1)
    return torch.utils.data.DataLoader(x, 16)


def fit(make_trainer, model, data=None, stop=None, others=(), first=True, path=None, **options):
    stop = stop or ae.StopHopeless(every_n_steps=4)
    callbacks = [stop, *others] if first else [*others, stop]
    trainer = make_trainer(**{"max_epochs": -1, "max_steps": STEPS, "callbacks": callbacks} | options)
    trainer.fit(model, data or numbers("low rank"), ckpt_path=path, weights_only=True if path else None)
    return stop, trainer


class TestWhatIsEnded:
    @pytest.mark.parametrize(
        ("model", "data", "cause"),
        [
            (lambda: Plain(lr=1e3), "low rank", "learning_rate_high"),
            (TurnsToNaN, "low rank", "learning_rate_high"),
            (Plain, "holes", "nonfinite_data"),
            (lambda: Plain(optimizer=torch.optim.Adam), "constant", "constant_data"),
            (Broadcasts, "normal", "broadcast_pair"),
            (SoftmaxOverOne, "normal", "constant_softmax"),
            (Rounds, "low rank", "no_gradient"),
            (Forgets, "low rank", "not_trained"),
            (lambda: Manual(lr=1e3), "low rank", "learning_rate_high"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Using a target size")  # torch says of broadcasting what it is, too
    def test_early_and_with_the_reason(self, make_trainer, model, data, cause):
        stop, trainer = fit(make_trainer, model(), numbers(data))
        assert stop.finding.cause == cause
        assert trainer.global_step < STEPS / 2
        assert f"ended at step {trainer.global_step}" in stop.reason
        assert stop.finding.evidence in stop.reason
        assert trainer.callback_metrics["hopeless"] == trainer.global_step

    def test_the_reason_is_logged(self, make_trainer, caplog):
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            stop, _ = fit(make_trainer, Rounds())
        assert f"StopHopeless: {stop.reason}" in caplog.text

    def test_after_more_looks_with_more_patience(self, make_trainer):
        steps = [
            fit(make_trainer, Rounds(), stop=ae.StopHopeless(patience=n, every_n_steps=4))[1].global_step
            for n in (1, 3, 8)
        ]
        assert steps == sorted(set(steps))

    def test_a_trainers_least_number_of_steps_is_made(self, make_trainer):
        stop, trainer = fit(make_trainer, Rounds(), min_steps=120)
        assert stop.reason is not None
        assert trainer.global_step == 120

    def test_in_a_run_of_a_few_dozen_steps(self, make_trainer):
        stop, trainer = fit(make_trainer, TurnsToNaN(lr=1e-3), max_steps=80, stop=ae.StopHopeless(every_n_steps=2))
        assert stop.reason is not None
        assert 40 < trainer.global_step < 70

    def test_with_many_short_epochs(self, make_trainer):
        stop, trainer = fit(make_trainer, Rounds(), numbers(examples=32), max_epochs=100, max_steps=-1)
        assert stop.finding.cause == "no_gradient"
        assert trainer.global_step < STEPS / 2


class TestWhatIsNotEnded:
    def test_a_healthy_run_whose_weights_are_as_without_it(self, make_trainer):
        weights = []
        for others in ([ae.StopHopeless(every_n_steps=4)], []):
            L.seed_everything(0, verbose=False)
            model = Plain(optimizer=torch.optim.Adam)
            trainer = make_trainer(max_epochs=-1, max_steps=STEPS, callbacks=others)
            trainer.fit(model, numbers("low rank"))
            assert trainer.global_step == STEPS
            weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert torch.equal(*weights)

    def test_data_with_holes_that_the_loss_leaves_out(self, make_trainer):
        stop, trainer = fit(make_trainer, Masks(optimizer=torch.optim.Adam), numbers("holes"))
        assert (stop.reason, trainer.global_step) == (None, STEPS)

    def test_steps_that_are_too_large_where_a_schedule_makes_them_smaller(self, make_trainer):
        for decay, ended in ((1.0, True), (0.9, False)):
            stop, trainer = fit(make_trainer, Plain(lr=300.0, decay=decay, optimizer=torch.optim.Adam))
            assert (stop.reason is not None) is ended
            assert (trainer.global_step < STEPS) is ended

    def test_a_schedule_that_has_not_begun_to_turn(self, make_trainer):
        class Later(Plain):
            def configure_optimizers(self):
                optimizer = torch.optim.Adam(self.parameters(), self.lr)
                schedule = torch.optim.lr_scheduler.StepLR(optimizer, STEPS - 10)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        stop, trainer = fit(make_trainer, Later(lr=300.0))
        assert (stop.reason, trainer.global_step) == (None, STEPS)

    def test_steps_that_a_callback_makes_smaller(self, make_trainer):
        class Slower(L.Callback):
            def on_train_batch_end(self, trainer, *others):
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] *= 0.9

        stop, _ = fit(make_trainer, Plain(lr=300.0, optimizer=torch.optim.Adam), others=[Slower()])
        assert stop.reason is None

    def test_a_part_that_is_frozen_until_a_callback_thaws_it(self, make_trainer):
        class Scaled(Plain):
            """Nothing is learnt as long as the first layer is as it was drawn."""

            def __init__(self):
                super().__init__(lr=0.05, optimizer=torch.optim.Adam)
                nn.init.zeros_(self.backbone[0].weight)

            def parameters_to_train(self):
                return [p for p in self.parameters() if p.requires_grad]

        options = {"max_steps": 120, "max_epochs": -1}
        finetuning = BackboneFinetuning(6, lambda epoch: 1.0, backbone_initial_lr=0.05, backbone_initial_ratio_lr=1.0)
        stop, trainer = fit(make_trainer, Scaled(), numbers("low rank", 16 * 10), others=[finetuning], **options)
        assert (stop.reason, trainer.global_step) == (None, 120)

    def test_one_batch_whose_loss_is_not_finite(self, make_trainer):
        class Once(Plain):
            def training_step(self, batch, batch_idx):
                loss = self.loss(batch)
                return loss.detach() * math.nan + 0 * self.head.bias[0].detach() if self.global_step == 40 else loss

            def on_before_optimizer_step(self, optimizer):
                for p in self.parameters():
                    if p.grad is not None:
                        p.grad.nan_to_num_(0.0)

            def backward(self, loss):
                if loss.requires_grad:
                    loss.backward()

        stop, trainer = fit(make_trainer, Once(optimizer=torch.optim.Adam))
        assert (stop.reason, trainer.global_step) == (None, STEPS)

    def test_a_look_that_fails_ends_nothing_and_is_said_once(self, make_trainer, monkeypatch):
        def fails(evidence):
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr("lightning_ae.diagnostics.stop.find", fails)
        with pytest.warns(UserWarning, match="could not look and goes on: ZeroDivisionError") as said:
            stop, trainer = fit(make_trainer, Rounds())
        assert (stop.reason, trainer.global_step) == (None, STEPS)
        assert len([w for w in said if "could not look" in str(w.message)]) == 1


class TestHowLong:
    """With findings that are given, of a model that does not move."""

    def ended(self, make_trainer, monkeypatch, cause, *, severity="error", least="error", steps=400, **options):
        finding = ae.Finding(severity, "somewhere", "figure", 1.0, 100, "It is so.", "Change it.", cause)
        monkeypatch.setattr("lightning_ae.diagnostics.stop.find", lambda evidence: [finding])
        stop = ae.StopHopeless(least, every_n_steps=4)
        # errors are those of one batch after the other: all the same, so that nothing falls by chance
        data = torch.utils.data.DataLoader(numbers("low rank", 16).dataset.repeat(40, 1), 16)
        options = {"max_steps": steps} | options
        stop, trainer = fit(make_trainer, Plain(lr=0.0), data, stop=stop, **options)
        assert (stop.finding == finding) is (stop.reason is not None)
        return trainer.global_step if stop.reason else None

    @pytest.mark.parametrize(
        ("cause", "share"),
        [("constant_softmax", 0.0), ("learning_rate_high", 0.08), ("double_activation", 0.16), ("input_scale", 0.25)],
    )
    def test_a_cause_stands_by_what_would_heal_it(self, make_trainer, monkeypatch, cause, share):
        step = self.ended(make_trainer, monkeypatch, cause)
        assert 400 * share <= step < 400 * (1.5 * share + 0.1)

    @pytest.mark.parametrize("cause", ["too_short", "constant_output", "overfitting", "posterior_collapse"])
    def test_what_names_no_cause_ends_nothing(self, make_trainer, monkeypatch, cause):
        assert self.ended(make_trainer, monkeypatch, cause) is None

    def test_the_least_severity_is_chosen(self, make_trainer, monkeypatch):
        options = {"severity": "warning", "steps": 100}
        assert self.ended(make_trainer, monkeypatch, "constant_softmax", **options) is None
        assert self.ended(make_trainer, monkeypatch, "constant_softmax", least="warning", **options) < 50

    def test_without_a_planned_end_what_more_steps_may_heal_ends_nothing(self, make_trainer, monkeypatch):
        class Over(L.Callback):
            def on_train_batch_end(self, trainer, *others):
                trainer.should_stop |= trainer.global_step >= 400

        options = {"max_epochs": -1, "steps": -1, "others": [Over()]}
        assert self.ended(make_trainer, monkeypatch, "input_scale", **options) is None
        assert self.ended(make_trainer, monkeypatch, "learning_rate_high", **options) < 400

    @pytest.mark.parametrize(
        ("fall", "planned", "expected"),
        [(0.0, 1000, False), (0.02, 1000, True), (0.02, 200, False), (0.002, 1000, False), (math.nan, 1000, False)],
    )
    def test_an_error_that_falls_fast_enough_is_waited_for(self, fall, planned, expected):
        looks = [(50, 9.0), (70, 1.0 + fall), (80, 1.0 + fall / 2), (100, 1.0)]
        epochs = SimpleNamespace(max_epochs=-1, epoch_loop=SimpleNamespace(total_batch_idx=100))
        trainer = SimpleNamespace(num_training_batches=10, fit_loop=epochs, global_step=100, max_steps=planned)
        # what fell before the last two fifths is not counted; 0.02 in 30 steps leave 0.5 after 900 more
        assert _falls(looks, 3, trainer) is expected


class TestWithOthers:
    @pytest.mark.parametrize("first", [True, False])
    def test_reads_the_monitors_of_a_report_which_says_why(self, make_trainer, first):
        report = ae.DiagnosticsReport(every_n_steps=4, quiet=True)
        stop, trainer = fit(make_trainer, Rounds(), others=[report], first=first)
        assert stop.finding.cause == "no_gradient"
        assert trainer.global_step < STEPS / 2
        assert stop.state_dict()["monitors"] == {}
        assert report.stopped == stop.reason
        assert report.findings[0].cause == "no_gradient"
        assert 0 < report._first_seen["no_gradient"] < trainer.global_step

    def test_leaves_the_report_as_it_is(self, make_trainer):
        reports = []
        for others in ([ae.StopHopeless()], []):
            L.seed_everything(0, verbose=False)
            report = ae.DiagnosticsReport(every_n_steps=4, quiet=True)
            trainer = make_trainer(max_epochs=-1, max_steps=STEPS, callbacks=[*others, report])
            trainer.fit(Plain(lr=300.0, decay=0.9), numbers("low rank"))
            reports.append(report.report)
        one, two = reports
        for name in ("findings", "sites", "layers", "output", "history", "frequencies"):
            assert str(getattr(one, name)) == str(getattr(two, name))  # NaN is not equal to itself

    def test_a_resumed_run_is_ended_where_an_uninterrupted_one_is(self, make_trainer, tmp_path):
        def run(path=None):
            L.seed_everything(0, verbose=False)
            save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
            stop = ae.StopHopeless(every_n_steps=2, patience=5)
            options = {"others": [save], "enable_checkpointing": True, "path": path, "stop": stop}
            return fit(make_trainer, Rounds(), numbers("low rank", 16 * 10), **options)

        whole, trainer = run()
        assert trainer.global_step > 10
        resumed, other = run(tmp_path / "step=10.ckpt")
        assert other.global_step == trainer.global_step
        assert resumed.reason == whole.reason

    def test_a_second_fit_begins_anew(self, make_trainer):
        stop, _ = fit(make_trainer, Rounds())
        assert stop.reason is not None
        fit(make_trainer, Plain(optimizer=torch.optim.Adam), stop=stop)
        assert stop.reason is None

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"severity: expected one of \['error', 'warning', 'info'\], got 'bad'"):
            ae.StopHopeless("bad")
        with pytest.raises(ValueError, match="patience: expected a positive whole number, got 0"):
            ae.StopHopeless(patience=0)
        with pytest.raises(ValueError, match="every_n_steps"):
            ae.StopHopeless(every_n_steps=0)


class TestOptuna:
    @pytest.fixture(autouse=True)
    def quiet(self):
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    @pytest.mark.parametrize("first", [True, False])
    def test_hopeless_trials_are_pruned_after_all_callbacks_are_through(self, make_trainer, first):
        ends = []

        class Ends(L.Callback):
            def on_fit_end(self, trainer, module):
                ends.append("fit")

            def teardown(self, trainer, module, stage):
                ends.append("teardown")

        report = ae.DiagnosticsReport(every_n_steps=4, quiet=True)

        def objective(trial):
            model = Plain(optimizer=torch.optim.Adam) if trial.number else Rounds()
            stop = ae.StopHopeless(trial=trial, every_n_steps=4)
            fit(make_trainer, model, stop=stop, others=[Ends(), report], first=first)
            return float(model.loss(next(iter(numbers("low rank")))).detach())

        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
        study.optimize(objective, n_trials=2)
        pruned, complete = study.trials
        assert pruned.state == optuna.trial.TrialState.PRUNED
        assert "The gradient is exactly 0" in pruned.user_attrs["hopeless"]
        assert complete.state == optuna.trial.TrialState.COMPLETE
        assert "hopeless" not in complete.user_attrs
        assert ends == ["fit", "teardown"] * 2
        assert report.stopped is None


DDP = """
    import sys

    import lightning as L
    import torch
    from torch import nn
    from torch.nn import functional

    import lightning_ae as ae


    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

        def training_step(self, batch, batch_idx):
            return functional.mse_loss(self.net(batch), batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e3)


    if __name__ == "__main__":
        torch.set_num_threads(1)
        out, report = sys.argv[1], sys.argv[2] == "report"
        stop = ae.StopHopeless(every_n_steps=4)
        reports = [ae.DiagnosticsReport(every_n_steps=4, quiet=True)] if report else []
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_steps=200, callbacks=[stop, *reports], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        )
        data = torch.utils.data.DataLoader(torch.randn(320, 6), 16, shuffle=True)
        trainer.fit(Model(), data)
        found = {
            "step": trainer.global_step, "reason": stop.reason, "cause": stop.finding.cause,
            "first": [dict(r._first_seen) for r in reports], "stopped": [r.stopped for r in reports],
        }
        torch.save(found, f"{out}/rank{trainer.global_rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "report"])
def test_ranks_stop_together(tmp_path, how):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(DDP))
    command = [sys.executable, str(script), str(tmp_path), how]
    done = subprocess.run(command, cwd=Path.cwd(), env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == two
    assert one["step"] < 100
    assert one["cause"] == "learning_rate_high"
    assert one["stopped"] == ([one["reason"]] if how == "report" else [])
