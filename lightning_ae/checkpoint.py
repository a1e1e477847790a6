"""Checkpoints that rebuild themselves: reading a file, building the model it describes, loading the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.files import fault_of
from lightning_ae.rebuildable import Tree, class_path, rebuild, resolve
from lightning_ae.settings import is_setting, restore_settings, settings

M = TypeVar("M", bound=L.LightningModule)


def load_recorded(
    path: str | Path,
    cls: type[M] | None,
    *,
    map_location: Any,
    trusted: Iterable[str],
    strict: bool,
    given: Mapping[str, Any],
) -> M:
    """The model of the class that is recorded, or of ``cls`` instead: see :func:`lightning_ae.load`."""
    checkpoint = _read(path, map_location, weights_only=True)
    trusted = (trusted,) if isinstance(trusted, str) else tuple(trusted)
    return _restore(path, checkpoint, cls, trusted=trusted, strict=strict, given=given)


def load_as(
    cls: type[M],
    path: str | Path,
    *,
    map_location: Any,
    trusted: Iterable[str],
    strict: bool,
    given: Mapping[str, Any],
    weights_only: bool = True,
) -> M:
    """As :func:`lightning_ae.load`, and a ``TypeError`` if the model is no ``cls``."""
    trusted = (trusted,) if isinstance(trusted, str) else tuple(trusted)
    checkpoint = _read(path, map_location, weights_only)
    recorded = checkpoint["hyper_parameters"]["class_path"]
    if not _names(cls, recorded):
        # another class of ours or of a trusted module may still be a subclass
        ours = any(recorded.startswith(f"{module}.") for module in (__package__, *trusted))
        found: Any = resolve(recorded, (__package__, *trusted)) if ours else None
        if found is None or not issubclass(found, cls):
            raise TypeError(
                f"{path} holds a {recorded}, not a {class_path(cls)}. If that is its new name, "
                f"lightning_ae.load(path, cls={cls.__name__}) takes it; a subclass needs trusted=[its package]."
            )
        cls = found
    return _restore(path, checkpoint, cls, trusted=trusted, strict=strict, given=given)


def _restore(
    path: str | Path,
    checkpoint: dict[str, Any],
    cls: type[M] | None,
    *,
    trusted: Iterable[str],
    strict: bool,
    given: Mapping[str, Any],
) -> M:
    with _naming(path):
        tree = checkpoint["hyper_parameters"]
        model: M = rebuild(tree, cls=cls, trusted=trusted, given=given)
        changed = tree.get("settings", {})
        plain = {name for name, value in given.items() if is_setting(value)}
        if plain and changed:  # arguments that are passed again count for more than what was set under the old ones
            others = {name: value for name, value in given.items() if name not in plain}
            before = settings(rebuild(tree, cls=cls, trusted=trusted, given=others))
            changed = {
                path: {
                    n: v for n, v in numbers.items() if v != before.get(path, {}).get(n) and (path or n not in plain)
                }
                for path, numbers in changed.items()
            }
        restore_settings(model, changed)
        checkpoint["state_dict"] = with_names_of(model, checkpoint["state_dict"])
        model.on_load_checkpoint(checkpoint)
        _widen(model, checkpoint["state_dict"])
        model.load_state_dict(checkpoint["state_dict"], strict=strict)
    tensors = [value for value in checkpoint["state_dict"].values() if isinstance(value, Tensor)]
    return model.to(tensors[0].device) if tensors else model


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Errors of what is built from a file say which file it was."""
    try:
        yield
    except Exception as error:
        for kind in (TypeError, ValueError, RuntimeError):
            if type(error) is kind:
                raise kind(f"{path}: {error}") from error
        if isinstance(error, (LookupError, AttributeError, ArithmeticError, RecursionError)):
            raise ValueError(f"{path}: it does not fit what it says it is: {type(error).__name__}: {error}") from error
        raise


def with_names_of(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the names that they have in a model whose parts are compiled where others were not, or not.

    ``torch.compile`` of a submodule puts it into another one, so that its weights are called ``encoder._orig_mod.…``.

    Args:
        model: to be loaded.
        state: the weights of one that is the same but for what is compiled.

    Returns:
        The same weights; what the model does not have keeps its name.

    Example:
        >>> plain, compiled = nn.Sequential(nn.Linear(2, 1)), nn.Sequential(torch.compile(nn.Linear(2, 1)))
        >>> list(with_names_of(plain, compiled.state_dict()))
        ['0.weight', '0.bias']
        >>> list(with_names_of(compiled, plain.state_dict()))
        ['0._orig_mod.weight', '0._orig_mod.bias']
    """
    # of a compiled module and what is in it, which have one name here, the latter comes last and counts
    own = {_uncompiled(name): name for name, _ in model.named_modules(remove_duplicate=False)}
    renamed = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        owner = own.get(_uncompiled(owner), owner)
        renamed[f"{owner}.{last}" if owner else last] = value
    return renamed


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _widen(model: L.LightningModule, state: Mapping[str, Any]) -> None:
    """Make room for weights in double precision; of half precision become float32, as with Lightning's loading."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        saved = state.get(name)
        if isinstance(saved, Tensor) and saved.dtype == torch.float64 and tensor.is_floating_point():
            tensor.data = tensor.data.double()


def _names(cls: type, recorded: str) -> bool:
    module = recorded.rpartition(".")[0]
    ours = class_path(cls).startswith(f"{__package__}.") or recorded.startswith(f"{__package__}.")
    same_module = module == cls.__module__ or ("__main__" in (module, cls.__module__) and not ours)
    return recorded == class_path(cls) or (same_module and recorded.endswith(f".{cls.__qualname__}"))


def _read(path: str | Path, map_location: Any, weights_only: bool) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only)
    except Exception as error:  # a damaged zip or pickle fails in every possible way
        raise ValueError(
            f"{path} is not a readable checkpoint (cut short, not one at all, or with more in it than weights and "
            f"plain data): {error}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint: expected a dict, got a {type(checkpoint).__name__}.")
    tree = checkpoint.get("hyper_parameters")
    if not isinstance(tree, Mapping) or "class_path" not in tree or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a lightning_ae model: it does not say which class to build.")
    if fault := fault_of(tree) or _fault_of_state(checkpoint["state_dict"]):
        raise ValueError(f"{path} is not a checkpoint of a lightning_ae model: {fault}.")
    return checkpoint


def _fault_of_state(state: Any) -> str | None:
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        return "its state_dict is no dict of weights by name"
    return None


def read_tree(path: str | Path) -> Tree:
    """The tree of the model in a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable checkpoint of this package.
    """
    tree: Tree = _read(path, "cpu", weights_only=True)["hyper_parameters"]
    return {name: node for name, node in tree.items() if name != "settings"}
