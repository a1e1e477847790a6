from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import lightning_ae as ae
from lightning_ae.diagnostics.remedies import (
    ScaleLearningRate,
    ScaleWeightDecay,
    StandardizeInput,
    TrainForgotten,
    UseAdam,
    ZeroGradients,
)


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def with_schedule(make, **options):
    """An SGD with a schedule, which goes on at each step."""

    def configure(module):
        optimizer = sgd(module)
        return [optimizer], [{"scheduler": make(optimizer), **(options or {"interval": "step"})}]

    return configure


SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: schedules.StepLR(o, 3),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.8),
    "polynomial": lambda o: schedules.PolynomialLR(o, 20, power=2.0),
    "linear": lambda o: schedules.LinearLR(o, 0.1, total_iters=6),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 12, eta_min=0.02),
    "cosine restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5, eta_min=0.02),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.3, total_steps=16),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.2, step_size_up=4),
    "one after the other": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, 12, eta_min=0.02)], [4]
    ),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.ExponentialLR(o, 0.9), schedules.ConstantLR(o, 0.5, total_iters=4)]
    ),
}


# -- the learning rate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_whole_curve_of_the_learning_rate_is_scaled(name, users, rates):
    configure = with_schedule(SCHEDULES[name])
    plain = rates(users(configure))
    scaled = rates(users(configure), ae.ApplyRemedies([ScaleLearningRate(0.25)]))
    assert len(plain) == 16
    assert plain.std() > 0  # it is a curve
    torch.testing.assert_close(scaled, 0.25 * plain, rtol=1e-12, atol=0)


def test_a_plateau_lowers_scaled_rates_to_a_scaled_floor(users, rates, loader):
    def plateau(optimizer):
        return schedules.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=10.0, min_lr=0.004)

    configure = with_schedule(plateau, monitor="val_loss")
    data = {"train_dataloaders": loader, "val_dataloaders": loader}
    plain = rates(users(configure), max_epochs=6, data=data)
    scaled = rates(users(configure), ae.ApplyRemedies([ScaleLearningRate(1e-5)]), max_epochs=6, data=data)
    assert plain[-1].item() == pytest.approx(0.004)
    torch.testing.assert_close(scaled, 1e-5 * plain, rtol=1e-12, atol=0)


def test_rates_of_several_groups_and_optimizers_are_scaled_each(manual, rates):
    def configure(module):
        first, last = module.network[0], module.network[2]
        one = torch.optim.SGD([{"params": [first.weight], "lr": 1}, {"params": [first.bias], "lr": 0.5}])
        two = torch.optim.Adam(last.parameters(), lr=0.01)
        return [one, two], [schedules.StepLR(one, 4), schedules.ExponentialLR(two, 0.9)]

    plain = rates(manual(configure))
    scaled = rates(manual(configure), ae.ApplyRemedies([ScaleLearningRate(3.0)]))
    assert plain[0].tolist() == [1, 0.5, 0.01]  # the first is an int
    torch.testing.assert_close(scaled, 3 * plain, rtol=1e-12, atol=0)


def test_a_rate_that_is_a_tensor_stays_one(users, rates, fit):
    def configure(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1), capturable=False, foreach=False)
        return [optimizer], [schedules.ExponentialLR(optimizer, 0.8)]

    plain = rates(users(configure), max_epochs=3)
    scaled = rates(users(configure), ae.ApplyRemedies([ScaleLearningRate(0.5)]), max_epochs=3)
    torch.testing.assert_close(scaled, 0.5 * plain, rtol=1e-6, atol=0)
    trainer = fit(users(configure), ae.ApplyRemedies([ScaleLearningRate(0.5)]))
    assert isinstance(trainer.optimizers[0].param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("through_callback", [True, False])
def test_the_rate_of_our_models_is_scaled_and_loaded_again(through_callback, fit, tmp_path):
    model = ae.LinearAutoencoder(4, 2, lr=0.1)
    changes = [ae.ApplyRemedies([ScaleLearningRate(0.1)])] if through_callback else []
    if not through_callback:
        assert ScaleLearningRate(0.1).apply(model).what == "lr = 0.01"
    trainer = fit(model, *changes)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert ae.load(tmp_path / "last.ckpt").lr == (0.1 if through_callback else model.lr)


def test_an_optimizer_that_the_command_line_has_put_in_is_scaled_through_the_callback():
    model = ae.LinearAutoencoder(4, 2, lr=0.1)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1.0)
    options = {}
    assert ScaleLearningRate(0.1).apply(model, options)
    assert model.lr == 0.1
    assert repr(options["callbacks"]) == "[ApplyRemedies(ScaleLearningRate(factor=0.1))]"


