"""Remedies in the optimizers, whoever configures them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_ae.diagnostics.remedies.apply import OptimizerRemedy
from lightning_ae.diagnostics.remedies.base import Change, Options, Remedy, note
from lightning_ae.models import Autoencoder

#: Where groups of an optimizer, and torch's schedules, keep learning rates; ``eps`` is the least change of one.
_RATES_OF_GROUP = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_RATES_OF_SCHEDULE = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "eta_min", "eps", "default_min_lr")
#: What schedules keep for each group.
_OF_EACH_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums")


def _configures_itself(model: nn.Module) -> bool:
    """Whether the optimizer is the one that models of ours make of ``lr`` and ``weight_decay``."""
    own = type(model).configure_optimizers if isinstance(model, Autoencoder) else None
    # LightningCLI puts the optimizer it is given into the instance
    return own is Autoencoder.configure_optimizers and "configure_optimizers" not in model.__dict__


def _unchanged(remedy: OptimizerRemedy, trainer: L.Trainer) -> list[torch.optim.Optimizer]:
    """Optimizers that a remedy has not changed yet, as one that is handed out for a second fit has been."""
    fresh = []
    for optimizer in trainer.optimizers:
        made = optimizer.__dict__.setdefault("_remedies_made", set())
        if repr(remedy) not in made:
            made.add(repr(remedy))
            fresh.append(optimizer)
    return fresh


def _schedules_of(optimizers: list[torch.optim.Optimizer], trainer: L.Trainer) -> Iterator[Any]:
    """The schedules of some optimizers, and those they are made of."""
    todo: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    while todo:
        schedule = todo.pop()
        todo += getattr(schedule, "_schedulers", ())
        if any(getattr(schedule, "optimizer", None) is optimizer for optimizer in optimizers):
            yield schedule


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_times(item, factor) for item in value)
    number = isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
    return value * factor if number else value


@dataclass(frozen=True)
class ScaleLearningRate(OptimizerRemedy):
    """Multiply the learning rates of all optimizers, those of torch's schedules included.

    Rates that the model itself writes into its optimizers while training stay as they are.

    Args:
        factor: what to multiply by.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> model = LinearAutoencoder(8, 2, lr=0.1)
        >>> ScaleLearningRate(0.1).apply(model).what
        'lr = 0.01'
    """

    factor: float

    def describe(self) -> str:
        """The factor."""
        return f"Multiply the learning rate by {self.factor:g}."

    def neighbours(self) -> tuple[Remedy, ...]:
        """Three times as much, and a third."""
        return tuple(ScaleLearningRate(float(f"{self.factor * by:.2g}")) for by in (3, 1 / 3))

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set ``lr`` of a model of ours; of others through the callback."""
        if isinstance(model, Autoencoder) and _configures_itself(model):
            model.lr = float(f"{model.lr * self.factor:.12g}")  # 0.1 times 0.1 is 0.01
            note(model, lr=model.lr)
            return Change(True, f"lr = {model.lr:g}")
        return super().apply(model, trainer_options, data)

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Multiply what groups and schedules hold."""
        changed = _unchanged(self, trainer)
        for optimizer in changed:
            for group in optimizer.param_groups:
                group.update({key: _times(group[key], self.factor) for key in _RATES_OF_GROUP if key in group})
        for schedule in _schedules_of(changed, trainer):
            for key in _RATES_OF_SCHEDULE:
                if hasattr(schedule, key):
                    setattr(schedule, key, _times(getattr(schedule, key), self.factor))


@dataclass(frozen=True)
class ScaleWeightDecay(OptimizerRemedy):
    """Multiply the weight decay of all optimizers.

    Args:
        factor: what to multiply by; 0 turns it off.

    Example:
        >>> ScaleWeightDecay(0.0).describe()
        'Turn weight decay off.'
    """

    factor: float = 0.0

    def describe(self) -> str:
        """The factor."""
        return "Turn weight decay off." if self.factor == 0 else f"Multiply the weight decay by {self.factor:g}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set ``weight_decay`` of a model of ours; of others through the callback."""
        if isinstance(model, Autoencoder) and _configures_itself(model):
            model.weight_decay = model.weight_decay * self.factor
            note(model, weight_decay=model.weight_decay)
            return Change(True, f"weight_decay = {model.weight_decay:g}")
        return super().apply(model, trainer_options, data)

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Multiply what groups hold."""
        for optimizer in _unchanged(self, trainer):
            for group in optimizer.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = group["weight_decay"] * self.factor


@dataclass(frozen=True)
class TrainForgotten(OptimizerRemedy):
    """Give parameters that are in no optimizer to the first one, with the settings of its first group.

    Example:
        >>> TrainForgotten().describe()
        'Give the parameters that are in no optimizer to the first one.'
    """

    def describe(self) -> str:
        """What it does."""
        return "Give the parameters that are in no optimizer to the first one."

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Add a group."""
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        left = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if not left or not trainer.optimizers:
            return
        optimizer = trainer.optimizers[0]
        first = optimizer.param_groups[0]
        settings = {name: _own(value) for name, value in first.items() if name not in ("params", "param_names")}
        optimizer.add_param_group({"params": left if "param_names" in first else [p for _, p in left], **settings})
        for schedule in _schedules_of([optimizer], trainer):
            for key in _OF_EACH_GROUP:
                settings_of = getattr(schedule, key, None)
                if isinstance(settings_of, list) and settings_of:
                    setattr(schedule, key, [*settings_of, _own(settings_of[0])])


def _own(value: Any) -> Any:
    """A tensor that no other group shares: schedules write into them."""
    return value.clone() if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class ZeroGradients(OptimizerRemedy):
    """Zero gradients before each step, though ``optimizer_zero_grad`` is overridden and does not.

    Example:
        >>> ZeroGradients().describe()
        'Zero the gradients before each step.'
    """

    def describe(self) -> str:
        """What it does."""
        return "Zero the gradients before each step."

    def on_before_zero_grad(self, model: L.LightningModule, optimizer: Any) -> None:
        """Zero them."""
        optimizer.zero_grad()


@dataclass(frozen=True)
class UseAdam(OptimizerRemedy):
    """Put Adam in the place of each optimizer, with the same groups of parameters.

    Args:
        lr: learning rate of all groups.

    Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980.

    Example:
        >>> UseAdam(1e-3).describe()
        'Train with Adam and a learning rate of 0.001.'
    """

    lr: float = 1e-3

    def describe(self) -> str:
        """The learning rate."""
        return f"Train with Adam and a learning rate of {self.lr:g}."

    def neighbours(self) -> tuple[Remedy, ...]:
        """Three times the learning rate, and a third."""
        return tuple(UseAdam(float(f"{self.lr * by:.2g}")) for by in (3, 1 / 3))

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Exchange the optimizers; schedules are bound to the old ones and end."""
        trainer.strategy.optimizers = [
            torch.optim.Adam([{"params": group["params"]} for group in optimizer.param_groups], lr=self.lr)
            for optimizer in trainer.optimizers
        ]
        if model.automatic_optimization:  # else the model asks for them, and steps what has no effect any more
            trainer.strategy.lr_scheduler_configs = []
