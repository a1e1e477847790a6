"""What every penalty promises: a raw term and its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_ae.checkpoint import Rebuildable

if TYPE_CHECKING:
    from lightning_ae.models.base import Autoencoder, AutoencoderOutput


class Penalty(Rebuildable, nn.Module, ABC):
    """Base of all penalties: a raw term, and the weight with which it enters the objective.

    Args:
        weight: a number; a schedule may change it while training.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, x: Tensor, output: AutoencoderOutput, model: Autoencoder) -> Tensor:
        """The raw term, ``(B,)`` or without dimensions, for clean data ``x`` and what the model made of it."""

    def on_fit_start(self, model: Autoencoder) -> None:
        """Called once when training starts, with the Trainer attached."""
