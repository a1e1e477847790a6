"""Which examples of a large batch are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Numbers of an activation, and of a prediction, that are counted in a batch; and examples that are in any case.
MOST_ELEMENTS, MOST_NUMBERS, LEAST_EXAMPLES = 2**16, 2**15, 32
ALL = slice(None)


def part_of(shape: Sequence[int], number: int | None, most: int = MOST_ELEMENTS) -> slice:
    r"""Every k-th example, from one that the number of the step decides.

    :math:`k = \max(1, \min(\lceil N / M \rceil, \lfloor B / 32 \rfloor))` for N numbers of B examples, of which about M
    are to be counted: up to M all are, and 32 examples in any case. A figure that is a mean over examples needs no
    more, and those that have been counted are given with it. Where it begins differs from step to step, is the same
    for all ranks and after a resume, and does not depend on the random state.

    Args:
        shape: of a tensor ``(B, ...)``.
        number: of the step; None for all examples.
        most: M.

    Example:
        >>> part_of((100, 128), 0)
        slice(None, None, None)
        >>> [part_of((128, 32, 14, 14), step) for step in (0, 25, 50)]
        [slice(0, None, 4), slice(1, None, 4), slice(3, None, 4)]
    """
    if number is None or len(shape) < 2:
        return ALL
    step = min(-(-math.prod(shape) // most), shape[0] // LEAST_EXAMPLES)
    if step <= 1:
        return ALL
    # multiplied by an odd number and cut off, as in Fibonacci hashing: periods of a loader and of the looks do not meet
    return slice((number * 2654435769 % 2**32) * step >> 32, None, step)
