"""A number somewhere in a model, found by its dotted path: read, set, and checked before it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.watch.site import WRAPPERS, clean_name

#: An owner, and what the number, or the next owner, is called in it: an attribute, a key or an index.
Step = tuple[Any, Any]


class Target:
    """A number in a model.

    The elements of the path are attributes, submodules, keys of mappings and indices of lists; compilers' and
    wrappers' own modules are passed over, and a first element ``model`` is, unless the model has such a part.

    Args:
        model: where to look.
        path: dotted, as ``"code.beta"`` or ``"loss.weights.ssim"``.
        whole: whether the numbers it is going to be set to are whole.

    Raises:
        ValueError: if there is no such path, or None at its end.
        TypeError: if what is there is no number, or cannot be set.
    """

    def __init__(self, model: nn.Module, path: str, whole: bool = False) -> None:
        self.model, self.path = model, path
        self.trail = _walk(model, path)
        self._check(whole)

    @property
    def place(self) -> tuple[int, Any]:
        """The same for two paths to one number."""
        owner, key = self.trail[-1]
        return id(owner), key

    @property
    def owner(self) -> Any:
        """What holds the number."""
        return self.trail[-1][0]

    def set(self, value: float) -> None:
        """Set it where the path leads now; a tensor in place, without waiting for its device."""
        self.trail = _walk(self.model, self.path)  # a checkpoint may have brought other containers
        owner, key = self.trail[-1]
        current = read(owner, key)
        if isinstance(current, Tensor):
            with torch.no_grad():
                current.fill_(value)
        else:
            write(owner, key, value)

    def _check(self, whole: bool) -> None:
        owner, key = self.trail[-1]
        value, name = read(owner, key), f"attribute: {self.path!r} of {type(owner).__name__}"
        if value is None:
            raise ValueError(f"{name} is None: give it a number first.")
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad):
            raise TypeError(f"{name} is trained: a schedule would fight the optimizer. Schedule a number or a buffer.")
        if isinstance(value, Tensor):
            if value.ndim or value.is_complex() or value.dtype == torch.bool:
                kind = f"a tensor {tuple(value.shape)} of {value.dtype}"
                raise TypeError(f"{name}: expected a number or a tensor without dimensions, got {kind}.")
            if not (whole or value.is_floating_point()):
                raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}; or take whole=True.")
            return
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}.")
        try:
            write(owner, key, value)
        except (AttributeError, TypeError) as error:
            raise TypeError(f"{name} cannot be set: {error}.") from error


def read(owner: Any, key: Any) -> Any:
    """What is there."""
    if _contains(owner):
        return owner[key]
    if isinstance(owner, nn.Module) and key in owner._modules:
        return owner._modules[key]
    return getattr(owner, key)


def write(owner: Any, key: Any, value: Any) -> None:
    """Put something else there."""
    if _contains(owner):
        owner[key] = value
    else:
        setattr(owner, key, value)


def _contains(owner: Any) -> bool:
    # a named tuple goes by its names
    return isinstance(owner, (Mapping, Sequence)) and not hasattr(owner, "_fields")


def _walk(model: nn.Module, path: str) -> list[Step]:
    elements = path.split(".")
    if elements[0] == "model" and len(elements) > 1 and _key(model, "model") is None:
        elements = elements[1:]
    trail: list[Step] = []
    value: Any = model
    for element in elements:
        value = _unwrapped(value)
        key = _key(value, element)
        if key is None:
            raise ValueError(f"attribute: {type(model).__name__} has no {path!r}{_hint(model, value, path, element)}.")
        trail.append((value, key))
        value = read(value, key)
    return trail


def _unwrapped(value: Any) -> Any:
    while isinstance(value, nn.Module):
        inner = next((value._modules[name] for name in WRAPPERS if name in value._modules), None)
        if inner is None:
            break
        value = inner
    return value


def _key(owner: Any, element: str) -> Any:
    """The element as its owner takes it; None if it has none."""
    if _contains(owner):
        if isinstance(owner, Mapping) and element in owner:
            return element
        number = int(element) if element.isdecimal() else None
        there = range(len(owner)) if isinstance(owner, Sequence) else owner
        return number if number is not None and number in there else None
    known = (isinstance(owner, nn.Module) and element in owner._modules) or hasattr(owner, element)
    return element if known else None


def _hint(model: nn.Module, owner: Any, path: str, element: str) -> str:
    everything = list(_numbers(model))
    last = path.rpartition(".")[2]
    ending = [known for known in everything if known.rpartition(".")[2] == last]
    near = [*ending, *difflib.get_close_matches(path.removeprefix("model."), everything, n=5, cutoff=0.5)]
    if isinstance(owner, (Mapping, Sequence)) and not near:
        there = list(owner) if isinstance(owner, Mapping) else list(range(len(owner)))
        return f": there is no {element!r} among {there}"
    near = list(dict.fromkeys(near))[:5] or everything[:8]
    return f"; near it are {', '.join(map(repr, near))}" if near else ""


def _numbers(model: nn.Module) -> Iterator[str]:
    """Paths of what could be scheduled."""
    for name, module in model.named_modules():
        begin = f"{clean_name(name)}." if clean_name(name) else ""
        for key, value in [*vars(module).items(), *module._buffers.items()]:
            if key.startswith("_"):
                continue
            if _is_number(value):
                yield f"{begin}{key}"
            elif isinstance(value, (MutableMapping, list)):
                items = value.items() if isinstance(value, Mapping) else enumerate(value)
                yield from (f"{begin}{key}.{inner}" for inner, item in items if _is_number(item))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.is_floating_point() and not value.requires_grad
    return isinstance(value, Real) and not isinstance(value, bool)
