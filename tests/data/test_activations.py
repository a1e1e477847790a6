"""Collecting activations: what is written, and going on after ``kill -9``."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from lightning_ae.data import ActivationShards, collect_activations


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def data(n=50, batch=7):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(2)).split(batch)


def everything(shards):
    return shards.rows(torch.arange(len(shards)))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("shard_rows", [1, 20, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_the_layers_output_in_the_order_of_the_data(tmp_path, shard_rows, dtype):
    model = network()
    shards = collect_activations(model, "1", data(), tmp_path, shard_rows=shard_rows, dtype=dtype)
    x = torch.cat(data())
    expected = torch.tanh(x @ model[0].weight.T + model[0].bias).detach()
    found = everything(shards)
    assert found.dtype == getattr(torch, dtype)
    atol = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    torch.testing.assert_close(found.float(), expected, atol=atol, rtol=0)
    assert shards.index(torch.arange(50))[:, 0].tolist() == list(range(50))
    assert sum(shards.sizes) == len(shards) == 50
    assert all(size >= shard_rows for size in shards.sizes[:-1])


def test_the_manifest_tells_counts_and_moments(tmp_path):
    shards = collect_activations(network(), "1", data(), tmp_path, shard_rows=20)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    written = [load_file(tmp_path / shard["file"])["activations"] for shard in manifest["shards"]]
    rows = np.concatenate(written).astype(np.float64)
    assert [len(part) for part in written] == [shard["rows"] for shard in manifest["shards"]] == [21, 21, 8]
    assert (manifest["rows"], manifest["shape"], manifest["batches"], manifest["complete"]) == (50, [5], 8, True)
    assert manifest["settings"]["dtype"] == "float32"
    np.testing.assert_allclose(manifest["mean"], rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest["mean_square"], (rows**2).mean(0), rtol=1e-12)
    torch.testing.assert_close(shards.mean, torch.tensor(rows.mean(0), dtype=torch.float32))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_shards_can_be_read_by_whom_new_files_can(tmp_path):
    (tmp_path / "new").touch()
    collect_activations(network(), "1", data(), tmp_path / "shards")
    assert {path.stat().st_mode for path in (tmp_path / "shards").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_any_rows_can_be_read_in_any_order(tmp_path):
    shards = collect_activations(network(), "1", data(), tmp_path, shard_rows=10)
    which = torch.tensor([49, 0, 13, 14, 13, 28])
    assert torch.equal(shards.rows(which), everything(shards)[which])
    assert shards.rows(which[:0]).shape == (0, 5)
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match=r"expected rows in \[0, 50\)"):
            shards.rows(torch.tensor([wrong]))


class Tokens(nn.Module):
    """A model in Hugging Face's manner: keyword arguments, and blocks that return tuples."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x), {"cache": None}

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Tokens.Block(), Tokens.Block()])

    def forward(self, *, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x, _ = block(x)
        return {"logits": x}


def token_batches():
    ids = torch.tensor([[5, 3, 0], [7, 0, 0], [1, 2, 3], [9, 9, 0]])
    return [{"input_ids": part, "attention_mask": (part != 0).long()} for part in ids.split(3)]


def test_tokens_become_rows_and_padding_none(tmp_path):
    model = Tokens()
    shards = collect_activations(
        model, "blocks.0", token_batches(), tmp_path, mask_fn=lambda batch: batch["attention_mask"]
    )
    kept = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
    assert [tuple(place) for place in shards.index(torch.arange(len(shards))).tolist()] == kept
    ids = torch.cat([batch["input_ids"] for batch in token_batches()])
    vectors = model.embed.weight[[ids[place].item() for place in kept]]
    expected = vectors @ model.blocks[0].linear.weight.T + model.blocks[0].linear.bias
    torch.testing.assert_close(everything(shards), expected.detach())


def test_without_a_mask_all_tokens_are_rows(tmp_path):
    shards = collect_activations(Tokens(), "blocks.1", token_batches(), tmp_path)
    assert (len(shards), shards.num_features) == (12, 4)


def test_a_model_of_hugging_face_works(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2Model(config)
    ids = torch.randint(20, (6, 5))
    batches = [transformers.BatchEncoding({"input_ids": part, "attention_mask": part * 0 + 1}) for part in ids.split(4)]
    shards = collect_activations(model, "h.0", batches, tmp_path)
    with torch.no_grad():
        expected = model.eval()(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(everything(shards), expected.flatten(0, 1), atol=1e-5, rtol=0)


def test_maps_have_a_row_for_each_place(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(1, 3, 2)), torch.randn(5, 1, 4, 4)
    shards = collect_activations(model, "0", x.split(2), tmp_path, feature_dim=1)
    maps = model(x).detach()
    for row, (example, i, j) in zip(everything(shards), shards.index(torch.arange(len(shards))).tolist(), strict=True):
        torch.testing.assert_close(row, maps[example, :, i, j])
    assert len(shards) == 5 * 3 * 3


def test_the_model_is_as_it_was(tmp_path):
    model = network()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    collect_activations(model, "4", data(), tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_evaluation_mode_is_what_is_collected(tmp_path):
    model = network().train()
    shards = collect_activations(model, "2", data(), tmp_path)  # dropout
    x = torch.cat(data())
    torch.testing.assert_close(everything(shards), torch.tanh(model[0](x)).detach())


def test_forward_of_ones_own_and_a_tuple_batch(tmp_path):
    model, x = network(), torch.cat(data())
    one = collect_activations(model, "0", [(x, torch.zeros(50))], tmp_path / "a")
    two = collect_activations(model, "0", [{"features": x}], tmp_path / "b", forward=lambda m, b: m(b["features"]))
    assert torch.equal(everything(one), everything(two))


# -- interrupted ------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def broken_off(after):
    for number, batch in enumerate(data()):
        if number == after:
            raise Interrupted
        yield batch


def runs(model):
    """Count the forward passes."""
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("after", "left"), [(0, 8), (2, 8), (3, 5), (5, 5), (6, 2), (7, 2)])
def test_a_restart_runs_only_batches_without_a_whole_shard(tmp_path, after, left):
    whole = collect_activations(network(), "1", data(), tmp_path / "whole", shard_rows=20)  # 3 batches in a shard
    with pytest.raises(Interrupted):
        collect_activations(network(), "1", broken_off(after), tmp_path / "parts", shard_rows=20)
    seen = runs(model := network())
    shards = collect_activations(model, "1", data(), tmp_path / "parts", shard_rows=20)
    assert len(seen) == left
    assert torch.equal(everything(shards), everything(whole))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_finished_folder_is_returned_without_looking_at_the_batches(tmp_path):
    collect_activations(network(), "1", data(), tmp_path)
    seen = runs(model := network())
    assert len(collect_activations(model, "1", broken_off(0), tmp_path)) == 50
    assert seen == []


@pytest.mark.parametrize(
    ("options", "name"),
    [({"layer": "0"}, "layer"), ({"dtype": "float16"}, "dtype"), ({"shard_rows": 21}, "shard_rows")],
)
def test_going_on_with_other_settings_is_an_error(tmp_path, options, name):
    collect_activations(network(), "1", data(), tmp_path, shard_rows=20)
    arguments = {"layer": "1", "shard_rows": 20} | options
    with pytest.raises(ValueError, match=f"out_dir: .* has shards collected with {name} = "):
        collect_activations(network(), batches=data(), out_dir=tmp_path, **arguments)


def test_going_on_with_another_model_is_an_error(tmp_path):
    collect_activations(network(), "1", data(), tmp_path)
    other = network()
    with torch.no_grad():
        other[0].bias[0] += 1e-3
    with pytest.raises(ValueError, match="has shards collected with model = "):
        collect_activations(other, "1", data(), tmp_path)


def test_going_on_with_batches_in_another_order_is_an_error(tmp_path):
    with pytest.raises(Interrupted):
        collect_activations(network(), "1", broken_off(5), tmp_path, shard_rows=20)
    with pytest.raises(ValueError, match="batches: number 0 is not what it was"):
        collect_activations(network(), "1", data()[::-1], tmp_path, shard_rows=20)
    with pytest.raises(ValueError, match=r"batches: 3 of them are in .* already, but only 2 were given"):
        collect_activations(network(), "1", data()[:2], tmp_path, shard_rows=20)


def _collect_and_die(folder, at):
    """In another process: ``kill -9`` at a call of the file system's, counted over the run."""
    import safetensors.torch

    calls = {"write": 0, "fsync": 0, "rename": 0}
    what, number = at

    def dying(kind, function, half=None):
        def call(*args, **kwargs):
            calls[kind] += 1
            if (kind, calls[kind]) == (what, number):
                if half is not None:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    save = safetensors.torch.save_file
    safetensors.torch.save_file = dying("write", save, lambda tensors, path: path.write_bytes(b"half of a shard"))
    os.fsync = dying("fsync", os.fsync)
    Path.replace = dying("rename", Path.replace)
    collect_activations(network(), "1", data(), folder, shard_rows=20)


# A shard is written, synced and renamed, the folder synced; then the same for the manifest.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # one thread, and the child only collects
@pytest.mark.parametrize(
    ("at", "whole"),
    [
        (("write", 2), 1),
        (("fsync", 5), 1),
        (("rename", 3), 1),  # the second shard is not there yet
        (("fsync", 6), 1),  # it is there, but the manifest does not list it
        (("rename", 4), 1),
        (("fsync", 8), 2),  # it is listed
        (("rename", 7), 3),  # all are; only that it was the last one is missing
    ],
)
def test_kill_9_anywhere_loses_at_most_the_shard_in_flight(tmp_path, at, whole):
    process = multiprocessing.get_context("fork").Process(target=_collect_and_die, args=(tmp_path / "parts", at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert len(manifest["shards"]) == whole
    assert not manifest["complete"]
    seen = runs(model := network())
    collect_activations(model, "1", data(), tmp_path / "parts", shard_rows=20)
    assert len(seen) == 8 - min(8, 3 * whole)
    collect_activations(network(), "1", data(), tmp_path / "whole", shard_rows=20)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


SLOWLY = """
import sys, time, torch
from torch import nn
from lightning_ae import collect_activations
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2))
def batches():
    draw = torch.Generator().manual_seed(3)
    for number in range(60):
        time.sleep(3600 if number == int(sys.argv[3]) else float(sys.argv[2]))
        yield torch.randn(500, 64, generator=draw)
collect_activations(model, "1", batches(), sys.argv[1], shard_rows=1000)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_time_goes_on(tmp_path):
    def run(folder, pause=0.0, last=60):
        # that stops there by itself: on a busy machine it could be through before it is killed
        return subprocess.Popen([sys.executable, "-c", SLOWLY, str(folder), str(pause), str(last)])

    assert run(tmp_path / "whole").wait() == 0
    reached = []
    for shards in (3, 12):  # killed twice
        process = run(tmp_path / "parts", 0.03, 2 * shards + 16)
        manifest = tmp_path / "parts" / "manifest.json"
        try:
            while not (manifest.exists() and len(json.loads(manifest.read_text())["shards"]) >= shards):
                assert process.poll() is None
                time.sleep(0.005)
        finally:
            process.kill()
            status = process.wait()
        assert status == -signal.SIGKILL
        reached.append(len(json.loads(manifest.read_text())["shards"]))
    assert reached[0] >= 3
    assert 12 <= reached[1] < 30
    assert run(tmp_path / "parts").wait() == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


# -- errors -----------------------------------------------------------------------------------------------------


def test_a_wrong_layer_is_an_error_with_near_names(tmp_path):
    with pytest.raises(ValueError, match=r"layer: Tokens has no 'block\.0'; near it are 'blocks\.0'"):
        collect_activations(Tokens(), "block.0", token_batches(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_mask_of_another_shape_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"mask_fn: expected \(3, 3\) for an output \(3, 3, 4\), got \(3, 1\)"):
        collect_activations(
            Tokens(), "blocks.0", token_batches(), tmp_path, mask_fn=lambda b: b["attention_mask"][:, :1]
        )


def test_activations_that_float16_cannot_hold_are_an_error(tmp_path):
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
    x = [torch.tensor([[1.0]]), torch.tensor([[1e5]])]
    with pytest.raises(ValueError, match=r"dtype: batch 1 has activations up to 1e\+05, too much for float16"):
        collect_activations(model, "0", x, tmp_path / "half", dtype="float16")
    collect_activations(model, "0", x, tmp_path / "wide", dtype="bfloat16")


def test_activations_that_are_not_finite_are_an_error(tmp_path):
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="model: the layer puts out NaN or infinity for batch 0"):
        collect_activations(model, "0", [torch.tensor([[torch.nan]])], tmp_path)


def test_no_rows_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="batches: expected some to leave rows, got 0 batches and none"):
        collect_activations(network(), "0", [], tmp_path / "a")
    with pytest.raises(ValueError, match="got 1 batches and none"):
        collect_activations(network(), "0", data()[:1], tmp_path / "b", mask_fn=lambda x: torch.zeros(len(x)))


def test_a_batch_without_rows_is_skipped(tmp_path):
    keep = torch.cat(data())[:, 0] > 1.0
    assert 0 < keep[7:14].sum() < 7
    shards = collect_activations(network(), "0", data(), tmp_path, mask_fn=lambda x: x[:, 0] > 1.0, shard_rows=3)
    assert shards.index(torch.arange(len(shards)))[:, 0].tolist() == keep.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype: expected 'float16', 'bfloat16' or 'float32'"),
        ({"shard_rows": 0}, "shard_rows: expected a positive whole number"),
    ],
)
def test_options_out_of_range_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        collect_activations(network(), "0", data(), tmp_path, **options)


def test_folders_that_are_not_what_they_should_be_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected shards of collect_activations"):
        ActivationShards(tmp_path)
    collect_activations(network(), "0", data(), tmp_path, shard_rows=20)
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.safetensors, which is missing"):
        ActivationShards(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"format": 99}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="expected a manifest of format 1, got 99"):
        ActivationShards(tmp_path)
