"""What a checkpoint says of its model, as arguments for the command line.

The command line imports what it is told, and takes a text for the path of a class wherever a class may stand. So a file
may only tell it what is checked here: classes of this package, and plain values where plain values are expected.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml

import lightning_ae
from lightning_ae.checkpoint import read_tree
from lightning_ae.rebuildable import rebuild, resolve

_PLAIN = {bool, int, float, str, type(None), Path, Ellipsis}
#: Types of which a parser reads texts as YAML, without importing what they name.
_ANYTHING = {Any, object, inspect.Parameter.empty, list, tuple, dict}
_HARMLESS = re.compile(r"[\w ./,+-]*")


def model_of_checkpoint_alone(args: Sequence[str]) -> L.LightningModule | None:
    """The model of a checkpoint where ``--ckpt_path`` is given and no model is; None elsewhere.

    It is built here, by :func:`lightning_ae.rebuildable.rebuild`, and no parser hears of what the file says.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it holds a class, or a part, that this package cannot build by itself.
    """
    peek = ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--ckpt_path")
    peek.add_argument("-c", "--config")
    known, rest = peek.parse_known_args(args)
    named = any(arg.startswith(("--model", "--print_config", "-h", "--help")) for arg in rest)
    if known.ckpt_path in (None, "last", "best", "hpc", "registry") or known.config is not None or named:
        return None
    if "fit" in rest:
        raise ValueError(
            "fit from a checkpoint needs the configuration of the interrupted run, with its optimizer and Trainer: "
            "lightning-ae fit -c <log_dir>/config.yaml --ckpt_path ..."
        )
    path = known.ckpt_path
    tree = read_tree(path)
    try:
        model: L.LightningModule = rebuild(tree)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its model cannot be built from what the file says: {error} Name the model with --model or "
            "--config, or load it in Python with lightning_ae.load."
        ) from error
    return model


def model_of_checkpoint(path: str | Path) -> dict[str, Any]:
    """The model in a checkpoint of this package, in the form of a configuration.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it holds a class, or a part, that this package cannot build by itself.
    """
    tree = read_tree(path)
    _check_tree(tree, str(path))
    plain: dict[str, Any] = _plain(tree)
    return plain


def inline(tree: Any) -> str:
    """A configuration in one line; YAML rather than JSON, which has no infinity."""
    return str(yaml.safe_dump(tree, default_flow_style=True, width=math.inf)).strip()


def _check_tree(node: Any, path: str) -> None:
    """Raise unless all classes are this package's and everything is recorded."""
    if isinstance(node, Mapping):
        if "not_recorded" in node or "same_as" in node:
            raise ValueError(
                f"{path}: its model has parts that are tied by hand or are not of lightning_ae. Name the model with "
                "--model or --config, or load it in Python with lightning_ae.load."
            )
        cls = resolve(node["class_path"], (lightning_ae.__name__,)) if "class_path" in node else None
        for item in node.values():
            _check_tree(item, path)
        if cls is not None:
            check_texts(cls, node.get("init_args", {}), path)
    elif isinstance(node, (list, tuple)):
        for item in node:
            _check_tree(item, path)
    elif not isinstance(node, (bool, int, float, str, type(None))):
        raise ValueError(f"{path}: its model has a {type(node).__name__} among its arguments; name it with --model.")


def check_texts(cls: type, arguments: Mapping[str, Any], path: str) -> None:
    """Raise if an argument has a text where the class wants an object, which would be imported by that name.

    Raises:
        ValueError: if so.
    """
    for name, value in arguments.items():
        hint = _hint(cls, name)
        if not all(_is_value(text, hint) for text in _texts(value)):
            raise ValueError(
                f"{path}: {name} of its {cls.__name__} is {value!r}, which would be taken for the name of a class. "
                f"If you trust it, give --model and its arguments, or a configuration (-c)."
            )


def _hint(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is not None and name in inspect.signature(init).parameters:
            try:
                return typing.get_type_hints(init).get(name, Any)
            except Exception:  # a name that only type checkers know
                return type  # nothing is taken for harmless
    return Any


def _texts(value: Any) -> list[str]:
    """All texts in plain data that are not those of a class of its own, which is checked by itself."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [] if "class_path" in value else list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, (list, tuple)) else []


def _is_value(text: str, hint: Any) -> bool:
    """Whether a parser takes a text for a text, given what an argument may be."""
    leaves = set(_leaves(hint))
    if leaves <= _PLAIN or text in leaves:
        return True
    return leaves <= _PLAIN | _ANYTHING | {text for text in leaves if isinstance(text, str)} and bool(
        _HARMLESS.fullmatch(text)
    )


def _leaves(hint: Any) -> list[Any]:
    """What stands inside unions and containers; of a Literal its values."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return list(inside)
    if origin in (typing.Union, types.UnionType) or (inside and origin is not type and origin is not typing.Callable):
        return [leaf for item in inside for leaf in _leaves(item)]
    try:
        hash(hint)
    except TypeError:  # parameters of a Callable
        return [type]
    return [hint]


def _plain(node: Any) -> Any:
    """Tuples as lists."""
    if isinstance(node, Mapping):
        return {key: _plain(item) for key, item in node.items()}
    return [_plain(item) for item in node] if isinstance(node, (list, tuple)) else node


# -- models of others ----------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of any LightningModule.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none, or holds more than weights and plain data.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle fails in every possible way
        reason = str(error).strip().split("\n")
        raise ValueError(
            f"{path} is not a readable checkpoint: it is cut short, none at all, or has more in it than weights and "
            f"plain data, and nothing else is read from a file, since that could run code "
            f"({type(error).__name__}: {next((line for line in reason if 'Unsupported' in line), reason[0])})."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a LightningModule: it has no state_dict.")
    return checkpoint


def is_ours(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint says how to build its model as those of this package do."""
    return "class_path" in (checkpoint.get("hyper_parameters") or {})


def named_model(cls: type, checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """A class, with the hyperparameters that a checkpoint has for it, in the form of a configuration.

    What ``__init__`` does not take is left out, as Lightning does.

    Raises:
        ValueError: if one would be taken for the name of something to import.
    """
    given = dict(checkpoint.get("hyper_parameters") or {})
    if is_ours(checkpoint):
        _check_tree(given, str(path))
        given = dict(given.get("init_args", {}))
    else:
        given = {name: value for name, value in given.items() if not name.startswith("_")}
        _check_plain(given, cls, path)
        parameters = inspect.signature(cls).parameters
        whole = str(checkpoint.get("hparams_name"))
        if whole in parameters and parameters[whole].kind is not inspect.Parameter.VAR_KEYWORD:
            given = {whole: given}  # save_hyperparameters(config) of a constructor that takes one dict
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        given = {name: value for name, value in given.items() if open_ended or name in parameters}
        check_texts(cls, given, str(path))
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": _plain(given)}


def _check_plain(node: Any, cls: type, path: str | Path) -> None:
    if isinstance(node, Mapping):
        if "class_path" in node:
            raise ValueError(
                f"{path}: its hyperparameters name {node['class_path']}, and a file does not say what is imported. "
                "Give the configuration of the run: -c config.yaml."
            )
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            _check_plain(item, cls, path)
    elif not isinstance(node, (bool, int, float, str, type(None))):
        raise ValueError(
            f"{path}: the hyperparameters of its {cls.__name__} have a {type(node).__name__}, which no command line "
            "can give. Give the configuration of the run (-c config.yaml), or all arguments with --model."
        )
