"""The soft limit: the identity inside, and numbers outside whatever comes."""

import torch

from lightning_ae.limits import soft_limit


def test_it_is_the_identity_inside_and_its_slope_is_continuous():
    t = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    y = soft_limit(t, -6.0, 10.0)
    inside = (t >= -6) & (t <= 10)
    assert torch.equal(y[inside], t[inside])
    (slope,) = torch.autograd.grad(y.sum(), t)
    distance = torch.maximum(-6 - t, t - 10).clamp(min=0).detach()
    torch.testing.assert_close(slope, 1 / (1 + distance))
    assert torch.equal(soft_limit(t), t)


def test_the_exponential_is_a_number_for_any_of_single_precision():
    t = torch.tensor([-3e38, -1e4, -100.0, 100.0, 1e4, 1e16], requires_grad=True)
    y = soft_limit(t, -6.0, 10.0).exp()
    assert (y > 0).all()
    assert y.isfinite().all()
    (slope,) = torch.autograd.grad(y.log().sum(), t)
    assert (slope > 0).all()
