"""Checkpoints of this package's models are rebuilt with what remedies have changed."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_ae as ae
from lightning_ae.diagnostics.remedies import (
    ExchangeLoss,
    Reinitialize,
    RestartCodebook,
    ScaleLearningRate,
    ScaleOutput,
    ScaleWeightDecay,
    SetBias,
    SetWeight,
    StandardizeInput,
    SwapActivation,
)

SHAPE = (1, 8, 8)


def mlp():
    loss, code = ae.SquaredError("sigmoid"), ae.L1Code(1.0)
    return ae.MLPAutoencoder(SHAPE, 4, hidden=(16,), loss=loss, code=code, weight_decay=0.1)


def conv():
    return ae.ConvAutoencoder(SHAPE, 4, channels=(4, 8))


def vae():
    pair = ae.mlp_pair(SHAPE, 4, (16,), "tanh", h_dim=8)
    return ae.VariationalAutoencoder(*pair, ae.BernoulliNLL(), code=ae.GaussianCode(beta=3.0))


def vq():
    code = ae.VectorQuantizerCode(16, 2, kmeans=False, expire=0.0)
    return ae.VectorQuantizedAutoencoder(*ae.mlp_pair(SHAPE, 4, (16,)), code=code)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (mlp, Reinitialize("orthogonal")),
        (mlp, SetBias(("decoder.layers.0",))),
        (mlp, StandardizeInput("encoder.layers.0", 64)),
        (mlp, ScaleOutput("decoder.layers.2", 3.0, 2.0)),
        (mlp, SwapActivation("gelu")),
        (mlp, SetWeight("l1", 0.1)),
        (mlp, ExchangeLoss("BernoulliNLL")),
        (mlp, ScaleLearningRate(0.5)),
        (mlp, ScaleWeightDecay(0.0)),
        (conv, SwapActivation("leaky_relu")),
        (conv, StandardizeInput("encoder.layers.0", 1)),
        (vae, SwapActivation("relu")),
        (vae, SetWeight("kl", 0.5)),
        (vq, RestartCodebook()),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_what_a_remedy_changed_comes_back_with_the_checkpoint(make, remedy, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(32, *SHAPE)
    options = {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    model, as_built = make(), make()
    assert remedy.apply(model, options, {})
    trainer = L.Trainer(**options, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, DataLoader(TensorDataset(x), 16))
    trainer.save_checkpoint(tmp_path / "treated.ckpt")
    again = ae.load(tmp_path / "treated.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(again.eval().reconstruct(x), model.eval().reconstruct(x), rtol=0, atol=0)

    def said(of):  # all that is no tensor
        activations = [type(m).__name__ for m in of.modules()]
        return of.lr, of.weight_decay, of.code.weights(), activations, getattr(of.code, "expire", None)

    assert said(again) == said(model)
    if not isinstance(remedy, (Reinitialize, SetBias, StandardizeInput, ScaleOutput)):
        assert said(again) != said(as_built)


def test_a_loss_that_the_model_would_refuse_when_it_is_rebuilt_is_not_exchanged():
    model = ae.DictionaryAutoencoder(8, 64)
    before = model.loss
    change = ExchangeLoss("BernoulliNLL").apply(model)
    assert not change
    assert "DictionaryAutoencoder" in change.what
    assert model.loss is before


def test_swapping_activations_leaves_the_code_its_own():
    model = mlp()
    before = model.code.activation
    assert before != "gelu"
    assert SwapActivation("gelu").apply(model)
    assert model.code.activation == before
    assert "gelu" not in str(model.hparams["init_args"]["code"])
    assert "gelu" in str(model.hparams["init_args"]["activation"])
