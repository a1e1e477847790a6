from __future__ import annotations

import inspect

import lightning as L
import pytest
import torch
import yaml
from torch import nn

import lightning_ae as ae
from lightning_ae.diagnostics import remedies
from lightning_ae.diagnostics.remedies import (
    BatchSize,
    ByHand,
    ClipGradients,
    ReviveUnits,
    ScaleLearningRate,
    ScaleWeightDecay,
    SetBias,
    StopEarly,
    SwapActivation,
    Together,
    TrainLonger,
)
from lightning_ae.diagnostics.remedies.base import code, merge, modules_by_name, replace_module

#: One of each kind, with arguments that suit the model below.
ONE_OF_EACH = {
    "SwapActivation": SwapActivation("gelu"),
    "InsertActivation": remedies.InsertActivation(("network.0",)),
    "Reinitialize": remedies.Reinitialize("orthogonal", ("network.0",)),
    "SetBias": SetBias(("network.0",), 0.2),
    "RequireGradients": remedies.RequireGradients(("network.2",)),
    "SetDropout": remedies.SetDropout(("network.3",), 0.1),
    "SetNormMomentum": remedies.SetNormMomentum(0.3),
    "StandardizeInput": remedies.StandardizeInput("network.0", 4),
    "ScaleOutput": remedies.ScaleOutput("network.2", 1.0, 2.0),
    "ScaleLearningRate": ScaleLearningRate(0.5),
    "ScaleWeightDecay": ScaleWeightDecay(0.0),
    "TrainForgotten": remedies.TrainForgotten(),
    "UseAdam": remedies.UseAdam(0.01),
    "ZeroGradients": remedies.ZeroGradients(),
    "ClipGradients": ClipGradients(0.5),
    "TrainLonger": TrainLonger(2),
    "BatchSize": BatchSize(8),
    "StopEarly": StopEarly("val_loss"),
    "ReviveUnits": ReviveUnits(),
    "SetWeight": remedies.SetWeight("kl", 0.1),
    "WarmUpWeight": remedies.WarmUpWeight("kl", 1.0),
    "ExchangeLoss": remedies.ExchangeLoss("BernoulliNLL"),
    "RestartCodebook": remedies.RestartCodebook(),
    "Together": Together((SwapActivation("gelu"), ScaleLearningRate(0.5), ClipGradients())),
    "ByHand": ByHand("nobody knows"),
}
#: Those that only models of ours take.
OURS = {"SetWeight", "WarmUpWeight", "ExchangeLoss", "RestartCodebook"}


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Dropout(), nn.BatchNorm1d(1))


def test_there_is_one_of_each():
    kinds = {n for n, k in vars(remedies).items() if inspect.isclass(k) and issubclass(k, remedies.Remedy)}
    assert kinds - {"Remedy", "TrainerRemedy", "OptimizerRemedy"} == set(ONE_OF_EACH)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_remedy_says_what_it_does_does_it_and_is_data(name, users, loader):
    remedy = ONE_OF_EACH[name]
    assert remedy.describe().endswith(".")
    assert eval(repr(remedy), vars(remedies)) == remedy
    assert hash(remedy) == hash(eval(repr(remedy), vars(remedies)))
    module = users(network=network())
    module.network[2].requires_grad_(False)
    options, data = {"max_epochs": 1}, {"train_dataloaders": loader}
    change = remedy.apply(module, options, data)
    assert change.done == (name not in OURS | {"ByHand"})
    assert change.what


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_code_of_a_remedy_runs_and_makes_the_same_change(name, users, loader):
    remedy, torch_state = ONE_OF_EACH[name], torch.get_rng_state()
    by_hand, by_code = users(network=network()), users(network=network())
    by_code.load_state_dict(by_hand.state_dict())
    for module in (by_hand, by_code):
        module.network[2].requires_grad_(False)
    options = {}
    torch.set_rng_state(torch_state)
    remedy.apply(by_hand, options, {"train_dataloaders": loader})
    space = {"L": L, "ae": ae, "remedies": remedies, "model": by_code}
    torch.set_rng_state(torch_state)
    exec(remedy.python(), space)
    assert str(by_hand) == str(by_code)
    assert all(
        torch.equal(a, b) for a, b in zip(by_hand.state_dict().values(), by_code.state_dict().values(), strict=True)
    )
    assert [p.requires_grad for p in by_hand.parameters()] == [p.requires_grad for p in by_code.parameters()]
    trainer = space.get("trainer")
    assert (trainer is not None) == (bool(options) or name == "WarmUpWeight")
    if trainer is not None:
        assert trainer.gradient_clip_val == options.get("gradient_clip_val")
        wanted = {
            repr(c) if isinstance(c, ae.ApplyRemedies) else type(c).__name__ for c in options.get("callbacks", [])
        }
        got = {repr(c) if isinstance(c, ae.ApplyRemedies) else type(c).__name__ for c in trainer.callbacks}
        assert wanted <= got


