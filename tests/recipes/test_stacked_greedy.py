"""The recipe on greedy training, in a tiny form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

RECIPE = Path(__file__).parents[2] / "recipes" / "stacked_greedy.py"


def test_greedy_levels_set_sigmoids_going_where_end_to_end_they_stall(tmp_path):
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("stacked_greedy", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = ["--seeds", "1", "--epochs-per-level", "4", "--finetune-epochs", "8"]
    numbers = module.main(["--out", str(tmp_path), *options])
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert (tmp_path / "stacked_greedy.png").read_bytes().startswith(b"\x89PNG")
    for way in ("greedy", "joint"):
        by_depth = [numbers[f"{way}_depth_{k}"] for k in (1, 2, 3, 4)]
        assert by_depth == sorted(by_depth)  # more is lost with each level
        assert numbers[f"{way}_depth_4"] < 0.8 * numbers["end_to_end_depth_4"]
    # fine-tuning goes on from where the levels are
    assert numbers["greedy_validation"] < numbers["greedy_validation_before_fine_tuning"]
    # near scikit-learn's of all digits, which are not the training images
    x = load_digits().data / 16
    left = x.var(0).sum() - PCA(6).fit(x).explained_variance_.sum()
    assert numbers["pca_depth_4"] == pytest.approx(left, rel=0.1)
