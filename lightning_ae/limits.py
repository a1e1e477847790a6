"""Keeping a learned logarithm where its exponential is a number."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_limit(t: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    r"""The identity on [low, high], and beyond it growth by the logarithm only, with a continuous slope.

    .. math:: t \mapsto c + \operatorname{sgn}(t - c)\,\ln(1 + |t - c|), \qquad c = \min(\max(t, low), high)

    Of a logarithm :math:`t = \ln\sigma` it makes :math:`\sigma_{min} / (1 + \ln(\sigma_{min}/\sigma))` below
    :math:`\sigma_{min} = e^{low}`: no number of single precision takes the exponential out of range, and as the slope
    :math:`1 / (1 + |t - c|)` is never 0, what went too far comes back, unlike behind a clamp or a softplus.

    Args:
        t: any shape.
        low: the lower end of the identity.
        high: the upper end.

    Returns:
        As ``t``.

    Example:
        >>> soft_limit(torch.tensor([-1000.0, -3.0, 2.0]), low=-6.0)
        tensor([-12.9027,  -3.0000,   2.0000])
    """
    inside = t.clamp(low, high)
    beyond = t - inside
    return inside + torch.sign(beyond) * beyond.abs().log1p()
