"""Reading collected activations."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_ae.data import ActivationDataModule, collect_activations


def numbered(folder, n=300, shard_rows=40, dtype="float32", width=2):
    """Rows (i, i, …), from batches of 20."""
    x = torch.arange(float(n))[:, None].expand(n, width)
    collect_activations(nn.Sequential(nn.Identity()), "0", x.split(20), folder, shard_rows=shard_rows, dtype=dtype)
    return folder


@pytest.fixture
def folder(tmp_path):
    return numbered(tmp_path)


def read(loader):
    return [batch[:, 0].int().tolist() for batch in loader]


def flat(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("buffer_rows", [1, 50, 10_000])
@pytest.mark.parametrize("val_by", ["blocks", "shards"])
def test_an_epoch_has_each_row_once_and_validation_the_others(folder, buffer_rows, val_by):
    data = ActivationDataModule(folder, 32, val_fraction=0.2, val_by=val_by, buffer_rows=buffer_rows)
    loader, val = data.train_dataloader(), flat(read(data.val_dataloader()))
    epochs = [flat(read(loader)) for _ in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(epoch + val) == list(range(300))
        assert len(epoch) == data.num_train_examples
    assert len(val) == pytest.approx(60, abs=20)
    assert val == sorted(val)


def test_batches_are_what_the_order_says(folder):
    data = ActivationDataModule(folder, 32, val_fraction=0, buffer_rows=100)
    loader = data.train_dataloader()
    for batch_idx, batch in enumerate(read(loader)):
        assert batch == loader.indices(batch_idx).tolist()
    assert loader.num_examples == 300


def test_shards_are_held_out_whole(folder):
    data = ActivationDataModule(folder, 32, val_fraction=0.3, val_by="shards")
    shard = {row: row // 40 for row in range(300)}
    val, train = flat(read(data.val_dataloader())), flat(read(data.train_dataloader()))
    assert {shard[row] for row in val}.isdisjoint(shard[row] for row in train)
    assert len({shard[row] for row in val}) == round(0.3 * 8)


def test_neighbours_are_held_out_together(folder):
    val = flat(read(ActivationDataModule(folder, 32, val_fraction=0.2).val_dataloader()))
    blocks = {row // 6 for row in val if row < 40}  # 300 // 50 rows in a block; shards of 40 start anew
    assert all({6 * block + i for i in range(6) if 6 * block + i < 40} <= set(val) for block in blocks)


def test_what_is_held_out_depends_on_the_seed_only(folder):
    def held_out(**options):
        return flat(read(ActivationDataModule(folder, 16, val_fraction=0.2, **options).val_dataloader()))

    assert held_out() == held_out(buffer_rows=20)
    assert held_out() != held_out(seed=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_batches_are_float32_whatever_is_stored(tmp_path, dtype):
    numbered(tmp_path, n=60, dtype=dtype)
    (batch,) = ActivationDataModule(tmp_path, 100, val_fraction=0).train_dataloader()
    assert batch.dtype == torch.float32
    assert sorted(batch[:, 1].tolist()) == [float(i) for i in range(60)]


def test_resumes_in_the_middle_of_an_epoch(folder):
    def loader():
        return ActivationDataModule(folder, 32, buffer_rows=64).train_dataloader()

    whole = loader()
    expected = [read(whole), read(whole)]
    broken_off = loader()
    iterator = iter(broken_off)
    seen = read([next(iterator) for _ in range(3)])
    state = broken_off.state_dict()
    iterator.close()
    again = loader()
    again.load_state_dict(state)
    assert state == {"epoch": 0, "batch": 3}
    assert seen + read(again) == expected[0]
    assert read(again) == expected[1]


def on_rank(folder, rank, world_size, **options):
    data = ActivationDataModule(folder, 8, val_fraction=0.2, buffer_rows=64, **options)
    data.trainer = SimpleNamespace(
        overfit_batches=0, distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size}
    )
    return data


def test_ranks_read_different_rows_and_together_the_batches_of_one_device(folder):
    one = ActivationDataModule(folder, 56, val_fraction=0.2, buffer_rows=64)
    ranks = [on_rank(folder, rank, 7) for rank in range(7)]
    whole, parts = read(one.train_dataloader()), [read(data.train_dataloader()) for data in ranks]
    assert one.num_train_examples % 7  # some rows have to be repeated, so that ranks have equally many
    assert len({len(flat(part)) for part in parts}) == 1
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        together = [row for rows in zip(*of_ranks, strict=True) for row in rows]
        assert together[: len(batch)] == batch
    seen = [row for part in parts for row in flat(part)]
    assert len(seen) - len(set(seen)) == -one.num_train_examples % 7
    held_out = [row for data in ranks for row in flat(read(data.val_dataloader()))]
    assert sorted(held_out) == flat(read(one.val_dataloader()))


def test_reading_ahead_ends_with_the_pass(folder):
    before = threading.active_count()
    iterator = iter(ActivationDataModule(folder, 8, buffer_rows=16).train_dataloader())
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before


def test_shape_and_moments_are_those_of_the_rows(folder):
    data = ActivationDataModule(folder, 32)
    rows = torch.arange(300.0)[:, None].expand(300, 2)
    assert data.in_shape == (2,)
    torch.testing.assert_close(data.shards.mean, rows.mean(0))
    torch.testing.assert_close(data.shards.mean_square, rows.square().mean(0))


def test_a_data_module_goes_to_another_process_without_the_rows(tmp_path):
    numbered(tmp_path, width=200)
    data = ActivationDataModule(tmp_path, 32, val_fraction=0)
    expected = read(data.train_dataloader())
    sent = pickle.dumps(data)
    assert len(sent) < 300 * 200
    assert read(pickle.loads(sent).train_dataloader()) == expected


@pytest.mark.filterwarnings("ignore:.*Total length of `list`")  # Lightning asks whether it is intended
def test_nothing_is_held_out_if_nothing_is_asked_for(folder):
    assert ActivationDataModule(folder, 32, val_fraction=0).val_dataloader() == []


ONE_PASS = """
import re, sys, torch
from lightning_ae import ActivationDataModule
torch.set_num_threads(1)
def mine():  # what the kernel cannot take back, in MB
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
data = ActivationDataModule(sys.argv[1], 512, val_fraction=0, buffer_rows=4096)
loader = data.train_dataloader()
next(iter(loader))
before, most, rows = mine(), 0, 0
for batch in loader:
    most, rows = max(most, mine()), rows + len(batch)