def test_a_second_fit_scales_no_more(users, fit):
    """Neither a new optimizer nor one that the module hands out again."""
    kept = {}

    def same(module):
        return kept.setdefault("optimizer", sgd(module))

    for configure in (sgd, same):
        module, change = users(configure), ae.ApplyRemedies([ScaleLearningRate(0.5), ScaleWeightDecay(0.5)])
        for _ in range(2):
            trainer = fit(module, change)
            assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, train_dataloaders=trainer.train_dataloader)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_weight_decay_is_turned_off_in_every_group(users, fit):
    def configure(module):
        return torch.optim.AdamW(
            [{"params": [p], "weight_decay": w} for p, w in zip(module.parameters(), (1.0, 0.0, 3, 0.5), strict=True)]
        )

    trainer = fit(users(configure), ae.ApplyRemedies([ScaleWeightDecay()]))
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0, 0, 0, 0]


# -- resuming ------------------------------------------------------------------------------------------------------

REMEDIES = {
    "rate": [ScaleLearningRate(0.3)],
    "decay": [ScaleWeightDecay(0.1)],
    "forgotten": [TrainForgotten()],
    "adam": [UseAdam(0.01)],
    "all": [TrainForgotten(), ScaleLearningRate(0.3), ScaleWeightDecay(0.0)],
}


def half(module):
    """An SGD with momentum that has forgotten the last layer, and a schedule."""
    optimizer = torch.optim.SGD(module.network[0].parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    return [optimizer], [{"scheduler": schedules.OneCycleLR(optimizer, 0.1, total_steps=40), "interval": "step"}]


class SaveAt(L.Callback):
    """A checkpoint in the middle of an epoch; it keeps no state, which Lightning would miss at the resume."""

    def __init__(self, path, step=10):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", REMEDIES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, users, fit, resumable, tmp_path):
    whole, resumed = users(half), users(half)
    end = fit(whole, ae.ApplyRemedies(REMEDIES[name]), SaveAt(tmp_path / "10.ckpt"), max_epochs=3, data=resumable())
    again = fit(
        resumed, ae.ApplyRemedies(REMEDIES[name]), ckpt_path=tmp_path / "10.ckpt", max_epochs=3, data=resumable()
    )
    assert again.global_step == end.global_step == 24
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    mine, theirs = again.optimizers[0].state_dict(), end.optimizers[0].state_dict()
    assert [g["lr"] for g in mine["param_groups"]] == [g["lr"] for g in theirs["param_groups"]]
    assert sorted(mine["state"]) == sorted(theirs["state"])


@pytest.mark.parametrize("name", REMEDIES)
def test_a_run_that_began_without_a_remedy_goes_on_with_it(name, users, fit, rates, resumable, tmp_path):
    """What the checkpoint holds of the optimizer does not undo it."""
    fit(users(half), SaveAt(tmp_path / "10.ckpt"), max_epochs=3, data=resumable())
    plain = rates(users(half), ckpt_path=tmp_path / "10.ckpt", max_epochs=3, data=resumable())
    module = users(half)
    treated = rates(
        module, ae.ApplyRemedies(REMEDIES[name]), ckpt_path=tmp_path / "10.ckpt", max_epochs=3, data=resumable()
    )
    wanted = {"rate": 0.3 * plain, "adam": torch.full_like(plain, 0.01)}.get(name, plain)
    wanted = torch.cat([0.3 * plain, 0.3 * plain], 1) if name == "all" else wanted
    wanted = torch.cat([plain, plain], 1) if name == "forgotten" else wanted
    torch.testing.assert_close(treated, wanted, rtol=1e-9, atol=0)


def test_a_second_remedy_is_added_to_the_first_at_a_resume(users, rates, fit, resumable, tmp_path):
    first = ae.ApplyRemedies([ScaleLearningRate(0.5)])
    fit(users(half), first, SaveAt(tmp_path / "10.ckpt"), max_epochs=3, data=resumable())
    both = ae.ApplyRemedies([ScaleLearningRate(0.5), ScaleLearningRate(0.1)])
    plain = rates(users(half), max_epochs=3, data=resumable())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning misses the callback that had but one of them
        treated = rates(users(half), both, ckpt_path=tmp_path / "10.ckpt", max_epochs=3, data=resumable())
    torch.testing.assert_close(treated, 0.05 * plain[10:], rtol=1e-9, atol=0)


# -- parameters that were forgotten --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_forgotten_parameters_move_with_the_schedule_of_the_others(name, users, rates):
    def configure(module):
        optimizer = torch.optim.SGD(module.network[0].parameters(), lr=0.1, momentum=0.5)
        return [optimizer], [{"scheduler": SCHEDULES[name](optimizer), "interval": "step"}]

    module = users(configure)
    before = [p.detach().clone() for p in module.parameters()]
    plain = rates(users(configure))
    both = rates(module, ae.ApplyRemedies([TrainForgotten()]))
    torch.testing.assert_close(both, plain.expand(-1, 2), rtol=1e-12, atol=0)
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_forgotten_parameters_suffer_the_plateau_of_the_others(users, rates, loader):
    def configure(module):
        optimizer = torch.optim.SGD(module.network[0].parameters(), lr=0.1)
        plateau = schedules.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, min_lr=[0.001])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    data = {"train_dataloaders": loader, "val_dataloaders": loader}
    seen = rates(users(configure), ae.ApplyRemedies([TrainForgotten()]), max_epochs=5, data=data)
    assert seen[-1].tolist() == pytest.approx([0.001, 0.001])


