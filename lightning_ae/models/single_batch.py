"""Batch normalisation and an epoch whose last batch is a single example, of which there is no variance."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def refuse_single_last_batch(trainer: L.Trainer, model: nn.Module) -> list[RemovableHandle]:
    """Let the first training step raise if batch normalisation will fail on the epoch's last batch.

    Args:
        trainer: whose epoch it is.
        model: its layers of batch normalisation are asked in the step which of them see one number for each example.

    Returns:
        Hooks to be removed after the step; none if the last batch is larger, or not known.
    """
    if trainer.num_training_batches != _length(trainer.train_dataloader) or _last(trainer.train_dataloader) != 1:
        return []
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [layer.register_forward_pre_hook(_refuse) for layer in layers]


def _refuse(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = inputs[0]
    if layer.training and isinstance(x, Tensor) and math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"batch_size: the last batch of an epoch is a single example, of which a {type(layer).__name__} "
            "(norm='batch') has no variance: leave it out with drop_last=True, or choose another batch_size."
        )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # of a stream
        return None


def _last(loader: Any) -> int | None:
    """Examples in the last batch of a loader of ours or of torch's; None if it does not say."""
    order: Any = getattr(loader, "batch_sampler", None)
    if hasattr(order, "span"):
        span = order.span(len(order) - 1)
        return int(span.stop - span.start)
    size: int | None = getattr(loader, "batch_size", None)
    rows = _length(getattr(loader, "sampler", None))
    if not size or rows is None or getattr(loader, "drop_last", True):
        return None
    return rows % size or size
