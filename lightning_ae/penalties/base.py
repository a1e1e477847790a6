"""What every penalty promises: a raw term and its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import check_finite
from lightning_ae.rebuildable import KeepsAttributes, Rebuildable


class Penalty(Rebuildable, KeepsAttributes, nn.Module, ABC):
    """Base of all penalties: a raw term, and the weight with which it enters the objective.

    Args:
        weight: a number; a schedule may change it while training, and checkpoints keep it as it is then.
    """

    kept = ("weight",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_finite("weight", weight)

    @abstractmethod
    def forward(self, x: Tensor, output: AutoencoderOutput, model: AutoencoderLike) -> Tensor:
        """The raw term, ``(B,)`` or without dimensions, for clean data ``x`` and what the model made of it."""

    def on_train_start(self, model: AutoencoderLike) -> None:
        """Called when training starts, with the Trainer attached and its data loaded."""


def refuse_sharding(penalty: Penalty, model: AutoencoderLike) -> None:
    """A clear error for a penalty on weights where each rank holds only a part of them."""
    if isinstance(model.trainer.strategy, FSDPStrategy):
        raise ValueError(f"{type(penalty).__name__}: cannot see whole weights under FSDP; use DDP.")
