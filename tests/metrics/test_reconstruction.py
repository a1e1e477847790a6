"""The collection of metrics for a shape of data, against NumPy and scikit-image."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lightning_ae import reconstruction_metrics

ALWAYS = {"mse", "mae", "fvu"}


def images(n=5, channels=1, side=24):
    torch.manual_seed(0)
    coarse = torch.rand(n, channels, side // 4, side // 4)
    x = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (x + 0.1 * torch.randn_like(x)).clamp(0, 1), x


def results(preds, x, data_range=1.0, batch_size=None):
    metrics = reconstruction_metrics(x.shape[1:], data_range)
    for batch in zip(preds.split(batch_size or len(x)), x.split(batch_size or len(x)), strict=True):
        metrics.update(*batch)
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.mark.parametrize(
    ("shape", "extra"),
    [
        ((64,), set()),
        ((3, 32), set()),
        ((2, 32, 32), set()),  # two channels are no image
        ((1, 8, 8, 8), set()),
        ((1, 8, 8), {"psnr"}),
        ((1, 10, 64), {"psnr"}),
        ((1, 11, 11), {"psnr", "ssim"}),
        ((3, 28, 28), {"psnr", "ssim"}),
        ((3, 175, 200), {"psnr", "ssim"}),
        ((3, 176, 176), {"psnr", "ssim", "ms_ssim"}),
    ],
)
def test_are_those_that_the_shape_allows_and_all_can_be_computed(shape, extra):
    metrics = reconstruction_metrics(shape)
    assert set(metrics) == ALWAYS | extra
    x = torch.rand(2, *shape)
    metrics.update((x + 0.01).clamp(0, 1), x)
    assert all(value.isfinite() for value in metrics.compute().values())


def test_means_are_over_all_numbers():
    preds, x = images()
    values = results(preds, x)
    assert values["mse"] == pytest.approx(np.mean((preds.numpy() - x.numpy()) ** 2), rel=1e-5)
    assert values["mae"] == pytest.approx(np.mean(np.abs(preds.numpy() - x.numpy())), rel=1e-5)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_scikit_images(channels, data_range):
    preds, x = images(channels=channels)
    values = results(preds, x, data_range)
    p, t = preds.double().numpy(), x.double().numpy()
    assert values["psnr"] == pytest.approx(peak_signal_noise_ratio(t, p, data_range=data_range), rel=1e-5)
    # torchmetrics mirrors the border and averages over the whole image, scikit-image leaves the border out
    mirrored = [np.pad(a, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect") for a in (t, p)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
    expected = [structural_similarity(*pair, data_range=data_range, **options) for pair in zip(*mirrored, strict=True)]
    assert values["ssim"] == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_ragged_batches_equal_one_batch(batch_size):
    preds, x = images(channels=3)
    whole = results(preds, x)
    assert results(preds, x, batch_size=batch_size) == pytest.approx(whole, rel=1e-5)


def test_a_perfect_reconstruction_has_no_error():
    _, x = images()
    values = results(x, x)
    assert values["mse"] == values["mae"] == values["fvu"] == 0
    assert values["ssim"] == pytest.approx(1, abs=1e-6)


def test_in_another_range_ssim_is_that_of_the_shifted_images():
    preds, x = images(side=180)
    for data_range, low in ((2.0, -1.0), (255.0, 0.0), (4.0, 3.0)):
        moved = reconstruction_metrics(x.shape[1:], data_range, low=low)
        moved.update(data_range * preds + low, data_range * x + low)
        expected = results(preds, x)
        for name in ("psnr", "ssim", "ms_ssim"):
            assert moved.compute()[name].item() == pytest.approx(expected[name], rel=1e-4), name
