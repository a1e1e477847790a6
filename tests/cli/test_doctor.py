"""The doctor says what is wrong, where, and by its exit code; and writes nothing but its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

import lightning_ae as ae
from lightning_ae.cli import doctor, main
from lightning_ae.cli.making import DoctorCLI
from lightning_ae.cli.treating import with_remedies
from lightning_ae.diagnostics import remedies

THEIRS = """
import lightning as L
import torch
from torch import nn


class Plain(L.LightningModule):
    def __init__(self, width: int, lr: float = 0.05, scale=1.0, squash=False):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8))

    def training_step(self, batch, batch_idx):
        x = self.hparams.scale * batch[0]
        y = self.net(x)
        loss = nn.functional.mse_loss(y.sigmoid() if self.hparams.squash else y, x)
        self.logger and self.logger.experiment.add_scalar("drawn", 1.0)
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


class FailsFirst(Plain):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0].reshape(-1, 4)).sum()


class FailsLater(Plain):
    def training_step(self, batch, batch_idx):
        if self.global_step == 40:
            raise RuntimeError("the loss went bad")
        return super().training_step(batch, batch_idx)


class Noisy(Plain):
    def training_step(self, batch, batch_idx):
        print("not JSON")
        return super().training_step(batch, batch_idx)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), (batch[0].sum(1) > 0).long())

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Slow(Plain):
    def training_step(self, batch, batch_idx):
        import time
        time.sleep(0.05)
        open("begun", "w").close()
        return super().training_step(batch, batch_idx)


class Data(L.LightningDataModule):
    def __init__(self, n: int = 320):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        x = torch.randn(n, 2, generator=g) @ torch.randn(2, 8, generator=g)
        self.x = torch.utils.data.TensorDataset(x)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.x, 32, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.x, 64)


class NoValidation(L.LightningDataModule):
    def train_dataloader(self):
        return Data().train_dataloader()


class Own(Plain):
    train_dataloader = lambda self: Data().train_dataloader()
"""
CPU = "--trainer.accelerator=cpu"


@pytest.fixture(autouse=True)
def _theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ae"])
    monkeypatch.delitem(sys.modules, "of_theirs", raising=False)
    Path("of_theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)


def plain(*args: str, name: str = "Plain", data: str = "Data", steps: int = 100) -> list[str]:
    return [f"--model=of_theirs.{name}", "--model.width=12", f"--data=of_theirs.{data}", CPU, f"--steps={steps}", *args]


def save(model: L.LightningModule, data: L.LightningDataModule, path: str, epochs: int = 1) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, enable_model_summary=False, **quiet)
    trainer.fit(model, data)
    trainer.save_checkpoint(path)


# -- a fit ----------------------------------------------------------------------------------------------------------


def test_a_healthy_model_is_healthy_and_only_the_folder_is_left(capsys):
    before = {path.name for path in Path().iterdir()}
    assert main(["doctor", *plain(steps=200)]) == 0
    out, err = capsys.readouterr()
    assert "error]" not in out
    assert "Written to doctor/diagnostics.html." in out
    assert not err
    assert {path.name for path in Path().iterdir()} - before <= {"doctor", "__pycache__"}
    assert {"diagnostics.html", "diagnostics.json", "diagnostics.md"} <= {p.name for p in Path("doctor").iterdir()}


def test_a_classifier_is_healthy():
    assert doctor(["--model=of_theirs.Classifier", "--data=of_theirs.Data", CPU, "--steps=200"]) == 0


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (["--model.scale=255", "--model.squash=true"], "target_out_of_reach"),
        (["--optimizer=SGD", "--optimizer.lr=300"], "learning_rate_high"),
    ],
)
def test_a_broken_one_is_found_out(args, cause):
    assert doctor(plain(*args)) == 1
    assert ae.Report.load("doctor").findings[0].cause == cause


def test_a_model_that_brings_its_own_data():
    assert doctor(["--model=of_theirs.Own", "--model.width=8", CPU, "--steps=60", "--folder=here"]) in (0, 1)
    assert Path("here/diagnostics.html").exists()


CONFIG = """
seed_everything: 5
trainer:
  accelerator: cpu
  max_epochs: 1
  precision: bf16-mixed
  accumulate_grad_batches: 2
  gradient_clip_val: 0.5
  enable_progress_bar: true
  logger: {class_path: CSVLogger, init_args: {save_dir: logs}}
  callbacks:
    - {class_path: lightning.pytorch.callbacks.ModelCheckpoint}
    - {class_path: lightning.pytorch.callbacks.LearningRateMonitor}
    - {class_path: lightning_ae.DeadReLUMonitor}
    - {class_path: lightning_ae.DiagnosticsReport, init_args: {latent: encoder}}
