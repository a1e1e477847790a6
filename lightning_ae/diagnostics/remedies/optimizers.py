"""Remedies in the optimizers, whoever configures them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_ae.diagnostics.remedies.apply import OptimizerRemedy
from lightning_ae.diagnostics.remedies.base import Change, Options
from lightning_ae.models import Autoencoder


def _configures_itself(model: nn.Module) -> bool:
    """Whether the optimizer is the one that models of ours make of ``lr`` and ``weight_decay``."""
    return isinstance(model, Autoencoder) and type(model).configure_optimizers is Autoencoder.configure_optimizers


@dataclass(frozen=True)
class ScaleLearningRate(OptimizerRemedy):
    """Multiply the learning rates of all optimizers, those of a schedule included.

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

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set ``lr`` of a model of ours; of others through the callback."""
        if isinstance(model, Autoencoder) and _configures_itself(model):
            model.lr = float(f"{model.lr * self.factor:.6g}")
            return Change(True, f"lr = {model.lr:g}")
        return super().apply(model, trainer_options, data)

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Multiply what groups and schedules hold."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if isinstance(group.get(key), (float, torch.Tensor)):
                        group[key] = group[key] * self.factor
        for config in trainer.lr_scheduler_configs:
            for key in ("base_lrs", "_last_lr", "min_lrs", "max_lrs"):
                rates = getattr(config.scheduler, key, None)
                if isinstance(rates, list):
                    setattr(config.scheduler, key, [rate * self.factor for rate in rates])


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
            return Change(True, f"weight_decay = {model.weight_decay:g}")
        return super().apply(model, trainer_options, data)

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Multiply what groups hold."""
        for optimizer in trainer.optimizers:
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
        left = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
        if left and trainer.optimizers:
            optimizer = trainer.optimizers[0]
            optimizer.add_param_group({"params": left, **_settings(optimizer.param_groups[0])})
            for config in trainer.lr_scheduler_configs:
                rates = getattr(config.scheduler, "base_lrs", None)
                if config.scheduler.optimizer is optimizer and isinstance(rates, list):
                    config.scheduler.base_lrs = [*rates, rates[0]]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


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

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Exchange the optimizers; schedules are bound to the old ones and end."""
        trainer.strategy.optimizers = [
            torch.optim.Adam([{"params": group["params"]} for group in optimizer.param_groups], lr=self.lr)
            for optimizer in trainer.optimizers
        ]
        trainer.strategy.lr_scheduler_configs = []
