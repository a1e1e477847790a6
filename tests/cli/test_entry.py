"""The command line trains, resumes, tests and predicts, from flags, from YAML, and from a checkpoint alone."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_ae as ae
from lightning_ae.cli import main

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger.class_path=CSVLogger",
    "--trainer.logger.init_args.save_dir=.",
]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ae"])  # pytest's own are not ours


def run(*args: str):
    return main([*args, *QUIET])


def checkpoint() -> str:
    (path,) = Path().rglob("*.ckpt")
    return str(path)


def test_fit_from_flags_then_predict_from_the_checkpoint_alone():
    fit = ["fit", "--model", "LinearAutoencoder", "--model.latent_dim", "8", "--data", "DigitsDataModule"]
    trained = run(*fit, "--trainer.max_epochs", "2")
    assert trained.trainer.current_epoch == 2
    assert trained.model.encoder.in_shape == (1, 8, 8)  # from the data
    run("predict", "--ckpt_path", checkpoint(), "--data", "DigitsDataModule")
    predictions = ae.load_predictions("predictions")
    x = torch.cat([x for x, _ in trained.datamodule.predict_dataloader()])
    model = trained.model.cpu().eval()
    torch.testing.assert_close(predictions["z"], model.encode(x).detach())
    torch.testing.assert_close(predictions["reconstruction"], model.reconstruct(x).detach())


CONFIG = """
trainer: {max_epochs: 1}
model:
  class_path: ConvAutoencoder
  init_args:
    latent_dim: 4
    channels: [4]
    loss: BernoulliNLL
    corruption: {class_path: lightning_ae.MaskingNoise, init_args: {p: 0.2}}
    penalties:
      prior: {class_path: WeightPrior, init_args: {prior_variance: 2.0}}
data: {class_path: DigitsDataModule}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}
lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.5}}
"""


def test_fit_from_yaml_then_test_and_resume_from_it():
    Path("run.yaml").write_text(CONFIG)
    trained = run("fit", "-c", "run.yaml")
    assert trained.model.penalties["prior"].num_examples == trained.datamodule.num_train_examples
    assert type(trained.trainer.optimizers[0]) is torch.optim.SGD
    assert trained.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0005]
    path = checkpoint()
    tested = run("test", "-c", "run.yaml", "--ckpt_path", path)
    assert tested.trainer.callback_metrics["test/loss"] > 0
    loaded = ae.load(path)
    assert isinstance(loaded.corruption, ae.MaskingNoise)
    assert loaded.penalties["prior"].weight == 0.25
    resumed = run("fit", "-c", "run.yaml", "--ckpt_path", path, "--trainer.max_epochs", "2")
    assert resumed.trainer.global_step == 2 * trained.trainer.global_step


def test_the_saved_configuration_is_that_of_the_run():
    Path("run.yaml").write_text(CONFIG)
    run("fit", "-c", "run.yaml")
    (saved,) = Path().rglob("config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert config["model"]["init_args"]["corruption"]["init_args"]["p"] == 0.2


def test_a_checkpoint_that_names_foreign_code_is_not_followed():
    class Mine(ae.LinearAutoencoder):
        pass

    import lightning as L

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Mine(4, 2))
    trainer.save_checkpoint("m.ckpt")
    with pytest.raises(ValueError, match="not part of lightning_ae"):
        run("predict", "--ckpt_path", "m.ckpt", "--data", "DigitsDataModule")


def test_a_checkpoint_cannot_make_it_import_code(tmp_path, monkeypatch):
    """Neither the model's own class nor one nested in its arguments, whether the model is named or not."""
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    run("fit", "--model=LinearAutoencoder", "--model.latent_dim=2", "--data=DigitsDataModule", "--trainer.max_epochs=1")
    path = checkpoint()
    state = torch.load(path)
    state["hyper_parameters"]["init_args"]["corruption"] = {"class_path": "evil.Net", "init_args": {}}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"asks for evil\.Net, which is not part of lightning_ae"):
        run("predict", "--ckpt_path", path, "--data=DigitsDataModule")
    run("test", "--ckpt_path", path, "--model=LinearAutoencoder", "--model.latent_dim=2", "--data=DigitsDataModule")
    assert not Path("ran").exists()


LOADER = "lightning_ae.LinearAutoencoder.load_from_checkpoint"
TEXTS = {
    "a class": "evil.Net",
    "a tree": "{class_path: evil.Net}",
    "an escaped tree": '{"\\x63lass_path": evil.Net}',
    "a file": "evil.yaml",
    "a loader": f"{{class_path: {LOADER}, init_args: {{checkpoint_path: evil.ckpt, weights_only: false}}}}",
}


class LeavesATrace:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.fixture
def crafted(tmp_path, make_trainer):
    """Writes a checkpoint with a text among its arguments, beside all that the texts name."""
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / "evil.yaml").write_text("class_path: evil.Net\n")
    torch.save({"hyper_parameters": LeavesATrace()}, "evil.ckpt")
    trainer = make_trainer()
    trainer.strategy.connect(ae.LinearAutoencoder((1, 8, 8), 2))
    trainer.save_checkpoint("good.ckpt")

    def write(name: str, text: str) -> str:
        state = torch.load("good.ckpt")
        state["hyper_parameters"]["init_args"][name] = text
        torch.save(state, "crafted.ckpt")
        return "crafted.ckpt"

    return write


