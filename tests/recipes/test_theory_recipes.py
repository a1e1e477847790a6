"""The recipes that compare with closed forms, each in a tiny form."""

import pytest


def test_linear_autoencoders_reach_the_principal_subspace_and_its_loss(run):
    numbers = run(
        "linear_vs_pca", "--latent-dim", 2, "--epochs", 20, "--small-epochs", 8, "--sizes", 16, 128, "--repeats", 1
    )
    for name, weights in (("tied", 64 * 2), ("untied", 2 * 64 * 2)):
        assert numbers[f"{name}_weights"] == weights
        assert numbers[f"{name}_angle"] < 0.02 < numbers[f"{name}_first_angle"]
        assert -1e-9 < numbers[f"{name}_excess_loss"] < 1e-3
    assert numbers["tied_orthonormality_error"] < 1e-3 < numbers["untied_orthonormality_error"]


def test_tied_weights_generalise_like_pca_from_fewer_examples_than_features(run):
    numbers = run(
        "linear_vs_pca", "--latent-dim", 2, "--epochs", 1, "--small-epochs", 12, "--sizes", 16, 256, "--repeats", 1
    )
    assert numbers["held_out_tied_16"] == pytest.approx(numbers["held_out_PCA_16"], rel=1e-2)
    assert numbers["held_out_untied_16"] > 1.1 * numbers["held_out_PCA_16"]
    assert numbers["held_out_untied_256"] == pytest.approx(numbers["held_out_PCA_256"], rel=1e-2)


def test_weight_prior_is_ridge_regression(run):
    numbers = run(
        "map_weight_prior",
        *(
            "--examples",
            24,
            "--inputs",
            12,
            "--outputs",
            10,
            "--steps",
            150,
            "--lr",
            0.02,
            "--epochs",
            1,
            "--draws",
            10,
        ),
    )
    lam = numbers["lambda"]
    assert lam == 4.0  # 2 / 0.5, the variances by default
    errors = {key: value for key, value in numbers.items() if key.startswith("ridge_error")}
    assert len(errors) == 7
    assert max(errors.values()) < 0.05
    assert errors["ridge_error_lambda_4_batch_12"] < 0.01  # half of the data: the least noise
    assert numbers["batch_size_difference"] < 0.05
    new = [numbers[f"new_error_lambda_{value}_batch_6"] for value in ("0.25", "4", "64")]
    assert new[1] < min(new[0], new[2])
    assert lam / 2 < numbers["best_lambda_on_grid"] < lam * 2
    assert numbers["hessian_error"] < 1e-10


def test_a_vanishing_prior_chooses_the_least_norm_of_equal_minima(run):
    numbers = run(
        "map_weight_prior",
        *("--examples", 24, "--inputs", 12, "--outputs", 10, "--steps", 2, "--epochs", 8, "--draws", 2),
    )
    assert numbers["pinv_distance_lambda_0.0001"] < 1e-3
    assert numbers["norm_ratio_lambda_0.0001"] == pytest.approx(1, rel=1e-3)
    # without the prior the data are fitted as well, by other and larger weights
    assert max(numbers["train_error_lambda_0"], numbers["train_error_lambda_0.0001"]) < 1e-6
    assert numbers["pinv_distance_lambda_0"] > 0.1
    assert numbers["norm_ratio_lambda_0"] > 1.005


def test_gradients_equal_closed_forms_and_squared_error_stalls_where_bernoulli_learns(run):
    numbers = run("output_gradients", "--epochs", 12)
    errors = [value for key, value in numbers.items() if key.startswith("error_")]
    assert len(errors) == 10
    assert max(errors) < 1e-10
    closed_form = 1 / (2 * 1e-4 * (1 - 1e-4))
    assert numbers["ratio_closed_form"] == pytest.approx(closed_form)
    assert numbers["ratio"] == pytest.approx(closed_form, rel=1e-2)
    start = numbers["bernoulli_first_mse"]
    assert numbers["squared_error_first_mse"] == pytest.approx(start)
    assert numbers["squared_error_mse"] > 0.99 * start
    assert numbers["bernoulli_mse"] < 0.6 * start
    assert numbers["squared_error_from_half_mse"] < 0.6 * numbers["squared_error_from_half_first_mse"]
