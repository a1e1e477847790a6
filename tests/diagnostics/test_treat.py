from __future__ import annotations

import copy
import math
import os
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lightning_ae as ae
from lightning_ae.diagnostics import trial
from lightning_ae.diagnostics.remedies import ByHand, ClipGradients, Reinitialize, ScaleLearningRate, SetBias

STEPS = 60


class Users(L.LightningModule):
    """A module by somebody else: a network, a loss, an optimizer."""

    def __init__(self, network, loss=functional.mse_loss, optimizer=None):
        super().__init__()
        self.network, self.loss = network, loss
        self.optimizer = optimizer or (lambda module: torch.optim.Adam(module.parameters(), 1e-2))

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return self.optimizer(self)


def loaders(x, y, batch=32, rows=64):
    """For training, drawn without end; and held out, all of it."""
    train, held = TensorDataset(x[rows:], y[rows:]), TensorDataset(x[:rows], y[:rows])
    return DataLoader(train, batch, sampler=RandomSampler(train, num_samples=20 * batch)), DataLoader(held, 64)


@pytest.fixture(scope="module")
def regression():
    """Targets of 8 numbers that a line makes, nearly."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(320, 8, generator=draw)
    return x, x @ torch.randn(8, 3, generator=draw) / 3 + 0.05 * torch.randn(320, 3, generator=draw)


@pytest.fixture(scope="module")
def labels():
    """Which of three classes 8 numbers are of."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(640, 8, generator=draw)
    return x, (x @ torch.randn(8, 3, generator=draw)).argmax(1)


def mlp(*end, activation=nn.Tanh, hidden=16, outputs=3, deep=1):
    inner = [layer for _ in range(deep - 1) for layer in (nn.Linear(hidden, hidden), activation())]
    return nn.Sequential(nn.Linear(8, hidden), activation(), *inner, nn.Linear(hidden, outputs), *end)


def adam(lr):
    return lambda module: torch.optim.Adam(module.parameters(), lr)


# -- what is healed ------------------------------------------------------------------------------------------------


def dead_biases():
    network = mlp(activation=nn.ReLU)
    network[0].bias.data.fill_(-20.0)
    return Users(network)


def frozen_part():
    network = mlp(activation=nn.ReLU)
    network[2].requires_grad_(False).weight.data.mul_(0.01)
    return Users(network)


def forgotten_part():
    network = mlp(activation=nn.ReLU)
    network[2].weight.data.mul_(0.01)
    return Users(network, optimizer=lambda module: torch.optim.Adam(module.network[0].parameters(), 1e-2))


class Piling(Users):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


def heavy(module):
    return torch.optim.SGD(module.parameters(), 0.5, 0.5)


def decay():
    return Users(mlp(), optimizer=lambda module: torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=20.0))


#: The model, what of the data is spoilt, and the remedy that is to be among those that were kept.
FAULTS = {
    "rate far too high": (lambda: Users(mlp(), optimizer=adam(3.0)), None, "ScaleLearningRate"),
    "rate far too low": (lambda: Users(mlp(), optimizer=adam(1e-6)), None, "ScaleLearningRate"),
    "deep sigmoids": (lambda: Users(mlp(activation=nn.Sigmoid, deep=6)), None, "SwapActivation"),
    "dead biases": (dead_biases, None, None),
    "frozen part": (frozen_part, None, "RequireGradients"),
    "forgotten part": (forgotten_part, None, "TrainForgotten"),
    "weight decay": (decay, None, "ScaleWeightDecay"),
    "gradients pile up": (
        lambda: Piling(mlp(), optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.5, 0.5)),
        None,
        None,
    ),
    "inputs of any scale": (lambda: Users(mlp()), "input", "StandardizeInput"),
    "targets of any scale": (lambda: Users(mlp()), "target", "ScaleOutput"),
    "targets out of reach": (lambda: Users(mlp(nn.Sigmoid())), None, "SwapActivation"),
    "weights of 0": (lambda: zeroed(Users(mlp(activation=nn.ReLU))), None, "Reinitialize"),
}


