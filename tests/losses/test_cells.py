"""Masses of cells against mpmath, with as many digits as it takes."""

import mpmath
import pytest
import torch

from lightning_ae.losses.cells import log_laplace_cell, log_logistic_cell, log_normal_cell, log_normal_tail

mpmath.mp.dps = 60
MIDDLES = [0.0, 1e-3, 0.3, 1.0, 3.0, 9.0, 40.0, 70.0, -2.0]
WIDTHS = [1e-6, 1e-3, 0.02, 0.0501, 0.3, 0.9, 2.0, 10.0, 200.0]


def logistic(z):
    return 1 / (1 + mpmath.exp(-z))


def laplace(z):
    return mpmath.exp(z) / 2 if z < 0 else 1 - mpmath.exp(-z) / 2


def normal(z):
    return mpmath.erfc(-z / mpmath.sqrt(2)) / 2


CELLS = {
    "logistic": (log_logistic_cell, logistic),
    "normal": (log_normal_cell, normal),
    "laplace": (log_laplace_cell, laplace),
}


def exact(distribution, z, w):
    z, w = -abs(mpmath.mpf(z)), mpmath.mpf(w)
    return mpmath.log(distribution(z + w / 2) - distribution(z - w / 2))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_is_the_mass_to_rounding(name, dtype, tolerance):
    cell, distribution = CELLS[name]
    for z in MIDDLES:
        for w in WIDTHS:
            middle, width = torch.tensor([z, w], dtype=dtype)
            expected = float(exact(distribution, middle.item(), width.item()))
            assert cell(middle, width).item() == pytest.approx(expected, rel=tolerance, abs=tolerance), (z, w)


@pytest.mark.parametrize("name", CELLS)
def test_gradients_are_those_of_the_mass(name):
    """Closed form: the densities at the two ends, over the mass."""
    cell, distribution = CELLS[name]
    density = {
        "logistic": lambda t: logistic(t) * logistic(-t),
        "normal": lambda t: mpmath.exp(-t * t / 2) / mpmath.sqrt(2 * mpmath.pi),
        "laplace": lambda t: mpmath.exp(-abs(t)) / 2,
    }[name]
    for z in MIDDLES:
        for w in WIDTHS:
            middle, width = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (z, w))
            by_middle, by_width = torch.autograd.grad(cell(middle, width), (middle, width))
            mass = mpmath.exp(exact(distribution, z, w))
            ends = [density(mpmath.mpf(z) + sign * mpmath.mpf(w) / 2) / mass for sign in (1, -1)]
            size = float(ends[0] + ends[1])
            assert by_middle.item() == pytest.approx(float(ends[0] - ends[1]), rel=1e-7, abs=1e-9 * size), (z, w)
            assert by_width.item() == pytest.approx(size / 2, rel=1e-7), (z, w)


@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients_are_finite_far_out(name):
    cell, _ = CELLS[name]
    z = torch.tensor([0.0, 1e3, 1e6, -1e6]).repeat(4).requires_grad_()
    w = torch.tensor([1e-6, 1e-2, 30.0, 1e3]).repeat_interleave(4).requires_grad_()
    value = cell(z, w)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (z, w)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_normal_tail_and_its_slope_hold_far_out(dtype, tolerance):
    for z in (8.0, 0.0, -3.0, -30.0, -49.0, -51.0, -300.0, -1e4, -1e6):
        t = torch.tensor(z, dtype=dtype, requires_grad=True)
        value = log_normal_tail(t)
        exact_value = mpmath.log(normal(mpmath.mpf(z)))
        slope = mpmath.exp(-(mpmath.mpf(z) ** 2) / 2) / mpmath.sqrt(2 * mpmath.pi) / normal(mpmath.mpf(z))
        assert value.item() == pytest.approx(float(exact_value), rel=tolerance, abs=1e-12)
        assert torch.autograd.grad(value, t)[0].item() == pytest.approx(float(slope), rel=tolerance, abs=1e-12)
