"""The recipe on saturation in a tiny form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "saturation.py"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    out = tmp_path_factory.mktemp("saturation")
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("saturation", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(["--epochs", "4", "--every", "5", "--out", str(out)])
    torch.set_num_threads(threads)
    assert json.loads((out / "numbers.json").read_text()) == found
    assert (out / "saturation.png").read_bytes().startswith(b"\x89PNG")
    return found


def test_the_monitor_sees_squared_error_starve_and_stall_where_bernoulli_learns(numbers):
    at = 1e-4
    # every pixel starts near 10⁻⁴: the closed form at that output, and at 0.5
    assert numbers["squared_error_first_output_ratio"] == pytest.approx(2 * at * (1 - at), rel=0.2)
    assert numbers["squared_error_from_half_first_output_ratio"] == pytest.approx(0.5, rel=0.2)
    assert numbers["squared_error_transmission_loss.sigmoid"] == pytest.approx(at, rel=0.5)
    assert numbers["squared_error_first_saturated_fraction_loss.sigmoid"] == 1.0
    assert numbers["squared_error_starved_fraction"] == 1.0
    for run in ("bernoulli", "stack_of_sigmoids", "stack_of_tanh"):
        for when in ("first_", ""):
            assert numbers[f"{run}_{when}output_ratio"] == pytest.approx(1, rel=1e-4)
            assert numbers[f"{run}_{when}starved_fraction"] == 0.0
    assert numbers["squared_error_mse"] > 0.999 * numbers["squared_error_first_mse"]
    assert numbers["squared_error_loss"] > 0.9 * numbers["squared_error_first_loss"]
    assert numbers["bernoulli_mse"] < 0.95 * numbers["bernoulli_first_mse"]
    assert numbers["squared_error_from_half_mse"] < 0.5 * numbers["squared_error_from_half_first_mse"]


def test_the_gradient_vanishes_towards_the_input_of_a_stack_of_sigmoids(numbers):
    sites = [f"{part}.layers.{i}" for part in ("encoder", "decoder") for i in (1, 3, 5)]
    assert all(0.15 < numbers[f"stack_of_sigmoids_transmission_{site}"] <= 0.25 for site in sites)
    assert all(numbers[f"stack_of_tanh_transmission_{site}"] > 0.3 for site in sites)
    # the last layer itself starts small, and holds back what comes to all before it alike
    first, last = "first_gradient_norm_encoder.layers.0", "first_gradient_norm_decoder.layers.4"
    assert numbers[f"stack_of_sigmoids_{first}"] < 1e-3 * numbers[f"stack_of_sigmoids_{last}"]
    assert numbers[f"stack_of_tanh_{first}"] > 0.1 * numbers[f"stack_of_tanh_{last}"]
