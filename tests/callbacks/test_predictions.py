"""Predictions on disk are those of the model, whole and in order."""

from __future__ import annotations

import pytest
import torch

import lightning_ae as ae
from lightning_ae.callbacks import PredictionWriter, load_predictions


def run(make_trainer, folder, x, batch_size=4, **options):
    model = ae.LinearAutoencoder(3, 2)
    data = ae.TensorDataModule(x, batch_size=batch_size, val_fraction=0.0)
    writer = PredictionWriter(folder, **options)
    make_trainer(callbacks=writer).predict(model, data, return_predictions=False)
    return model


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
@pytest.mark.parametrize("shard_size", [1, 8, 100])
def test_shards_hold_what_the_model_predicts_in_the_order_of_the_data(file_format, shard_size, make_trainer, tmp_path):
    x = torch.rand(18, 3)
    model = run(make_trainer, tmp_path / "p", x, format=file_format, shard_size=shard_size)
    got = load_predictions(tmp_path / "p")
    z = x @ model.encoder.weight.T + model.encoder.bias
    x_hat = z @ model.encoder.weight + model.decoder.layer.bias
    torch.testing.assert_close(got["z"], z)
    torch.testing.assert_close(got["reconstruction"], x_hat)
    torch.testing.assert_close(got["score"], (x_hat - x).square().sum(1))
    shards = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert len(shards) == {1: 5, 8: 3, 100: 1}[shard_size]
    assert shards[0] == f"rank0-00000.{file_format}"


def test_a_second_run_replaces_the_first(make_trainer, tmp_path):
    run(make_trainer, tmp_path, torch.rand(20, 3), shard_size=1)
    run(make_trainer, tmp_path, torch.rand(6, 3), shard_size=1)
    assert len(load_predictions(tmp_path)["score"]) == 6


def test_shards_of_several_ranks_are_put_in_order(tmp_path):
    import numpy as np

    np.savez(tmp_path / "rank1-00000.npz", index=np.array([1, 3, 0]), z=np.array([10.0, 30.0, 0.0]))
    np.savez(tmp_path / "rank0-00000.npz", index=np.array([0, 2]), z=np.array([0.0, 20.0]))
    assert load_predictions(tmp_path)["z"].tolist() == [0.0, 10.0, 20.0, 30.0]


def test_torchs_own_loader_works_too(make_trainer, tmp_path):
    x = torch.rand(7, 3)
    model = ae.LinearAutoencoder(3, 2)
    loader = torch.utils.data.DataLoader(x, batch_size=3)
    make_trainer(callbacks=PredictionWriter(tmp_path)).predict(model, loader, return_predictions=False)
    torch.testing.assert_close(load_predictions(tmp_path)["z"], model.encode(x).detach())


def test_errors_at_the_door(tmp_path):
    with pytest.raises(ValueError, match="format: expected 'npz' or 'safetensors', got 'csv'"):
        PredictionWriter(tmp_path, format="csv")
    with pytest.raises(ValueError, match="shard_size: expected a positive whole number, got 0"):
        PredictionWriter(tmp_path, shard_size=0)
    with pytest.raises(FileNotFoundError, match="No shards"):
        load_predictions(tmp_path)
