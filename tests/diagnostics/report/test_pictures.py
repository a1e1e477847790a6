"""Pictures of a report with matplotlib, and inputs beside reconstructions without it."""

from __future__ import annotations

import base64
import io
import math

import lightning as L
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image
from torch import nn
from torch.nn import functional

import lightning_ae as ae


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", ["full", "hostile"])
def test_plot_gives_figure_and_axes_as_torchmetrics_does(name, request):
    report = request.getfixturevalue(name)
    figure, axes = report.plot()
    assert isinstance(axes, np.ndarray)
    assert all(isinstance(one, Axes) and one.figure in (figure, None) for one in axes.flat)
    figure.savefig(io.BytesIO())
    mine, ax = pyplot.subplots()
    assert report.plot(ax) == (mine, ax)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["training"].get_xdata()) == report.curves["loss"].steps
    assert list(lines["training"].get_ydata()) == report.curves["loss"].values
    # a line for each finding of which it is known when it was first seen
    upright = [line for line in ax.get_lines() if len(set(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in upright] == [0, 10, 20]
    assert [text.get_text().strip() for text in ax.texts] == ["1", "2", "3"]


def test_plot_of_a_report_without_figures_is_empty_and_no_error():
    figure, axes = ae.Report([]).plot()
    assert axes.shape == (1, 1)
    figure.savefig(io.BytesIO())


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


class Plain(L.LightningModule):
    """Reconstructs images by a loss that it is told; its last layer gives logits."""

    def __init__(self, loss, shape=(1, 8, 8)):
        super().__init__()
        self.loss, size = loss, math.prod(shape)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(size, 4), nn.Linear(4, size), nn.Unflatten(1, shape))

    def training_step(self, batch, batch_idx):
        x = batch if isinstance(batch, torch.Tensor) else batch[0]
        return self.loss(self.net(x), x)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def examples(make_trainer, model, data=None, **options):
    report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
    make_trainer(callbacks=report, limit_train_batches=3, **options).fit(model, data or ae.DigitsDataModule())
    return report.report.examples


@pytest.mark.parametrize(
    ("loss", "output", "validate"),
    [
        (functional.mse_loss, lambda a: a, True),
        (functional.mse_loss, lambda a: a, False),
        (functional.binary_cross_entropy_with_logits, torch.sigmoid, True),
        # what is written out is heard by its gradient, which validation has not
        (lambda a, x: ((x - torch.sigmoid(a)) ** 2).flatten(1).sum(1).mean(), torch.sigmoid, False),
    ],
)
def test_keeps_inputs_beside_their_reconstructions_and_finds_the_worst(make_trainer, loss, output, validate):
    model, data = Plain(loss), ae.DigitsDataModule(batch_size=32)
    found = examples(make_trainer, model, data, limit_val_batches=1 if validate else 0)
    assert (found.stage, found.of, found.shape) == ("validation" if validate else "training", 32, [1, 8, 8])
    assert (found.low, found.high) == (0, 1)
    assert [e.number for e in found.first] == list(range(8))
    assert [e.error for e in found.worst] == sorted((e.error for e in found.worst), reverse=True)
    assert max(e.error for e in found.first) <= found.worst[0].error
    assert pixels(found.first[0].x).shape == (8, 8)
    if validate:  # the first batch of validation is always the same one
        x = next(iter(data.val_dataloader()))[0]
        errors = (output(model.net(x)) - x).square().flatten(1).mean(1).detach()
        assert [e.number for e in found.worst] == errors.argsort(descending=True)[:8].tolist()
        for e in (*found.first, *found.worst):
            assert e.error == pytest.approx(float(errors[e.number]), rel=1e-5)
            expected = (x[e.number, 0].clamp(0, 1) * 255).round()
            assert np.array_equal(pixels(e.x), expected.numpy())
            expected = (output(model.net(x))[e.number, 0].detach().clamp(0, 1) * 255).round()
            assert np.abs(pixels(e.x_hat) - expected.numpy()).max() <= 1


def test_a_model_of_ours_is_drawn_as_it_reconstructs(make_trainer):
    model, data = ae.MLPAutoencoder((1, 8, 8), 4, hidden=(8,), lr=0.0), ae.DigitsDataModule(batch_size=32)
    found = examples(make_trainer, model, data, limit_val_batches=1)
    x = next(iter(data.val_dataloader()))[0]
    errors = (model.eval().reconstruct(x) - x).square().flatten(1).mean(1).detach()
    assert [e.error for e in found.first] == pytest.approx(errors[:8].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [
        ((3, 6, 5), (6, 5, 3)),
        ((1, 130, 65), (64, 32)),
        ((9, 7), (9, 7)),
        ((5, 4, 6), (4, 6)),
        ((12,), 12),
        ((1, 700), 256),
    ],
)
def test_events_of_all_shapes_are_images_or_curves(make_trainer, shape, drawn):
    data = ae.TensorDataModule(torch.rand(40, *shape), batch_size=16)
    found = examples(make_trainer, Plain(functional.mse_loss, shape), data)
    for part in found.first[0][2:]:
        if isinstance(drawn, int):
            assert len(part) == drawn
        else:
            assert pixels(part).shape[:2] == drawn[:2]
    if not isinstance(drawn, int):
        assert pixels(found.first[0].x).shape == drawn


def test_numbers_that_are_not_finite_are_the_worst_and_break_nothing(make_trainer):
    def loss(a, x):
        return functional.mse_loss(a.where((torch.arange(len(a)) != 5)[:, None, None, None], math.inf), x)

    found = examples(make_trainer, Plain(loss), ae.DigitsDataModule(batch_size=32), limit_val_batches=1)
    assert found.worst[0].number == 5
    assert math.isinf(found.worst[0].error)
    assert not any(math.isinf(e.error) for e in found.worst[1:])


def test_what_reconstructs_nothing_has_no_examples(make_trainer):
    class Classifier(Plain):
        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.net(batch[0]).flatten(1)[:, :10], batch[1])

        validation_step = training_step

    assert examples(make_trainer, Classifier(None)) is None


def test_large_batches_are_kept_in_part(make_trainer):
    data = ae.TensorDataModule(torch.rand(200, 1, 8, 8), batch_size=100, val_fraction=0.0)
    assert examples(make_trainer, Plain(functional.mse_loss), data).of == 64