print(rows, most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pass_needs_memory_for_the_buffer_and_not_for_the_data(tmp_path):
    x = torch.randn(32_768, 1024)  # 128 MB
    collect_activations(nn.Sequential(nn.Identity()), "0", x.split(2048), tmp_path, shard_rows=8192)
    out = subprocess.run([sys.executable, "-c", ONE_PASS, str(tmp_path)], capture_output=True, text=True, check=True)
    rows, grown = out.stdout.split()
    assert int(rows) == 32_768
    assert float(grown) < 48  # two windows of 8 MB, and batches


# -- errors -----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_what_is_not_finished_is_an_error(tmp_path):
    def batches():
        yield torch.zeros(5, 2)
        yield torch.zeros(5, 2)
        raise Interrupted

    with pytest.raises(Interrupted):
        collect_activations(nn.Sequential(nn.Identity()), "0", batches(), tmp_path, shard_rows=5)
    with pytest.raises(ValueError, match=r"folder: collecting into .* is not finished"):
        _ = ActivationDataModule(tmp_path).in_shape


def test_a_shard_of_another_length_is_an_error(folder):
    data = ActivationDataModule(folder, 32)
    shard = folder / "shard-00000.safetensors"
    save_file({"activations": torch.zeros(3, 2), "index": torch.zeros(3, 1, dtype=torch.int64)}, shard)
    gc.collect()
    with pytest.raises(
        ValueError, match=r"expected 40 rows of activations in .*shard-00000.safetensors, got .*\(3, 2\)"
    ):
        list(data.train_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_by": "rows"}, "val_by: expected 'blocks' or 'shards', got 'rows'"),
        ({"block_rows": 0}, "block_rows: expected a positive whole number, got 0"),
        ({"buffer_rows": 0}, "buffer_rows: expected a positive whole number, got 0"),
        ({"val_fraction": 1.0}, r"val_fraction: expected a number in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ActivationDataModule(tmp_path, **options)


def test_a_folder_without_a_manifest_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected shards of collect_activations"):
        ActivationDataModule(tmp_path).setup()


def test_one_shard_cannot_be_split_by_shards(tmp_path):
    numbered(tmp_path, shard_rows=1000)
    with pytest.raises(ValueError, match="leaves none to train on"):
        ActivationDataModule(tmp_path, val_by="shards").setup()
