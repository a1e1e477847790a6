"""The convolutional autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder, check_loss
from lightning_ae.networks import conv_pair
from lightning_ae.networks.init import Activation, Norm
from lightning_ae.networks.shapes import check_shape


class ConvAutoencoder(Autoencoder):
    r"""Strided convolutions down to a flat latent, transposed convolutions back to the same size exactly.

    Args:
        in_shape: ``(channels, *spatial)`` of one example, with 1 to 3 spatial dimensions of any size.
        latent_dim: size of the latent.
        channels: the encoder's channels, one for each halving of the size; the decoder has them reversed.
        kernel_size: odd, at least 3.
        activation: name of the activation; weights are drawn to suit it.
        norm: normalisation before each activation: ``"batch"``, ``"layer"`` or None.
        bias_init: where the hidden biases start; 0.01 to 0.1 keeps ReLUs alive.
        dropout: share of each hidden layer that is dropped in training, after its activation; of whole channels.
        loss: None for :class:`SquaredError`.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, *in_shape)``; ``z``: ``(B, latent_dim)``.

    Raises:
        ValueError: as :func:`conv_pair`.

    Source: Masci et al. 2011, https://doi.org/10.1007/978-3-642-21735-7_7.

    Example:
        >>> import torch
        >>> model = ConvAutoencoder((3, 17, 30), latent_dim=5)
        >>> model.reconstruct(torch.zeros(2, 3, 17, 30)).shape
        torch.Size([2, 3, 17, 30])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        latent_dim: int,
        *,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        activation: Activation = "relu",
        norm: Norm | None = None,
        bias_init: float = 0.0,
        dropout: float = 0.0,
        loss: ReconstructionLoss | None = None,
        **kwargs: Any,
    ) -> None:
        loss = check_loss(loss)
        encoder, decoder = conv_pair(
            in_shape,
            latent_dim,
            channels,
            kernel_size,
            activation,
            norm,
            out_shape=loss.params_shape(check_shape(in_shape)),
            bias_init=bias_init,
            dropout=dropout,
        )
        super().__init__(encoder, decoder, loss, **kwargs)
