"""An epoch that ends in a batch of one example, under batch normalisation."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_ae as ae

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(**options) -> L.Trainer:
    return L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET, **options)


def mlp() -> ae.Autoencoder:
    return ae.MLPAutoencoder(4, 2, hidden=(8,), norm="batch")


def ours(n: int, **kwargs) -> ae.TensorDataModule:
    return ae.TensorDataModule(torch.rand(n, 4), batch_size=4, val_fraction=0, **kwargs)


@pytest.mark.parametrize("data", [lambda: ours(9), lambda: DataLoader(torch.rand(9, 4), 4)], ids=["ours", "torch"])
def test_it_is_refused_in_the_first_step_before_anything_is_learnt(data):
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit = trainer()
    with pytest.raises(ValueError, match=r"batch_size: the last batch of an epoch is a single example.*drop_last=True"):
        fit.fit(model, data())
    assert fit.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_never_meets_it_trains():
    for model, data, options in (
        (mlp(), ours(9, drop_last=True), {}),
        (mlp(), ours(10), {}),
        (mlp(), ours(9), {"limit_train_batches": 2}),
        (mlp(), DataLoader(torch.rand(9, 4), 4, drop_last=True), {}),
        (ae.MLPAutoencoder(4, 2, hidden=(8,), norm="layer"), ours(9), {}),
    ):
        fit = trainer(**options)
        fit.fit(model, data)
        assert fit.global_step >= 2
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_images_that_are_not_shrunk_to_a_point_have_a_variance_each():
    images = ae.TensorDataModule(torch.rand(9, 1, 8, 8), batch_size=4, val_fraction=0)
    fit = trainer()
    fit.fit(ae.ConvAutoencoder((1, 8, 8), 2, channels=(2,), norm="batch"), images)
    assert fit.global_step == 3
    with pytest.raises(ValueError, match="batch_size: the last batch"):
        trainer().fit(
            ae.ConvAutoencoder((1, 4, 4), 2, channels=(2, 2), norm="batch"),
            ae.TensorDataModule(torch.rand(9, 1, 4, 4), batch_size=4, val_fraction=0),
        )
