"""The recipe on codebooks in a tiny form."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "vq_digits.py"


@pytest.fixture
def recipe():
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("vq_digits", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_expiry_keeps_codes_in_use_and_the_grid_needs_none(recipe, tmp_path):
    numbers = recipe.main(["--out", str(tmp_path), "--epochs", "6", "--codes", "128"])
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert (tmp_path / "vq_digits.png").read_bytes().startswith(b"\x89PNG")
    for name in ("k-means, expiry", "expiry alone"):
        assert numbers[f"{name}/used"] > 100
        assert numbers["neither/used"] < 80
        assert numbers[f"{name}/fvu"] < numbers["neither/fvu"] < 0.6
    for name in ("k-means, expiry", "expiry alone", "k-means alone", "neither", "grid (FSQ)"):
        assert 1 < numbers[f"{name}/perplexity"] <= numbers[f"{name}/used"] <= numbers[f"{name}/codes"]
        assert numbers[f"{name}/bits"] == pytest.approx(4 * math.log2(numbers[f"{name}/codes"]))


def test_the_grids_size_is_near_the_codebooks(recipe):
    for codes in (64, 128, 256, 512, 1024):
        assert math.prod(recipe.grid_levels(codes)) == pytest.approx(codes, rel=0.1)