def test_several_remedies_make_one_trainer():
    text = code([ClipGradients(2.0), SetBias(("0",)), ScaleLearningRate(0.5), ReviveUnits(), StopEarly("val_loss")])
    assert text.count("L.Trainer") == 1
    model = nn.Sequential(nn.Linear(2, 1))
    space = {"L": L, "ae": ae, "remedies": remedies, "model": model}
    exec(text, space)
    assert model[0].bias.item() == pytest.approx(0.1)
    assert space["trainer"].gradient_clip_val == 2.0
    names = [type(callback).__name__ for callback in space["trainer"].callbacks]
    assert {"ApplyRemedies", "DeadUnitReviver", "EarlyStopping"} <= set(names)


# -- several at once -----------------------------------------------------------------------------------------------


def test_what_is_together_is_made_in_order_as_far_as_it_can_be():
    model, options = nn.Sequential(nn.Linear(2, 2)), {}
    change = Together([SetBias(("0",), 0.5), SwapActivation("relu"), SetBias(("0",), 0.7)]).apply(model, options)
    assert change == (True, "Start the biases of 0 at 0.5. Start the biases of 0 at 0.7.")
    assert model[0].bias.tolist() == pytest.approx([0.7, 0.7])
    change = Together((SwapActivation("relu"), SetBias(("9",)))).apply(model)
    assert change == (False, "there is no such activation module; 9: no such layer with a bias")


def test_configurations_are_joined():
    assert merge([]) == {}
    one, two = ScaleLearningRate(0.5).config(), Together((ScaleWeightDecay(), ClipGradients())).config()
    joined = merge([one, two, {"data": {"init_args": {"batch_size": 4}}}])
    assert len(joined["trainer"]["callbacks"]) == 2
    assert joined["trainer"]["gradient_clip_val"] == 1.0
    assert joined["data"] == {"init_args": {"batch_size": 4}}
    assert yaml.safe_load(yaml.safe_dump(joined)) == joined
    assert len(one["trainer"]["callbacks"]) == 1  # not changed by it


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_configuration_is_plain_data(name):
    config = ONE_OF_EACH[name].config()
    assert yaml.safe_load(yaml.safe_dump(config)) == config


def test_what_is_done_by_hand_is_a_comment():
    remedy = ByHand("which values are right is not known")
    assert remedy.python() == "# Not to be applied from outside: which values are right is not known."
    assert remedy.config() == {}


# -- finding modules -----------------------------------------------------------------------------------------------


def test_modules_are_found_by_the_names_that_people_know():
    inner = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.ReLU(), backend="eager"))
    model = nn.ModuleDict({"net": torch.compile(inner, backend="eager"), "again": inner[0]})
    found = modules_by_name(model)
    assert found["net"] is inner
    assert found["net.0"] is found["again"] is inner[0]
    assert isinstance(found["net.1"], nn.ReLU)
    assert not any("_orig_mod" in name for name in found)


def test_a_module_is_replaced_wherever_it_is_used_with_what_wraps_it():
    shared = nn.Tanh()
    model = nn.Sequential(shared, nn.Sequential(shared), torch.compile(nn.Tanh(), backend="eager")).eval()
    replace_module(model, "1.0", nn.ReLU())
    assert model[0] is model[1][0]
    replace_module(model, "2", nn.GELU())
    assert [type(m).__name__ for m in (model[0], model[2])] == ["ReLU", "GELU"]
    assert not model[2].training
