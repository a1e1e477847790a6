"""Checks of weights that come one for each part of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real


def check_weights(name: str, weights: Sequence[float], count: int, part: str) -> list[float]:
    """The weights as a list of their own.

    Args:
        name: of the argument.
        weights: finite numbers >= 0.
        count: how many there must be.
        part: what each of them is for, in the error.

    Raises:
        TypeError: if they are no sequence of numbers.
        ValueError: if there are more or fewer, or one is negative or not finite.

    Example:
        >>> check_weights("level_weights", (1, 0.5), 2, "level")
        [1.0, 0.5]
    """
    if not isinstance(weights, Sequence) or not all(isinstance(weight, Real) for weight in weights):
        raise TypeError(f"{name}: expected {count} numbers, one for each {part}, got {weights!r}.")
    numbers = [float(weight) for weight in weights]
    if len(numbers) != count or not all(0 <= weight < math.inf for weight in numbers):
        raise ValueError(f"{name}: expected {count} finite numbers >= 0, one for each {part}, got {numbers}.")
    return numbers
