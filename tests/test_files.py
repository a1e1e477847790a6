"""Files that others may have written: each way in which one can lie ends in an error with its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_ae as ae
from lightning_ae.files import fault_of, read_json, refuse_texts


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", deep(100_000), '{"a": ' + deep(100_000) + "}", "\udcff", '{"a": ' + "9" * 5000 + "}"]
)
def test_what_is_no_json_object_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "front.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"front\.json is not a front"):
        read_json(path, "a front")


# -- trees ---------------------------------------------------------------------------------------------------------


def nested(levels: int) -> dict:
    tree: dict = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


def doubled(levels: int) -> list:
    """A few lists that are shared: 2 ** levels nodes for whoever walks them."""
    tree: list = []
    for _ in range(levels):
        tree = [tree, tree]
    return tree


CIRCLE: list = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        ({"class_path": 3}, "class_path is no text"),
        ({"class_path": "a.B", "init_args": [1]}, "init_args are no dict by name"),
        ({"class_path": "a.B", "init_args": {1: 2}}, "init_args are no dict by name"),
        ({"x": {"same_as": ["y"]}}, "same_as is no text at x"),
        ({"x": {"not_recorded": None}}, "not_recorded is no text at x"),
        ({("a",): 1}, "a key is no text"),
        (nested(10_000), "nested deeper"),
        (CIRCLE, "nested deeper"),
        (doubled(50), "nodes"),
    ],
)
def test_trees_that_no_model_has_are_told_at_once(tree, fault):
    assert fault in fault_of(tree)


def test_the_trees_of_models_are_fine():
    from lightning_ae.rebuildable import describe

    assert fault_of(describe(ae.StackedAutoencoder([ae.LinearAutoencoder(4, 3), ae.LinearAutoencoder(3, 2)]))) is None


def test_texts_are_refused_where_there_are_none():
    refuse_texts(ae.L1Code, {"activation": "relu"})
    refuse_texts(ae.LPIPSLoss, {"weights": "alex.pth", "net": "alex"})
    refuse_texts(ae.LinearAutoencoder, {"batch_key": "image"})  # of a base, through **kwargs
    for cls, name in ((ae.L1Code, "weight"), (ae.LinearAutoencoder, "corruption"), (ae.MLPAutoencoder, "hidden")):
        with pytest.raises(
            ValueError, match=rf"^at\.{name}: expected no text for a .* of {cls.__name__}, got 'os.system'"
        ):
            refuse_texts(cls, {name: "os.system"}, "at")
    with pytest.raises(ValueError, match="activation"):
        refuse_texts(ae.L1Code, {"activation": "os.system"})


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, make_trainer):
    trainer = make_trainer()
    trainer.strategy.connect(ae.LinearAutoencoder(4, 2))
    trainer.save_checkpoint(tmp_path / "m.ckpt")

    def write(change) -> Path:
        state = torch.load(tmp_path / "m.ckpt")
        change(state)
        torch.save(state, tmp_path / "m.ckpt")
        return tmp_path / "m.ckpt"

    return write


def set_argument(name, value):
    return lambda state: state["hyper_parameters"]["init_args"].update({name: value})


LIES = {
    "hyperparameters that are a list": lambda state: state.update(hyper_parameters=["class_path"]),
    "a class that is a number": lambda state: state["hyper_parameters"].update(class_path=3),
    "arguments that are a list": lambda state: state["hyper_parameters"].update(init_args=[4, 2]),
    "an unknown argument": set_argument("colour", 1),
    "a circle": set_argument("penalties", CIRCLE),
    "a nested tree": set_argument("penalties", nested(150)),
    "a negative size": set_argument("latent_dim", -2),
    "a text for a size": set_argument("latent_dim", "2"),
    "nowhere the same": set_argument("loss", {"same_as": "moon"}),
    "a class of no module": set_argument("loss", {"class_path": "lightning_ae.moon.Loss", "init_args": {}}),
    "no class": set_argument("loss", {"class_path": "lightning_ae.losses.full_precision", "init_args": {}}),
    "weights that are a list": lambda state: state.update(state_dict=[1]),
    "weights by number": lambda state: state["state_dict"].update({3: torch.zeros(1)}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_is_refused_by_its_name(checkpoint, lie):
    path = checkpoint(LIES[lie])
    for read in (ae.load, ae.LinearAutoencoder.load_from_checkpoint):
        with pytest.raises((ValueError, TypeError), match=r"m\.ckpt"):
            read(path)


def test_weights_that_do_not_fit_are_refused_by_the_name_of_the_file(checkpoint):
    path = checkpoint(lambda state: state["state_dict"].update({"encoder.weight": torch.zeros(3, 3)}))
    with pytest.raises(RuntimeError, match=r"(?s)m\.ckpt: .*size mismatch for encoder.weight"):
        ae.load(path)


# -- activations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    ae.collect_activations(nn.Sequential(nn.Linear(4, 3)), "0", torch.rand(20, 4).split(5), tmp_path, shard_rows=10)
    return tmp_path


def of_shard(**changes):
    return lambda manifest: manifest["shards"][0].update(changes)


MANIFESTS = {
    "no shards": lambda m: m.pop("shards"),
    "shards that are a dict": lambda m: m.update(shards={}),
    "settings that are a list": lambda m: m.update(settings=[]),
    "rows that are a text": lambda m: m.update(rows="20"),
    "more rows than in the shards": lambda m: m.update(rows=21),
    "fewer rows": of_shard(rows=9),
    "negative rows": of_shard(rows=-10),
    "a file elsewhere": of_shard(file="../x.safetensors"),
    "an absolute path": of_shard(file="/etc/x.safetensors"),
    "a file of another kind": of_shard(file="x.pt"),
    "a file twice": lambda m: m["shards"][1].update(file=m["shards"][0]["file"]),
    "no fingerprint": lambda m: m["shards"][0].pop("fingerprint"),
    "another shape": lambda m: m.update(shape=[4]),
    "a shape that is a number": lambda m: m.update(shape=3),
    "no mean": lambda m: m.update(mean=None),
    "a mean of another length": lambda m: m.update(mean=[0.0]),
    "a mean that is NaN": lambda m: m.update(mean=[float("nan")] * 3),
    "a mean that is a text": lambda m: m.update(mean=["0", "0", "0"]),
    "a mean square below the mean's": lambda m: m.update(mean=[100.0] * 3),
}


@pytest.mark.parametrize("lie", MANIFESTS)
def test_a_manifest_that_lies_is_refused_by_its_name(shards, lie):
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    MANIFESTS[lie](manifest)
    path.write_text(json.dumps(manifest))
    for read in (ae.ActivationShards, lambda folder: ae.ActivationDataModule(folder).setup()):
        with pytest.raises(ValueError, match=r"^folder: .*(manifest\.json|shard-0000\d\.safetensors)"):
            read(shards)


@pytest.mark.parametrize(
    "tensors",
    [
        {"activations": torch.zeros(10, 3)},
        {"activations": torch.zeros(9, 3), "index": torch.zeros(10, 1, dtype=torch.int64)},
        {"activations": torch.zeros(10, 2), "index": torch.zeros(10, 1, dtype=torch.int64)},
        {"activations": torch.zeros(30), "index": torch.zeros(10, 1, dtype=torch.int64)},
        {"activations": torch.zeros(10, 3), "index": torch.zeros(10, 1)},
        {"activations": torch.zeros(10, 3, dtype=torch.int64), "index": torch.zeros(10, 1, dtype=torch.int64)},
    ],
)
def test_a_shard_that_lies_is_refused_by_its_name(shards, tensors):
    save_file(tensors, shards / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors"):
        ae.ActivationShards(shards)


def test_a_shard_that_is_cut_short_is_refused_by_its_name(shards):
    path = shards / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors"):
        ae.ActivationShards(shards)


# -- fronts, predictions, SAELens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"alphas": None},
        {"alphas": ["x", "y"]},
        {"objectives": [[1.0]]},
        {"models": "x"},
        {"models": ["../x.ckpt", "y.ckpt"]},
        {"models": ["x.ckpt"]},
        {"models": [1, 2]},
    ],
)
def test_a_front_that_lies_is_refused_by_its_name(tmp_path, change):
    ae.ParetoFront([0.0, 1.0], [[1.0, 2.0], [2.0, 1.0]]).save(tmp_path)
    content = json.loads((tmp_path / "front.json").read_text()) | change
    (tmp_path / "front.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"front\.json is not a front"):
        ae.ParetoFront.load(tmp_path)


def test_predictions_leave_the_files_of_others_alone(tmp_path, make_trainer):
    mine = [tmp_path / name for name in ("rank-mine.npz", "rank0-best.npz", "rank0-00000.npz.bak", "ranking-00000.npz")]
    for path in mine:
        np.savez(path.with_suffix(""), index=np.arange(3))
        path.write_bytes(b"mine")
    stale = tmp_path / "rank7-00000.npz"
    np.savez(stale, index=np.arange(3))
    trainer = make_trainer(callbacks=ae.PredictionWriter(tmp_path))
    trainer.predict(
        ae.LinearAutoencoder(4, 2), ae.TensorDataModule(torch.rand(10, 4), val_fraction=0.0), return_predictions=False
    )
    assert [path.read_bytes() for path in mine] == [b"mine"] * 4
    assert not stale.exists()
    assert len(ae.load_predictions(tmp_path)["z"]) == 10


@pytest.mark.parametrize(
    "arrays",
    [{}, {"z": np.zeros(3)}, {"index": np.zeros(3)}, {"index": np.arange(3), "z": np.zeros(2)}, {"index": np.array(3)}],
)
def test_a_shard_of_predictions_that_lies_is_refused_by_its_name(tmp_path, arrays):
    np.savez(tmp_path / "rank0-00000.npz", **arrays)
    with pytest.raises(ValueError, match=r"rank0-00000\.npz"):
        ae.load_predictions(tmp_path)
    (tmp_path / "rank0-00000.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"rank0-00000\.npz"):
        ae.load_predictions(tmp_path)


def test_shards_of_two_runs_are_told(tmp_path):
    np.savez(tmp_path / "rank0-00000.npz", index=np.arange(2), z=np.zeros((2, 3)))
    np.savez(tmp_path / "rank0-00001.npz", index=np.arange(2), z=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"rank0-00001\.npz has .* of another run"):
        ae.load_predictions(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"k": "4"}, {"k": 1000}, {"architecture": ["topk"]}, {"architecture": "jumprelu"}, {"activation_fn": 3},
    ],
)  # fmt: skip
def test_a_dictionary_of_saelens_that_lies_is_refused(tmp_path, change):
    ae.save_saelens(ae.DictionaryAutoencoder(8, 32, ae.TopKCode(4)), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | change
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^path: "):
        ae.load_saelens(tmp_path)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec", "b_enc"])
@pytest.mark.parametrize("tensor", [None, torch.zeros(3, 3, 3)])
def test_weights_of_saelens_that_do_not_fit_are_named(tmp_path, name, tensor):
    from safetensors.torch import load_file

    ae.save_saelens(ae.DictionaryAutoencoder(8, 32, ae.TopKCode(4)), tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights = {key: value.clone() for key, value in weights.items() if key != name}
    save_file(weights if tensor is None else {**weights, name: tensor}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=name):
        ae.load_saelens(tmp_path)
