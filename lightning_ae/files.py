"""Files that others may have written: nothing in them is believed before it is looked at, and errors name the file."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        what: what it should be, for the message.

    Returns:
        It, as a dict.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, nested too deep, or something else than an object; the message has the path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "cfg.json")
        ...     _ = path.write_text('{"k": 4}')
        ...     read_json(path, "a configuration")
        {'k': 4}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected {what}, found no {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is not {what}: {type(error).__name__}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: expected an object, got a {type(content).__name__}.")
    return content


#: Deeper and larger trees than any model's.
_MOST_DEEP, _MOST_NODES = 64, 100_000


def fault_of(tree: Any) -> str | None:
    """What is wrong with the form of a tree, which is a file's and not to be believed; None if nothing is.

    Example:
        >>> fault_of({"class_path": 3})
        'class_path is no text at the top'
    """
    todo: list[tuple[Any, str, int]] = [(tree, "", 0)]
    for _ in range(_MOST_NODES):
        if not todo:
            return None
        node, path, depth = todo.pop()
        where = f"at {path}" if path else "at the top"
        if depth > _MOST_DEEP:
            return f"it is nested deeper than {_MOST_DEEP} levels {where[:80]}"
        if isinstance(node, Mapping):
            if not all(isinstance(key, (str, int, float, bool, type(None))) for key in node):
                return f"a key is no text {where}"
            for key in ("class_path", "same_as", "not_recorded"):
                if key in node and not isinstance(node[key], str):
                    return f"{key} is no text {where}"
            if "init_args" in node and not _names_arguments(node["init_args"]):
                return f"init_args are no dict by name {where}"
            todo += [(item, f"{path}.{key}".strip("."), depth + 1) for key, item in node.items() if key != "init_args"]
            todo += [(item, f"{path}.{name}".strip("."), depth + 1) for name, item in node.get("init_args", {}).items()]
        elif isinstance(node, (list, tuple)):
            todo += [(item, f"{path}.{i}".strip("."), depth + 1) for i, item in enumerate(node)]
    return f"it has more than {_MOST_NODES} nodes"


def _names_arguments(arguments: Any) -> bool:
    return isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)


def refuse_texts(cls: type, arguments: Mapping[str, Any], path: str = "") -> None:
    """Raise if an argument is a text, or holds one, where the class takes no texts.

    A text of a file is never a number, a module or a class: a parser might import what it names.

    Args:
        cls: the class.
        arguments: plain data by name.
        path: where in the tree they are, for the message.

    Raises:
        ValueError: if so.

    Example:
        >>> from lightning_ae import GaussianNLL
        >>> refuse_texts(GaussianNLL, {"scale": "os.system"})
        Traceback (most recent call last):
            ...
        ValueError: scale: expected no text for a float of GaussianNLL, got 'os.system'.
    """
    for name, value in arguments.items():
        hint = _hint(cls, name)
        if isinstance(value, str) and not _takes_text(hint, value):
            where = f"{path}.{name}" if path else name
            wanted = getattr(hint, "__name__", str(hint)).removeprefix("typing.")
            raise ValueError(f"{where}: expected no text for a {wanted} of {cls.__name__}, got {value[:60]!r}.")


def _hint(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is not None and name in inspect.signature(init).parameters:
            try:
                return typing.get_type_hints(init).get(name, Any)
            except Exception:  # a name that only type checkers know; the constructor has its own checks
                return Any
    return Any


def _takes_text(hint: Any, text: str) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return text in inside
    if origin in (typing.Union, types.UnionType):
        return any(_takes_text(part, text) for part in inside)
    return hint in (Any, object, str, Path) or isinstance(hint, typing.TypeVar)
