"""The error of each scale against NumPy, and as one among other metrics."""

import numpy as np
import pytest
import torch
from torchmetrics import MeanSquaredError, MetricCollection

from lightning_ae import BlockMean, LaplacianPyramid, ScaleError


def test_it_is_the_mean_square_of_each_part_of_the_error():
    rng = np.random.default_rng(0)
    x, x_hat = rng.normal(size=(2, 10, 1, 6, 6))
    means = (x - x_hat).reshape(10, 1, 3, 2, 3, 2).mean((3, 5)).repeat(2, 2).repeat(2, 3)
    metric = ScaleError(BlockMean(2).parts, 2)
    for start, stop in ((0, 4), (4, 5), (5, 10)):
        metric.update(torch.as_tensor(x_hat[start:stop]), torch.as_tensor(x[start:stop]))
    result = metric.compute()
    assert list(result) == ["mse_scale_0", "mse_scale_1"]
    assert float(result["mse_scale_0"]) == pytest.approx(((x - x_hat - means) ** 2).mean(), rel=1e-6)
    assert float(result["mse_scale_1"]) == pytest.approx((means**2).mean(), rel=1e-6)


def test_scales_share_the_whole_error_in_a_collection_and_are_reset():
    metrics = MetricCollection({"mse": MeanSquaredError(), "scales": ScaleError(BlockMean([2, 4]).parts, 3)}).clone()
    for _ in range(2):
        x, x_hat = torch.rand(2, 5, 3, 9, 9)
        metrics.update(x_hat, x)
        result = metrics.compute()
        assert set(result) == {"mse", "mse_scale_0", "mse_scale_1", "mse_scale_2"}
        expected = float((x - x_hat).square().mean())
        assert float(sum(result[f"mse_scale_{index}"] for index in range(3))) == pytest.approx(expected, rel=1e-5)
        metrics.reset()


def test_the_number_of_scales_has_to_be_right():
    metric = ScaleError(LaplacianPyramid(2).parts, 2)
    with pytest.raises(ValueError, match="num_scales: expected 3, as there are parts, got 2"):
        metric.update(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8))
