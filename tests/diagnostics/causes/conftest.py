"""Small networks that are trained for a moment on small data, and what a report says of them."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lightning_ae as ae


class Plain(L.LightningModule):
    """A network whose prediction is compared with a batch's last tensor."""

    def __init__(self, network, loss, optimizer):
        super().__init__()
        self.network, self.loss, self.optimizer = network, loss, optimizer

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch[0]), batch[-1])

    def configure_optimizers(self):
        return self.optimizer(self)


class Validated(Plain):
    """The same, with a loss on validation data that is logged."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.fixture
def train(make_trainer):
    """Trains for some steps, one epoch, on examples drawn from all; gives the report."""

    def run(
        network,
        loss,
        *tensors,
        lr=1e-2,
        steps=100,
        batch=32,
        looks=2,
        optimizer=None,
        validation=None,
        latent=None,
        **options,
    ):
        optimizer = optimizer or (lambda module: torch.optim.Adam(module.parameters(), lr))
        if isinstance(network, L.LightningModule):
            module = network
        else:
            module = (Plain if validation is None else Validated)(network, loss, optimizer)
        data = TensorDataset(*tensors)
        loader = DataLoader(data, batch, sampler=RandomSampler(data, num_samples=steps * batch))
        loaders = None if validation is None else DataLoader(TensorDataset(*validation), 64)
        report = ae.DiagnosticsReport(latent, every_n_steps=looks, quiet=True)
        options = {"num_sanity_val_steps": 0, "log_every_n_steps": 20} | options
        make_trainer(callbacks=report, **options).fit(module, loader, loaders)
        return report

    return run


@pytest.fixture
def causes():
    """From a report to the names of the causes that were found, and of what was seen as well."""

    def names(report):
        seen = {symptom.rpartition("(")[2][:-1] for f in report.findings for symptom in f.symptoms}
        return {f.cause for f in report.findings} | seen

    return names


@pytest.fixture
def mlp():
    """A network with one hidden layer."""

    def make(inputs=8, outputs=1, *end, hidden=16, activation=nn.Tanh):
        return nn.Sequential(nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, outputs), *end)

    return make


@pytest.fixture
def regression():
    """Inputs of 8 numbers, and what a line makes of them."""
    x = torch.randn(256, 8)
    return x, x @ torch.tensor([[0.6], [-0.5], [-0.1], [0.5], [0.2], [0.4], [-0.4], [0.2]])


@pytest.fixture
def labels():
    """Inputs of 8 numbers, and which of 3 classes they are of."""
    x = torch.randn(256, 8)
    return x, (x @ torch.randn(8, 3)).argmax(1)


@pytest.fixture
def flat():
    """Examples of 12 numbers that two tell, between 0 and 1."""
    return (torch.randn(256, 2) @ torch.randn(2, 12)).sigmoid()
