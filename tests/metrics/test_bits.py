"""Bits per dimension against code lengths that are known."""

import math

import pytest
import torch
from scipy import stats

from lightning_ae import BernoulliNLL, BitsPerDim, ContinuousBernoulliNLL, GaussianNLL


def test_uniform_bytes_take_eight_bits():
    x = torch.randint(256, (20, 1, 5, 5)) / 255
    metric = BitsPerDim(resolution=1 / 256)
    metric.update(ContinuousBernoulliNLL()(torch.zeros_like(x), x), dims=25)  # logit 0 is the uniform density
    assert metric.compute().item() == pytest.approx(8, abs=1e-5)


def test_fair_coins_take_one_bit():
    x = torch.randint(2, (20, 7)).float()
    metric = BitsPerDim()
    metric.update(BernoulliNLL()(torch.zeros_like(x), x), dims=7)
    assert metric.compute().item() == pytest.approx(1, abs=1e-6)


def test_is_the_entropy_of_the_source_on_its_own_samples():
    x = 3 * torch.randn(4000, 10)
    metric = BitsPerDim(resolution=0.1)
    metric.update(GaussianNLL(3.0)(torch.zeros_like(x), x), dims=10)
    expected = stats.norm(scale=3).entropy() / math.log(2) - math.log2(0.1)
    assert metric.compute().item() == pytest.approx(expected, abs=5 * math.sqrt(0.5 / 40_000) / math.log(2))


@pytest.mark.parametrize("use_forward", [False, True])
def test_ragged_batches_equal_one_batch(use_forward):
    nll = 10 * torch.rand(17)
    metric = BitsPerDim()
    for batch in nll.split(7):
        (metric if use_forward else metric.update)(batch, dims=3)
    assert metric.compute().item() == pytest.approx(nll.double().sum().item() / (17 * 3) / math.log(2), rel=1e-6)


def test_examples_of_several_sizes_count_by_their_dimensions():
    metric = BitsPerDim()
    metric.update(torch.full((2,), math.log(2) * 4), dims=4)
    metric.update(torch.full((3,), math.log(2) * 30), dims=10)
    assert metric.compute().item() == pytest.approx((2 * 4 + 3 * 30) / (2 * 4 + 3 * 10))


def test_keeps_no_graph():
    metric = BitsPerDim()
    metric.update(torch.ones(2, requires_grad=True) * 2, dims=1)
    assert not metric.nats.requires_grad


@pytest.mark.parametrize("resolution", [0.0, -1.0, math.nan])
def test_resolution_that_is_not_positive_is_an_error(resolution):
    with pytest.raises(ValueError, match="resolution: expected a positive number, got"):
        BitsPerDim(resolution)
