"""What may come in: checks of arguments whose errors begin with the argument's name and say what was expected and got.

A ``TypeError`` for what is no number, name or module at all, a ``ValueError`` for one out of range. Booleans are no
numbers; NumPy's numbers, and tensors and arrays without dimensions, are. Each check gives back a plain Python value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

#: The largest whole number that torch takes.
_MOST = 2**63 - 1
#: The largest number of single precision, in which nearly all is computed.
_LARGEST = 3.4028234663852886e38


def describe_type(value: object) -> str:
    """What a value is, for a message: ``"a list"``, or ``"the class Linear"`` for a class instead of an instance.

    Example:
        >>> describe_type([]), describe_type(list)
        ('a list', 'the class list')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def outline(value: Any, depth: int = 3) -> str:
    """What a batch is made of: shapes and types instead of numbers.

    Example:
        >>> import torch
        >>> outline({"u": [(torch.zeros(4, 6), "a")]})
        "{'u': [(tensor (4, 6), str)]}"
    """
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    nested = isinstance(value, (dict, list, tuple))
    if not nested or depth == 0:
        return type(value).__name__
    first = list(value.items() if isinstance(value, dict) else value)[:4]
    rest = ", …" if len(value) > len(first) else ""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {outline(item, depth - 1)}" for key, item in first) + rest + "}"
    inside = ", ".join(outline(item, depth - 1) for item in first) + rest
    return f"[{inside}]" if isinstance(value, list) else f"({inside})"


def _wrong_type(name: str, expected: str, value: object) -> NoReturn:
    text = repr(value)
    shown = text if len(text) <= 60 and "\n" not in text else f"{text[:40].splitlines()[0]}…"
    raise TypeError(f"{name}: expected {expected}, got {shown} of type {type(value).__name__}.")


