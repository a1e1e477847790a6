"""Recipes are scripts: how they are loaded and run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe():
    """The module of a recipe by its path without the ending; gives the number of threads back."""
    threads = torch.get_num_threads()

    def load(path):
        spec = importlib.util.spec_from_file_location(Path(path).name, RECIPES / f"{path}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_num_threads(threads)


@pytest.fixture
def run(recipe, tmp_path):
    """Call a recipe's main; checks that the files hold what it returned, but for the picture where there is none."""

    def call(path, *options, picture=True):
        numbers = recipe(path).main(["--out", str(tmp_path / "out"), *map(str, options)])
        assert json.loads((tmp_path / "out" / "numbers.json").read_text()) == numbers
        if picture:
            assert (tmp_path / "out" / f"{Path(path).name}.png").read_bytes().startswith(b"\x89PNG")
        return numbers

    return call
