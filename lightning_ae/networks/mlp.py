"""Multi-layer perceptrons as encoder and decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lightning_ae.checks import check_finite, check_one_of, check_type, check_whole
from lightning_ae.networks.init import (
    OUTPUT_SCALE,
    Activation,
    Norm,
    check_activation,
    check_norm,
    initialise,
    make_activation,
    make_dropout,
    make_norm,
)
from lightning_ae.networks.linear import TiedLinear
from lightning_ae.networks.shapes import Shape, check_input, check_shape, check_sizes
from lightning_ae.rebuildable import Rebuildable

InputTransform = Literal["identity", "log1p"]


class MLPEncoder(Rebuildable, nn.Module):
    r"""Perceptron :math:`h = \psi(W_n\,\varphi(\dots\varphi(W_1 x + b_1)\dots) + b_n)` on the flattened input.

    Args:
        in_shape: shape of one example; a number is a flat vector.
        latent_dim: size of ``h``.
        hidden: sizes of the hidden layers, in order; empty for one layer.
        activation: name of :math:`\varphi`; weights are drawn to suit it.
        norm: normalisation before each hidden activation: ``"batch"``, ``"layer"`` or None.
        latent_activation: name of :math:`\psi` on the output, e.g. ``"sigmoid"`` for the textbook's contractive code.
        bias_init: where the hidden biases start; 0.01 to 0.1 keeps ReLUs alive.
        input_transform: ``"log1p"`` reads :math:`\ln(1 + x)`, which keeps counts of any size within reach.
        dropout: share of each hidden layer that is dropped in training, after its activation.

    Shapes:
        ``(B, *in_shape)`` to ``(B, latent_dim)``.

    Raises:
        ValueError: for sizes that are not positive, unknown names, or a batch of another shape.

    Source: Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647.

    Example:
        >>> import torch
        >>> MLPEncoder((1, 8, 8), 3, hidden=(16,))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_shape: Shape,
        latent_dim: int,
        hidden: Sequence[int] = (256,),
        activation: Activation = "relu",
        norm: Norm | None = None,
        latent_activation: Activation = "identity",
        bias_init: float = 0.0,
        input_transform: InputTransform = "identity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_shape = check_shape(in_shape)
        self.input_transform = check_one_of("input_transform", input_transform, ("identity", "log1p"))
        latent_dim, bias_init = check_whole("latent_dim", latent_dim), check_finite("bias_init", bias_init)
        check_activation("activation", activation)
        check_activation("latent_activation", latent_activation)
        check_norm(norm)
        make_dropout(dropout)
        sizes = [math.prod(self.in_shape), *check_sizes("hidden", hidden)]
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            linear = nn.Linear(size_in, size_out)
            initialise(linear, activation, bias_init)
            layers += [linear, *make_norm(norm, size_out), make_activation(activation), *make_dropout(dropout)]
        #: of ``h``, without the batch dimension
        self.h_shape = (latent_dim,)
        last = nn.Linear(sizes[-1], latent_dim)
        initialise(last, latent_activation)
        layers.append(last)
        if latent_activation != "identity":
            layers.append(make_activation(latent_activation))
        self.layers = nn.Sequential(*layers)

    def linears(self) -> list[nn.Linear]:
        """The linear layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        check_input(x, self.in_shape, self)
        if self.input_transform == "log1p":
            x = x.log1p()
        h: Tensor = self.layers(x.flatten(1))
        return h


class MLPDecoder(Rebuildable, nn.Module):
    r"""Perceptron from the latent to pre-activations in the shape of the data; ends in a linear layer.

    Args:
        latent_dim: size of ``z``.
        out_shape: shape of one example of the output; a number is a flat vector.
        hidden: sizes of the hidden layers, in order from the latent; tied: those of the encoder, reversed.
        activation: name of the activation; weights are drawn to suit it.
        norm: normalisation before each hidden activation: ``"batch"``, ``"layer"`` or None.
        bias_init: where the hidden biases start.
        tied_to: the encoder whose weights are shared, each layer's the transpose of its mirror image; biases are own.
        dropout: share of each hidden layer that is dropped in training, after its activation.

    Shapes:
        ``(B, latent_dim)`` to ``(B, *out_shape)``.

    Raises:
        ValueError: for sizes that are not positive, unknown names, or sizes that are not the mirror image of the
            encoder it is tied to.

    Source: Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647.

    Example:
        >>> import torch
        >>> MLPDecoder(3, (1, 8, 8), hidden=(16,))(torch.zeros(2, 3)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        out_shape: Shape,
        hidden: Sequence[int] = (256,),
        activation: Activation = "relu",
        norm: Norm | None = None,
        bias_init: float = 0.0,
        tied_to: MLPEncoder | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        #: of ``z``, without the batch dimension
        self.latent_shape = (check_whole("latent_dim", latent_dim),)
        self.out_shape = check_shape(out_shape, "out_shape")
        bias_init = check_finite("bias_init", bias_init)
        check_activation("activation", activation)
        check_norm(norm)
        make_dropout(dropout)
        check_type("tied_to", tied_to, MLPEncoder, None)
        sizes = [*self.latent_shape, *check_sizes("hidden", hidden), math.prod(self.out_shape)]
        linears: list[nn.Module]
        if tied_to is None:
            linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
            for linear in linears[:-1]:
                initialise(linear, activation, bias_init)
            initialise(linears[-1], scale=OUTPUT_SCALE)
        else:
            sources = tied_to.linears()[::-1]
            theirs = [sources[0].out_features, *(source.in_features for source in sources)]
            if theirs != sizes:
                raise ValueError(f"tied_to: its mirror image has sizes {theirs}, but this decoder has {sizes}.")
            linears = [TiedLinear(source) for source in sources]
            for linear in linears[:-1]:
                nn.init.constant_(linear.get_parameter("bias"), bias_init)
        layers: list[nn.Module] = []
        for linear, size in zip(linears[:-1], sizes[1:-1], strict=True):
            layers += [linear, *make_norm(norm, size), make_activation(activation), *make_dropout(dropout)]
        self.layers = nn.Sequential(*layers, linears[-1])

    def forward(self, z: Tensor) -> Tensor:
        """Decode to pre-activations."""
        check_input(z, self.latent_shape, self, "z")
        out: Tensor = self.layers(z)
        return out.reshape(-1, *self.out_shape)
