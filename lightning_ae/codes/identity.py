"""What every code promises, and the code that changes nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_ae.codes.ranks import Ranks
from lightning_ae.rebuildable import Rebuildable


class CodeOutput(NamedTuple):
    """What a code gives: the latent, and what it charges for it.

    Attributes:
        z: the latent, ``(B, *latent)``, that the decoder reads.
        penalties: raw terms by name, each ``(B,)``; :meth:`Code.weights` says how they enter the objective.
    """

    z: Tensor
    penalties: dict[str, Tensor]


class Code(Rebuildable, nn.Module, ABC):
    r"""Base of all codes: turns the encoder's output ``h`` into the latent ``z`` and may charge for it.

    A code and its penalty cannot be separated (posterior and KL, codebook and commitment), so they are one object.
    """

    #: Whether a Trainer's loop calls :meth:`after_step` at present.
    managed: bool = False

    def __init__(self) -> None:
        super().__init__()

    def __getstate__(self) -> dict[str, Any]:
        # no Trainer looks after a copy
        return {name: value for name, value in vars(self).items() if name != "managed"}

    @abstractmethod
    def forward(self, h: Tensor) -> CodeOutput:
        """Latent and penalties of a batch; may be stochastic in training."""

    def encode(self, h: Tensor) -> Tensor:
        """The deterministic latent of ``h`` (the posterior's mean, for a distribution)."""
        output: CodeOutput = self(h)
        return output.z

    def weights(self) -> Mapping[str, float | Tensor]:
        """Weight of each penalty in the objective, read at every step so that it may change while training."""
        return {}

    def auxiliary(self, score: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Further penalties of the latest forward pass, ``(B,)`` each: those that need a decoder.

        Args:
            score: the reconstruction loss ``(B,)`` of a latent when it is decoded with the decoder's weights frozen.
        """
        return {}

    def per_latent(self) -> list[nn.Parameter]:
        """Parameters ``(D,)`` with a number for each latent that is 0 at the start, and again when it starts anew."""
        return []

    def start_from(self, h: Tensor, known: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take from data what starts there, such as thresholds; called before the first step, by few models.

        Args:
            h: the encoder's output for the first training rows, ``(B, *h_shape)``.
            known: whether training began before, without dimensions; then nothing changes.
            reduce: averages a tensor over the ranks.
        """

    def rescale(self, factor: Tensor) -> None:
        """Turn ``code(h)`` into ``factor * code(h / factor)``, in place.

        Args:
            factor: a positive number, without dimensions.

        Raises:
            ValueError: if the code has no such form.
        """
        raise ValueError(f"code: expected one that can be scaled, got {type(self).__name__}, which cannot.")

    def h_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape that the encoder must give for a latent of this shape (both without the batch dimension)."""
        return tuple(latent_shape)

    def after_step(self, ranks: Ranks) -> None:
        """Take up what the forward passes since the last call have left, outside of what is compiled.

        Called by the Trainer's loop after each optimizer step, so once for all batches that were accumulated. In a loop
        of your own (:attr:`managed` is False) codes do it themselves in the next forward pass, unless it is compiled.

        Args:
            ranks: the processes that train together.
        """

    def statistics(self, h: Tensor) -> dict[str, Tensor]:
        """What :class:`lightning_ae.LatentSparsityMonitor` looks at beside ``z``, for the encoder's output ``h``.

        Any of ``"mean"`` and ``"log_variance"``, ``(B, D)``, of a Gaussian posterior, or ``"kl"``, ``(B, D)`` in nats;
        of a quantised code ``"indices"``, whole numbers ``(B, ...)``, and ``"num_codes"``, without dimensions.
        """
        return {}


class Identity(Code):
    """The plain autoencoder's code: ``z = h``, free of charge.

    Shapes:
        ``h`` and ``z``: ``(B, *latent)``.

    Example:
        >>> import torch
        >>> Identity()(torch.ones(1, 2)).z
        tensor([[1., 1.]])
    """

    def forward(self, h: Tensor) -> CodeOutput:
        """Pass ``h`` on."""
        return CodeOutput(h, {})

    def rescale(self, factor: Tensor) -> None:
        """Nothing to do."""
