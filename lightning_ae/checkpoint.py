"""Checkpoints that rebuild themselves: reading a file, building the model it describes, loading the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor

from lightning_ae.rebuildable import Tree, class_path, rebuild, resolve
from lightning_ae.settings import restore_settings, settings

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
    return _restore(checkpoint, cls, trusted=trusted, strict=strict, given=given)


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
    return _restore(checkpoint, cls, trusted=trusted, strict=strict, given=given)


def _restore(
    checkpoint: dict[str, Any],
    cls: type[M] | None,
    *,
    trusted: Iterable[str],
    strict: bool,
    given: Mapping[str, Any],
) -> M:
    tree = checkpoint["hyper_parameters"]
    model: M = rebuild(tree, cls=cls, trusted=trusted, given=given)
    changed = tree.get("settings", {})
    plain = {name for name, value in given.items() if type(value) in (bool, int, float)}
    if plain and changed:  # arguments that are passed again count for more than what was set under the old ones
        others = {name: value for name, value in given.items() if name not in plain}
        before = settings(rebuild(tree, cls=cls, trusted=trusted, given=others))
        changed = {
            path: {n: v for n, v in numbers.items() if v != before.get(path, {}).get(n) and (path or n not in plain)}
            for path, numbers in changed.items()
        }
    restore_settings(model, changed)
    model.on_load_checkpoint(checkpoint)
    _widen(model, checkpoint["state_dict"])
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    tensors = [value for value in checkpoint["state_dict"].values() if isinstance(value, Tensor)]
    return model.to(tensors[0].device) if tensors else model


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
    if "class_path" not in checkpoint.get("hyper_parameters", {}) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a lightning_ae model: it does not say which class to build.")
    return checkpoint


def read_tree(path: str | Path) -> Tree:
    """The tree of the model in a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable checkpoint of this package.
    """
    tree: Tree = _read(path, "cpu", weights_only=True)["hyper_parameters"]
    return {name: node for name, node in tree.items() if name != "settings"}
