r"""Probabilities of cells, :math:`\ln P(|X - x| \le \delta/2)`: what a number costs that is recorded with a spacing.

Each is exact to rounding for cells much narrower and much wider than the distribution, and far out in its tails.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

#: So many standard deviations out three terms of the asymptotic series are exact to rounding.
_TAIL = 50.0


def log_logistic_cell(z: Tensor, width: Tensor) -> Tensor:
    r""":math:`\ln[\sigma(z + w/2) - \sigma(z - w/2)] = \ln\sigma(b) + \ln\sigma(-a) + \ln(1 - e^{-w})`.

    Args:
        z: distance of the cell's middle from the mean, in scales; :math:`a, b = z \mp w/2`.
        width: :math:`w`, in scales, positive.

    Example:
        >>> log_logistic_cell(torch.tensor([0.0, 500.0]), torch.tensor(2.0)).exp()[0]  # tanh ½
        tensor(0.4621)
    """
    upper, lower = functional.logsigmoid(z + width / 2), functional.logsigmoid(width / 2 - z)
    return upper + lower + torch.log(-torch.expm1(-width))


def log_normal_cell(z: Tensor, width: Tensor) -> Tensor:
    r""":math:`\ln[\Phi(z + w/2) - \Phi(z - w/2)]`.

    Narrow cells by the moments of :math:`e^{-zt - t^2/2}` over the cell, others by the difference of two logarithms, on
    the side of the mean where that does not cancel.

    Args:
        z: distance of the cell's middle from the mean, in standard deviations.
        width: :math:`w`, in standard deviations, positive.

    Example:
        >>> log_normal_cell(torch.tensor(0.0), torch.tensor(2.0)).exp()
        tensor(0.6827)
    """
    z = z.abs()
    width = width.expand_as(z)
    narrow = width * (1 + z) < 0.1
    w, t = torch.where(narrow, width, 0.01), torch.where(narrow, z, 0.0)
    square, bent = w.square(), t.square()
    moments = square / 24 * (bent - 1) + square.square() / 1920 * (bent.square() - 6 * bent + 3)
    by_moments = w.log() - bent / 2 - 0.5 * math.log(2 * math.pi) + moments.log1p()
    w, t = torch.where(narrow, 1.0, width), torch.where(narrow, 0.0, z)
    near = log_normal_tail(w / 2 - t)
    # far out both logarithms are huge, and their difference is that of the asymptotic series
    tail = t - w / 2 > _TAIL
    a, b = (torch.where(tail, end, _TAIL) for end in (t - w / 2, t + w / 2))
    asymptotic = -t * w - (b / a).log() + _rest(b).log1p() - _rest(a).log1p()
    far = log_normal_tail(torch.where(tail, 0.0, -w / 2 - t))
    drop = torch.where(tail, asymptotic, far - torch.where(tail, 0.0, near))
    return torch.where(narrow, by_moments, near + torch.log(-torch.expm1(drop)))


def log_normal_tail(z: Tensor) -> Tensor:
    r""":math:`\ln\Phi(z)`, as :func:`torch.special.log_ndtr`, whose gradient is lost far out in single precision.

    Args:
        z: any shape.

    Example:
        >>> z = torch.tensor(-1e4, requires_grad=True)
        >>> torch.autograd.grad(log_normal_tail(z), z)[0]
        tensor(10000.)
    """
    tail = z < -_TAIL
    x = torch.where(tail, -z, _TAIL)
    asymptotic = -x.square() / 2 - x.log() - 0.5 * math.log(2 * math.pi) + _rest(x).log1p()
    return torch.where(tail, asymptotic, torch.special.log_ndtr(torch.where(tail, 0.0, z)))


def _rest(x: Tensor) -> Tensor:
    r"""What is left of :math:`\Phi(-x) / (\varphi(x)/x)` after the 1; to rounding from 50 on."""
    square = x.square().reciprocal()
    return -square * (1 - square * (3 - 15 * square))


def log_laplace_cell(z: Tensor, width: Tensor) -> Tensor:
    r""":math:`\ln[F(z + w/2) - F(z - w/2)]` of Laplace's distribution.

    The mass is :math:`e^{-|z|}\sinh(w/2)` beside the median, and :math:`1 - e^{-w/2}\cosh z` of a cell around it.

    Args:
        z: distance of the cell's middle from the median, in scales.
        width: :math:`w`, in scales, positive.

    Example:
        >>> log_laplace_cell(torch.tensor(0.0), torch.tensor(2.0)).exp()  # 1 - 1/e
        tensor(0.6321)
    """
    z = z.abs()
    half = (width / 2).expand_as(z)
    beside = half - z + torch.log(-torch.expm1(-2 * half)) - math.log(2)
    inside = z < half
    t = torch.where(inside, z, 0.0)
    around = torch.log(-torch.expm1(-half) - 2 * (-half).exp() * (t / 2).sinh().square())
    return torch.where(inside, around, beside)