def _unwrapped(value: Any) -> Any:
    """The number in a tensor or an array without dimensions; anything else as it is."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 and not getattr(value, "is_meta", False):
        return value.item()
    return value


def _number(name: str, value: Any, expected: str) -> float:
    number = _unwrapped(value)
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, Real):
        _wrong_type(name, expected, value)
    if isinstance(number, Integral) and abs(int(number)) < 2**53:
        return int(number)
    try:
        return float(number)
    except OverflowError:  # a whole number
        return math.copysign(math.inf, 1 if int(value) > 0 else -1)


def _between(
    name: str,
    value: Any,
    expected: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
    finite: bool = True,
) -> float:
    number = _number(name, value, expected)
    inside = (number > low if above else number >= low) and (number < high if below else number <= high)
    if inside and finite and not abs(number) <= _LARGEST:
        expected += "" if "finite" in expected else " that is finite"
        expected += "" if abs(number) == math.inf else ", in single precision"
        inside = False
    if not inside:
        raise ValueError(f"{name}: expected {expected}, got {value}.")
    return number


def check_finite(name: str, value: float) -> float:
    """A finite number.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave.

    Returns:
        It, as Python's number.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is NaN or infinite.

    Example:
        >>> check_finite("bias_init", np.float32(0.5))
        0.5
    """
    return _between(name, value, "a finite number")


def check_positive(name: str, value: float, *, finite: bool = True) -> float:
    """A number above 0, and unless ``finite`` is False below infinity; errors as :func:`check_finite`.

    Example:
        >>> check_positive("scale", 0)
        Traceback (most recent call last):
            ...
        ValueError: scale: expected a positive number, got 0.
    """
    return _between(name, value, "a positive number", low=0, above=True, finite=finite)


def check_non_negative(name: str, value: float, *, finite: bool = True) -> float:
    """A number of at least 0, finite unless told otherwise, as weights of terms are; errors as :func:`check_finite`.

    Example:
        >>> check_non_negative("beta", 4)
        4
    """
    return _between(name, value, "a finite number >= 0" if finite else "a number >= 0", low=0, finite=finite)


def check_share(name: str, value: float, ends: str = "[]", *, high: int = 1) -> float:
    """A number from 0 to 1, or to ``high``; errors as :func:`check_finite`.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave.
        ends: whether 0 and the other end belong to it: ``"[]"``, ``"[)"``, ``"(]"`` or ``"()"``.
        high: the other end.

    Example:
        >>> check_share("val_fraction", 1.0, "[)")
        Traceback (most recent call last):
            ...
        ValueError: val_fraction: expected a number in [0, 1), got 1.0.
    """
    expected = f"a number in {ends[0]}0, {high}{ends[1]}"
    return _between(name, value, expected, low=0, high=high, above=ends[0] == "(", below=ends[1] == ")")


def check_whole(name: str, value: int, *, least: int = 1, most: int = _MOST) -> int:
    """A whole number of at least ``least``; errors as :func:`check_finite`. 2.0 is none.

    Example:
        >>> check_whole("k", np.int64(3)), check_whole("dim", -1, least=-4)
        (3, -1)
        >>> check_whole("k", 2.0)
        Traceback (most recent call last):
            ...
        TypeError: k: expected a positive whole number, got 2.0 of type float.
    """
    expected = "a positive whole number" if least == 1 else f"a whole number >= {least}"
    number = _unwrapped(value)
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, Integral):
        _wrong_type(name, expected, value)
    whole = int(number)
    if not least <= whole <= most:
        expected += f" and <= {most}" if whole > most else ""
        raise ValueError(f"{name}: expected {expected}, got {value}.")
    return whole


def check_seed(name: str, value: int, *, most: int = _MOST) -> int:
    """A whole number from 0 on, as torch takes it to seed its generators; NumPy and scikit-learn take up to 2³² - 1.

    Example:
        >>> check_seed("seed", "0")
        Traceback (most recent call last):
            ...
        TypeError: seed: expected a whole number >= 0, got '0' of type str.
    """
    return check_whole(name, value, least=0, most=most)


def check_flag(name: str, value: bool) -> bool:
    """True or False (NumPy's too, and 0 and 1); a ``TypeError`` for anything else, such as ``"no"``.

    Example:
        >>> check_flag("bias", np.bool_(False))
        False
    """
    number = _unwrapped(value)
    if isinstance(number, (bool, np.bool_)) or (isinstance(number, Integral) and number in (0, 1)):
        return bool(number)
    _wrong_type(name, "True or False", value)


def check_one_of(name: str, value: T, choices: Iterable[T]) -> T:
    """One of a few names; a ``TypeError`` for what is no name, a ``ValueError`` for another.

    Example:
        >>> check_one_of("padding", "full", ("same", "valid"))
        Traceback (most recent call last):
            ...
        ValueError: padding: expected 'same' or 'valid', got 'full'.
    """
    names = list(choices)
    plain = isinstance(value, (str, int, float, bool)) or value is None
    # by type as well: 1 is not True
    if plain and any(value == choice and type(value) is type(choice) for choice in names):
        return value
    *others, last = (repr(choice) for choice in names)
    expected = f"{', '.join(others)} or {last}" if others else last
    expected = f"one of {', '.join([*others, last])}" if len(names) > 3 else expected
    if isinstance(value, tuple({type(choice) for choice in names})):
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    _wrong_type(name, expected, value)


def check_type(name: str, value: Any, *types: type | None) -> None:
    """An instance of one of some classes; None among them allows None.

    Raises:
        TypeError: if it is none of them.

    Example:
        >>> from torch import nn
        >>> check_type("encoder", nn.Linear, nn.Module)
        Traceback (most recent call last):
            ...
        TypeError: encoder: expected a Module, got the class Linear.
    """
    expected = tuple(kind for kind in types if kind is not None)
    if not (isinstance(value, expected) or (value is None and None in types)):
        article = "an" if expected[0].__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name}: expected {article} {expected[0].__name__}, got {describe_type(value)}.")


def check_sequence(name: str, value: Iterable[Any], of: str = "numbers") -> list[Any]:
    """The items of a list, a tuple or another iterable with an end; a ``TypeError`` for a number or a string.

    Example:
        >>> check_sequence("channels", (32, 64))
        [32, 64]
        >>> check_sequence("channels", "64")
        Traceback (most recent call last):
            ...
        TypeError: channels: expected a sequence of numbers, got '64' of type str.
    """
    if isinstance(value, Tensor) and value.layout != torch.strided:
        _wrong_type(name, f"a sequence of {of}", value)
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0:
        return list(value.tolist()) if value.ndim == 1 else list(value)
    if isinstance(value, (str, bytes, dict, set, Tensor, np.ndarray)) or not isinstance(value, (Sequence, Iterable)):
        _wrong_type(name, f"a sequence of {of}", value)
    return list(value)


# -- tensors -------------------------------------------------------------------------------------------------------


def check_tensor(name: str, value: Any, *, least_dims: int = 0) -> None:
    """A tensor of real numbers (booleans and whole numbers too) with so many dimensions; nothing of it is read.

    Raises:
        TypeError: if it is no tensor, or a complex one.
        ValueError: if it has fewer dimensions.

    Example:
        >>> check_tensor("counts", torch.zeros(2, dtype=torch.complex64))
        Traceback (most recent call last):
            ...
        TypeError: counts: expected real numbers, got torch.complex64.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe_type(value)}.")
    if value.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}.")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}; see to_dense().")
    if value.ndim < least_dims:
        shape = ", ".join(["B", "D", "H", "W"][:least_dims])
        raise ValueError(f"{name}: expected a batch ({shape}, ...), got a tensor of shape {tuple(value.shape)}.")


def check_floating(name: str, value: Any, *, least_dims: int = 0) -> None:
    """A tensor of floating-point numbers, as :func:`check_tensor`.

    Example:
        >>> check_floating("h", torch.zeros(2, 3, dtype=torch.int64))
        Traceback (most recent call last):
            ...
        TypeError: h: expected floating-point numbers, got torch.int64; convert them, as with h.float().
    """
    check_tensor(name, value, least_dims=least_dims)
    if not value.is_floating_point():
        raise TypeError(
            f"{name}: expected floating-point numbers, got {value.dtype}; convert them, as with {name}.float()."
        )
