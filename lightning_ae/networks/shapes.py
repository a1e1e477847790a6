"""Checks of the sizes that networks are given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from torch import Tensor

Shape = int | Sequence[int]


def check_shape(shape: Shape, name: str = "in_shape") -> tuple[int, ...]:
    """A shape as a tuple; a number ``d`` is the flat shape ``(d,)``.

    Raises:
        ValueError: if a size is not a positive whole number.

    Example:
        >>> check_shape(64), check_shape([1, 8, 8])
        ((64,), (1, 8, 8))
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not sizes or not all(_is_size(size) for size in sizes):
        raise ValueError(f"{name}: expected a positive number or a sequence of them, got {shape!r}.")
    return tuple(int(size) for size in sizes)


def check_size(size: int, name: str) -> int:
    """A positive whole number, or a ``ValueError`` naming the argument."""
    if not _is_size(size):
        raise ValueError(f"{name}: expected a positive whole number, got {size!r}.")
    return int(size)


def _is_size(size: object) -> bool:
    # Integral: NumPy's whole numbers too, but no booleans
    return not isinstance(size, bool) and isinstance(size, Integral) and int(size) > 0


def check_input(x: Tensor, in_shape: tuple[int, ...], network: object) -> None:
    """A ``ValueError`` unless ``x`` is a batch of ``in_shape``: two tuples compared, nothing of the data."""
    if tuple(x.shape[1:]) != in_shape:
        raise ValueError(
            f"{type(network).__name__}: expected a batch (B, {', '.join(map(str, in_shape))}), got {tuple(x.shape)}."
        )
