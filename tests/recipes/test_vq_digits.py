"""The recipe on codebooks in a tiny form."""

import math

import pytest


def test_expiry_keeps_codes_in_use_and_the_grid_needs_none(run):
    numbers = run("vq_digits", "--epochs", 6, "--codes", 128)
    for name in ("k-means, expiry", "expiry alone"):
        assert numbers[f"{name}/used"] > 100
        assert numbers["neither/used"] < 80
        assert numbers[f"{name}/fvu"] < numbers["neither/fvu"] < 0.6
    for name in ("k-means, expiry", "expiry alone", "k-means alone", "neither", "grid (FSQ)"):
        assert 1 < numbers[f"{name}/perplexity"] <= numbers[f"{name}/used"] <= numbers[f"{name}/codes"]
        assert numbers[f"{name}/bits"] == pytest.approx(4 * math.log2(numbers[f"{name}/codes"]))


def test_the_grids_size_is_near_the_codebooks(recipe):
    for codes in (64, 128, 256, 512, 1024):
        assert math.prod(recipe("vq_digits").grid_levels(codes)) == pytest.approx(codes, rel=0.1)
