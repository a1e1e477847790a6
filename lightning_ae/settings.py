"""What a person, a tuner or a schedule sets on a model after it was built, and its arguments as loggers want them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from lightning_ae.rebuildable import KeepsAttributes, Rebuildable, Tree

#: What is taken for a setting: a number, or None where there is none.
Setting: TypeAlias = bool | int | float | None


def settings(model: nn.Module) -> dict[str, dict[str, Setting]]:
    """Plain numbers that are arguments and attributes of a model's parts, as they are now.

    A person, a tuner or a schedule may have changed them since the constructor ran. Of a part that keeps some of them
    with its weights (:class:`KeepsAttributes`) only the others. Numbers of NumPy, as searches over grids give them, and
    tensors of one number become plain ones: a checkpoint with others in it could not be read as plain data.

    Args:
        model: any module; parts that are not :class:`Rebuildable` are passed over.

    Returns:
        By the part's path and the attribute's name; parts without any are left out.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> model = LinearAutoencoder(4, 2)
        >>> model.lr = 0.5
        >>> settings(model)[""]["lr"]
        0.5
    """
    found: dict[str, dict[str, Setting]] = {}
    for path, part in model.named_modules():
        if isinstance(part, Rebuildable):
            kept = part.kept if isinstance(part, KeepsAttributes) else ()
            names = sorted((_parameters(type(part)) - {*kept}) & vars(part).keys())
            held = {name: _plain(vars(part)[name]) for name in names}
            plain = {name: value for name, value in held.items() if is_setting(value)}
            if plain:
                found[path] = plain
    return found


def is_setting(value: Any) -> bool:
    """Whether a value is a plain number or None."""
    return value is None or type(value) in (bool, int, float)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item()
    return value


def restore_settings(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Take up what :func:`settings` gave; whatever else is in there is passed over.

    A number takes the place of a number or of None, and None that of a number.

    Args:
        model: as it was rebuilt.
        saved: what :func:`settings` gave.
    """
    for path, numbers in settings(model).items():
        theirs = saved.get(path)
        theirs = theirs if isinstance(theirs, Mapping) else {}
        for name, value in numbers.items():
            new = theirs.get(name)
            if name in theirs and is_setting(new) and new != value and _alike(new, value):
                setattr(model.get_submodule(path), name, new)


def _alike(new: Setting, value: Setting) -> bool:
    return new is None or value is None or isinstance(new, bool) == isinstance(value, bool)


def _parameters(cls: type) -> set[str]:
    """Names of the arguments of a class's constructor and of those of its bases."""
    return {
        n for base in cls.__mro__ if issubclass(base, Rebuildable) for n in inspect.signature(base.__init__).parameters
    }


def flat_arguments(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """A tree as one line of numbers and names, as loggers compare runs by.

    Args:
        tree: what :func:`describe` returned.
        prefix: of all names.

    Returns:
        ``{"model": class, "lr": ..., "loss": class, "loss.scale": ...}``; sequences as text.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> from lightning_ae.rebuildable import describe
        >>> flat = flat_arguments(describe(LinearAutoencoder(4, 2, lr=0.1)))
        >>> flat["model"], flat["latent_dim"], flat["lr"]
        ('LinearAutoencoder', 2, 0.1)
    """
    name = (tree.get("class_path") or tree.get("not_recorded") or tree.get("same_as") or "").rpartition(".")[2]
    flat: dict[str, Any] = {prefix.rstrip(".") or "model": name} if name else {}
    for key, value in tree.get("init_args", {} if name else tree).items():
        if isinstance(value, Mapping):
            flat |= flat_arguments(dict(value), f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = f"tensor of shape {tuple(value.shape)}"
        elif value is None or type(value) in (bool, int, float, str):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
