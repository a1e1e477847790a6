from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
import yaml
from torch import nn

import lightning_ae as ae
from lightning_ae.cli import main
from lightning_ae.diagnostics import Report, Treatment, remedies
from lightning_ae.diagnostics.remedies import (
    ClipGradients,
    Reinitialize,
    ReviveUnits,
    ScaleLearningRate,
    SetBias,
    StandardizeInput,
    StopEarly,
    SwapActivation,
    Together,
    TrainForgotten,
    WarmUpWeight,
    ZeroGradients,
)


def test_changes_of_the_model_are_made_before_the_optimizer_is_configured_and_once(users, fit):
    module = users()
    change = ae.ApplyRemedies([SwapActivation("relu"), SetBias(("network.0",), 0.5)])
    seen = []

    def configure(module):
        seen.append(module.network[0].bias.tolist())
        return torch.optim.SGD(module.parameters(), lr=0.1)

    module.configure = configure
    fit(module, change)
    after = module.network[0].bias.detach().clone()
    fit(module, change)
    assert seen == [[0.5] * 8, after.tolist()]  # not set back
    assert isinstance(module.network[1], nn.ReLU)


def test_a_remedy_that_changes_nothing_is_warned_of(users, fit):
    for remedy in (SwapActivation("relu", ("nowhere",)), ClipGradients()):
        with pytest.warns(UserWarning, match=f"{type(remedy).__name__} changes nothing here: "):
            fit(users(), ae.ApplyRemedies([remedy]))


def test_only_a_fit_is_changed(users, make_trainer, loader):
    module = users()
    make_trainer(callbacks=ae.ApplyRemedies([SwapActivation("relu")])).validate(module, loader, verbose=False)
    assert isinstance(module.network[1], nn.Tanh)


def test_what_is_together_is_made_each_in_its_time(users, rates, fit):
    both = Together((SwapActivation("relu"), Together((ScaleLearningRate(0.5),))))
    module = users()
    assert set(rates(module, ae.ApplyRemedies([both])).flatten().tolist()) == {0.05}
    assert isinstance(module.network[1], nn.ReLU)


def test_new_weights_that_a_checkpoint_replaces_are_warned_of(users, fit, tmp_path):
    fit(users()).save_checkpoint(tmp_path / "plain.ckpt")
    treated = fit(users(), ae.ApplyRemedies([Reinitialize("he")]))
    treated.save_checkpoint(tmp_path / "treated.ckpt")
    change = ae.ApplyRemedies([Reinitialize("he")])
    with pytest.warns(UserWarning, match="Reinitialize is undone by the weights of the checkpoint"):
        fit(users(), change, ckpt_path=tmp_path / "plain.ckpt", max_epochs=3)
    fit(users(), change, ckpt_path=tmp_path / "treated.ckpt", max_epochs=3)  # as a warning is an error


def test_statistics_of_the_input_go_on_in_a_run_that_is_resumed(users, fit, resumable, tmp_path):
    """A user's module is built without them, and has them before the weights are loaded."""
    change = ae.ApplyRemedies([StandardizeInput("network.0", 4)])
    whole, resumed = users(), users()
    first = fit(whole, change, data=resumable())
    first.save_checkpoint(tmp_path / "end.ckpt")
    fit(resumed, change, data=resumable(), ckpt_path=tmp_path / "end.ckpt", max_epochs=3)
    assert resumed.network[0].input_count == 96
    assert whole.network[0].input_count == 64


def test_remedies_come_as_one_or_several_and_nothing_else_does(users):
    assert ae.ApplyRemedies(ZeroGradients()).remedies == (ZeroGradients(),)
    with pytest.raises(TypeError, match="remedies: expected remedies, got a str"):
        ae.ApplyRemedies(["ScaleLearningRate"])


def test_remedies_of_optimizers_share_one_callback():
    options = {"callbacks": L.Callback()}
    for remedy in (ScaleLearningRate(0.5), TrainForgotten()):
        assert remedy.apply(nn.Linear(1, 1), options)
    assert [type(c) for c in options["callbacks"]] == [L.Callback, ae.ApplyRemedies]
    assert options["callbacks"][1].remedies == (ScaleLearningRate(0.5), TrainForgotten())
    assert not ScaleLearningRate(0.5).apply(nn.Linear(1, 1))


def test_the_callback_and_a_model_it_has_changed_can_be_copied(users, fit):
    change = ae.ApplyRemedies([SwapActivation("relu"), ScaleLearningRate(0.5)])
    module = users()
    copies = (copy.deepcopy(change), pickle.loads(pickle.dumps(change)))
    fit(module, change)
    for other in copies:
        assert other.remedies == change.remedies
        assert other.state_key == change.state_key
    again = copy.deepcopy(module)
    fit(again, change)
    assert isinstance(again.network[1], nn.ReLU)