def test_the_crafted_files_would_leave_a_trace(crafted):
    torch.load("evil.ckpt", weights_only=False)
    assert Path("ran").exists()


@pytest.mark.parametrize("name", ["corruption", "loss", "lr"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_in_a_checkpoint_is_neither_imported_nor_built(crafted, monkeypatch, text, name):
    monkeypatch.syspath_prepend(Path().resolve())
    with pytest.raises(ValueError, match=rf"crafted\.ckpt: .*{name}: expected no text for a .* of LinearAutoencoder"):
        run("predict", "--ckpt_path", crafted(name, text), "--data=DigitsDataModule")
    assert not Path("ran").exists()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_other_commands_build_it_no_more(crafted, monkeypatch, command):
    monkeypatch.syspath_prepend(Path().resolve())
    with pytest.raises(ValueError, match="expected no text"):
        run(command, f"--ckpt_path={crafted('corruption', TEXTS['a loader'])}", "--data=DigitsDataModule")
    assert not Path("ran").exists()


@pytest.mark.parametrize("command", ["predict", "doctor"])
def test_nor_does_a_process_of_its_own(crafted, command):
    path = crafted("corruption", TEXTS["a tree"])
    line = [sys.executable, "-m", "lightning_ae", command, "--ckpt_path", path, "--data=DigitsDataModule"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "corruption: expected no text for a" in done.stderr
    assert not Path("ran").exists()


def test_a_flat_prior_and_a_tied_model_in_a_checkpoint(make_trainer):
    encoder = ae.LinearEncoder((1, 8, 8), 2)
    flat = ae.LinearAutoencoder((1, 8, 8), 2, penalties={"p": ae.WeightPrior(prior_variance=float("inf"))})
    tied = ae.Autoencoder(encoder, ae.LinearDecoder(2, (1, 8, 8), tied_to=encoder))
    for name, model in (("flat", flat), ("tied", tied)):
        trainer = make_trainer()
        trainer.fit(model, ae.DigitsDataModule())
        trainer.save_checkpoint(f"{name}.ckpt")
    assert run("test", "--ckpt_path=flat.ckpt", "--data=DigitsDataModule").model.penalties["p"].weight == 0
    again = run("test", "--ckpt_path=tied.ckpt", "--data=DigitsDataModule").model
    assert again.decoder.layer.weight is again.encoder.weight
    torch.testing.assert_close(again.encoder.weight, encoder.weight)


def test_fit_goes_on_from_the_configuration_and_says_so():
    Path("m.ckpt").touch()
    with pytest.raises(ValueError, match=r"lightning-ae fit -c <log_dir>/config.yaml --ckpt_path"):
        run("fit", "--ckpt_path", "m.ckpt", "--data=DigitsDataModule")


def test_what_is_installed_ends_without_an_exit_code(monkeypatch):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lightning-ae")
    fit = ["fit", "--model=LinearAutoencoder", "--model.latent_dim=2", "--data=DigitsDataModule"]
    monkeypatch.setattr(sys, "argv", ["lightning-ae", *fit, "--trainer.fast_dev_run=1", *QUIET])
    assert script.load()() is None  # anything else is printed, and the process fails


def test_what_is_installed_finds_classes_in_the_current_folder(monkeypatch):
    Path("of_mine.py").write_text("import lightning_ae as ae\nclass Mine(ae.LinearAutoencoder): pass\n")
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lightning-ae")
    Path("inner").mkdir()  # a parser goes there to read the file
    Path("inner/run.yaml").write_text("model: {class_path: of_mine.Mine, init_args: {latent_dim: 2}}")
    fit = ["fit", "-c", "inner/run.yaml", "--data=DigitsDataModule"]
    monkeypatch.setattr(sys, "argv", ["lightning-ae", *fit, "--trainer.fast_dev_run=1", *QUIET])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as that of an installed script
    assert script.load()() is None
    assert "of_mine" in sys.modules


def test_a_model_that_is_not_ours_is_fitted_and_predicts():
    Path("of_somebody.py").write_text(
        "import lightning as L, torch\n"
        "class Theirs(L.LightningModule):\n"
        "    def __init__(self, width: int = 4):\n"
        "        super().__init__()\n"
        "        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width))\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return self.net(batch[0]).square().mean()\n"
        "    validation_step = training_step\n"
        "    def predict_step(self, batch, batch_idx):\n"
        "        return self.net(batch[0])\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), 0.1)\n"
    )
    sys.path.insert(0, str(Path.cwd()))
    model = ["--model=of_somebody.Theirs", "--model.width=3", "--data=DigitsDataModule"]
    try:
        fitted = run("fit", *model, "--trainer.fast_dev_run=1")
        run("predict", *model, "--trainer.fast_dev_run=1")
    finally:
        sys.path.remove(str(Path.cwd()))
    assert fitted.model.net[1].out_features == 3
    assert not Path("predictions").exists()


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lightning_ae", "--help"], capture_output=True, text=True, check=True)
    assert "{fit,validate,test,predict}" in done.stdout
    assert "lightning-ae doctor" in done.stdout