def zeroed(module):
    for p in module.parameters():
        p.data.zero_()
    return module


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_healed(name, regression):
    make, spoilt, kind = FAULTS[name]
    trials = 2 if spoilt or name == "deep sigmoids" else 1
    x, y = regression
    x = 300 + 50 * x if spoilt == "input" else x
    y = 5000 + 800 * y if spoilt == "target" else y
    treatment = ae.treat(make, loaders(x, y), steps=STEPS, trials=trials)
    assert treatment.before > 0.5
    assert treatment.after < 0.5 * treatment.before, treatment
    assert kind is None or kind in repr(treatment.remedies), treatment
    with torch.no_grad():  # the figure is that of the model it gives
        y_hat = copy.deepcopy(treatment.model).eval().network(x[:64])
    r_squared = r2_score(y[:64].numpy(), y_hat.numpy(), multioutput="variance_weighted")
    assert treatment.after == pytest.approx(1 - r_squared, rel=1e-4)


def test_an_activation_before_cross_entropy_is_removed(labels):
    treatment = ae.treat(
        lambda: Users(mlp(nn.Softmax(1)), functional.cross_entropy), loaders(*labels), steps=STEPS, trials=2
    )
    assert "identity" in repr(treatment.remedies)
    assert treatment.after < treatment.before
    assert isinstance(treatment.model.network[-1], nn.Identity)


def test_models_of_ours_are_healed():
    def make():
        return ae.MLPAutoencoder((1, 8, 8), 8, hidden=(32,), code=ae.L1Code(1e4))

    treatment = ae.treat(make, ae.DigitsDataModule(), steps=STEPS, trials=2)
    assert "SetWeight" in repr(treatment.remedies)
    assert treatment.after < 0.7 * treatment.before


# -- never worse ---------------------------------------------------------------------------------------------------


def wrong_remedies(monkeypatch, *wrong):
    """All findings call for these."""
    real = trial.DiagnosticsReport._make

    def make(self, trainer, module):
        real(self, trainer, module)
        self.report.findings = [f._replace(severity="error", remedies=wrong) for f in self.report.findings]

    monkeypatch.setattr(trial.DiagnosticsReport, "_make", make)


def test_what_does_not_help_is_not_kept(monkeypatch, regression):
    wrong = (SetBias(("network.0",), 50.0), ScaleLearningRate(1e-9), ClipGradients(1e9), ByHand("nobody can"))
    wrong_remedies(monkeypatch, *wrong, SetBias(("nowhere",)))
    x, y = regression
    shuffled = DataLoader(TensorDataset(x[64:], y[64:]), 32, shuffle=True, generator=torch.Generator().manual_seed(3))
    data = (shuffled, loaders(x, y)[1])
    treatment = ae.treat(lambda: Users(mlp(activation=nn.Sigmoid), optimizer=adam(1e-3)), data, steps=30, trials=9)
    assert not treatment.improved
    assert treatment.after == treatment.before
    assert [t.kept for t in treatment.trials] == [False] * 6
    errors = [t.error for t in treatment.trials]
    assert errors[1] > errors[0]
    assert errors[3] == errors[0]  # clips nothing, and sees the same batches
    assert [math.isnan(e) for e in errors] == [False] * 4 + [True] * 2
    assert "nobody can" in str(treatment)
    assert "Not applied: nowhere: no such layer with a bias." in str(treatment)
    assert treatment.python() == "# Nothing to change."
    assert treatment.yaml() == "# Nothing to change."


def test_a_rate_that_was_a_guess_is_varied_when_nothing_is_found_any_more(regression):
    treatment = ae.treat(lambda: Users(mlp(), optimizer=adam(1e-6)), loaders(*regression), steps=STEPS, trials=4)
    called_for = [t for t in treatment.trials[1:] if t.finding is not None]
    varied = [t for t in treatment.trials[1:] if t.finding is None]
    rates = [remedy.factor for remedy in treatment.remedies if isinstance(remedy, ScaleLearningRate)]
    assert called_for[0].kept
    assert varied
    assert len(rates) == 1  # another number takes the place of the first one
    factor = called_for[0].remedy.factor
    assert rates[0] in [pytest.approx(factor * 3**power, rel=0.1) for power in range(-3, 4)]
    assert treatment.after == min(t.error for t in treatment.trials if t.kept)


