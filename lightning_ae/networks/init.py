"""Activations and normalisations by name, and weights drawn so that signals keep their size through them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import nn

from lightning_ae.checks import check_one_of, check_share

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid", "identity"]

Norm = Literal["batch", "layer"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}

#: Of the weights of a decoder's last layer. A decoder that starts by saying next to nothing learns faster: held-out
#: squared error of 784-128-16-128-784 on MNIST after 100 / 300 / 1,200 batches is 22.5 / 18.1 / 15.5, with 1 it is
#: 33.4 / 22.5 / 17.5, and with torch's own initialisation 29.4 / 21.0 / 17.1 (`recipes/benchmarks/defaults.py`).
OUTPUT_SCALE = 0.1
#: Of the linear layer that spreads a latent over a convolutional decoder's maps: 28.8 / 16.9 / 11.2 (16, 32 channels);
#: with 1 and the last layer as above 32.4 / 20.7 / 14.7, and with torch's own initialisation 29.4 / 17.5 / 11.7.
SPREAD_SCALE = 0.2

_AVERAGED = {"tanh", "sigmoid", "softplus", "identity"}


def check_activation(argument: str, name: Activation) -> Activation:
    """The name, if there is an activation of it.

    Example:
        >>> check_activation("latent_activation", "tanh")
        'tanh'
    """
    return cast("Activation", check_one_of(argument, name, sorted(_ACTIVATIONS)))


def check_norm(name: Norm | None) -> Norm | None:
    """The name, if there is a normalisation of it, or None.

    Example:
        >>> check_norm("layer")
        'layer'
    """
    return check_one_of("norm", name, ("batch", "layer", None))


def make_activation(name: Activation) -> nn.Module:
    """A new module for an activation's name, one per place so that each can be watched on its own.

    Raises:
        ValueError: if there is no activation of this name.

    Example:
        >>> make_activation("relu")
        ReLU()
    """
    return _ACTIVATIONS[check_activation("activation", name)]()


def make_norm(name: Norm | None, channels: int, dims: int = 0) -> list[nn.Module]:
    """The normalisation before an activation, as a list of one module or none.

    Args:
        name: ``"batch"``; ``"layer"``, over all but the batch dimension; or None.
        channels: size of the second dimension of the data.
        dims: spatial dimensions behind it, 0 to 3.

    Raises:
        ValueError: if there is no normalisation of this name.

    Example:
        >>> [type(norm).__name__ for norm in make_norm("layer", 8, dims=2)]
        ['GroupNorm']
        >>> make_norm(None, 8)
        []
    """
    if check_norm(name) is None:
        return []
    if name == "batch":
        return [{0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels)]
    return [nn.GroupNorm(1, channels) if dims else nn.LayerNorm(channels)]


def make_dropout(p: float, dims: int = 0) -> list[nn.Module]:
    """Dropout after an activation, as a list of one module, or of none for 0: whole channels where there is space.

    Args:
        p: the share that is dropped in training, in [0, 1).
        dims: spatial dimensions of the data, 0 to 3.

    Raises:
        ValueError: if ``p`` is out of range.

    Source: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html; of channels Tompson et al. 2015,
    https://arxiv.org/abs/1411.4280.

    Example:
        >>> make_dropout(0.1, dims=2), make_dropout(0.0)
        ([Dropout2d(p=0.1, inplace=False)], [])
    """
    if not check_share("dropout", p, "[)"):
        return []
    return [{0: nn.Dropout, 1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}[dims](p)]


def initialise(layer: nn.Module, activation: Activation = "identity", bias: float = 0.0, *, scale: float = 1.0) -> None:
    r"""Draw the weights of a linear or convolutional layer to suit the activation after it, in place.

    For ReLU and its relatives Kaiming's :math:`\operatorname{Var} w = g^2/n_{in}` with :math:`g^2 = 2` (leaky:
    :math:`2/(1 + 0.01^2)`), which keeps :math:`E[y^2]` from layer to layer; for the others Glorot's
    :math:`\operatorname{Var} w = 2 g^2/(n_{in} + n_{out})` with :math:`g = 5/3` for tanh and 1 else. A transposed
    convolution of stride s reaches each output from only :math:`1/s` of its kernel per dimension, which counts here.

    Args:
        layer: has ``weight`` ``(out, in, *kernel)`` (transposed: ``(in, out, *kernel)``) and maybe ``bias``.
        activation: the name of the activation that follows.
        bias: value of all biases; a small positive one, 0.01 to 0.1, keeps ReLUs alive at the start.
        scale: times which the weights are taken.

    Source: He et al. 2015, https://arxiv.org/abs/1502.01852; Glorot & Bengio 2010,
    https://proceedings.mlr.press/v9/glorot10a.html.

    Example:
        >>> layer = nn.Linear(1000, 1000)
        >>> initialise(layer, "relu")
        >>> round(layer.weight.std().item() * 1000**0.5, 1)  # √2
        1.4
    """
    weight, stride = layer.get_parameter("weight"), cast("tuple[int, ...]", getattr(layer, "stride", ()))
    kernel = weight[0, 0].numel()
    fan_out, fan_in = float(weight.shape[0] * kernel), float(weight.shape[1] * kernel)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        fan_in, fan_out = fan_out / math.prod(stride), fan_in
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        fan_out /= math.prod(stride)
    if activation in _AVERAGED:
        std = nn.init.calculate_gain("tanh" if activation == "tanh" else "linear") * math.sqrt(2 / (fan_in + fan_out))
    else:
        std = nn.init.calculate_gain("leaky_relu" if activation == "leaky_relu" else "relu") / math.sqrt(fan_in)
    with torch.no_grad():
        weight.normal_(0.0, scale * std)
        if layer.bias is not None:
            layer.get_parameter("bias").fill_(bias)
