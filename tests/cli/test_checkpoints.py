"""What a checkpoint may tell the command line: plain values where plain values are expected, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from torch import nn

import lightning_ae as ae
from lightning_ae.cli.checkpoints import check_texts, named_model, read
from lightning_ae.rebuildable import describe

SHAPE = (1, 8, 8)


class Theirs(L.LightningModule):
    def __init__(
        self,
        width: int,
        name: str = "net",
        kind: Literal["a.b", "c"] = "c",
        layer: nn.Module | None = None,
        either: nn.Module | str = "relu",
        make: Callable[[], nn.Module] | None = None,
        untyped=None,
        many: list[str] | None = None,
        cls: type[nn.Module] = nn.Linear,
    ):
        super().__init__()


def saved(**hyperparameters: Any) -> dict[str, Any]:
    return {"state_dict": {}, "hyper_parameters": hyperparameters, "hparams_name": "kwargs"}


def test_plain_hyperparameters_reach_the_arguments_of_that_name():
    checkpoint = saved(width=3, name="evil.Net", kind="a.b", untyped="relu", many=["a.b", "c"], dropped=1, layer=None)
    found = named_model(Theirs, checkpoint, "x")
    assert found["init_args"] == {
        "width": 3, "name": "evil.Net", "kind": "a.b", "untyped": "relu", "many": ["a.b", "c"], "layer": None
    }  # fmt: skip


@pytest.mark.parametrize(
    "argument",
    [
        {"layer": "evil.Net"},
        {"layer": "evil"},
        {"either": "evil.Net"},
        {"make": "evil.make"},
        {"cls": "evil.Net"},
        {"untyped": "{class_path: evil.Net}"},
        {"untyped": ['{"\\x63lass_path": "evil.Net"}']},
        {"untyped": {"a": "class_path: evil.Net"}},
        {"kind": "evil.Net", "layer": "evil.Net"},
    ],
    ids=str,
)
def test_what_a_parser_could_import_is_refused(argument: dict[str, Any]):
    with pytest.raises(ValueError, match="would be taken for the name of a class"):
        named_model(Theirs, saved(width=3, **argument), "x")


@pytest.mark.parametrize("value", [{"class_path": "evil.Net"}, [{"class_path": "evil.Net"}]], ids=str)
def test_classes_among_hyperparameters_are_refused(value: Any):
    with pytest.raises(ValueError, match=r"name evil\.Net, and a file does not say what is imported"):
        named_model(Theirs, saved(width=3, untyped=value), "x")


def test_what_is_no_plain_data_is_refused():
    with pytest.raises(ValueError, match="have a Tensor, which no command line can give"):
        named_model(Theirs, saved(width=torch.ones(1)), "x")


def test_a_constructor_that_takes_one_dict_gets_it():
    class OfConfig(L.LightningModule):
        def __init__(self, config: dict):
            super().__init__()

    checkpoint = {**saved(width=3, name="net"), "hparams_name": "config"}
    assert named_model(OfConfig, checkpoint, "x")["init_args"] == {"config": {"width": 3, "name": "net"}}


def test_what_lightnings_own_command_line_adds_is_left_out():
    checkpoint = saved(width=3, _instantiator="evil.run", _class_path="evil.Net")
    assert named_model(Theirs, checkpoint, "x")["init_args"] == {"width": 3}


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": {"width": Evil()}}, "x.ckpt")
    with pytest.raises(ValueError, match=r"more in it than weights and plain data.*could run code"):
        read("x.ckpt")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ae.LinearAutoencoder(SHAPE, 2, tied=True),
        lambda: ae.MLPAutoencoder(SHAPE, 2, activation="tanh", loss=ae.SquaredError("sigmoid")),
        lambda: ae.ConvAutoencoder(SHAPE, 2, channels=(4,), penalties={"p": ae.WeightPrior(prior_variance=2.0)}),
        lambda: ae.ContractiveAutoencoder(SHAPE, 2),
        lambda: ae.DictionaryAutoencoder(64, 96, ae.TopKCode(4)),
        lambda: ae.StackedAutoencoder([ae.MLPAutoencoder(SHAPE, 8, hidden=(8,)), ae.MLPAutoencoder((8,), 2)]),
        lambda: ae.VariationalAutoencoder(*ae.mlp_pair(SHAPE, 3, h_dim=6), ae.BernoulliNLL()),
        lambda: ae.VectorQuantizedAutoencoder(*ae.conv_pair(SHAPE, 3, spatial=True, channels=(8,))),
    ],
)
def test_nothing_that_our_own_models_record_is_refused(make):
    def walk(node: Any) -> int:
        if isinstance(node, dict) and "class_path" in node:
            check_texts(ae.rebuildable.resolve(node["class_path"], ("lightning_ae",)), node["init_args"], "x")
        items = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
        return 1 + sum(map(walk, items))

    assert walk(describe(make())) > 3