def test_forgotten_parameters_join_an_optimizer_of_named_ones(users, fit):
    trainer = fit(
        users(lambda module: torch.optim.SGD(module.network[0].named_parameters(), lr=0.1)),
        ae.ApplyRemedies([TrainForgotten()]),
    )
    assert trainer.optimizers[0].param_groups[1]["param_names"] == ["network.2.weight", "network.2.bias"]


def test_frozen_parameters_are_not_forgotten_ones(users, fit):
    module = users(lambda module: torch.optim.SGD(module.network[0].parameters(), lr=0.1))
    module.network[2].requires_grad_(False)
    before = module.network[2].weight.clone()
    trainer = fit(module, ae.ApplyRemedies([TrainForgotten()]))
    assert len(trainer.optimizers[0].param_groups) == 1
    assert torch.equal(module.network[2].weight, before)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_zeroed_gradients_are_those_of_lightning(accumulate, users, fit):
    class Piling(users):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            pass

    plain, treated, ill = users(sgd), Piling(sgd), Piling(sgd)
    fit(plain, accumulate_grad_batches=accumulate)
    fit(treated, ae.ApplyRemedies([ZeroGradients()]), accumulate_grad_batches=accumulate)
    fit(ill, accumulate_grad_batches=accumulate)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), treated.parameters(), strict=True))
    assert not torch.equal(next(plain.parameters()), next(ill.parameters()))


# -- another optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one cycle", "cosine", None])
def test_adam_takes_the_place_of_the_optimizer_and_its_schedule(name, users, rates, fit):
    configure = sgd if name is None else with_schedule(SCHEDULES[name])
    module, reference = users(configure), users(lambda module: torch.optim.Adam(module.parameters(), lr=0.02))
    assert set(rates(module, ae.ApplyRemedies([UseAdam(0.02)])).flatten().tolist()) == {0.02}
    fit(reference)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), reference.parameters(), strict=True))


def test_adam_steps_where_the_model_steps_by_itself(manual, fit):
    """Also where it asks for its schedules."""
    reference = manual(lambda module: torch.optim.Adam(module.parameters(), lr=0.02))
    optimizers = {}

    def configure(module):
        optimizers["old"] = sgd(module)
        return [optimizers["old"]], [schedules.ExponentialLR(optimizers["old"], 0.5)]

    module = manual(configure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # of the old optimizer
        fit(module, ae.ApplyRemedies([UseAdam(0.02)]))
    fit(reference)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), reference.parameters(), strict=True))


# -- several ranks -------------------------------------------------------------------------------------------------


class Ranked(L.LightningModule):
    """Of the module, so that processes can be started with it."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.read = nn.Linear(4, 4), nn.Linear(4, 1), []

    def training_step(self, batch, batch_idx):
        self.read.append(batch)
        return self.last(self.first(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.first.parameters(), lr=0.4)


class Write(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        groups = [(g["lr"], g["weight_decay"]) for g in trainer.optimizers[0].param_groups]
        torch.save((groups, pl_module.state_dict(), pl_module.read), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_two_ranks_have_the_same_optimizer_and_the_first_ones_statistics(make_trainer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))  # where the spawned processes find this module
    module = Ranked()
    before = module.last.weight.clone()
    remedies = [TrainForgotten(), ScaleLearningRate(0.5), ScaleWeightDecay(), StandardizeInput("first", 4)]
    trainer = make_trainer(devices=2, strategy="ddp_spawn", callbacks=[ae.ApplyRemedies(remedies), Write(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
        trainer.fit(module, torch.utils.data.DataLoader(7 + torch.randn(3200, 4), batch_size=100))
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one[0] == two[0] == [(0.2, 0.0), (0.2, 0.0)]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])
    assert not torch.equal(one[1]["last.weight"], before)
    assert one[1]["first.input_count"] == 1000
    torch.testing.assert_close(one[1]["first.input_mean"], torch.cat(one[2][:10]).mean(0))
    assert not torch.equal(one[2][0], two[2][0])