model: {class_path: MLPAutoencoder, init_args: {latent_dim: 4, hidden: [16]}}
data: {class_path: DigitsDataModule, init_args: {batch_size: 32}}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 30.0}}
lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.9}}
"""


@pytest.mark.filterwarnings("ignore:`MLPAutoencoder.configure_optimizers` will be overridden")
def test_the_fit_is_that_of_the_configuration_on_one_device_without_what_writes():
    Path("run.yaml").write_text(CONFIG)
    cli = DoctorCLI(["-c", "run.yaml"])
    model = cli.make_model()
    made = model.configure_optimizers()
    assert type(made[0][0]) is torch.optim.SGD
    assert made[0][0].param_groups[0]["lr"] == 30
    assert type(made[1][0]) is torch.optim.lr_scheduler.ExponentialLR
    assert cli.latent.latent == "encoder"
    options = cli.trainer_options
    assert (options["precision"], options["accumulate_grad_batches"], options["gradient_clip_val"]) == (
        "bf16-mixed", 2, 0.5
    )  # fmt: skip
    kinds = [type(callback).__name__ for callback in options["callbacks"]]
    assert kinds == ["LearningRateMonitor", "DeadReLUMonitor"]
    assert "max_epochs" not in options
    assert cli.make_model() is not model


def test_a_saved_configuration_of_a_fit_is_taken():
    saved = yaml.safe_load(CONFIG) | {"ckpt_path": None, "weights_only": None}
    Path("run.yaml").write_text(yaml.safe_dump(saved))
    assert DoctorCLI(["-c", "run.yaml"]).config.steps == 300


# -- a checkpoint ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_ours_needs_no_name_and_keeps_its_weights(capsys):
    enc = ae.LinearEncoder((1, 8, 8), 2)
    tied = ae.Autoencoder(enc, ae.LinearDecoder(2, (1, 8, 8), tied_to=enc))
    save(tied, ae.DigitsDataModule(), "m.ckpt", 3)
    before = Path("m.ckpt").read_bytes()
    assert doctor(["--ckpt_path=m.ckpt", "--data=DigitsDataModule", CPU]) == 0
    assert Path("m.ckpt").read_bytes() == before
    report = ae.Report.load("doctor")
    assert report.about["checkpoint"] == "m.ckpt"
    data = ae.DigitsDataModule()
    data.setup("fit")
    x = torch.cat([x for x, _ in data.val_dataloader()])
    x_hat = ae.load("m.ckpt").reconstruct(x).detach()
    expected = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert report.output["held-out error"] == pytest.approx(float(expected), rel=1e-4)


def test_a_checkpoint_whose_units_are_dead():
    model = ae.MLPAutoencoder((1, 8, 8), 4, hidden=(16,))
    with torch.no_grad():
        model.encoder.layers[0].bias.fill_(-100.0)
    save(model, ae.DigitsDataModule(), "m.ckpt")
    assert doctor(["--ckpt_path", "m.ckpt", "--data", "DigitsDataModule", CPU, "--steps", "20"]) == 1
    assert ae.Report.load("doctor").findings[0].cause == "dead_units"


def test_a_checkpoint_of_another_is_built_from_its_hyperparameters_and_what_is_said(capsys):
    import of_theirs

    save(of_theirs.Plain(width=7, lr=0.02), of_theirs.Data(), "m.ckpt", 20)
    named = ["--ckpt_path=m.ckpt", "--data=of_theirs.Data", CPU]
    assert doctor([*named, "--model=of_theirs.Plain"]) == 0
    assert doctor([*named, "--model", "of_theirs.Plain", "--model.scale=255", "--model.squash=true"]) == 1
    assert doctor(named) == 2
    assert "does not say of which class its model is: give --model" in capsys.readouterr().err
    assert doctor([*named, "--model=of_theirs.Plain", "--model.width=8"]) == 2
    assert "does not fit a Plain with these arguments" in capsys.readouterr().err


# -- what cannot be diagnosed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data=of_theirs.Data"], "model: none is named"),
        (["--model=of_theirs.Plain", "--model.width=3"], "data: none are named"),
        (["--model=of_theirs.Nothing"], "of_theirs has no class of that name"),
        (["--model=nowhere.Plain"], "no module nowhere, in which nowhere.Plain would be"),
        (["--model=of_theirs.Data"], "of_theirs.Data is no LightningModule"),
        (["--model=Unheard"], "no LightningModule called Unheard"),
        (["--data", "of_theirs.Plain"], "of_theirs.Plain is no LightningDataModule"),
        (["--ckpt_path=nowhere.ckpt", "--data=DigitsDataModule"], "No checkpoint at nowhere.ckpt"),
        (plain("--steps=0"), "steps: expected a positive number, got 0"),
        (plain("--treat", data="NoValidation"), "NoValidation has no validation data"),
    ],
)
def test_what_is_missing_is_named(args, said, capsys):
    assert doctor(args) == 2
    assert said in capsys.readouterr().err


def test_arguments_that_do_not_parse_end_as_argparse_does(capsys):
    with pytest.raises(SystemExit) as ended:
        doctor(plain("--model.widht=3"))
    assert ended.value.code == 2
    assert "'widht' is not accepted" in capsys.readouterr().err


def test_a_model_that_fails_at_once_is_shown_with_its_code_and_batch(capsys):
    assert doctor(plain(name="FailsFirst")) == 2
    err = capsys.readouterr().err
    assert "return self.net(batch[0].reshape(-1, 4)).sum()" in err
    assert "The fit failed in a training batch of ((32, 8) float32): RuntimeError: mat1 and mat2" in err
    assert "site-packages/lightning" not in err
    assert "lightning_ae/diagnostics" not in err


def test_a_fit_that_breaks_off_is_reported_until_there(capsys):
    assert doctor(plain(name="FailsLater")) == 1
    out, err = capsys.readouterr()
    assert "Written to" in out
    assert "After 40 batches the fit broke off" in err
    assert "the loss went bad" in err


# -- JSON and treatment ---------------------------------------------------------------------------------------------


def test_json_is_all_that_is_printed(capsys):
    assert doctor(plain("--json", "--model.scale=255", "--model.squash=true", name="Noisy")) == 1
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert (tree["exit_code"], tree["folder"], tree["treatment"]) == (1, "doctor", None)
    assert tree["report"] == json.loads(Path("doctor/diagnostics.json").read_text())
    assert "not JSON" in err


def test_a_treatment_is_written_as_a_configuration_with_the_users_callbacks(capsys):
    Path("run.yaml").write_text(CONFIG.replace("bf16-mixed", "32"))
    assert doctor(["-c", "run.yaml", "--treat", "--trials=1", "--steps=80"]) == 0
    out = capsys.readouterr().out
    assert "lightning-ae fit -c doctor/treatment.yaml" in out
    assert isinstance(ae.load("doctor/treated.ckpt"), ae.MLPAutoencoder)
    assert Path("doctor/treated/diagnostics.html").exists()
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    fitted = main(["fit", "-c", "run.yaml", "-c", "doctor/treatment.yaml", *quiet])
    kinds = [type(callback).__name__ for callback in fitted.trainer.callbacks]
    assert {"LearningRateMonitor", "DeadReLUMonitor", "DiagnosticsReport", "ApplyRemedies"} <= set(kinds)
    assert type(fitted.trainer.optimizers[0]) is torch.optim.Adam or fitted.trainer.optimizers[0].defaults["lr"] == 30
    assert fitted.trainer.optimizers[0].param_groups[0]["lr"] < 1
    assert fitted.trainer.callback_metrics["val/loss"] < 100


def test_what_is_healthy_is_not_treated(capsys):
    assert doctor(plain("--treat", steps=200)) == 0
    assert "Nothing to treat." in capsys.readouterr().out
    assert not Path("doctor/treated.ckpt").exists()


def test_longer_training_multiplies_what_the_configuration_says():
    longer = remedies.Together((remedies.TrainLonger(3), remedies.ClipGradients(2.0)))
    found = with_remedies({"trainer": {"max_epochs": 2, "max_steps": -1, "callbacks": {"class_path": "a"}}}, [longer])
    expected = {"max_epochs": 6, "max_steps": -1, "callbacks": [{"class_path": "a"}], "gradient_clip_val": 2.0}
    assert found == {"trainer": expected}


# -- as a process ---------------------------------------------------------------------------------------------------


def process(*args: str) -> subprocess.Popen:
    script = Path(sys.executable).parent / "lightning-ae"
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([script, "doctor", *args], env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.mark.slow
def test_the_installed_script_finds_models_in_the_current_folder_and_exits_with_what_was_found():
    well, ill = process(*plain(steps=200)), process(*plain("--model.scale=255", "--model.squash=true"))
    for started, code in ((well, 0), (ill, 1)):
        out, err = started.communicate(timeout=300)
        assert started.returncode == code, err
        assert not err
        assert "Written to" in out


@pytest.mark.slow
def test_an_interrupt_ends_the_fit_and_reports_what_was_seen():
    running = process(*plain(name="Slow", steps=100_000))
    while not Path("begun").exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.2)
    time.sleep(1.0)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert "Written to doctor/diagnostics.html." in out
    assert "Interrupted" in err
