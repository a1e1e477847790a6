"""The flow as others see it: what a forward pass gives, and what may be asked of the model that made it.

It knows no room, so that penalties, diagnostics and models may all speak of each other's boxes without importing them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import lightning as L
from torch import Tensor, nn


class AutoencoderOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        z: the latent, ``(B, *latent)``.
        params: the decoder's output, pre-activations ``(B, *loss.params_shape(event))``.
        penalties: raw terms that the code charges, each ``(B,)``.
        mask: true where a number of x is there, of its shape; None if all are.
    """

    z: Tensor
    params: Tensor
    penalties: dict[str, Tensor]
    mask: Tensor | None = None

    def detach(self) -> AutoencoderOutput:
        """The same, cut from the graph."""
        penalties = {name: value.detach() for name, value in self.penalties.items()}
        return AutoencoderOutput(self.z.detach(), self.params.detach(), penalties, self.mask)


class LossLike(Protocol):
    """What may be asked of a model's loss; :class:`lightning_ae.ReconstructionLoss` says what each answer means."""

    def __call__(self, params: Tensor, x: Tensor) -> Tensor:
        """Loss of each example, ``(B,)``."""

    def mean(self, params: Tensor) -> Tensor:
        """Reconstruction ``(B, *event)`` from the decoder's output."""

    def prediction(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What is compared with ``x``, of which a mask says what is there."""


class AutoencoderLike(Protocol):
    """What a penalty or a diagnostic cause may ask of a model; :class:`lightning_ae.Autoencoder` keeps it.

    Boxes are properties, as a variant may narrow the type of its own.
    """

    @property
    def encoder(self) -> nn.Module:
        """From ``(B, *event)`` to ``h``."""

    @property
    def decoder(self) -> nn.Module:
        """From ``z`` to pre-activations."""

    @property
    def code(self) -> nn.Module:
        """From ``h`` to ``z`` and what it charges."""

    @property
    def loss(self) -> LossLike:
        """Scores pre-activations against ``x``."""

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer; a ``RuntimeError`` where there is none."""

    def __call__(self, x: Tensor) -> AutoencoderOutput:
        """The forward pass, without corruption."""

    def encode(self, x: Tensor) -> Tensor:
        """The latent of clean data, without randomness."""

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction of a latent, output activation applied."""

    def get_input(self, batch: Any) -> Tensor:
        """``x`` of a batch."""

    def observed(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """``x`` with 0 where it is missing, and the mask of what is there; None if all is."""

    def terms(self, x: Tensor, output: AutoencoderOutput) -> dict[str, Tensor]:
        """Raw, unweighted terms by name."""

    def objective(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum, ``(B,)``."""
