"""Convolutional encoder and decoder for signals, images and volumes of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_ae.checks import check_finite, check_flag, check_whole
from lightning_ae.networks.init import (
    OUTPUT_SCALE,
    SPREAD_SCALE,
    Activation,
    Norm,
    check_activation,
    initialise,
    make_activation,
    make_dropout,
    make_norm,
)
from lightning_ae.networks.shapes import check_input, check_shape, check_sizes
from lightning_ae.rebuildable import Rebuildable

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _check(
    shape: Sequence[int], channels: Sequence[int], kernel_size: int, name: str
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    sizes = check_shape(shape, name)
    if len(sizes) not in (2, 3, 4):
        raise ValueError(f"{name}: expected (channels, *spatial) with 1 to 3 spatial dimensions, got {sizes}.")
    kernel_size = check_whole("kernel_size", kernel_size, least=0)
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number >= 3, got {kernel_size}.")
    channels = check_sizes("channels", channels)
    if not channels:
        raise ValueError("channels: expected at least one number, got none.")
    return sizes, channels, kernel_size


def _halvings(spatial: tuple[int, ...], times: int) -> list[tuple[int, ...]]:
    """Sizes after 0, 1, … strided convolutions; each gives ⌈n/2⌉."""
    sizes = [spatial]
    for _ in range(times):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes


class ConvEncoder(Rebuildable, nn.Module):
    r"""Strided convolutions, each halving the size (rounded up), then a linear layer to the latent.

    Args:
        in_shape: ``(channels, *spatial)`` of one example, with 1 to 3 spatial dimensions of any size.
        latent_dim: size of ``h``; its channels if it is a map.
        channels: output channels of each convolution; as many as the size is halved.
        kernel_size: odd, at least 3.
        activation: name of the activation; weights are drawn to suit it.
        norm: normalisation before each activation: ``"batch"``, ``"layer"`` or None.
        bias_init: where the convolutions' biases start; 0.01 to 0.1 keeps ReLUs alive.
        spatial: give a map, by a 1×1 convolution in place of the linear layer: a vector for each place.
        dropout: share of the channels of each layer that is dropped in training, after its activation.

    Shapes:
        ``(B, *in_shape)`` to ``(B, latent_dim)``, or ``(B, latent_dim, *spatial)`` with each size halved as often as
        there are ``channels``.

    Raises:
        ValueError: for sizes that are not positive, an even kernel, unknown names, or a batch of another shape.

    Source: Masci et al. 2011, https://doi.org/10.1007/978-3-642-21735-7_7.

    Example:
        >>> import torch
        >>> ConvEncoder((3, 17, 30), 5)(torch.zeros(2, 3, 17, 30)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        activation: Activation = "relu",
        norm: Norm | None = None,
        bias_init: float = 0.0,
        spatial: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_shape, channels, kernel_size = _check(in_shape, channels, kernel_size, "in_shape")
        latent_dim = check_whole("latent_dim", latent_dim)
        spatial, bias_init = check_flag("spatial", spatial), check_finite("bias_init", bias_init)
        check_activation("activation", activation)
        dims = len(self.in_shape) - 1
        layers: list[nn.Module] = []
        for size_in, size_out in zip([self.in_shape[0], *channels[:-1]], channels, strict=True):
            conv = _CONV[dims](size_in, size_out, kernel_size, stride=2, padding=kernel_size // 2)
            initialise(conv, activation, bias_init)
            layers += [
                conv,
                *make_norm(norm, size_out, dims),
                make_activation(activation),
                *make_dropout(dropout, dims),
            ]
        places = _halvings(self.in_shape[1:], len(channels))[-1]
        #: of ``h``, without the batch dimension
        self.h_shape = (latent_dim, *places) if spatial else (latent_dim,)
        if spatial:
            last: nn.Module = _CONV[dims](channels[-1], latent_dim, 1)
        else:
            layers.append(nn.Flatten())
            last = nn.Linear(channels[-1] * math.prod(places), latent_dim)
        initialise(last)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        check_input(x, self.in_shape, self)
        h: Tensor = self.layers(x)
        return h


class ConvDecoder(Rebuildable, nn.Module):
    r"""Mirror image of :class:`ConvEncoder`: a linear layer, then transposed convolutions up to ``out_shape`` exactly.

    A transposed convolution of stride 2 gives :math:`2n - 1` or :math:`2n` as its output padding is 0 or 1,
    so every size on the way down has its way up.

    Args:
        latent_dim: size of ``z``; its channels if it is a map.
        out_shape: ``(channels, *spatial)`` of the output, with 1 to 3 spatial dimensions of any size.
        channels: input channels of each transposed convolution; the encoder's, reversed.
        kernel_size: odd, at least 3.
        activation: name of the activation; weights are drawn to suit it. None follows the last convolution.
        norm: normalisation before each activation: ``"batch"``, ``"layer"`` or None.
        bias_init: where the hidden biases start.
        spatial: take a map, by a 1×1 convolution in place of the linear layer.
        dropout: share of the channels of each layer that is dropped in training, after its activation.

    Shapes:
        ``(B, latent_dim)``, or the map ``(B, *latent_shape)``, to ``(B, *out_shape)``.

    Raises:
        ValueError: for sizes that are not positive, an even kernel, or unknown names.

    Source: Dumoulin & Visin 2016, https://arxiv.org/abs/1603.07285, for the arithmetic.

    Example:
        >>> import torch
        >>> ConvDecoder(5, (3, 17, 30))(torch.zeros(2, 5)).shape
        torch.Size([2, 3, 17, 30])
    """

    def __init__(
        self,
        latent_dim: int,
        out_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        kernel_size: int = 3,
        activation: Activation = "relu",
        norm: Norm | None = None,
        bias_init: float = 0.0,
        spatial: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        latent_dim = check_whole("latent_dim", latent_dim)
        self.out_shape, channels, kernel_size = _check(out_shape, channels, kernel_size, "out_shape")
        spatial, bias_init = check_flag("spatial", spatial), check_finite("bias_init", bias_init)
        check_activation("activation", activation)
        dims = len(self.out_shape) - 1
        sizes = _halvings(self.out_shape[1:], len(channels))[::-1]
        #: of ``z``, without the batch dimension
        self.latent_shape = (latent_dim, *sizes[0]) if spatial else (latent_dim,)
        if spatial:
            layers: list[nn.Module] = [_CONV[dims](latent_dim, channels[0], 1)]
        else:
            first = nn.Linear(latent_dim, channels[0] * math.prod(sizes[0]))
            layers = [first, nn.Unflatten(1, (channels[0], *sizes[0]))]
        initialise(layers[0], activation, bias_init, scale=1.0 if spatial else SPREAD_SCALE)
        layers += [*make_norm(norm, channels[0], dims), make_activation(activation), *make_dropout(dropout, dims)]
        ends = [*channels[1:], self.out_shape[0]]
        for i, (size_in, size_out) in enumerate(zip(channels, ends, strict=True)):
            output_padding: Any = tuple(1 - n % 2 for n in sizes[i + 1])
            conv = _TRANSPOSED[dims](
                size_in, size_out, kernel_size, stride=2, padding=kernel_size // 2, output_padding=output_padding
            )
            layers.append(conv)
            if i < len(channels) - 1:
                initialise(conv, activation, bias_init)
                layers += [*make_norm(norm, size_out, dims), make_activation(activation), *make_dropout(dropout, dims)]
            else:
                initialise(conv, scale=OUTPUT_SCALE)
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Decode to pre-activations."""
        check_input(z, self.latent_shape, self, "z")
        out: Tensor = self.layers(z)
        return out
