"""Logged terms that cannot be: not finite, or below what their loss allows."""

from __future__ import annotations

import math
from collections.abc import Mapping


def impossible(means: Mapping[str, float], lower_bound: float = -math.inf) -> str:
    """Which term cannot be, and what is mostly why; empty if all can.

    Args:
        means: mean of each term, reconstruction before what code and penalties charge.
        lower_bound: what no reconstruction loss can be below for data in its support.

    Returns:
        The rest of a sentence that begins with the term.

    Example:
        >>> impossible({"loss": math.nan, "reconstruction": 3.0, "kl": math.inf})[:36]
        'kl is not finite, while the terms be'
        >>> impossible({"loss": -4.0, "reconstruction": -4.0}, 0.0)[:50]
        'reconstruction is -4, but cannot be below 0: a bat'
    """
    bad = [name for name, value in means.items() if not math.isfinite(value) and name != "loss"]
    if bad:
        first = bad[0]
        if first.startswith("reconstruction"):
            return (
                f"{first} is not finite: look for NaN in the data after the first batch, or lower the learning rate "
                "and clip gradients"
            )
        return (
            f"{first} is not finite, while the terms before it are: steps have driven what it charges for beyond the "
            "range of floating-point numbers (an exponential of a log-variance or log-scale, say); lower the learning "
            "rate, clip gradients, or bound what it is computed from. The data are not why"
        )
    value = means.get("reconstruction", math.inf)
    if value < lower_bound - 1e-4 * max(1.0, abs(lower_bound)):
        return (
            f"reconstruction is {value:.4g}, but cannot be below {lower_bound:g}: a batch after the first holds data "
            "that the loss is not defined for (outside [0, 1], or negative counts); look at how they are scaled"
        )
    return ""
