"""The report while the fit runs: what it warns of and when, what it knows by then, and that nobody feels it."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae


class Plain(L.LightningModule):
    """Somebody's autoencoder of six numbers."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        loss = functional.mse_loss(self.net(batch), batch)
        self.log("val_loss" if self.trainer.validating or self.trainer.sanity_checking else "loss", loss)
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Detached(Plain):
    """The first layer never hears of the loss."""

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.net[2](self.net[:2](batch).detach()), batch)

    validation_step = training_step


def loader(examples=256, batch=16):
    return torch.utils.data.DataLoader(torch.randn(examples, 6, generator=torch.Generator().manual_seed(0)), batch)


def warned_of(make_trainer, model, report=None, data=None, **options):
    """What was said, and the step at which it was."""
    report = report or ae.DiagnosticsReport(every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=report, **options).fit(model, data or loader(), loader(32))
    said = [str(w.message) for w in caught if str(w.message).startswith("At step")]
    return [(int(text.split()[2][:-1]), text) for text in said]


class TestWarnings:
    def test_what_is_so_from_the_first_batch_on_is_said_at_the_end_of_the_first_epoch_and_once(self, make_trainer):
        (said,) = warned_of(make_trainer, Detached(), max_epochs=6)
        assert said[0] == 16
        assert "[error] net.0: The weights of net.0" in said[1]
        assert "\n" not in said[1]
        assert "detach()" in said[1]

    def test_what_a_run_may_get_over_is_said_when_two_looks_have_seen_it(self, make_trainer):
        (said,) = warned_of(make_trainer, Plain(lr=30.0), max_epochs=6)
        assert "divide the learning rate by 10" in said[1]
        assert said[0] > 16

    def test_a_run_that_is_one_epoch_is_warned_of_at_its_validations(self, make_trainer):
        options = {"max_steps": 40, "max_epochs": -1, "val_check_interval": 10, "check_val_every_n_epoch": None}
        (said,) = warned_of(make_trainer, Detached(), data=loader(16 * 40), **options)
        assert said[0] == 10

    @pytest.mark.parametrize(("model", "quiet"), [(Detached, True), (Plain, False)])
    def test_nothing_is_said_where_quiet_is_wanted_or_where_nothing_is_wrong(self, make_trainer, model, quiet):
        report = ae.DiagnosticsReport(every_n_steps=1, quiet=quiet)
        assert warned_of(make_trainer, model(), report, max_epochs=6) == []

    def test_what_fails_while_looking_is_said_and_ends_nothing(self, make_trainer, monkeypatch):
        def fails(evidence):
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr("lightning_ae.diagnostics.attach.find", fails)
        report = ae.DiagnosticsReport(every_n_steps=1)
        with pytest.warns(UserWarning, match="could not look and goes on: ZeroDivisionError: on purpose"):
            make_trainer(callbacks=report, max_epochs=4).fit(Plain(), loader(), loader(32))
        assert report.report is not None


class Peeking(L.Callback):
    """Asks the report in the middle of everything."""

    def __init__(self, report):
        self.report, self.peeks = report, []

    def look(self, trainer, *others):
        if trainer.global_step > 0 and not trainer.sanity_checking:
            self.peeks.append(self.report.peek())

    on_train_batch_start = on_before_optimizer_step = on_train_batch_end = on_validation_end = look


class TestPeek:
    def fit(self, make_trainer, peeks, report=None, **options):
        L.seed_everything(0, verbose=False)
        model = ae.MLPAutoencoder((1, 8, 8), 4, hidden=(16,), lr=0.3)
        report = report or ae.DiagnosticsReport(every_n_steps=2, quiet=True)
        peeking = Peeking(report)
        callbacks = [report, peeking] if peeks else [report]
        make_trainer(callbacks=callbacks, max_epochs=2, **options).fit(model, ae.DigitsDataModule())
        return model, report, peeking.peeks

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_leaves_weights_sums_and_the_final_report_as_they_are(self, make_trainer, accumulate):
        (model, report, peeks), (twin, other, _) = (
            self.fit(make_trainer, peeks, accumulate_grad_batches=accumulate) for peeks in (True, False)
        )
        assert len(peeks) > 20
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
        for name in ("findings", "sites", "layers", "latent", "output", "history", "frequencies", "over_time"):
            assert getattr(report.report, name) == getattr(other.report, name)
        mine, others = report.state_dict()["monitors"], other.state_dict()["monitors"]
        for name, state in mine.items():
            assert {s: {k: v.tolist() for k, v in f.items()} for s, f in state["current"].items()} == {
                s: {k: v.tolist() for k, v in f.items()} for s, f in others[name]["current"].items()
            }

    def test_knows_what_was_seen_so_far(self, make_trainer):
        _, report, peeks = self.fit(make_trainer, True)
        seen = [peek.sites["encoder.layers.1"]["n"] for peek in peeks]
        assert seen == sorted(seen)
        assert 0 < seen[0] < seen[-1] <= report.report.sites["encoder.layers.1"]["n"]
        assert report.peek() is report.report

    def test_without_a_fit_there_is_nothing_to_know(self):
        with pytest.raises(RuntimeError, match="peek: nothing was looked at yet"):
            ae.DiagnosticsReport().peek()


class TestFirstSeen:
    def test_each_cause_has_the_step_at_which_it_was_first_found(self, make_trainer):
        report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
        make_trainer(callbacks=report, max_epochs=6).fit(Detached(), loader(), loader(32))
        assert report._first_seen["not_trained"] == 16
        assert {f.cause for f in report.findings} <= set(report._first_seen)
        assert max(report._first_seen.values()) <= 96

    def test_is_kept_in_the_checkpoint_and_nothing_is_said_twice(self, make_trainer, tmp_path):
        report = ae.DiagnosticsReport(every_n_steps=1)
        trainer = make_trainer(callbacks=report, max_epochs=2)
        with pytest.warns(UserWarning, match="At step 16"):
            trainer.fit(Detached(), loader(), loader(32))
        trainer.save_checkpoint(tmp_path / "some.ckpt")
        resumed = ae.DiagnosticsReport(every_n_steps=1)
        make_trainer(callbacks=resumed, max_epochs=5).fit(  # warnings are errors
            Detached(), loader(), loader(32), ckpt_path=tmp_path / "some.ckpt", weights_only=True
        )
        assert resumed._first_seen["not_trained"] == 16

    def test_a_report_with_a_running_trainer_can_be_copied(self, make_trainer):
        class Copies(L.Callback):
            def on_train_batch_end(self, trainer, *others):
                copy.deepcopy(trainer.callbacks[0].__getstate__())

        report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
        make_trainer(callbacks=[report, Copies()], limit_train_batches=2).fit(Plain(), loader(), loader(32))
        assert report.report is not None
