"""The comparison of pixel loss and SSIM in a tiny form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "ssim_vs_mse.py"


def load():
    spec = importlib.util.spec_from_file_location("ssim_vs_mse", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_losses_are_measured_and_drawn(tmp_path):
    arguments = ["--epochs", "1", "--examples", "320", "--threads", "1", "--accelerator", "cpu", "--out", str(tmp_path)]
    numbers = load().main(arguments)
    assert list(numbers) == ["squared error", "mix", "SSIM"]
    assert all(0 < n["ssim"] < 1 for n in numbers.values())
    assert (tmp_path / "ssim_vs_mse.png").stat().st_size > 10_000


def test_measures_of_a_perfect_and_a_glowing_reconstruction():
    measure = load().measure
    x = torch.zeros(2, 1, 32, 32)
    x[..., 12:20, 12:20] = 1.0
    perfect = measure(x.clone(), x)
    assert perfect["ssim"] == 1
    assert perfect["sharpness"] == 1
    assert perfect["halo"] == 0
    glow = x.clone()
    glow[..., 10:22, 10:22] = glow[..., 10:22, 10:22].clamp(min=0.3)  # two pixels around the edge
    assert measure(glow, x)["halo"] > 0.1
    assert measure(0.5 * x, x)["sharpness"] < 0.6


def test_measures_on_grey_are_those_on_black():
    measure = load().measure
    x = torch.zeros(2, 1, 32, 32)
    x[..., 12:20, 12:20] = 1.0
    glow = x.clone()
    glow[..., 10:22, 10:22] = glow[..., 10:22, 10:22].clamp(min=0.3)
    on_black, on_grey = measure(glow, x), measure(0.5 + 0.5 * glow, 0.5 + 0.5 * x, background=0.5)
    assert abs(on_grey["halo"] - 0.5 * on_black["halo"]) < 1e-6
    assert abs(on_grey["sharpness"] - on_black["sharpness"]) < 1e-6
    assert abs(measure(0.1 + x, x)["drift"] - 0.1) < 1e-6
