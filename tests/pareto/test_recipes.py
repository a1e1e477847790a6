"""The two recipes of this room, in a tiny form."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def run():
    """Call a recipe's main; gives the number of threads back."""
    threads = torch.get_num_threads()

    def call(name, *options):
        path = RECIPES / f"{name}.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([str(option) for option in options])

    yield call
    torch.set_num_threads(threads)


def test_the_front_of_pixels_and_meaning(run, tmp_path):
    sizes = ("--points", 3, "--epochs", 8, "--classifier-epochs", 5, "--accelerator", "cpu")
    numbers = run("pareto_front", "--out", tmp_path, *sizes)
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert (tmp_path / "pareto_front.png").stat().st_size > 20_000
    assert len(list((tmp_path / "front").glob("*.ckpt"))) == 3
    (_, at_zero), (pixel_half, _), (pixel_one, at_one) = numbers["objectives"]
    guess = numbers["reference"][0]
    assert 4 < guess < 5  # total variance of the digits in [0, 1]
    assert pixel_one < guess / 1.3
    assert at_zero < at_one  # what the perceptual loss alone is better at
    assert numbers["objectives"][0][0] > 3 * max(pixel_half, pixel_one)  # and what it is blind to
    assert 0 < numbers["hypervolume"] < guess**2
    assert numbers["read_originals"] > 0.85


def test_the_benchmark_prints_a_ratio_for_each_batch_size(run, capsys):
    ratios = run("benchmarks/together", *("--steps", 3, "--repeats", 1, "--threads", 1, "--models", 2))
    assert set(ratios) == {
        f"{kind}_{size}{end}" for kind in ("sweep", "steps") for size in (32, 256) for end in ("", "_fastest")
    }
    assert min(ratios.values()) > 0
    assert "together" in capsys.readouterr().out