def test_two_callbacks_keep_their_states_apart(rates, users, tmp_path, fit, resumable):
    both = [ae.ApplyRemedies([ScaleLearningRate(0.5)]), ae.ApplyRemedies([TrainForgotten(), ScaleLearningRate(0.1)])]
    fit(users(), *both, data=resumable()).save_checkpoint(tmp_path / "end.ckpt")
    again = rates(users(), *both, data=resumable(), ckpt_path=tmp_path / "end.ckpt", max_epochs=3)
    assert again.unique().tolist() == pytest.approx([0.005])


# -- from a configuration ------------------------------------------------------------------------------------------

CHANGES = [
    SwapActivation("gelu"),
    Together((Reinitialize("he", ("decoder.layers.0", "encoder.layers.0")), ClipGradients(0.5))),
    SetBias(("decoder.layers.0",), 0.5),
    StandardizeInput("encoder.layers.0", 64),
    ScaleLearningRate(0.5),
    remedies.ScaleWeightDecay(0.0),
    TrainForgotten(),
    ZeroGradients(),
    remedies.ExchangeLoss("BernoulliNLL"),
    remedies.BatchSize(32),
    StopEarly("val/loss", 2),
    ReviveUnits(),
]


def treatment(kept):
    return Treatment([], kept, None, Report([]), 1.0, 0.5)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """LightningCLI with a model and the configuration of a treatment."""
    monkeypatch.setattr("sys.argv", ["lightning-ae"])
    trainer = {
        "accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False, "limit_val_batches": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path),
        "val_check_interval": 1, "num_sanity_val_steps": 0,
    }  # fmt: skip

    def main_with(model, config):
        plain = {"seed_everything": 0, "trainer": trainer, "model": model, "data": "lightning_ae.DigitsDataModule"}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
        (tmp_path / "change.yaml").write_text(config)
        return main(["fit", "-c", str(tmp_path / "run.yaml"), "-c", str(tmp_path / "change.yaml")])

    return main_with


MLP = {
    "class_path": "lightning_ae.MLPAutoencoder",
    "init_args": {"latent_dim": 4, "hidden": [16], "lr": 0.01, "weight_decay": 0.3},
}


def test_the_yaml_of_a_treatment_runs_on_the_command_line_and_makes_its_changes(run):
    done = run(MLP, treatment(CHANGES).yaml())
    model, trainer = done.model, done.trainer
    assert isinstance(model.encoder.layers[1], nn.GELU)
    assert model.encoder.layers[0].input_count == 96
    assert isinstance(model.loss, ae.BernoulliNLL)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.005, 0.0)
    assert trainer.gradient_clip_val == 0.5
    assert done.datamodule.batch_size == 32
    assert (model.decoder.layers[0].bias - 0.5).abs().max() < 0.1  # three steps of AdamW from it
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    assert {"EarlyStopping", "DeadUnitReviver"} <= set(kinds)


def test_the_yaml_of_a_warm_up_runs_on_the_command_line(run):
    pair = {"in_shape": 64, "latent_dim": 2}
    model = {
        "class_path": "lightning_ae.VariationalAutoencoder",
        "init_args": {
            "encoder": {"class_path": "lightning_ae.MLPEncoder", "init_args": {**pair, "latent_dim": 4}},
            "decoder": {"class_path": "lightning_ae.MLPDecoder", "init_args": {"latent_dim": 2, "out_shape": 64}},
        },
    }
    config = treatment([WarmUpWeight("kl", 3.0, 1.0)]).yaml() + "\ndata:\n  init_args:\n    flat: true\n"
    done = run(model, config)
    assert done.model.code.beta == pytest.approx(2.0)  # the third of three steps


def test_the_code_of_a_treatment_runs_and_makes_the_same_changes(fit, tmp_path):
    kept = [c for c in CHANGES if not isinstance(c, (remedies.BatchSize, StopEarly))]
    weights = []
    for by_code in (True, False):
        torch.manual_seed(0)
        model = ae.MLPAutoencoder((1, 8, 8), 4, hidden=(16,), lr=0.01, weight_decay=0.3)
        options = {}
        if by_code:
            space = {"model": model}
            exec(treatment(kept).python(), space)
            trainer = space["trainer"]
            options = {
                "callbacks": [c for c in trainer.callbacks if isinstance(c, (ae.ApplyRemedies, ae.DeadUnitReviver))],
                "gradient_clip_val": trainer.gradient_clip_val,
            }
        else:
            for remedy in kept:
                assert remedy.apply(model, options, {})
        callbacks = options.pop("callbacks")
        fit(model, *callbacks, data={"datamodule": ae.DigitsDataModule()}, max_steps=4, max_epochs=-1, **options)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, weights[1][name], rtol=1e-6, atol=1e-7)
    assert treatment([]).python() == "# Nothing to change."
    assert treatment([]).yaml() == "# Nothing to change."
