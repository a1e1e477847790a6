"""Strategies under which no device has whole parameters."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy


def shards_parameters(trainer: L.Trainer) -> bool:
    """Whether a device may hold a part of the parameters only: FSDP, ModelParallel, DeepSpeed.

    Example:
        >>> shards_parameters(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
        False
    """
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))
