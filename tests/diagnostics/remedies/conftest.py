"""A user's module whose optimizers are whatever a test gives it, and what is to be seen of its steps."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ae as ae


class Users(L.LightningModule):
    """A regression by somebody who has never heard of this package."""

    def __init__(self, configure=None, network=None):
        super().__init__()
        torch.manual_seed(1)
        self.network = network or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.configure = configure or (lambda module: torch.optim.SGD(module.parameters(), lr=0.1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.configure(self)


class Manual(Users):
    """The same, stepping by itself."""

    def __init__(self, configure=None, network=None):
        super().__init__(configure, network)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers, schedules = self.optimizers(), self.lr_schedulers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.network(batch[0]), batch[1]))
            optimizer.step()
        for schedule in schedules if isinstance(schedules, list) else [schedules] if schedules else []:
            schedule.step()


class Rates(L.Callback):
    """The learning rate of each group at each step, as the optimizer has it."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([float(group["lr"]) for o in trainer.optimizers for group in o.param_groups])


@pytest.fixture
def users():
    """Makes the module; the same weights each time."""
    return Users


@pytest.fixture
def manual():
    """Makes the one with manual optimization."""
    return Manual


@pytest.fixture
def loader():
    """Eight batches of four examples, in order."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(32, 4, generator=draw)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


@pytest.fixture
def resumable(loader):
    """The same examples, shuffled, from a loader that goes on in the middle of an epoch."""

    def make():
        return {"datamodule": ae.TensorDataModule(loader.dataset.tensors, batch_size=4, val_fraction=0.0)}

    return make


@pytest.fixture
def fit(make_trainer, loader):
    """Fits with callbacks; gives the Trainer."""

    def run(module, *callbacks, ckpt_path=None, data=None, **options):
        trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 2, "num_sanity_val_steps": 0, **options})
        data = {"train_dataloaders": loader} if data is None else data
        trainer.fit(module, **data, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def rates(fit):
    """Learning rates of all groups, step by step, as a tensor."""

    def run(module, *callbacks, **options):
        seen = Rates()
        fit(module, *callbacks, seen, **options)
        return torch.tensor(seen.seen, dtype=torch.float64)

    return run
