"""Checks of the sizes that networks are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_ae.checks import check_floating, check_sequence, check_whole

Shape = int | Sequence[int]


def check_shape(shape: Shape, name: str = "in_shape") -> tuple[int, ...]:
    """A shape as a tuple; a number ``d`` is the flat shape ``(d,)``.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if a size is not positive, or there is none.

    Example:
        >>> check_shape(64), check_shape([1, 8, 8])
        ((64,), (1, 8, 8))
    """
    given: Any = shape
    sizes = tuple(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else (given,)
    wrong = f"{name}: expected a positive number or a sequence of them, got {shape!r}."
    if not sizes:
        raise ValueError(wrong)
    try:
        return tuple(check_whole(name, size) for size in sizes)
    except (TypeError, ValueError) as error:
        raise type(error)(wrong) from error


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Positive whole numbers, none or more: the sizes of layers. Errors as :func:`check_shape`.

    Example:
        >>> check_sizes("hidden", [32, 16])
        (32, 16)
    """
    return tuple(check_whole(name, size) for size in check_sequence(name, sizes))


def check_input(x: Any, in_shape: tuple[int, ...], network: nn.Module, name: str = "x") -> None:
    """An error unless ``x`` is a batch of ``in_shape`` in the precision of the network; nothing of the data is read.

    Raises:
        TypeError: if it is no tensor of floating-point numbers, or of others than the weights are.
        ValueError: if it has another shape.
    """
    check_floating(name, x)
    if tuple(x.shape[1:]) != in_shape or not x.ndim:
        raise ValueError(
            f"{name}: {type(network).__name__}: expected a batch (B, {', '.join(map(str, in_shape))}), got "
            f"{tuple(x.shape)}."
        )
    own = next((weight.dtype for weight in network.parameters()), x.dtype)
    if x.dtype != own and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}: expected {own} as the weights of {type(network).__name__} are, got {x.dtype}: convert it, or the "
            "model, or set the Trainer's precision."
        )
