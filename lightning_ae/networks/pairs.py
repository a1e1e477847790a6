"""An encoder and the decoder that is its mirror image, in one call."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ae.checks import check_flag, check_whole
from lightning_ae.networks.conv import ConvDecoder, ConvEncoder
from lightning_ae.networks.init import Activation, Norm
from lightning_ae.networks.mlp import InputTransform, MLPDecoder, MLPEncoder
from lightning_ae.networks.shapes import Shape, check_shape, check_sizes


def mlp_pair(
    in_shape: Shape,
    latent_dim: int,
    hidden: Sequence[int] = (256,),
    activation: Activation = "relu",
    norm: Norm | None = None,
    *,
    out_shape: Shape | None = None,
    h_dim: int | None = None,
    latent_activation: Activation = "identity",
    bias_init: float = 0.0,
    input_transform: InputTransform = "identity",
    tied: bool = False,
    dropout: float = 0.0,
) -> tuple[MLPEncoder, MLPDecoder]:
    """Two perceptrons with mirrored hidden layers.

    Args:
        in_shape: shape of one example; a number is a flat vector.
        latent_dim: size of the latent.
        hidden: the encoder's hidden sizes; the decoder has them reversed.
        activation: name of the hidden activation.
        norm: ``"batch"``, ``"layer"`` or None.
        out_shape: shape that the decoder gives, if it is not ``in_shape``: see ``loss.params_shape(in_shape)``.
        h_dim: size that the encoder gives, if it is not ``latent_dim``: mean and log-variance, ``2 * latent_dim``, for
            a :class:`lightning_ae.GaussianCode`.
        latent_activation: name of an activation on the encoder's output.
        bias_init: where the hidden biases start.
        input_transform: what the encoder does to its input first: ``"log1p"`` for counts.
        tied: whether the decoder uses the encoder's weights, transposed.
        dropout: share of each hidden layer that is dropped in training, after its activation.

    Returns:
        The encoder, ``(B, *in_shape)`` to ``(B, h_dim)``, and the decoder from ``(B, latent_dim)`` back to
        ``(B, *out_shape)``.

    Raises:
        ValueError: as :class:`MLPEncoder` and :class:`MLPDecoder`.

    Example:
        >>> encoder, decoder = mlp_pair(64, 3, hidden=(32, 16), tied=True)
        >>> decoder.layers[0].weight is encoder.linears()[-1].weight
        True
    """
    h_dim = check_whole("latent_dim", latent_dim) if h_dim is None else check_whole("h_dim", h_dim)
    hidden = check_sizes("hidden", hidden)
    encoder = MLPEncoder(
        in_shape, h_dim, hidden, activation, norm, latent_activation, bias_init, input_transform, dropout
    )
    out_shape = in_shape if out_shape is None else check_shape(out_shape, "out_shape")
    tied_to = encoder if check_flag("tied", tied) else None
    return encoder, MLPDecoder(latent_dim, out_shape, hidden[::-1], activation, norm, bias_init, tied_to, dropout)


def conv_pair(
    in_shape: Sequence[int],
    latent_dim: int,
    channels: Sequence[int] = (32, 64),
    kernel_size: int = 3,
    activation: Activation = "relu",
    norm: Norm | None = None,
    *,
    out_shape: Sequence[int] | None = None,
    h_dim: int | None = None,
    bias_init: float = 0.0,
    spatial: bool = False,
    dropout: float = 0.0,
) -> tuple[ConvEncoder, ConvDecoder]:
    """Two convolutional networks with mirrored channels.

    Args:
        in_shape: ``(channels, *spatial)`` of one example.
        latent_dim: size of the latent; its channels if it is a map.
        channels: the encoder's channels; the decoder has them reversed.
        kernel_size: odd, at least 3.
        activation: name of the activation.
        norm: ``"batch"``, ``"layer"`` or None.
        out_shape: shape that the decoder gives, if it is not ``in_shape``: see ``loss.params_shape(in_shape)``.
        h_dim: size that the encoder gives, if it is not ``latent_dim``: mean and log-variance, ``2 * latent_dim``, for
            a :class:`lightning_ae.GaussianCode`.
        bias_init: where the hidden biases start.
        spatial: make the latent a map of ``latent_dim`` channels, its sizes halved as often as there are ``channels``.
        dropout: share of the channels of each layer that is dropped in training, after its activation.

    Returns:
        The encoder, ``(B, *in_shape)`` to ``(B, h_dim)``, and the decoder from ``(B, latent_dim)`` back to
        ``(B, *out_shape)``; maps have their sizes after ``h_dim`` and ``latent_dim``.

    Raises:
        ValueError: as :class:`ConvEncoder` and :class:`ConvDecoder`.

    Example:
        >>> encoder, decoder = conv_pair((1, 28, 28), 16)
        >>> decoder.out_shape
        (1, 28, 28)
        >>> conv_pair((1, 28, 28), 16, spatial=True)[1].latent_shape
        (16, 7, 7)
    """
    out_shape = in_shape if out_shape is None else out_shape
    h_dim = check_whole("latent_dim", latent_dim) if h_dim is None else check_whole("h_dim", h_dim)
    channels = check_sizes("channels", channels)
    encoder = ConvEncoder(in_shape, h_dim, channels, kernel_size, activation, norm, bias_init, spatial, dropout)
    return encoder, ConvDecoder(
        latent_dim, out_shape, channels[::-1], kernel_size, activation, norm, bias_init, spatial, dropout
    )
