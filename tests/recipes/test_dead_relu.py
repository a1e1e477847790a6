"""The recipe on dead units in a tiny form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "dead_relu.py"


def load():
    spec = importlib.util.spec_from_file_location("dead_relu", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_five_ways_are_trained_measured_and_drawn(tmp_path):
    arguments = ["--epochs", "3", "--hidden", "24", "16", "--bias", "-0.2", "--accelerator", "cpu"]
    numbers = load().main([*arguments, "--out", str(tmp_path)])
    assert list(numbers) == ["as is", "He", "positive bias", "LeakyReLU", "revived"]
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert (tmp_path / "dead_relu.png").stat().st_size > 10_000
    assert numbers["as is"]["dead_at_last"] > 0.2
    assert numbers["revived"]["dead_at_first"] == numbers["as is"]["dead_at_first"]
    assert numbers["revived"]["dead_at_last"] < 0.5 * numbers["as is"]["dead_at_last"]
    assert numbers["revived"]["squared_error"] < numbers["as is"]["squared_error"]
    assert numbers["revived"]["revived"] > 0
    assert numbers["LeakyReLU"]["dead_at_last"] == 0
