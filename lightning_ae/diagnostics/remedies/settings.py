"""Remedies in the arguments and callbacks of the Trainer, and in the loader."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ae.diagnostics.remedies.base import Change, Options, Remedy, TrainerRemedy, add_callback
from lightning_ae.diagnostics.remedies.revival import DeadUnitReviver

#: What a loader keeps when its batches get another size, besides the sampler.
_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


@dataclass(frozen=True)
class ClipGradients(TrainerRemedy):
    """Clip the norm of the gradient.

    Args:
        norm: the largest norm that is left as it is.

    Source: Pascanu, Mikolov & Bengio 2013, https://arxiv.org/abs/1211.5063.

    Example:
        >>> options = {}
        >>> ClipGradients(0.5).apply(nn.Linear(1, 1), options).done, options
        (True, {'gradient_clip_val': 0.5})
    """

    norm: float = 1.0

    def describe(self) -> str:
        """The norm."""
        return f"Clip the gradient to a norm of {self.norm:g}."

    def options(self) -> dict[str, Any]:
        """``gradient_clip_val``."""
        return {"gradient_clip_val": self.norm}

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set the argument, where Lightning takes it and gradients are not clipped as low already."""
        if not getattr(model, "automatic_optimization", True):
            return Change(False, "the model optimizes by itself: self.clip_gradients(...) before its steps")
        options = {} if trainer_options is None else trainer_options
        by_norm = options.get("gradient_clip_algorithm") in (None, "norm")
        if by_norm and 0 < (options.get("gradient_clip_val") or math.inf) <= self.norm:
            return Change(False, f"gradients are clipped to a norm of {options['gradient_clip_val']:g} already")
        if not by_norm:
            options["gradient_clip_algorithm"] = "norm"
        return super().apply(model, trainer_options, data)


@dataclass(frozen=True)
class TrainLonger(Remedy):
    """Multiply the steps, or the epochs, of the Trainer.

    Args:
        factor: what to multiply by.

    Example:
        >>> options = {"max_steps": 100}
        >>> TrainLonger(4).apply(nn.Linear(1, 1), options).what, options
        ('max_steps = 400', {'max_steps': 400})
    """

    factor: int = 4

    def describe(self) -> str:
        """The factor."""
        return f"Train {self.factor} times as long."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Multiply what is limited."""
        options = {} if trainer_options is None else trainer_options
        limited = [name for name in ("max_steps", "max_epochs") if (options.get(name) or -1) > 0]
        for name in limited:
            options[name] = options[name] * self.factor
        if limited:
            return Change(True, ", ".join(f"{name} = {options[name]}" for name in limited))
        return Change(False, "give trainer_options with max_steps or max_epochs")

    def statements(self) -> list[str]:
        """A comment."""
        return [f"# {self.describe()} (max_epochs or max_steps of the Trainer)"]

    def config(self) -> dict[str, Any]:
        """Nothing: how long is not known here."""
        return {}


@dataclass(frozen=True)
class BatchSize(Remedy):
    """Make training batches of another size.

    Args:
        size: examples in a batch.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = {"train_dataloaders": DataLoader(TensorDataset(torch.zeros(64, 2)), batch_size=2)}
        >>> BatchSize(32).apply(nn.Linear(2, 1), {}, data).done, data["train_dataloaders"].batch_size
        (True, 32)
    """

    size: int = 32

    def describe(self) -> str:
        """The size."""
        return f"Use batches of {self.size} examples."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set ``batch_size`` of the data module or of its hyperparameters, or make the loader anew."""
        data = {} if data is None else data
        module, loader = data.get("datamodule"), data.get("train_dataloaders")
        if module is not None:
            return self._of_module(module)
        if type(loader) is not DataLoader or loader.batch_size is None:
            return Change(False, "the data are neither a data module with batch_size nor a plain DataLoader")
        if loader.batch_size == self.size:
            return Change(False, f"batches are of {self.size} examples already")
        kept: dict[str, Any] = {name: getattr(loader, name) for name in _KEPT}
        if not isinstance(loader.dataset, IterableDataset):
            kept["sampler"] = loader.sampler  # which shuffles, or does not
        data["train_dataloaders"] = DataLoader(loader.dataset, self.size, **kept)
        return Change(True, self.describe())

    def _of_module(self, module: L.LightningDataModule) -> Change:
        before = getattr(module, "batch_size", None), module.hparams.get("batch_size")
        if before == (None, None):
            return Change(False, "the data module has no batch_size, neither of its own nor in its hparams")
        if all(size in (None, self.size) for size in before):
            return Change(False, f"batches are of {self.size} examples already")
        if before[1] is not None:  # of this one alone: a copy shares them
            module._hparams = copy.deepcopy(module.hparams)
            module.hparams["batch_size"] = self.size
        if before[0] is not None:
            module.batch_size = self.size  # type: ignore[attr-defined]
        return Change(True, self.describe())

    def statements(self) -> list[str]:
        """A comment."""
        return [f"# {self.describe()} (batch_size of the loader, or of the data module)"]

    def config(self) -> dict[str, Any]:
        """An argument of the data module."""
        return {"data": {"init_args": {"batch_size": self.size}}}


@dataclass(frozen=True)
class StopEarly(Remedy):
    """End the run when a validation loss no longer falls.

    Args:
        monitor: the name under which it is logged.
        patience: validations without a new best.

    Source: Prechelt 1998, Early stopping — but when?

    Example:
        >>> options = {}
        >>> StopEarly("val_loss").apply(nn.Linear(1, 1), options).done, type(options["callbacks"][0]).__name__
        (True, 'EarlyStopping')
    """

    monitor: str
    patience: int = 3

    def describe(self) -> str:
        """Of what."""
        return f"Stop when {self.monitor} has not fallen for {self.patience} validations."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Add the callback."""
        if trainer_options is None:
            return Change(False, "it is a callback of the Trainer: give trainer_options")
        add_callback(trainer_options, EarlyStopping(self.monitor, patience=self.patience))
        return Change(True, self.describe())

    def statements(self) -> list[str]:
        """None: a callback does it."""
        return []

    def arguments(self) -> dict[str, Any]:
        """The callback."""
        return {"callbacks": [f"L.pytorch.callbacks.EarlyStopping({self.monitor!r}, patience={self.patience})"]}

    def config(self) -> dict[str, Any]:
        """The callback."""
        arguments = {"monitor": self.monitor, "patience": self.patience}
        return _callback("lightning.pytorch.callbacks.EarlyStopping", arguments)


@dataclass(frozen=True)
class ReviveUnits(Remedy):
    """Give dead units a new start after each validation, by :class:`lightning_ae.DeadUnitReviver`.

    Example:
        >>> options = {}
        >>> ReviveUnits().apply(nn.Linear(1, 1), options).done, type(options["callbacks"][0]).__name__
        (True, 'DeadUnitReviver')
    """

    def describe(self) -> str:
        """What it does."""
        return "Give units that never fire a new start after each validation."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Add the callback."""
        if trainer_options is None:
            return Change(False, "it is a callback of the Trainer: give trainer_options")
        add_callback(trainer_options, DeadUnitReviver())
        return Change(True, self.describe())

    def statements(self) -> list[str]:
        """None: a callback does it."""
        return []

    def arguments(self) -> dict[str, Any]:
        """The callback."""
        return {"callbacks": ["ae.DeadUnitReviver()"]}

    def config(self) -> dict[str, Any]:
        """The callback."""
        return _callback("lightning_ae.DeadUnitReviver", {})


def _callback(path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": path, "init_args": arguments}]}}
