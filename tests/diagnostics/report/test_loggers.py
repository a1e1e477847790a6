"""The report where loggers show it, and that none of them can take a run down."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

import lightning_ae as ae


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawn elsewhere, and slowly."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))


def fit(make_trainer, logger, **options):
    report = ae.DiagnosticsReport(every_n_steps=2, quiet=True, **options)
    model = ae.MLPAutoencoder((1, 8, 8), 4, hidden=(8,), activation="relu")
    trainer = make_trainer(callbacks=report, logger=logger, max_epochs=2, log_every_n_steps=5)
    trainer.fit(model, ae.DigitsDataModule())
    return report, trainer


def test_tensorboard_shows_text_and_figures(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report, trainer = fit(make_trainer, TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    (text,) = events.Tensors("diagnostics/text_summary")
    assert text.step == trainer.global_step
    assert text.tensor_proto.string_val[0].decode() == report.report.to_markdown()
    images = [name for name in events.Tags()["images"] if name.startswith("diagnostics/")]
    assert set(images) == {
        f"diagnostics/{name}" for name in ("firing_frequencies", "units", "transmission", "progress")
    }
    assert events.Images(images[0])[0].width > 300


class Run:
    """What is called of a run of Weights & Biases."""

    def __init__(self, broken=False):
        self.logged, self.summary, self.broken = [], {}, broken
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)

    def log(self, values, **options):
        if self.broken and any(name.startswith("diagnostics/") for name in values):
            raise ConnectionError("no network")
        self.logged.append(values)


class Wandb(WandbLogger):
    """Lightning's logger with a stub for the run."""

    def __init__(self, run, folder):
        Logger.__init__(self)
        self.run, self._save_dir = run, str(folder)

    name = version = "stub"

    @property
    def experiment(self):
        return self.run

    @property
    def save_dir(self):
        return self._save_dir

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass

    def finalize(self, status):
        pass

    def after_save_checkpoint(self, callback):
        pass


@pytest.fixture
def wandb(monkeypatch):
    stub = SimpleNamespace(
        Html=lambda data, inject=True: ("html", data, inject),
        Image=lambda figure: ("image", figure),
        Histogram=lambda values: ("histogram", values),
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_weights_and_biases_show_the_page_the_verdict_and_pictures(make_trainer, tmp_path, wandb):
    run = Run()
    report, trainer = fit(make_trainer, Wandb(run, tmp_path))
    (shown,) = [values for values in run.logged if "diagnostics/page" in values]
    assert shown["diagnostics/page"] == ("html", report.report.to_html(), False)
    assert shown["trainer/global_step"] == trainer.global_step
    assert shown["diagnostics/units"][0] == "image"
    assert run.summary == {"diagnostics/verdict": report.report.verdict}


@pytest.mark.usefixtures("no_pictures")
def test_a_logger_that_fails_is_a_warning_and_the_page_is_written(make_trainer, tmp_path, wandb):
    with pytest.warns(UserWarning, match="could not log to Wandb: ConnectionError: no network"):
        report, _ = fit(make_trainer, Wandb(Run(broken=True), tmp_path), folder=tmp_path / "page")
    assert ae.Report.load(tmp_path / "page") == report.report


def test_a_folder_that_cannot_be_written_is_a_warning_and_the_report_is_there(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"could not write to .*file"):
        report, _ = fit(make_trainer, False, folder=tmp_path / "file")
    assert report.report is not None


@pytest.mark.usefixtures("no_pictures")
def test_writes_into_the_folder_of_the_run_or_the_one_given_and_else_nowhere(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"diagnostics.html", "diagnostics.json", "diagnostics.md"}
    fit(make_trainer, CSVLogger(tmp_path / "logs", name="run"))
    assert names <= {path.name for path in (tmp_path / "logs/run/version_0").iterdir()}
    before = set(tmp_path.rglob("*"))
    fit(make_trainer, False)
    assert set(tmp_path.rglob("*")) == before
    fit(make_trainer, CSVLogger(tmp_path / "logs", name="run"), folder=tmp_path / "elsewhere")
    assert names <= {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert not names & {path.name for path in (tmp_path / "logs/run/version_1").iterdir()}