def test_a_healthy_model_is_left_as_it_is(regression):
    treatment = ae.treat(lambda: Users(mlp()), loaders(*regression), steps=200, trials=1)
    assert treatment.before < 0.05
    assert not [f for f in treatment.report.findings if f.severity == "error"]
    assert treatment.after <= treatment.before


# -- the same each time, and nothing is disturbed ------------------------------------------------------------------


def test_it_gives_the_same_each_time_and_gives_back_what_it_used(regression, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "77")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    draw = torch.Generator().manual_seed(9)
    x, y = regression
    train = DataLoader(TensorDataset(x[64:], y[64:]), 32, shuffle=True, generator=draw)
    data = (train, DataLoader(TensorDataset(x[:64], y[:64]), 64))
    callback = L.pytorch.callbacks.EarlyStopping("val_loss", patience=1000)
    options = {"callbacks": [callback]}

    def state():
        filters = [f[:4] for f in warnings.filters]
        draws = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        seeds = os.environ.get("PL_GLOBAL_SEED"), os.environ.get("PL_SEED_WORKERS")
        return filters, draws, draw.get_state().tolist(), seeds

    before = state()
    found = []
    for _ in range(2):
        treatment = ae.treat(
            lambda: Users(mlp(nn.Dropout(0.2)), optimizer=adam(1.0)),
            data,
            steps=STEPS,
            trials=2,
            trainer_options=options,
        )
        assert state() == before
        found.append(treatment)
        torch.rand(3)
        before = state()
    assert str(found[0]) == str(found[1])
    assert len(found[0].trials) == 3
    mine, theirs = (t.model.state_dict() for t in found)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert options == {"callbacks": [callback]}
    assert callback.best_score == math.inf  # of none of the fits


def test_the_data_module_stays_as_it_is():
    class Theirs(L.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 2
            self.save_hyperparameters()
            self.hparams["batch_size"] = 2
            self.x = torch.randn(80, 8) * 4

        def train_dataloader(self):
            return DataLoader(TensorDataset(self.x[16:], self.x[16:, :3]), self.hparams.batch_size, shuffle=True)

        def val_dataloader(self):
            return [DataLoader(TensorDataset(self.x[:16], self.x[:16, :3]), 16)]

    data = Theirs()
    before = dict(data.__dict__)
    ae.treat(lambda: Users(mlp(nn.BatchNorm1d(3))), data, steps=40, trials=2)
    assert data.batch_size == data.hparams["batch_size"] == 2
    assert data.trainer is None
    assert data.__dict__ == before


def test_a_treated_model_goes_on_in_training_mode(regression):
    treatment = ae.treat(lambda: Users(mlp(nn.Dropout(0.1))), loaders(*regression), steps=20, trials=1)
    assert all(module.training for module in treatment.model.modules())


# -- models and data as people have them ---------------------------------------------------------------------------


class Training(L.LightningModule):
    """Has no validation_step, and asks its Trainer."""

    def __init__(self, lr):
        super().__init__()
        self.network, self.lr = mlp(), lr

    def training_step(self, batch):
        loss = ((self.network(batch[0]) - batch[1]) ** 2).mean()
        self.log("train_loss", loss + self.trainer.current_epoch)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def test_a_module_without_a_validation_step_is_treated(regression):
    treatment = ae.treat(lambda: Training(3.0), loaders(*regression), steps=STEPS, trials=2)
    assert treatment.after < 0.3 * treatment.before


def test_a_schedule_that_goes_by_a_validation_loss_finds_one(regression):
    def optimizer(module):
        made = torch.optim.Adam(module.parameters(), 1e-6)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(made, patience=99)
        return {"optimizer": made, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    x, y = regression
    data = (DataLoader(TensorDataset(x[64:], y[64:]), 128), DataLoader(TensorDataset(x[:64], y[:64]), 64))
    treatment = ae.treat(lambda: Users(mlp(), optimizer=optimizer), data, steps=30, trials=1)
    assert treatment.improved


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        lambda train, held: (train, None),
        lambda train, held: train,
        lambda train, held: [train],
        lambda train, held: L.LightningDataModule.from_datasets(train.dataset),
        lambda train, held: L.LightningDataModule(),
    ],
)
def test_held_out_data_are_asked_for_before_anything_is_fitted(data, regression):
    made = []
    with pytest.raises(ValueError, match=r"^data: .*held-out data are needed"):
        ae.treat(lambda: made.append(1), data(*loaders(*regression)))
    assert not made


