from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

import lightning_ae as ae
from lightning_ae.diagnostics.remedies import BatchSize, ClipGradients, ReviveUnits, StopEarly, TrainLonger

NUMBERS = TensorDataset(torch.arange(64.0)[:, None])


# -- clipping ------------------------------------------------------------------------------------------------------


class Norms(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        norms = [p.grad.norm() for p in pl_module.parameters()]
        self.seen.append(float(torch.stack(norms).norm()))


@pytest.mark.parametrize("given", [{}, {"gradient_clip_val": 50.0, "gradient_clip_algorithm": "value"}])
def test_no_step_is_made_with_a_gradient_of_a_larger_norm(given, users, fit):
    plain, clipped, options = Norms(), Norms(), dict(given)
    module = users()
    fit(users(), plain)
    assert ClipGradients(0.5).apply(module, options)
    fit(module, clipped, **options)
    assert max(plain.seen) > 1
    assert max(clipped.seen) == pytest.approx(0.5, rel=1e-4)


def test_what_is_clipped_as_low_already_or_by_the_model_is_left(users, manual):
    options = {"gradient_clip_val": 0.3}
    assert ClipGradients(0.5).apply(users(), options) == (False, "gradients are clipped to a norm of 0.3 already")
    assert options == {"gradient_clip_val": 0.3}
    change = ClipGradients(0.5).apply(manual(), {})
    assert not change
    assert "self.clip_gradients" in change.what
    assert not ClipGradients(0.5).apply(users())
    assert ClipGradients(0.5).apply(users(), {"gradient_clip_val": 0})  # Lightning's for not at all


# -- length --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"), [({"max_epochs": 2}, 32), ({"max_epochs": -1, "max_steps": 5}, 10), ({"max_steps": 10}, 20)]
)
def test_a_run_is_as_many_times_as_long(options, steps, users, fit):
    """Also where both steps and epochs are limited."""
    options = {"max_epochs": 2, **options}
    assert TrainLonger(2).apply(users(), options)
    assert fit(users(), **options).global_step == steps


def test_a_run_without_a_limit_cannot_be_longer(users):
    for options in ({}, {"max_epochs": None}, {"max_steps": -1}, None):
        assert TrainLonger().apply(users(), options) == (False, "give trainer_options with max_steps or max_epochs")


# -- batches -------------------------------------------------------------------------------------------------------


def work(worker):
    """Of a module, so that it is the same object."""


def test_the_rest_of_a_loader_is_kept():
    draw = torch.Generator()
    sampler = WeightedRandomSampler(torch.ones(64), 40, generator=draw)
    loader = DataLoader(
        NUMBERS, 2, sampler=sampler, num_workers=1, collate_fn=torch.utils.data.default_convert, drop_last=True,
        timeout=7, worker_init_fn=work, generator=draw, prefetch_factor=3, persistent_workers=True,
    )  # fmt: skip
    data = {"train_dataloaders": loader, "val_dataloaders": loader}
    assert BatchSize(16).apply(None, {}, data)
    new = data["train_dataloaders"]
    assert new is not loader
    assert data["val_dataloaders"] is loader
    assert (new.batch_size, loader.batch_size) == (16, 2)
    unchanged = (
        "dataset",
        "sampler",
        "num_workers",
        "collate_fn",
        "drop_last",
        "timeout",
        "worker_init_fn",
        "generator",
    )
    for name in (*unchanged, "prefetch_factor", "persistent_workers", "pin_memory", "multiprocessing_context"):
        assert getattr(new, name) is getattr(loader, name) or getattr(new, name) == getattr(loader, name), name


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_that_shuffles_goes_on_shuffling_and_shows_each_example_once(shuffle):
    data = {"train_dataloaders": DataLoader(NUMBERS, 2, shuffle=shuffle, generator=torch.Generator().manual_seed(1))}
    BatchSize(16).apply(None, {}, data)
    batches = [batch[0][:, 0] for batch in data["train_dataloaders"]]
    assert [len(batch) for batch in batches] == [16] * 4
    assert torch.cat(batches).tolist() != list(range(64)) if shuffle else torch.cat(batches).tolist() == list(range(64))
    assert sorted(torch.cat(batches).tolist()) == list(range(64))


def test_a_sampler_with_its_own_number_of_draws_is_kept():
    loader = DataLoader(NUMBERS, 2, sampler=RandomSampler(NUMBERS, replacement=True, num_samples=160))
    data = {"train_dataloaders": loader}
    BatchSize(16).apply(None, {}, data)
    assert len(data["train_dataloaders"]) == 10


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(64.0)


def test_a_stream_is_cut_into_other_batches():
    data = {"train_dataloaders": DataLoader(Stream(), 2)}
    assert BatchSize(16).apply(None, {}, data)
    assert [len(batch) for batch in data["train_dataloaders"]] == [16] * 4


class Own(DataLoader):
    pass


@pytest.mark.parametrize(
    "loader",
    [
        Own(NUMBERS, 2),
        DataLoader(NUMBERS, batch_size=None),
        DataLoader(NUMBERS, batch_sampler=[[0, 1], [2, 3]]),
        [torch.zeros(2, 1)],
        None,
    ],
)
def test_loaders_that_make_batches_by_themselves_are_refused(loader):
    data = {"train_dataloaders": loader}
    change = BatchSize(16).apply(None, {}, data)
    assert not change
    assert "plain DataLoader" in change.what
    assert data["train_dataloaders"] is loader


class Theirs(L.LightningDataModule):
    def __init__(self, batch_size=2):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(NUMBERS, self.hparams.batch_size)


def test_data_modules_make_other_batches():
    ours, theirs = ae.TensorDataModule((torch.zeros(64, 3),), batch_size=2, val_fraction=0.0), Theirs()
    for module in (ours, theirs):
        assert BatchSize(16).apply(None, {}, {"datamodule": module})
        module.setup("fit")
        batch = next(iter(module.train_dataloader()))
        assert len(batch[0] if isinstance(batch, (tuple, list)) else batch) == 16
        assert BatchSize(16).apply(None, {}, {"datamodule": module}) == (False, "batches are of 16 examples already")
    assert not BatchSize(16).apply(None, {}, {"datamodule": L.LightningDataModule()})
    assert not BatchSize(2).apply(None, {}, {"train_dataloaders": DataLoader(NUMBERS, 2)})
    assert not BatchSize(2).apply(None)


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_a_run_stops_when_the_loss_no_longer_falls(users, fit, loader):
    options = {"callbacks": EarlyStopping("train_loss")}
    assert StopEarly("val_loss", patience=2).apply(users(), options)
    assert [c.monitor for c in options["callbacks"]] == ["train_loss", "val_loss"]
    module = users(lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
    data = {"train_dataloaders": loader, "val_dataloaders": loader}
    trainer = fit(module, options["callbacks"][1], data=data, max_epochs=20)
    assert trainer.current_epoch == 3  # the first is the best


@pytest.mark.parametrize("remedy", [StopEarly("val_loss"), ReviveUnits()])
def test_a_callback_needs_the_trainers_options(remedy, users):
    assert remedy.apply(users()) == (False, "it is a callback of the Trainer: give trainer_options")
    options = {"callbacks": None}
    assert remedy.apply(users(), options)
    assert len(options["callbacks"]) == 1
