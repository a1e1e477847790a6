"""Parts that remember their constructor arguments, and models described by them.

A model's hyperparameters are a tree of ``{"class_path": ..., "init_args": {...}}``, the form of LightningCLI's YAML.
Two more kinds of node occur: ``{"same_as": "encoder"}``, the object built at that path (tied parts), and
``{"not_recorded": "my_project.Net"}``, an object that is not ours and has to be passed again.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_ae.files import refuse_texts

Tree = dict[str, Any]
T = TypeVar("T", bound="Rebuildable")


class Rebuildable:
    """Mixin for a class whose instances remember how they were built.

    The arguments of the constructor are kept as given, so :func:`describe` can write them down and
    :func:`rebuild` can call the constructor again. Put it first among the bases.

    Example:
        >>> class Scale(Rebuildable, torch.nn.Module):
        ...     def __init__(self, factor: float = 1.0):
        ...         super().__init__()
        >>> describe(Scale(2.0))["init_args"]
        {'factor': 2.0}
    """

    _init_args: dict[str, Any] | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the constructor's signature, which ``__new__`` would hide."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Record the arguments, whatever ``__init__`` does with them."""
        self = super().__new__(cls)
        # straight into __dict__: nn.Module.__setattr__ would register modules among the arguments
        self.__dict__["_init_args"] = _bound_arguments(cls, args, kwargs)
        return self


class KeepsAttributes:
    """Mixin for a module whose plain attributes change while training: they are saved with its weights.

    Put it before ``nn.Module`` among the bases.
    """

    #: Names of the attributes: numbers, strings, or containers of them.
    kept: tuple[str, ...] = ()

    def get_extra_state(self) -> dict[str, Any]:
        """The attributes as they are now, as plain data; containers are copied, as they go on to change."""
        return {name: _describe_value(getattr(self, name), name, {}) for name in self.kept}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the attributes of a checkpoint; containers become this module's own."""
        for name in self.kept:
            setattr(self, name, copy.deepcopy(state[name]))


def _bound_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name; None where they cannot be passed by name, or do not fit (then ``__init__`` says so)."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        bound = signature.bind_partial(None, *args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()  # a checkpoint outlives a default
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.POSITIONAL_ONLY or (kind is inspect.Parameter.VAR_POSITIONAL and value):
            return None
        if kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def class_path(cls: type) -> str:
    """The shortest import path of a class: ``lightning_ae.Name`` for what this package exports."""
    if getattr(sys.modules.get("lightning_ae"), cls.__qualname__, None) is cls:
        return f"lightning_ae.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(part: Rebuildable) -> Tree:
    """Write a part, and every part among its arguments, as a tree of plain data.

    Args:
        part: any instance of a :class:`Rebuildable` class.

    Returns:
        ``{"class_path": str, "init_args": {...}}`` of numbers, strings, containers and tensors only.

    Example:
        >>> from lightning_ae import GaussianNLL
        >>> describe(GaussianNLL(scale=0.1))
        {'class_path': 'lightning_ae.GaussianNLL', 'init_args': {'scale': 0.1, 'learn_scale': False, 'min_scale': None}}
    """
    return _describe_part(part, "", {})


def _describe_part(part: Rebuildable, path: str, seen: dict[int, str]) -> Tree:
    if id(part) in seen:
        return {"same_as": seen[id(part)]}
    seen[id(part)] = path
    arguments = part._init_args
    if arguments is None:
        return {"not_recorded": class_path(type(part))}
    return {
        "class_path": class_path(type(part)),
        "init_args": {name: _describe_value(value, _join(path, name), seen) for name, value in arguments.items()},
    }


