"""Corruptions do what their equations say, in training only unless asked."""

import math

import pytest
import torch

from lightning_ae import Corruption, GaussianNoise, MaskingNoise, SaltAndPepper

N = 100_000
CORRUPTIONS = [GaussianNoise(0.3), MaskingNoise(0.3), SaltAndPepper(0.3, low=-2.0, high=4.0)]
EACH = pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: type(corruption).__name__)


def share(indicator, expected):
    """Whether a share of N independent events lies within five standard deviations of its probability."""
    return abs(indicator.double().mean().item() - expected) <= 5 * math.sqrt(expected * (1 - expected) / N)


@pytest.mark.parametrize("std", [0.0, 0.1, 3.0])
def test_gaussian_noise_is_normal_with_its_deviation(std):
    x = torch.rand(N // 100, 100, dtype=torch.float64)
    noise = GaussianNoise(std)(x) - x
    assert noise.mean().abs().item() <= 5 * std / math.sqrt(N) + 1e-12
    assert noise.var().item() == pytest.approx(std**2, rel=5 * math.sqrt(2 / N))
    if std:
        assert share(noise.abs() < std, math.erf(1 / math.sqrt(2)))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_masking_erases_its_share_and_leaves_the_rest(p):
    x = torch.rand(N // 100, 100) + 1
    y = MaskingNoise(p)(x)
    assert share(y == 0, p)
    assert torch.equal(y[y != 0], x[y != 0])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6, 1.0])
def test_salt_and_pepper_are_each_half_of_the_share_and_the_rest_is_left(p):
    x = torch.rand(N // 100, 100)
    y = SaltAndPepper(p, low=-2.0, high=4.0)(x)
    assert share(y == -2, p / 2)
    assert share(y == 4, p / 2)
    rest = (y != -2) & (y != 4)
    assert torch.equal(y[rest], x[rest])


@pytest.mark.parametrize("corruption", [MaskingNoise(0.3), SaltAndPepper(0.3, low=9.0, high=9.0)])
def test_numbers_are_replaced_independently(corruption):
    x = torch.ones(N, 2)
    hit = corruption(x) != 1
    assert share(hit[:, 0] & hit[:, 1], 0.3**2)


@EACH
class TestEveryCorruption:
    def test_leaves_the_clean_data_alone(self, corruption):
        x = torch.rand(50, 4)
        before = x.clone()
        y = corruption.train()(x)
        assert torch.equal(x, before)
        assert not torch.equal(y, x)
        assert y.shape == x.shape

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_the_dtype(self, corruption, dtype):
        assert corruption.train()(torch.rand(5, 4).to(dtype)).dtype == dtype

    def test_draws_anew_each_time(self, corruption):
        x = torch.rand(50, 4)
        assert not torch.equal(corruption.train()(x), corruption(x))

    def test_does_nothing_in_evaluation_unless_asked(self, corruption):
        x = torch.rand(50, 4)
        corruption.eval()
        assert corruption(x) is x
        corruption.in_eval = True
        try:
            assert not torch.equal(corruption(x), x)
        finally:
            corruption.in_eval = False
            corruption.train()


@pytest.mark.parametrize("make", [GaussianNoise, MaskingNoise, SaltAndPepper])
def test_in_eval_is_an_argument(make):
    x = torch.rand(50, 4)
    assert not torch.equal(make(0.5, in_eval=True).eval()(x), x)


def test_gradients_pass_where_the_data_were_kept():
    x = torch.rand(50, 4, requires_grad=True)
    y = MaskingNoise(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).float())


def test_a_corruption_of_ones_own_needs_only_corrupt():
    class Negated(Corruption):
        def corrupt(self, x):
            return -x

    x = torch.ones(1, 2)
    assert Negated()(x).tolist() == [[-1, -1]]
    assert Negated().eval()(x) is x


@pytest.mark.parametrize("make", [MaskingNoise, SaltAndPepper])
@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_share_outside_the_unit_interval_is_an_error(make, p):
    with pytest.raises(ValueError, match=r"p: expected a number in \[0, 1\], got"):
        make(p)


@pytest.mark.parametrize("std", [-0.1, math.nan])
def test_a_negative_deviation_is_an_error(std):
    with pytest.raises(ValueError, match="std: expected a finite number >= 0, got"):
        GaussianNoise(std)
