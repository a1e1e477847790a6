from __future__ import annotations

import copy
import math
import random

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, r2_score
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightning_ae as ae
from lightning_ae.diagnostics.held_out import HeldOut, held_out


class Module(L.LightningModule):
    """A network and a loss of a batch of two, in training and validation."""

    def __init__(self, loss, outputs=3, inputs=5):
        super().__init__()
        self.network, self.loss = nn.Sequential(nn.Linear(inputs, outputs), nn.Dropout(0.5)), loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss


def batches(*tensors):
    return DataLoader(TensorDataset(*tensors), 7)  # the last is smaller


def predictions(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).eval().network(x)


# -- the figure ----------------------------------------------------------------------------------------------------

REAL = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
    "written out": lambda y_hat, y: ((y_hat - y) ** 2).mean(),
    "written out, absolute": lambda y_hat, y: (y - y_hat).abs().mean(),
    "gaussian": lambda y_hat, y: functional.gaussian_nll_loss(y_hat, y, torch.ones_like(y)),
}


@pytest.mark.parametrize("name", REAL)
def test_of_real_targets_it_is_one_minus_r_squared(name):
    """Whatever the loss, units and the size of batches; in evaluation mode."""
    model, x = Module(REAL[name]), torch.randn(60, 5)
    y = 100 + 7 * x[:, :3] + torch.randn(60, 3) * torch.tensor([1.0, 20.0, 300.0])
    r_squared = r2_score(y.numpy(), predictions(model, x).numpy(), multioutput="variance_weighted")
    assert held_out(model, batches(x, y)).value == pytest.approx(1 - r_squared, rel=1e-6)


def brier_skill(probabilities, onehot):
    """Multi-class Brier score over that of the base rates, by NumPy."""
    rates = onehot.mean(0)
    return ((probabilities - onehot) ** 2).sum(1).mean() / ((rates - onehot) ** 2).sum(1).mean()


