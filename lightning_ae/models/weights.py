"""Checks of weights that come one for each part of a model."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ae.checks import check_non_negative


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
    if not isinstance(weights, Sequence):
        raise TypeError(f"{name}: expected {count} numbers, one for each {part}, got {weights!r}.")
    wrong = f"{name}: expected {count} finite numbers >= 0, one for each {part}, got {weights!r}."
    try:
        numbers = [float(check_non_negative(name, weight)) for weight in weights]
    except TypeError as error:
        raise TypeError(f"{name}: expected {count} numbers, one for each {part}, got {weights!r}.") from error
    except ValueError as error:
        raise ValueError(wrong) from error
    if len(numbers) != count:
        raise ValueError(wrong)
    return numbers
