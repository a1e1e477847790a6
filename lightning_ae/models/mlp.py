"""The autoencoder made of two perceptrons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder, check_loss
from lightning_ae.networks import mlp_pair
from lightning_ae.networks.init import Activation, Norm
from lightning_ae.networks.mlp import InputTransform
from lightning_ae.networks.shapes import Shape, check_shape


class MLPAutoencoder(Autoencoder):
    r"""Perceptrons as encoder and decoder, mirror images of each other.

    Args:
        in_shape: shape of one example, flattened inside; a number is a flat vector.
        latent_dim: size of the latent.
        hidden: the encoder's hidden sizes; the decoder has them reversed.
        activation: name of the hidden activation; weights are drawn to suit it.
        norm: normalisation before each hidden activation: ``"batch"``, ``"layer"`` or None.
        latent_activation: name of an activation on the encoder's output.
        tied: whether the decoder uses the encoder's weights, transposed.
        bias_init: where the hidden biases start; 0.01 to 0.1 keeps ReLUs alive.
        input_transform: what the encoder does to its input first: ``"log1p"`` for counts.
        dropout: share of each hidden layer that is dropped in training, after its activation.
        loss: None for :class:`SquaredError`.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, *in_shape)``; ``z``: ``(B, latent_dim)``.

    Raises:
        ValueError: as :func:`mlp_pair`.

    Source: Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647.

    Example:
        >>> MLPAutoencoder((1, 8, 8), latent_dim=3, hidden=(32,)).decoder.out_shape
        (1, 8, 8)
    """

    def __init__(
        self,
        in_shape: Shape,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (256,),
        activation: Activation = "relu",
        norm: Norm | None = None,
        latent_activation: Activation = "identity",
        tied: bool = False,
        bias_init: float = 0.0,
        input_transform: InputTransform = "identity",
        dropout: float = 0.0,
        loss: ReconstructionLoss | None = None,
        **kwargs: Any,
    ) -> None:
        loss = check_loss(loss)
        encoder, decoder = mlp_pair(
            in_shape,
            latent_dim,
            hidden,
            activation,
            norm,
            out_shape=loss.params_shape(check_shape(in_shape)),
            latent_activation=latent_activation,
            bias_init=bias_init,
            input_transform=input_transform,
            tied=tied,
            dropout=dropout,
        )
        super().__init__(encoder, decoder, loss, **kwargs)