CLASSES = {
    "cross_entropy": (functional.cross_entropy, lambda a: a.softmax(1)),
    "nll_loss": (lambda a, y: functional.nll_loss(a.log_softmax(1), y), lambda a: a.softmax(1)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_of_classes_it_is_the_brier_score_over_that_of_the_base_rates(name):
    loss, probabilities = CLASSES[name]
    model, x, y = Module(loss), torch.randn(60, 5), torch.randint(0, 3, (60,))
    expected = brier_skill(probabilities(predictions(model, x)).double().numpy(), np.eye(3)[y])
    assert held_out(model, batches(x, y)).value == pytest.approx(expected, rel=1e-6)


def test_soft_targets_of_classes_are_compared_with_probabilities():
    x, y = torch.randn(60, 5), torch.rand(60, 3).softmax(1)
    for loss in (functional.cross_entropy, lambda a, y: -(y * a.log_softmax(1)).sum(1).mean()):
        model = Module(loss)
        expected = brier_skill(predictions(model, x).softmax(1).double().numpy(), y.double().numpy())
        assert held_out(model, batches(x, y)).value == pytest.approx(expected, rel=1e-5)


def test_classes_at_positions_count_where_they_are_known():
    model = Module(lambda a, y: functional.cross_entropy(a.reshape(-1, 3, 4), y, ignore_index=0), outputs=12)
    x, y = torch.randn(60, 5), torch.randint(0, 3, (60, 4))
    probabilities = predictions(model, x).reshape(-1, 3, 4).softmax(1).movedim(1, -1).reshape(-1, 3).double().numpy()
    known = y.reshape(-1).numpy() != 0
    expected = brier_skill(probabilities[known], np.eye(3)[y.reshape(-1)][known])
    assert held_out(model, batches(x, y)).value == pytest.approx(expected, rel=1e-6)


BINARY = {
    "logits": (functional.binary_cross_entropy_with_logits, torch.sigmoid),
    "probabilities": (lambda a, y: functional.binary_cross_entropy(a.sigmoid(), y), torch.sigmoid),
    "flat": (lambda a, y: functional.binary_cross_entropy_with_logits(a[:, 0], y[:, 0]), torch.sigmoid),
}


@pytest.mark.parametrize("name", BINARY)
def test_of_labels_it_is_the_brier_score_over_that_of_the_base_rate(name):
    loss, probability = BINARY[name]
    model, x, y = Module(loss, outputs=1), torch.randn(60, 5), torch.randint(0, 2, (60, 1)).float()
    p = probability(predictions(model, x))[:, 0].double().numpy()
    label = y[:, 0].numpy()
    expected = brier_score_loss(label, p) / brier_score_loss(label, np.full(60, label.mean(dtype=np.float64)))
    assert held_out(model, batches(x, y)).value == pytest.approx(expected, rel=1e-6)


def test_counts_are_compared_with_rates():
    model, x, y = Module(functional.poisson_nll_loss), torch.randn(60, 5), torch.poisson(torch.full((60, 3), 2.0))
    r_squared = r2_score(y.numpy(), predictions(model, x).exp().numpy(), multioutput="variance_weighted")
    assert held_out(model, batches(x, y)).value == pytest.approx(1 - r_squared, rel=1e-5)


@pytest.mark.parametrize(
    "loss", [ae.SquaredError(), ae.BernoulliNLL(), ae.SquaredError("sigmoid"), ae.GaussianNLL(0.1)]
)
def test_of_a_model_of_ours_it_is_that_of_the_reconstruction(loss):
    model, x = ae.MLPAutoencoder((1, 4, 4), 3, hidden=(8,), loss=loss), torch.rand(40, 1, 4, 4)
    with torch.no_grad():
        x_hat = copy.deepcopy(model).eval().reconstruct(x)
    r_squared = r2_score(x.flatten(1).numpy(), x_hat.flatten(1).numpy(), multioutput="variance_weighted")
    assert held_out(model, batches(x)).value == pytest.approx(1 - r_squared, rel=1e-5)


def test_a_constant_leaves_1_a_perfect_prediction_0_and_what_is_not_finite_is_infinitely_bad():
    x = torch.randn(40, 3)
    model = Module(functional.mse_loss, inputs=3)
    for weight, bias, expected in ((torch.zeros(3, 3), x.mean(0), 1), (torch.eye(3), torch.zeros(3), 0)):
        model.network[0].load_state_dict({"weight": weight, "bias": bias})
        assert held_out(model, batches(x, x)).value == pytest.approx(expected, abs=1e-6)
    model.network[0].bias.data[0] = math.nan
    assert held_out(model, batches(x, x)).value == math.inf
    assert math.isnan(HeldOut(torch.zeros(0)).value)


def test_the_comparison_that_matters_is_the_one_that_is_named():
    def loss(y_hat, y):
        return functional.mse_loss(y_hat, 0 * y) + functional.mse_loss(y_hat, y) + functional.l1_loss(y_hat, 2 * y)

    model, x, y = Module(loss), torch.randn(60, 5), torch.randn(60, 3)
    y_hat = predictions(model, x).numpy()
    for name, target in (("mse_loss#1", y), ("l1_loss", 2 * y)):
        expected = 1 - r2_score(target.numpy(), y_hat, multioutput="variance_weighted")
        assert held_out(model, batches(x, y), name).value == pytest.approx(expected, rel=1e-6)


# -- comparing -----------------------------------------------------------------------------------------------------


def test_better_is_what_gains_more_than_two_paired_standard_errors_and_a_hundredth():
    draw = np.random.default_rng(0)
    earlier = draw.uniform(0.5, 1.5, 400)
    for gain, noise in ((0.02, 0.15), (0.02, 0.25), (0.005, 0.0), (0.02, 0.0), (-0.02, 0.1)):
        apart = draw.standard_normal(400)
        apart = gain + noise * (apart - apart.mean()) / apart.std(ddof=1)
        one, other = HeldOut(torch.tensor(earlier)), HeldOut(torch.tensor(earlier - apart))
        expected = gain > 2 * noise / 20 and gain > 0.01 * min(1, earlier.mean())
        assert other.better_than(one) == expected, (gain, noise)
        assert other.gain(one) == pytest.approx((gain, noise / 20), abs=1e-12)


def test_anything_is_better_than_what_is_not_finite_and_nothing_is_better_than_itself():
    fine, broken, nothing = HeldOut(torch.rand(9) + 9), HeldOut(torch.full((9,), math.nan)), HeldOut(torch.zeros(0))
    assert fine.better_than(broken)
    assert fine.better_than(nothing)
    for one in (fine, broken, nothing):
        assert not one.better_than(one)
        assert not broken.better_than(one)
        assert not nothing.better_than(one)


# -- the model is left as it was, and may be as it likes ---------------------------------------------------------------


class Counts(Module):
    """Keeps a count of the examples in a buffer, and asks its Trainer for things."""

    def __init__(self):
        super().__init__(functional.mse_loss)
        self.register_buffer("seen", torch.zeros(()))

    def validation_step(self, batch):  # with no number
        self.seen += len(batch[0])
        noise = torch.rand(())
        loss = functional.mse_loss(self.network(batch[0]) + noise, batch[1])
        self.log_dict({"val_loss": loss, "step": float(self.trainer.global_step), "epoch": float(self.current_epoch)})
        return loss

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] / 50, batch[1]]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_model_and_all_random_numbers_are_left_as_they_were(make_trainer):
    model, data = Counts(), batches(50 * torch.randn(60, 5), torch.randn(60, 3))
    make_trainer().fit(model, data, data)
    model.network[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    first = held_out(model, data).value
    torch.manual_seed(6)  # what is drawn in validation is the same all the same
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    log = model.log
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert held_out(model, data).value == first < 10  # as it has gone through the hook
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert model.log == log
    assert all(p.grad.eq(1).all() for p in model.parameters())
    assert model.trainer is not None


class Training(L.LightningModule):
    """Has no validation_step."""

    def __init__(self, automatic=True):
        super().__init__()
        self.network, self.automatic_optimization = nn.Linear(5, 3), automatic

    def training_step(self, batch, batch_idx):
        y_hat = self.network(batch[0])
        gradient = torch.autograd.grad(y_hat.sum(), self.network.weight, create_graph=True)[0]
        return functional.mse_loss(y_hat, batch[1]) + 0.1 * gradient.square().sum()


def test_without_a_validation_step_the_training_step_is_asked_unless_it_trains():
    model, x, y = Training(), torch.randn(60, 5), torch.randn(60, 3)
    expected = 1 - r2_score(y.numpy(), predictions(model, x).numpy(), multioutput="variance_weighted")
    assert held_out(model, batches(x, y)).value == pytest.approx(expected, rel=1e-6)
    assert model.network.weight.grad is None
    with pytest.raises(ValueError, match=r"model: Training needs a validation_step: its training_step also trains it"):
        held_out(Training(automatic=False), batches(x, y))


def test_a_step_that_fails_shows_its_own_error_and_the_model_is_as_it_was():
    def fails(y_hat, y):
        raise KeyError("mine")

    model = Module(fails)
    with pytest.raises(KeyError, match="mine"):
        held_out(model, batches(torch.randn(9, 5), torch.randn(9, 3)))
    assert model.training
    assert "log" not in model.__dict__
