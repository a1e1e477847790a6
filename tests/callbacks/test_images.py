"""Pictures show what was asked for, where it was asked for, and training does not notice."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from torch import nn

import lightning_ae as ae
from lightning_ae.callbacks import ReconstructionImages

PAD, GREY = 2, round(0.5 * 255)


class Half(L.LightningModule):
    """Reconstructs half of each pixel, drops out and draws random numbers; not ours."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.5)

    def reconstruct(self, x):
        assert not torch.is_grad_enabled()
        assert not self.training
        return self.drop(x) / 2 + 0 * torch.rand(1)

    def training_step(self, batch, batch_idx):
        return (self.theta * self.drop(batch) + torch.rand(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Staged(Half):
    """Has stages, and can be sampled."""

    def stages(self, x):
        return [x / 4, x / 3, x / 2]

    def sample(self, n):
        return torch.rand(n, *self.event)


def loader(x, batch_size=2):
    return torch.utils.data.DataLoader(x, batch_size=batch_size)


def draw(make_trainer, tmp_path, x, model=None, batch_size=2, **options):
    callback = ReconstructionImages(folder=tmp_path / "pictures", **options)
    make_trainer(callbacks=callback).validate(Half() if model is None else model, loader(x, batch_size), verbose=False)
    return np.asarray(Image.open(tmp_path / "pictures" / "reconstructions-0.png"))


def cells(picture, height, width, rows, columns):
    """The picture cut at its padding: (rows, columns, height, width, 3)."""
    assert picture.shape == (rows * (height + PAD) + PAD, columns * (width + PAD) + PAD, 3)
    assert (picture[:PAD] == GREY).all()
    cut = picture[PAD:, PAD:].reshape(rows, height + PAD, columns, width + PAD, 3)
    return cut[:, :height, :, :width].transpose(0, 2, 1, 3, 4)


def as_bytes(x):
    return np.floor(np.asarray(x, dtype=np.float64) * 255 + 0.5).astype(np.uint8)


def test_examples_are_drawn_over_their_reconstructions(make_trainer, tmp_path):
    x = torch.rand(7, 3, 50, 60)  # not square
    found = cells(draw(make_trainer, tmp_path, x, num=5), 50, 60, rows=2, columns=5)
    expected = x[:5].permute(0, 2, 3, 1)
    np.testing.assert_allclose(found[0], as_bytes(expected), atol=1)
    np.testing.assert_allclose(found[1], as_bytes(expected / 2), atol=1)


def test_fewer_examples_than_asked_for_are_all_drawn(make_trainer, tmp_path):
    picture = draw(make_trainer, tmp_path, torch.rand(3, 1, 48, 48), num=8)
    assert cells(picture, 48, 48, rows=2, columns=3).shape[1] == 3


def test_small_and_grey_images_are_enlarged_by_whole_factors(make_trainer, tmp_path):
    x = torch.rand(2, 8, 6)
    found = cells(draw(make_trainer, tmp_path, x, num=2), 48, 36, rows=2, columns=2)
    blocks = np.kron(as_bytes(x), np.ones((1, 6, 6)))[..., None]
    np.testing.assert_allclose(found[0], np.broadcast_to(blocks, (2, 48, 36, 3)), atol=1)


def test_flat_data_are_drawn_in_the_shape_given(make_trainer, tmp_path):
    x = torch.rand(2, 48 * 50)
    found = cells(draw(make_trainer, tmp_path, x, num=2, shape=(48, 50)), 48, 50, rows=2, columns=2)
    np.testing.assert_allclose(found[0, ..., 0], as_bytes(x.view(2, 48, 50)), atol=1)


def test_stages_and_samples_have_their_rows(make_trainer, tmp_path):
    model = Staged()
    model.event = (1, 48, 48)
    x = torch.rand(3, 1, 48, 48)
    found = cells(draw(make_trainer, tmp_path, x, model, num=3, samples=True), 48, 48, rows=5, columns=3)[..., 0]
    for row, share in enumerate([1, 2, 4, 3]):
        np.testing.assert_allclose(found[row], as_bytes(x[:, 0] / share), atol=1)
    again = cells(draw(make_trainer, tmp_path, x, model, num=3, samples=True), 48, 48, rows=5, columns=3)[..., 0]
    assert (found[4] == again[4]).all()
    assert found[4].std() > 50


@pytest.mark.parametrize(
    ("x", "options", "low", "high"),
    [
        (torch.linspace(-3, 5, 48 * 48).view(1, 1, 48, 48), {}, -3, 5),
        (torch.linspace(0.2, 0.9, 48 * 48).view(1, 1, 48, 48), {}, 0, 1),
        (torch.full((1, 1, 48, 48), 0.5), {}, 0, 1),
        (torch.linspace(-3, 5, 48 * 48).view(1, 1, 48, 48), {"value_range": (0.0, 2.0)}, 0, 2),
    ],
)
def test_the_range_goes_from_black_to_white(make_trainer, tmp_path, x, options, low, high):
    found = cells(draw(make_trainer, tmp_path, x, num=1, **options), 48, 48, rows=2, columns=1)[..., 0]
    for row, values in enumerate([x, x / 2]):
        np.testing.assert_allclose(found[row, 0], as_bytes(((values[0, 0] - low) / (high - low)).clamp(0, 1)), atol=1)


def test_the_range_is_that_of_the_loss(make_trainer, tmp_path):
    model = Half()
    model.loss = ae.SquaredError("tanh")
    x = torch.rand(1, 1, 48, 48)
    found = cells(draw(make_trainer, tmp_path, x, model, num=1), 48, 48, rows=2, columns=1)[..., 0]
    np.testing.assert_allclose(found[0, 0], as_bytes((x[0, 0] + 1) / 2), atol=1)


# -- when and where -------------------------------------------------------------------------------------------


def fit(make_trainer, callbacks, model=None, **options):
    model = Half() if model is None else model
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 5, **options})
    x = torch.rand(4, 1, 48, 48)
    trainer.fit(model, loader(x), loader(x))
    return trainer


