"""Sums of losses: the value, the raw terms, and one reconstruction for all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_ae as ae


class Counting(ae.SquaredError):
    """Counts how often the reconstruction is computed."""

    calls = 0

    def mean(self, params):
        self.calls += 1
        return super().mean(params)


def test_the_sum_is_weighted_and_the_parts_are_raw():
    params, x = torch.randn(3, 4), torch.rand(3, 4)
    loss = ae.WeightedLoss({"bce": ae.BernoulliNLL(), "mse": ae.SquaredError()}, {"bce": 2.0, "mse": 0.5})
    terms = loss.terms(params, x)
    bce = nn.functional.binary_cross_entropy_with_logits(params, x, reduction="none").sum(1)
    mse = (params.sigmoid() - x).square().sum(1)  # on the reconstruction of the first loss
    torch.testing.assert_close(terms["reconstruction/bce"], bce)
    torch.testing.assert_close(terms["reconstruction/mse"], mse)
    torch.testing.assert_close(terms["reconstruction"], 2 * bce + 0.5 * mse)
    torch.testing.assert_close(loss(params, x), 2 * bce + 0.5 * mse)
    torch.testing.assert_close(loss.mean(params), params.sigmoid())


def test_weights_are_read_at_every_call():
    params, x = torch.randn(3, 4), torch.rand(3, 4)
    loss = ae.WeightedLoss({"a": ae.SquaredError(), "b": ae.LaplaceNLL()})
    loss.weights["b"] = 0.0
    torch.testing.assert_close(loss(params, x), (params - x).square().sum(1))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_mixes_pixels_and_perception(alpha):
    params, x = torch.rand(2, 1, 6, 6), torch.rand(2, 1, 6, 6)
    loss = ae.AlphaMix(ae.SquaredError(), ae.FeatureLoss(ae.ImageGradients()), alpha)
    r = params - x
    pixel = r.square().sum((1, 2, 3))
    edges = r.diff(dim=2).square().sum((1, 2, 3)) + r.diff(dim=3).square().sum((1, 2, 3))
    torch.testing.assert_close(loss(params, x), alpha * pixel + (1 - alpha) * edges)
    assert list(loss.terms(params, x)) == ["reconstruction", "reconstruction/pixel", "reconstruction/perceptual"]


def test_alpha_is_read_at_every_call():
    loss = ae.AlphaMix(ae.SquaredError(), ae.LaplaceNLL(), alpha=0.0)
    loss.alpha = 1.0
    torch.testing.assert_close(loss(torch.ones(1, 3), torch.zeros(1, 3)), torch.tensor([3.0]))


def test_the_reconstruction_is_computed_once_for_all_but_the_first():
    first = Counting("sigmoid")
    others = {name: ae.FeatureLoss(nn.Identity()) for name in "abc"}
    loss = ae.WeightedLoss({"first": first, **others})
    loss(torch.randn(2, 3), torch.rand(2, 3))
    assert first.calls == 2  # its own, and the one that the others share


def test_parts_are_logged_and_rebuilt(make_trainer, tmp_path):
    loss = ae.AlphaMix(ae.BernoulliNLL(), ae.FeatureLoss(ae.ImageGradients("sobel")), alpha=0.25)
    model = ae.ConvAutoencoder((1, 8, 8), 2, channels=(4,), loss=loss)
    trainer = make_trainer(log_every_n_steps=1)
    trainer.fit(model, ae.TensorDataModule(torch.rand(16, 1, 8, 8), batch_size=8))
    names = ("reconstruction/pixel", "reconstruction/perceptual")
    got = {name: trainer.callback_metrics[f"val/{name}"].item() for name in ("loss", *names)}
    assert got["loss"] == pytest.approx(0.25 * got[names[0]] + 0.75 * got[names[1]], rel=1e-5)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = ae.load(tmp_path / "m.ckpt")
    assert again.loss.alpha == 0.25
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(again.loss(again(x).params, x), model.loss(model(x).params, x))


def test_a_mix_has_no_weights_but_alpha():
    loss = ae.AlphaMix(ae.SquaredError(), ae.LaplaceNLL(), alpha=0.25)
    assert not hasattr(loss, "weights")
    assert loss.current_weights() == {"pixel": 0.25, "perceptual": 0.75}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ae.WeightedLoss([ae.SquaredError()]), "losses: expected a mapping from names to losses, got a list"),
        (
            lambda: ae.WeightedLoss({"a": nn.MSELoss()}),
            "losses: expected 'a' to be a Recon.*, got a MSELoss",
        ),
        (lambda: ae.AlphaMix(ae.SquaredError(), ae.ImageGradients()), "^perceptual: expected a ReconstructionLoss"),
    ],
)
def test_what_is_no_loss_is_refused(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ae.WeightedLoss({}), "losses: expected at least one"),
        (lambda: ae.WeightedLoss({"a": ae.SquaredError()}, {"b": 1.0}), r"weights: expected the names \['a'\]"),
        (lambda: ae.WeightedLoss({"a": ae.SquaredError(), "b": ae.BernoulliNLL()}), "identity, but 'b' sigmoid. Put"),
        (lambda: ae.AlphaMix(ae.SquaredError(), ae.LaplaceNLL(), 1.5), r"alpha: expected a number in \[0, 1\]"),
    ],
)
def test_errors_at_the_door(build, message):
    with pytest.raises(ValueError, match=message):
        build()
