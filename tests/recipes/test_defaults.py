"""The benchmarks of defaults and of speed, in a tiny form."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import lightning_ae as ae

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_our_start_is_ahead_of_others_after_few_batches(capsys):
    module = load("defaults")
    found = module.main(["--seeds", "20", "21", "--steps", "5", "60", "--rows", "MLP, one"])
    assert set(found) == {"MLP, one hidden layer"}
    for row in found.values():
        means = {how: torch.tensor(runs).mean(0) for how, runs in row.items()}
        assert means["ours"][1] < means["ours"][0]
        for how in ("at full size", "torch's"):
            assert means["ours"][1] < means[how][1], how
    assert "one hidden layer" in capsys.readouterr().out


def test_variants_of_a_start_are_what_their_names_say():
    module = load("defaults")
    torch.manual_seed(0)
    model = ae.MLPAutoencoder((1, 8, 8), 16, hidden=(512,))
    weight = model.decoder.layers[-1].weight
    assert weight.detach().std() == pytest.approx(0.1 * math.sqrt(2 / (512 + 64)), rel=0.05)
    module.restart(model, "at full size")
    assert weight.detach().std() == pytest.approx(math.sqrt(2 / (512 + 64)), rel=0.05)
    module.restart(model, "torch's")
    assert weight.detach().abs().max() <= 1 / math.sqrt(512)


def test_a_fast_scale_finds_the_dispersion_of_the_counts():
    """From 1 on the way to 100, against the rate of the weights."""
    module = load("defaults")
    (row,) = module.main(["--seeds", "20", "--steps", "100", "--rows", "θ = 100"]).values()
    assert row["ours"][0][0] < row["rate 1"][0][0] - 3
    x = module.counts(3, 1.0)
    assert (x == x.round()).all()
    assert x.var(0).sum() > 2 * x.mean(0).sum()  # overdispersed


def test_throughput_trains_every_one_of_its_rows(capsys):
    ratios = load("throughput").main(["--examples", "400", "--rounds", "1", "--threads", "1"])
    assert {"plain loop", "plain loop, fused AdamW", "ours", "ours, lean", "ours, three monitors"} <= set(ratios)
    assert ratios["plain loop"] == 1
    assert all(ratio > 0 for ratio in ratios.values())
    assert "k/s" in capsys.readouterr().out
