"""The shipped YAML files are the test matrix: each variant under each kind of loss, from the CLI to predictions."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import distributions
from torch.nn import functional

import lightning_ae as ae
from lightning_ae.cli import main

VARIANTS = sorted((Path(__file__).parents[2] / "recipes" / "variants").glob("*.yaml"))
SSIM = {"class_path": "lightning_ae.SSIMLoss", "init_args": {"window_size": 7, "sigma": 1.0}}
LOSSES = {
    "gaussian": {"class_path": "lightning_ae.GaussianNLL", "init_args": {"scale": 0.3, "learn_scale": True}},
    "bernoulli": {"class_path": "lightning_ae.BernoulliNLL"},
    "ssim mix": {
        "class_path": "lightning_ae.AlphaMix",
        "init_args": {"pixel": {"class_path": "lightning_ae.BernoulliNLL"}, "perceptual": SSIM, "alpha": 0.9},
    },
}
MONITORS = ("DeadReLUMonitor", "GradientSaturationMonitor", "LatentSparsityMonitor")


def test_every_variant_is_shipped_as_yaml():
    named = {yaml.safe_load(path.read_text())["model"]["class_path"] for path in VARIANTS}
    shipped = {name for name, c in vars(ae).items() if isinstance(c, type) and issubclass(c, ae.Autoencoder)}
    assert named == shipped - {"Autoencoder"}


@pytest.mark.filterwarnings("ignore:GreedyLevels")  # one epoch is too few for it
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_it_trains_checkpoints_reloads_predicts_compiles_and_is_monitored(path, loss, tmp_path, monkeypatch):
    if path.stem == "dictionary" and loss != "gaussian":
        pytest.skip("a dictionary scales vectors, which neither Bernoulli nor SSIM allows: it refuses both")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ae"])  # pytest's own are not ours
    config = yaml.safe_load(path.read_text())
    arguments = config["model"]["init_args"]
    (arguments["levels"][0]["init_args"] if "levels" in arguments else arguments)["loss"] = LOSSES[loss]
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1, "accelerator": "cpu"}
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    config["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": "."}}
    config["trainer"].setdefault("callbacks", []).extend(
        {"class_path": f"lightning_ae.{name}", "init_args": {"every_n_steps": 1}} for name in MONITORS
    )
    Path("run.yaml").write_text(yaml.safe_dump(config))

    run = main(["fit", "-c", "run.yaml"])
    model, metrics = run.model.eval(), run.trainer.callback_metrics
    assert metrics["train/loss"].isfinite()
    assert metrics["val/reconstruction"].isfinite()
    monitors = {type(callback).__name__: callback for callback in run.trainer.callbacks}
    assert monitors["LatentSparsityMonitor"].summary()["samples"] > 0
    assert monitors["GradientSaturationMonitor"].update_ratio()
    assert any(name.startswith("latent/") for name in metrics)
    assert any(name.startswith("saturation/") for name in metrics)

    (saved,) = Path().rglob("*.ckpt")
    loaded = ae.load(saved, score="loss").eval()
    assert type(loaded) is type(model)
    if isinstance(model, ae.StackedAutoencoder):
        model.training_level = loaded.training_level = None  # one epoch trained the first level alone
    x = torch.cat([model.get_input(batch) for batch in run.datamodule.test_dataloader()])
    with torch.no_grad():
        predictions = run.trainer.predict(loaded, run.datamodule.test_dataloader())
        reconstruction = torch.cat([batch["reconstruction"] for batch in predictions])
        torch.testing.assert_close(reconstruction, model.reconstruct(x))
        score = torch.cat([batch["score"] for batch in predictions])
        assert score.isfinite().all()
        if loss != "ssim mix":
            unit = getattr(model, "input_scale", 1.0)  # of a dictionary's terms
            torch.testing.assert_close(
                score, likelihood(loss, unit * reconstruction, unit * x, model), rtol=1e-4, atol=1e-3
            )

    agrees_when_compiled(model, x[:16])


def likelihood(loss, reconstruction, x, model):
    """The negative log-likelihood, by torch's own distributions."""
    if loss == "bernoulli":
        return functional.binary_cross_entropy(reconstruction, x, reduction="none").flatten(1).sum(1)
    return -distributions.Normal(reconstruction, model.loss.scale).log_prob(x).flatten(1).sum(1)


def agrees_when_compiled(model, x):
    """Loss and gradients of a training step in one graph are those of the same step without compiling."""
    torch._dynamo.reset()
    gradients = []
    for compiled in (False, True):
        own = copy.deepcopy(model).train()
        own.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        step = torch.compile(own.training_step, fullgraph=True, backend="aot_eager") if compiled else own.training_step
        torch.manual_seed(0)
        loss = step(x, 0)["loss"]
        loss.backward()
        gradients.append({"loss": loss, **{n: p.grad for n, p in own.named_parameters() if p.grad is not None}})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 2
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
