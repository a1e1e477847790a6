"""What a person, a tuner or a schedule sets on a model after it was built, and its arguments as loggers want them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_ae.rebuildable import KeepsAttributes, Rebuildable, Tree


def settings(model: nn.Module) -> dict[str, dict[str, bool | int | float]]:
    """Plain numbers that are arguments and attributes of a model's parts, as they are now.

    A person, a tuner or a schedule may have changed them since the constructor ran. Of a part that keeps some of them
    with its weights (:class:`KeepsAttributes`) only the others.

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
    found: dict[str, dict[str, bool | int | float]] = {}
    for path, part in model.named_modules():
        if isinstance(part, Rebuildable):
            kept = part.kept if isinstance(part, KeepsAttributes) else ()
            held = {name: vars(part).get(name) for name in sorted(_parameters(type(part)) - {*kept})}
            numbers = {name: value for name, value in held.items() if isinstance(value, (bool, int, float))}
            if numbers:
                found[path] = numbers
    return found


def restore_settings(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Take up the numbers of :func:`settings`; whatever else is in there is passed over.

    Args:
        model: as it was rebuilt.
        saved: what :func:`settings` gave.
    """
    for path, numbers in settings(model).items():
        theirs = saved.get(path, {})
        for name, value in numbers.items():
            new = theirs.get(name) if isinstance(theirs, Mapping) else None
            if type(new) in (bool, int, float) and (isinstance(new, bool) == isinstance(value, bool)) and new != value:
                setattr(model.get_submodule(path), name, new)


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
