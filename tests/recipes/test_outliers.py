"""The recipe and the benchmark of outliers in a tiny form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def load(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, RECIPES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_finds_them_and_draws(tmp_path):
    numbers = load("outliers.py").main(["--out", str(tmp_path), "--epochs", "1"])
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert numbers["detector"] > 0.8
    assert (tmp_path / "outliers.png").stat().st_size > 10_000


def test_the_benchmark_has_a_row_for_each_table(tmp_path):
    numbers = load("benchmarks/outliers.py").main(["--out", str(tmp_path), "--seeds", "1", "--only", "iris", "wine"])
    assert set(numbers) == {"iris", "wine"}
    assert all(0.5 < row["ae.OutlierDetector"]["auroc"] <= 1 for row in numbers.values())
