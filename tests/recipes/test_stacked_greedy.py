"""The recipe on greedy training, in a tiny form."""

from __future__ import annotations

import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA


def test_greedy_levels_set_sigmoids_going_where_end_to_end_they_stall(run):
    numbers = run("stacked_greedy", "--seeds", 1, "--epochs-per-level", 4, "--finetune-epochs", 8)
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