def steps(folder):
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("*.png"))


def test_every_so_many_validations_are_drawn_without_the_sanity_check(make_trainer, tmp_path):
    fit(make_trainer, ReconstructionImages(2, every_n_epochs=2))
    assert steps(tmp_path / "images") == [2, 6, 10]


def test_a_resumed_run_draws_when_the_interrupted_one_would_have(make_trainer, tmp_path):
    first = fit(make_trainer, ReconstructionImages(2, every_n_epochs=2), max_epochs=1)
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(callbacks=ReconstructionImages(2, every_n_epochs=2), max_epochs=5)
    x = torch.rand(4, 1, 48, 48)
    trainer.fit(Half(), loader(x), loader(x), ckpt_path=tmp_path / "last.ckpt")
    assert steps(tmp_path / "images") == [2, 6, 10]


def test_tensorboard_gets_pictures_and_no_files_are_written(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = fit(make_trainer, ReconstructionImages(2), logger=TensorBoardLogger(tmp_path), max_epochs=2)
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    images = events.Images("reconstructions")
    assert [image.step for image in images] == [2, 4]
    assert (images[0].width, images[0].height) == (2 * 50 + 2, 2 * 50 + 2)
    assert not list(tmp_path.rglob("*.png"))


class Wandb(Logger):
    """What is called of Weights & Biases' logger."""

    def __init__(self):
        super().__init__()
        self.images = []
        self.experiment = object()

    name = version = "wandb"
    save_dir = None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_image(self, key, images, step=None):
        self.images.append((key, *images, step))


def test_weights_and_biases_get_pictures(make_trainer, tmp_path):
    logger = Wandb()
    fit(make_trainer, ReconstructionImages(2), logger=logger, max_epochs=1)
    ((key, image, step),) = logger.images
    assert (key, image.shape, image.dtype, step) == ("reconstructions", (102, 102, 3), np.uint8, 2)


def test_what_is_out_of_range_or_not_finite_is_black_or_white(make_trainer):
    logger, model = Wandb(), Half()
    model.reconstruct = lambda x: torch.stack([torch.full_like(x[0], value) for value in (3.0, -0.5, torch.nan)])
    callback = ReconstructionImages(3)
    make_trainer(callbacks=callback, logger=logger).validate(model, loader(torch.rand(3, 1, 48, 48), 3), verbose=False)
    found = cells(logger.images[0][1], 48, 48, rows=2, columns=3)
    assert [np.unique(cell).tolist() for cell in found[1]] == [[255], [0], [0]]


def test_other_loggers_leave_files_in_the_log_folder(make_trainer, tmp_path):
    trainer = fit(make_trainer, ReconstructionImages(2), logger=CSVLogger(tmp_path), max_epochs=1)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["reconstructions-2.png"]
    assert next(iter(tmp_path.rglob("*.png"))).is_relative_to(trainer.logger.log_dir)


def test_a_folder_is_written_to_beside_the_logger(make_trainer, tmp_path):
    callback = ReconstructionImages(2, folder=tmp_path / "mine")
    fit(make_trainer, callback, logger=TensorBoardLogger(tmp_path), max_epochs=1)
    assert steps(tmp_path / "mine") == [2]


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_weights_are_the_same_bit_by_bit(make_trainer, tmp_path, kind):
    def train(callbacks):
        L.seed_everything(3, verbose=False)
        model = Staged()
        model.event = (1, 48, 48)
        if kind == "ours":
            model = ae.DenoisingAutoencoder((1, 48, 48), 3, hidden=(8,), norm="batch", lr=0.01)
        fit(make_trainer, callbacks, model, max_epochs=3)
        assert model.training
        return model.state_dict()

    plain = train([])
    drawn = train([ReconstructionImages(3, samples=kind == "theirs")])
    assert steps(tmp_path / "images") == [2, 4, 6]
    assert all(torch.equal(value, drawn[name]) for name, value in plain.items() if isinstance(value, torch.Tensor))


def test_half_precision_is_drawn(make_trainer, tmp_path):
    model = ae.ConvAutoencoder((1, 48, 48), 4, channels=[4])
    fit(make_trainer, ReconstructionImages(2), model, max_epochs=1, precision="bf16-mixed")
    assert steps(tmp_path / "images") == [2]


# -- what cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(2, 8, 8), (5, 8, 8), (64,), (3, 4, 4, 4)])
def test_other_data_are_not_drawn_and_it_says_so(make_trainer, tmp_path, event):
    callback = ReconstructionImages(2)
    with pytest.warns(UserWarning, match=rf"one or three channels.*not examples of shape \({event[0]},"):
        make_trainer(callbacks=callback).validate(Half(), loader(torch.rand(4, *event)), verbose=False)
    assert not (tmp_path / "images").exists()


def test_a_model_that_cannot_reconstruct_is_an_error(make_trainer):
    class Other(Half):
        reconstruct = None

    with pytest.raises(TypeError, match="Other has no method 'reconstruct'"):
        make_trainer(callbacks=ReconstructionImages()).fit(Other(), loader(torch.rand(4, 1, 8, 8)))
    with pytest.raises(TypeError, match="Half has no method 'sample'"):
        make_trainer(callbacks=ReconstructionImages(samples=True)).fit(Half(), loader(torch.rand(4, 1, 8, 8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num: expected a positive whole number, got 0"),
        ({"every_n_epochs": -1}, "every_n_epochs: expected a positive whole number, got -1"),
        ({"shape": (3,)}, r"shape: expected \(H, W\) or \(C, H, W\), got \(3,\)"),
        ({"value_range": (1.0, 0.0)}, "value_range: expected"),
        ({"value_range": (1.0, float("inf"))}, "value_range: expected a finite number, got inf"),
    ],
)
def test_errors_at_the_door(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionImages(**arguments)
