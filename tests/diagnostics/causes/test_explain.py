"""The order of findings: what is listed under what, and that no two contradict each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae
from lightning_ae.diagnostics import attach
from lightning_ae.diagnostics.causes import CAUSES, Stage
from lightning_ae.diagnostics.causes.base import Look

#: Another number that a change turns belongs to another finding.
OPPOSITE = ("learning_rate", -1), ("learning_rate", +1)


@pytest.fixture
def say(monkeypatch):
    """Lets causes say what the test chooses, and all others nothing; gives findings of a small network."""

    def find(**looks):
        for name, declared in CAUSES.items():
            said = looks.get(name)
            rule = (lambda e, said=said: iter([said])) if said is not None else (lambda e: iter(()))
            monkeypatch.setitem(CAUSES, name, replace(declared, rule=rule))
        return ae.diagnose(nn.Linear(2, 2), [torch.rand(8, 2)], functional.mse_loss).findings

    return find


def look(severity, change=None, words="It is so."):
    return Look(severity, "here", "figure", 1.0, words, "Change this.", change)


class TestFind:
    def test_the_worst_first_then_as_a_batch_meets_them(self, say):
        found = say(
            train_eval_mismatch=look("warning"),
            unread_latents=look("error"),
            penalty_dominates=look("error"),
            input_scale=look("info"),
            one_class=look("error"),
        )
        assert [f.cause for f in found] == [
            "one_class",
            "penalty_dominates",
            "unread_latents",
            "train_eval_mismatch",
            "input_scale",
        ]

    def test_what_follows_from_a_cause_is_listed_under_it_without_advice(self, say):
        (finding,) = say(double_activation=look("error"), dead_units=look("error", words="Units are dead."))
        assert finding.cause == "double_activation"
        assert finding.symptoms == ("here: Units are dead. (dead_units)",)
        assert "seen as well: here: Units are dead. (dead_units)" in str(finding)
        assert str(finding).count("Change this.") == 1

    def test_what_follows_from_nothing_stands_for_itself(self, say):
        assert [f.cause for f in say(dead_units=look("error"))] == ["dead_units"]
        # a warning is no reason for an error
        found = say(double_activation=look("warning"), dead_units=look("error"))
        assert [f.cause for f in found] == ["dead_units", "double_activation"]
        # nor is what comes later
        found = say(unread_latents=look("error"), dead_units=look("error"))
        assert sorted(f.cause for f in found) == ["dead_units", "unread_latents"]

    def test_two_causes_stand_beside_each_other(self, say):
        found = say(input_scale=look("error"), double_activation=look("error"))
        assert [f.cause for f in found] == ["input_scale", "double_activation"]
        assert all(f.symptoms == () for f in found)

    def test_no_two_turn_one_number_in_opposite_directions(self, say):
        found = say(log_variance_explodes=look("error", OPPOSITE[0]), penalty_dominates=look("error", OPPOSITE[1]))
        assert len(found) == 1
        assert len(found[0].symptoms) == 1
        assert found[0].cause in ("log_variance_explodes", "penalty_dominates")
        found = say(
            log_variance_explodes=look("error", ("learning_rate", -1)), penalty_dominates=look("error", ("weight", +1))
        )
        assert len(found) == 2

    def test_steps_too_small_or_too_few_are_looked_for_last(self, say):
        small = look("error", ("learning_rate", +1))
        assert [f.cause for f in say(learning_rate_low=small)] == ["learning_rate_low"]
        assert [f.cause for f in say(learning_rate_low=small, one_class=look("error"))] == ["one_class"]
        found = say(learning_rate_low=small, constant_output=look("error", words="All is grey."))
        assert found[0].cause == "learning_rate_low"
        assert "All is grey." in found[0].symptoms[0]

    def test_findings_of_runs_that_fail_in_many_ways_do_not_contradict_each_other(self, train, mlp, regression):
        x, y = regression
        deep = nn.Sequential(*[part for _ in range(5) for part in (nn.Linear(8, 8), nn.Sigmoid())], nn.Linear(8, 1))
        for network, lr, data in ((deep, 1e-5, (x, y)), (mlp(), 10.0, (x, y)), (mlp(), 1e-6, (100 * x, 100 * y))):
            report = train(network, functional.mse_loss, *data, lr=lr, steps=60)
            changes = {f.change for f in report.findings if f.change is not None}
            assert not any((knob, -way) in changes for knob, way in changes)
            assert report.findings

    def test_each_cause_has_tests_of_its_own(self):
        classes = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
        for name in CAUSES:
            assert f"class Test{name.title().replace('_', '')}:" in classes

    def test_each_cause_is_declared_whole(self):
        for name, declared in CAUSES.items():
            assert declared.name == name
            assert declared.definition
            assert declared.source
            assert isinstance(declared.stage, Stage)


class TestReportThatFails:
    def test_does_not_take_the_fit_down(self, make_trainer, monkeypatch, mlp, regression):
        def broken(*evidence):
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr(attach, "make_report", broken)

        class Module(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.network = mlp()

            def training_step(self, batch, batch_idx):
                return functional.mse_loss(self.network(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*regression), 32)
        trainer = make_trainer(callbacks=ae.DiagnosticsReport(every_n_steps=2, quiet=True), max_epochs=2)
        with pytest.warns(UserWarning, match="could not be made: ZeroDivisionError: on purpose"):
            trainer.fit(Module(), loader)
        assert trainer.state.finished
        assert trainer.global_step == 16

    def test_indices_beside_an_output_that_is_constant(self, train, flat):
        class Quantised(nn.Module):
            def forward(self, h):
                return h, (h[:, 0] > 0.5).long()

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.vq, self.out = Quantised(), nn.Linear(12, 12)

            def forward(self, x):
                h, _ = self.vq(x)
                return self.out(0 * h)

        latent = {"indices": "network.vq[1]", "num_codes": 16}
        report = train(Network(), functional.mse_loss, flat, steps=40, latent=latent)
        assert report.report is not None
        assert report.report.latent["codebook_usage"] == 2 / 16
        assert any("codes are used" in str(f) for f in report.findings)
