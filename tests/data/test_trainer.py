"""The data modules under a real Trainer."""

import multiprocessing

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lightning_ae.data import ActivationDataModule, ImageFolderDataModule, TensorDataModule, collect_activations

pytestmark = [
    # Lightning's own use of torch's pytree.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # The resumed run must not overwrite the checkpoints of the first.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    # The runs are on the CPU by intention.
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]


class Recorder(LightningModule):
    """Writes down the batches it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch_idx, batch.flatten(1)[:, 0].tolist()))
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.flatten(1)[:, 0].tolist())

    def predict_step(self, batch, batch_idx):
        self.predicted.append(batch.flatten(1)[:, 0].tolist())
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbers(**options):
    return TensorDataModule(torch.arange(50.0)[:, None], batch_size=4, val_fraction=0.1, **options)


@pytest.fixture
def folder(tmp_path):
    (root := tmp_path / "images").mkdir()
    for number in range(50):
        Image.new("L", (4, 4), number).save(root / f"{number:02}.png")

    def make():
        return ImageFolderDataModule(root, image_size=4, channels=1, batch_size=4, num_workers=1)

    return make


@pytest.fixture
def activations(tmp_path):
    rows = torch.arange(50.0)[:, None].split(10)
    collect_activations(torch.nn.Sequential(torch.nn.Identity()), "0", rows, tmp_path / "shards", shard_rows=20)

    def make():
        return ActivationDataModule(tmp_path / "shards", 4, val_fraction=0.1, buffer_rows=10)

    return make


@pytest.fixture
def fit(make_trainer):
    def run(data, ckpt_path=None, **options):
        model = Recorder()
        trainer = make_trainer(num_sanity_val_steps=0, **options)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model, trainer

    return run


def assert_resumes(fit, make, tmp_path, step, limit, keep, **options):
    """Compare the batches after a checkpoint at ``step`` with those of a run that was not interrupted."""

    def checkpoints(folder):  # Lightning expects the callback in both runs
        return ModelCheckpoint(dirpath=tmp_path / folder, filename="{step}", save_top_k=-1, **keep)

    whole, _ = fit(make(), callbacks=[checkpoints("whole")], enable_checkpointing=True, **limit, **options)
    saved = tmp_path / "whole" / f"step={step}.ckpt"
    resumed, _ = fit(make(), saved, callbacks=[checkpoints("resumed")], enable_checkpointing=True, **limit, **options)
    assert len(whole.trained) == 36
    assert resumed.trained == whole.trained[step:]


either_limit = pytest.mark.parametrize(
    "limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 36}], ids=["epochs", "steps"]
)


# 45 training examples are 12 batches an epoch: steps 5 and 17 lie in the middle of one, 12 and 24 at an end.
@either_limit
@pytest.mark.parametrize("step", [5, 12, 17, 24])
def test_resuming_sees_the_batches_of_an_uninterrupted_run(fit, tmp_path, step, limit):
    assert_resumes(fit, numbers, tmp_path, step, limit, {"every_n_train_steps": step})


@either_limit
@pytest.mark.parametrize(("step", "interval"), [(12, 1.0), (18, 0.5)])
def test_resuming_after_validation_sees_the_batches_of_an_uninterrupted_run(fit, tmp_path, step, interval, limit):
    keep = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    assert_resumes(fit, numbers, tmp_path, step, limit, keep, val_check_interval=interval)


# Not with max_steps: resuming from such a checkpoint, Lightning 2.6 counts one epoch too many and tells samplers so.
# For models of ours it is told better: tests/models/test_base.py.
def test_resuming_after_an_epoch_sees_the_batches_of_an_uninterrupted_run(fit, tmp_path):
    keep = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    assert_resumes(fit, numbers, tmp_path, 12, {"max_epochs": 3}, keep)


def test_resuming_with_workers_sees_the_batches_of_an_uninterrupted_run(fit, tmp_path, folder):
    assert_resumes(fit, folder, tmp_path, 17, {"max_epochs": 3}, {"every_n_train_steps": 17})


@either_limit
@pytest.mark.parametrize("step", [5, 12, 17])
def test_resuming_on_activations_sees_the_batches_of_an_uninterrupted_run(fit, tmp_path, activations, step, limit):
    assert_resumes(fit, activations, tmp_path, step, limit, {"every_n_train_steps": step})


def test_no_worker_is_left_when_training_ends(fit, folder):
    before = set(multiprocessing.active_children())
    model, trainer = fit(folder(), max_epochs=1)
    assert len(model.trained) == 12
    assert set(multiprocessing.active_children()) <= before
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=trainer.datamodule)
    assert len(model.trained) == 24


def test_each_epoch_trains_on_all_examples_in_a_new_order(fit):
    model, _ = fit(numbers(), max_epochs=3)
    epochs = [[x for e, _, batch in model.trained if e == epoch for x in batch] for epoch in range(3)]
    held_out = [x for batch in model.validated[:2] for x in batch]
    assert all(sorted(epoch + held_out) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert model.validated[:2] == model.validated[2:4]


def test_overfit_batches_repeats_the_same_batches(fit):
    model, _ = fit(numbers(), max_epochs=3, overfit_batches=2)
    epochs = [[batch for e, _, batch in model.trained if e == epoch] for epoch in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 2


@pytest.mark.filterwarnings("ignore:Total length of `list`:UserWarning")  # Lightning asks whether it is intended
def test_validation_is_skipped_without_a_val_split(fit):
    data = TensorDataModule(torch.rand(8, 2), batch_size=4, val_fraction=0)
    model, trainer = fit(data, max_epochs=2)
    assert len(model.trained) == 4
    assert model.validated == []
    assert trainer.validate(model, datamodule=data, verbose=False) == []


def test_prediction_covers_the_data_in_order(make_trainer):
    model = Recorder()
    data = TensorDataModule(torch.rand(6, 1), predict=torch.arange(5.0)[:, None], batch_size=2)
    trainer = make_trainer()
    trainer.predict(model, datamodule=data)
    assert model.predicted == [[0.0, 1.0], [2.0, 3.0], [4.0]]
    assert trainer.predict_dataloaders.indices(2).tolist() == [4]


def test_reloading_the_loaders_keeps_the_order(fit):
    model, _ = fit(numbers(), max_epochs=3)
    reloaded, _ = fit(numbers(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert reloaded.trained == model.trained


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_resident_data_train_on_the_same_batches(fit, make_trainer):
    on_host, _ = fit(numbers(), max_epochs=2)
    data, model = numbers(device_resident=True), Recorder()
    make_trainer(accelerator="gpu", max_epochs=2).fit(model, data)
    assert next(iter(data.train_dataloader())).is_cuda
    assert model.trained == on_host.trained
