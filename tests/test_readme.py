"""What the README says is true: its code runs, its tables list what there is, its commands are two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_ae as ae

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


# the report that the README shows warns of its errors while the model trains
@pytest.mark.filterwarnings(r"ignore:At step \d+. \[error\]:UserWarning")
@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), namespace)
    if "QuietAutoencoder" in block:
        model, trained = namespace["model"], namespace["trainer"].lightning_module
        assert model.quiet == 0.1
        assert model.encoder[1].out_features == 16
        assert all((a == b).all() for a, b in zip(model.parameters(), trained.parameters(), strict=True))
        assert namespace["trainer"].callback_metrics["val/quiet"] > 0


def test_the_subclass_is_ten_lines():
    (block,) = (block for block in PYTHON if "class QuietAutoencoder" in block)
    body = re.search(r"class Quiet.*?(?=\n\n\n)", block, re.DOTALL).group()
    assert len([line for line in body.splitlines() if line.strip()]) <= 10


def test_there_are_two_set_up_commands():
    assert len(re.findall(r"^pip install", TEXT, re.MULTILINE)) == 2


def test_the_recipe_table_lists_the_recipes():
    listed = set(re.findall(r"^\| `(recipes/[\w/.]+)`", TEXT, re.MULTILINE))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.py")} | {"recipes/variants/"}
    assert listed == there


def test_every_public_class_of_the_listed_rooms_is_named():
    missing = [
        name
        for name in ae.__all__
        if not name[0].islower()
        and name not in TEXT
        and not name.endswith(("Encoder", "Decoder", "Output"))
        and name not in ("Code", "Corruption", "Penalty", "Likelihood", "PointwiseLoss", "ReconstructionLoss")
        and name not in ("Identity", "Rebuildable")
    ]
    assert missing == []


def test_yaml_files_are_where_the_table_says():
    assert {path.parent for path in (ROOT / "recipes").rglob("*.yaml")} == {ROOT / "recipes" / "variants"}
