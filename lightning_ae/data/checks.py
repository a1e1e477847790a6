"""Argument checks shared by the data room."""


def check_int(name: str, value: int, *, least: int) -> int:
    """Return ``value`` if it is an integer of at least ``least``.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave.
        least: the smallest value allowed.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: if ``value`` is not an ``int``.
        ValueError: if ``value`` is below ``least``.

    Example:
        >>> check_int("batch_size", 64, least=1)
        64
        >>> check_int("batch_size", 0, least=1)
        Traceback (most recent call last):
            ...
        ValueError: batch_size: expected an integer >= 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer >= {least}, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    return value


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` if it is a number in ``[0, 1)``.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: if ``value`` is not a number.
        ValueError: if ``value`` is outside ``[0, 1)``.

    Example:
        >>> check_fraction("val_fraction", 0.1)
        0.1
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1), got {value!r} of type {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return value
