"""The recipes on sparse codes, each in a tiny form."""

import pytest


def test_the_orthonormal_case_and_the_lasso_have_known_answers(run):
    options = ("--epochs", 40, "--atoms", 80, "--lasso-examples", 20, "--steps", 1, 3, "--lista-epochs", 8)
    numbers = run("soft_threshold", *options)
    assert numbers["linear_code_error"] < 0.1 < numbers["perceptron_code_error"]
    assert 0 < numbers["linear_excess_objective"] < 0.01 < numbers["perceptron_excess_objective"] < 1
    assert numbers["learned_threshold_error"] < 0.1 * numbers["threshold"]
    assert numbers["zeros_linear"] == pytest.approx(numbers["zeros_best"], abs=0.05)
    assert numbers["fista_code_difference"] < 1e-7
    assert abs(numbers["fista_objective_difference"]) < 1e-9
    for steps in (1, 3):
        assert numbers[f"excess_LISTA_{steps}"] < 0.7 * numbers[f"excess_ISTA_{steps}"]


def test_l1_shrinks_and_topk_and_jumprelu_do_not(run):
    numbers = run("sparse_digits", "--latents", 96, "--l0", 12, "--epochs", 60, "--lr", 0.005)
    assert numbers["TopK_12_l0"] == pytest.approx(12, rel=0.02)
    for name in ("L1", "JumpReLU"):
        assert numbers[f"{name}_12_train_l0"] == pytest.approx(12, rel=0.15)
        assert numbers[f"{name}_12_weight"] > 0
    for name in ("TopK", "JumpReLU"):
        assert numbers[f"{name}_12_fvu"] < numbers["L1_12_fvu"]
        assert numbers[f"{name}_12_fvu"] < numbers["PCA_12_fvu"]
        assert numbers["L1_12_norm_ratio"] < numbers[f"{name}_12_norm_ratio"] < 1.02