def test_a_data_module_of_ours_without_validation_says_so(regression):
    data = ae.TensorDataModule(regression, val_fraction=0.0)
    with pytest.raises(ValueError, match="data: no held-out data, so no remedy can be judged"):
        ae.treat(lambda: Users(mlp()), data, steps=4)


def test_bad_arguments_are_named(regression):
    data = loaders(*regression)
    with pytest.raises(TypeError, match=r"make_model: expected a function .*, got a Users"):
        ae.treat(Users(mlp()), data)
    with pytest.raises(TypeError, match="make_model: expected it to give a LightningModule, got a Sequential"):
        ae.treat(lambda: mlp(), data)
    for name in ("trials", "steps"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive whole number, got 0"):
            ae.treat(lambda: Users(mlp()), data, **{name: 0})


def test_a_model_without_a_comparison_cannot_be_judged(regression):
    def loss(y_hat, y):
        return y_hat.square().mean()

    with pytest.raises(ValueError, match="make_model: no loss of a Users was heard to compare"):
        ae.treat(lambda: Users(mlp(), loss), loaders(*regression), steps=8)


@pytest.mark.parametrize("error", [KeyError("mine"), RuntimeError("mine"), ValueError("mine")])
def test_an_error_of_the_users_is_shown(error, regression):
    def fails(y_hat, y):
        raise error

    with pytest.raises(type(error), match="mine"):
        ae.treat(lambda: Users(mlp(), fails), loaders(*regression), steps=8)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        ae.treat(lambda: Users(nn.Linear(5, 3)), loaders(*regression), steps=8)


class Careful(Users):
    """Gives up when its loss is large."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if loss > 1e4:
            raise ValueError("the loss explodes")
        return loss

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def test_a_fit_that_breaks_off_is_as_bad_as_can_be_and_can_be_healed(regression):
    def make():
        return Careful(mlp(activation=nn.ReLU), optimizer=lambda module: torch.optim.SGD(module.parameters(), 50.0))

    treatment = ae.treat(make, loaders(*regression), steps=STEPS, trials=3)
    assert treatment.before == math.inf
    assert treatment.after < 0.5


def test_a_remedy_that_the_model_does_not_bear_is_told(monkeypatch, regression):
    class Delicate(Users):
        def on_fit_start(self):
            if self.network[0].bias.abs().max() > 10:
                raise KeyError("bias")

    wrong_remedies(monkeypatch, SetBias(("network.0",), 50.0), Reinitialize("xavier"))
    treatment = ae.treat(lambda: Delicate(mlp(), optimizer=adam(1e-4)), loaders(*regression), steps=20, trials=1)
    assert "the fit broke off (KeyError: 'bias')" in treatment.trials[1].what
    assert len(treatment.trials) == 3  # it counts as no fit


# -- what is said --------------------------------------------------------------------------------------------------


def test_it_says_what_was_tried_and_how_to_make_it_last(regression, make_trainer):
    treatment = ae.treat(lambda: Users(mlp(), optimizer=adam(3.0)), loaders(*regression), steps=STEPS, trials=1)
    text = str(treatment)
    assert text.startswith(f"Held-out error {treatment.before:.3g} → {treatment.after:.3g}")
    assert "0. start" in text
    assert "1. kept" in text
    assert f"[{treatment.trials[1].finding.cause}]" in text
    assert treatment.python() in text
    assert "class_path: lightning_ae.ApplyRemedies" in treatment.yaml()
    # the code, on a new model, trains as well
    L.seed_everything(0, verbose=False)
    space = {"model": Users(mlp(), optimizer=adam(3.0))}
    exec(treatment.python(), space)
    change = [c for c in space["trainer"].callbacks if isinstance(c, ae.ApplyRemedies)]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    train, held = loaders(*regression)
    L.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=change, **quiet).fit(space["model"], train)
    x, y = held.dataset.tensors
    with torch.no_grad():
        left = 1 - r2_score(y.numpy(), space["model"].network(x).numpy(), multioutput="variance_weighted")
    assert left < 0.5 * treatment.before