def _describe_value(value: Any, path: str, seen: dict[int, str]) -> Any:
    if isinstance(value, np.generic):
        return _describe_value(value.item(), path, seen)
    if value is None or type(value) in (bool, int, float, str, torch.dtype):
        return value
    if isinstance(value, Rebuildable):
        return _describe_part(value, path, seen)
    if isinstance(value, Mapping):
        return {key: _describe_value(item, _join(path, str(key)), seen) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_describe_value(item, _join(path, str(i)), seen) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.as_tensor(value)
    if isinstance(value, Path):
        return str(value)
    return {"not_recorded": getattr(value, "__qualname__", None) or class_path(type(value))}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def rebuild(
    tree: Tree, *, cls: type | None = None, trusted: Iterable[str] = (), given: Mapping[str, Any] | None = None
) -> Any:
    """Build the object that :func:`describe` wrote down.

    Args:
        tree: what :func:`describe` returned.
        cls: the class to build instead of importing the one the tree names; its module is trusted.
        trusted: names of packages or modules, besides this one, whose classes may be imported.
        given: objects to use at a dotted path of the tree instead of what is written there,
            e.g. ``{"encoder": my_encoder, "penalties.flow.residual": my_function}``.

    Returns:
        A new object; its weights are freshly initialised.

    Raises:
        ValueError: if a class is not trusted or cannot be found, an object was not recorded and is not ``given``, or
            there is a text where the class takes none.

    Example:
        >>> from lightning_ae import GaussianNLL
        >>> rebuild(describe(GaussianNLL(scale=0.5))).scale
        tensor(0.5000)
    """
    given = dict(given or {})
    missing = {path: name for path, name in _not_recorded(tree, "") if not _is_given(path, given)}
    if missing:
        names = ", ".join(f"{path} (a {name})" for path, name in missing.items())
        raise ValueError(
            f"The checkpoint does not record how to build {names}: it is not a part of lightning_ae, or was built "
            f"with positional-only arguments. Build it yourself and pass it again: load(path, {_call(missing)})."
        )
    return _Builder(cls, trusted, given).build(tree, "")


def _call(missing: Iterable[str]) -> str:
    plain = [f"{path}=..." for path in missing if "." not in path]
    dotted = [f'"{path}": ...' for path in missing if "." in path]
    return ", ".join(plain + ([f"**{{{', '.join(dotted)}}}"] if dotted else []))


def _not_recorded(node: Any, path: str) -> Iterable[tuple[str, str]]:
    if isinstance(node, Mapping):
        if "not_recorded" in node:
            yield path, node["not_recorded"]
            return
        for key, item in node.get("init_args", node).items():
            yield from _not_recorded(item, _join(path, str(key)))
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _not_recorded(item, _join(path, str(i)))


def _is_given(path: str, given: Mapping[str, Any]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in given)


class _Builder:
    """One walk over a tree: what may be imported, what was passed, what has been built so far."""

    def __init__(self, root: type | None, trusted: Iterable[str], given: dict[str, Any]) -> None:
        self.root = root
        self.trusted = (__package__, *trusted, *([root.__module__] if root else []))
        self.given = given
        self.built: dict[str, Any] = {}

    def build(self, node: Any, path: str) -> Any:
        if path in self.given:
            self.built[path] = self.given.pop(path)
            return self.built[path]
        if isinstance(node, (list, tuple)):
            return type(node)(self.build(item, _join(path, str(i))) for i, item in enumerate(node))
        if not isinstance(node, Mapping):
            return node
        if "same_as" in node:
            if node["same_as"] not in self.built:
                raise ValueError(f"{path} is shared with {node['same_as']}, which you replaced: pass {path!r} as well.")
            return self.built[node["same_as"]]
        values = {key: self.build(item, _join(path, str(key))) for key, item in node.get("init_args", node).items()}
        if "class_path" not in node:
            return values
        if path == "":
            values.update({name: self.given.pop(name) for name in list(self.given) if "." not in name})
            if self.given:
                raise ValueError(f"The checkpoint's model has no part at {sorted(self.given)}.")
        cls = self.root if self.root and path == "" else resolve(node["class_path"], self.trusted)
        recorded = {name: item for name, item in node.get("init_args", {}).items() if values[name] is item}
        refuse_texts(cls, recorded, path)
        self.built[path] = cls(**values)
        return self.built[path]


def resolve(path: str, trusted: Iterable[str]) -> type[Rebuildable]:
    """Import a :class:`Rebuildable` class by its path, from trusted modules only.

    Raises:
        ValueError: if the module is not trusted, or has no such class.
    """
    module, _, name = path.rpartition(".")
    if not any(module == prefix or module.startswith(f"{prefix}.") for prefix in trusted):
        raise ValueError(
            f"The checkpoint asks for {path}, which is not part of lightning_ae. If you trust it, "
            f"call load(path, trusted=[{module.split('.')[0]!r}]), or load_from_checkpoint of that class."
        )
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"The checkpoint asks for {path}, whose module cannot be imported: {error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, Rebuildable)):
        raise ValueError(f"The checkpoint asks for {path}: no such class, or not one that checkpoints can rebuild.")
    return cls
