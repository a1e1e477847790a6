"""Dequantisation: cells are filled evenly, and its bits bound those of the code from above."""

import math

import pytest
import torch
from scipy import stats

from lightning_ae import BitsPerDim, GaussianNLL, dequantize


def test_each_value_fills_a_cell_of_its_own():
    x = (torch.arange(256) / 255).repeat(200, 1)
    y = dequantize(x)
    assert torch.equal((256 * y).floor(), torch.arange(256.0).expand(200, -1))
    inside = (256 * y - (256 * y).floor()).flatten()
    assert stats.kstest(inside.numpy(), "uniform").pvalue > 1e-4
    again = dequantize(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, dequantize(x, generator=torch.Generator().manual_seed(1)))


def test_the_largest_noise_stays_in_its_cell(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 1 - 2.0**-24))
    y = dequantize(torch.arange(256) / 255)
    assert torch.equal((256 * y).floor(), torch.arange(256.0))
    assert (y < 1).all()


def test_its_bits_bound_the_length_of_the_code_from_above():
    """A Gaussian of 2 grey levels: the mass of the cells against the mean of the density over them."""
    sigma, levels = 2 / 256, 256
    x = (torch.randn(20_000, 1) * 2 + 128).round() / 255
    k = (x * 255).round().double()
    cdf = stats.norm(0.5, sigma).cdf
    exact = -torch.as_tensor(cdf(((k + 1) / 256).numpy()) - cdf((k / 256).numpy())).log2().mean().item()
    metric = BitsPerDim(1 / levels)
    for _ in range(5):
        y = dequantize(x)
        metric.update(GaussianNLL(sigma)(torch.full_like(y, 0.5), y), dims=1)
    assert exact < metric.compute().item() < exact + 0.05


def test_what_cannot_be_is_an_error():
    with pytest.raises(TypeError, match=r"x: expected floating-point values in \[0, 1\], got torch.uint8"):
        dequantize(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="levels: expected a whole number >= 2, got 1"):
        dequantize(torch.zeros(2), levels=1)
    assert math.isfinite(dequantize(torch.zeros(1), levels=2).item())
