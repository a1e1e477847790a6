from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lightning_ae as ae
from lightning_ae.diagnostics.causes import CAUSES, Finding
from lightning_ae.diagnostics.remedies import ByHand, Remedy, prescribe
from lightning_ae.diagnostics.remedies.prescribe import BY_HAND
from lightning_ae.diagnostics.remedies.prescriptions import PRESCRIPTIONS
from lightning_ae.networks import mlp_pair

# -- all causes ----------------------------------------------------------------------------------------------------


def test_every_cause_has_remedies_or_a_reason_why_not():
    assert set(PRESCRIPTIONS) | set(BY_HAND) == set(CAUSES)
    assert all(reason and not reason.endswith(".") for reason in BY_HAND.values())


def finding(cause):
    return Finding("error", "loss", "x", 1.0, 1, "", "", cause)


def test_a_prescription_that_fails_says_so_and_costs_no_report(monkeypatch):
    def fails(e, finding):
        yield ByHand("first")
        raise KeyError("mine")

    monkeypatch.setitem(PRESCRIPTIONS, "weight_decay", fails)
    assert prescribe(None, finding("weight_decay")) == (ByHand("none could be made (KeyError: 'mine')"),)


@pytest.mark.parametrize("cause", sorted(set(BY_HAND) - set(PRESCRIPTIONS)))
def test_what_cannot_be_applied_says_why(cause):
    (remedy,) = prescribe(None, finding(cause))
    assert remedy == ByHand(BY_HAND[cause])
    assert BY_HAND[cause] in remedy.describe()


# -- planted faults ------------------------------------------------------------------------------------------------


def line(rows=256, outputs=3):
    x = torch.randn(rows, 4)
    return x, x @ torch.randn(4, outputs) / 2


def flat(rows=256):
    """Examples of 12 numbers in [0, 1] that two tell."""
    return (torch.randn(rows, 2) @ torch.randn(2, 12)).sigmoid()


def net(*end, activation=nn.Tanh, outputs=3, deep=1):
    """Makes a network; the weights are drawn in the test."""

    def make():
        inner = [layer for _ in range(deep - 1) for layer in (nn.Linear(8, 8), activation())]
        return nn.Sequential(nn.Linear(4, 8), activation(), *inner, nn.Linear(8, outputs), *end)

    return make


def dead():
    network = net(activation=nn.ReLU)()
    network[0].bias.data.fill_(-30.0)
    return network


def adam(lr):
    return lambda module: torch.optim.Adam(module.parameters(), lr)


def supervised(network, loss=functional.mse_loss, lr=1e-2, optimizer=None, x=None, y=None):
    def make(users):
        class Theirs(users):
            def training_step(self, batch, batch_idx):
                return loss(self.network(batch[0]), batch[1])

        given_x, given_y = line()
        data = (given_x if x is None else x(given_x), given_y if y is None else y(given_x, given_y))
        return Theirs(optimizer or adam(lr), network()), data

    return make


def ours(make_model, x=flat):
    return lambda users: (make_model(), (x(),))


def piling(users):
    """A module whose gradients pile up."""

    class Theirs(users):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            pass

    return Theirs(adam(1e-2), net()()), line()


def three(x, y):
    return (x[:, :3] @ torch.eye(3)).argmax(1)


def frozen():
    network = net(activation=nn.ReLU)()
    network[2].requires_grad_(False).weight.data.mul_(0.01)
    return network


def loose(module):
    return torch.optim.Adam(module.network[0].parameters(), 1e-2)


#: The fault, the cause that is found, and what the names of its first remedy are to have in them.
FAULTS = {
    "rate too high": (supervised(net(), lr=5.0), "learning_rate_high", "ScaleLearningRate(factor=0.0"),
    "rate too high, plain": (
        supervised(net(), optimizer=lambda m: torch.optim.SGD(m.parameters(), 20.0)),
        "learning_rate_high",
        "UseAdam",
    ),
    "rate too low": (supervised(net(), lr=1e-6), "learning_rate_low", "ScaleLearningRate(factor="),
    "decay": (
        supervised(net(), optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=30.0)),
        "weight_decay",
        "ScaleWeightDecay(factor=0.0)",
    ),
    "pile": (piling, "gradients_pile_up", "ZeroGradients()"),
    "frozen": (supervised(frozen), "not_trained", "RequireGradients"),
    "forgotten": (supervised(net(activation=nn.ReLU), optimizer=loose), "not_trained", "TrainForgotten()"),
    "input": (
        supervised(net(), x=lambda x: 500 * x + 900),
        "input_scale",
        "StandardizeInput(layer='network.0', features=4)",
    ),
    "targets": (
        supervised(net(), y=lambda x, y: 900 + 300 * y),
        "target_scale",
        "ScaleOutput(layer='network.2', mean=",
    ),
    "reach": (
        supervised(net(nn.Sigmoid()), y=lambda x, y: 5 * y),
        "target_out_of_reach",
        "SwapActivation(to='identity', sites=('network.3',)",
    ),
    "constant softmax": (
        supervised(net(nn.Softmax(1), outputs=1), y=lambda x, y: (y[:, :1] > 0).float()),
        "constant_softmax",
        "SwapActivation(to='sigmoid', sites=('network.3',)",
    ),
    "softmax and cross-entropy": (
        supervised(net(nn.Softmax(1)), functional.cross_entropy, y=three),
        "double_activation",
        "SwapActivation(to='identity', sites=('network.3',)",
    ),
    "sigmoids": (supervised(net(activation=nn.Sigmoid, deep=7)), "vanishing_gradient", "SwapActivation(to='relu'"),
    "dead": (supervised(dead), "dead_units", "Reinitialize(scheme='he'"),
    "penalty": (
        ours(lambda: ae.MLPAutoencoder(12, 4, hidden=(16,), code=ae.L1Code(1e4))),
        "penalty_dominates",
        "SetWeight(term='l1'",
    ),
    "posterior": (
        ours(
            lambda: ae.VariationalAutoencoder(
                *mlp_pair(12, 2, (16,), h_dim=4), code=ae.GaussianCode(beta=30.0), lr=1e-2
            )
        ),
        "posterior_collapse",
        "SetWeight(term='kl', weight=1.0)",
    ),
    "not a number": (supervised(net(), x=lambda x: torch.where(x > 2.5, torch.nan, x)), "nonfinite_data", "ByHand"),
    "one class": (
        supervised(net(), functional.cross_entropy, y=lambda x, y: torch.zeros(len(x), dtype=torch.int64)),
        "one_class",
        "ByHand",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_calls_for_its_remedy_and_every_remedy_applies_or_says_why_not(name, users, make_trainer):
    plant, cause, expected = FAULTS[name]
    module, tensors = plant(users)
    fresh = copy.deepcopy(module)
    data = TensorDataset(*tensors)
    loader = DataLoader(data, 32, sampler=RandomSampler(data, num_samples=100 * 32))
    report = ae.DiagnosticsReport(every_n_steps=2, quiet=True)
    make_trainer(callbacks=report).fit(module, loader)
    found = {f.cause: f for f in report.findings}
    assert cause in found, report.findings
    assert found[cause].remedy is found[cause].remedies[0]
    assert expected in repr(found[cause].remedy)
    for one in report.findings:
        assert one.remedies
        assert len(set(one.remedies)) == len(one.remedies)
        for remedy in one.remedies:
            assert isinstance(remedy, Remedy)
            change = remedy.apply(copy.deepcopy(fresh), {"max_steps": 100}, {"train_dataloaders": loader})
            assert change.done != isinstance(remedy, ByHand), (remedy, change)
            assert change.what
