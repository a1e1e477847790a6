"""Activation functions as torch calls them: which there are, where they are flat, their slope as autograd sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

#: From pre-activation (None if it was overwritten), output and the call's options to the slope φ'.
Slope = Callable[[Tensor | None, Tensor, dict[str, Any]], Tensor | None]


class Activation(NamedTuple):
    """One activation function.

    Attributes:
        name: as in :mod:`torch.nn.functional`.
        slope: its derivative, taken from the output where autograd does so: in half precision y(1 − y) of a sigmoid is
            exactly 0 near |z| = 10, and that is what training sees. None where it is not known.
        options: names of the arguments after the input, in order, with their defaults.
        live: the open interval of outputs in which the unit has a slope; None if it has no hard zero.
    """

    name: str
    slope: Slope | None
    options: tuple[tuple[str, Any], ...] = ()
    live: tuple[float, float] | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options of a call."""
        options = dict(self.options)
        options.update(zip(options, args[1:], strict=False))
        options.update({name: value for name, value in kwargs.items() if name in options})
        return options

    def interval(self, options: dict[str, Any]) -> tuple[float, float] | None:
        """Where the output of this call has a slope."""
        if self.name == "hardtanh":
            return float(options["min_val"]), float(options["max_val"])
        return self.live


def _where(condition: Tensor, inside: float | Tensor, outside: float | Tensor, like: Tensor) -> Tensor:
    # numbers as they are: made into tensors they would have to be copied to the device
    chosen = torch.where(condition, inside, outside)
    return chosen.to(like.dtype)


def _relu(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return y.gt(0).to(y.dtype)


def _hardtanh(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return (y.gt(options["min_val"]) & y.lt(options["max_val"])).to(y.dtype)


def _relu6(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return (y.gt(0) & y.lt(6)).to(y.dtype)


def _leaky_relu(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    # from the input where it is there: a negative slope turns the sign of the output
    return _where((y if z is None else z).gt(0), 1.0, options["negative_slope"], y)


def _elu(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return _where(y.gt(0), 1.0, y + options["alpha"], y)


def _selu(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return _where(y.gt(0), scale, y + scale * alpha, y)


def _celu(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return _where(y.gt(0), 1.0, y / options["alpha"] + 1, y)


def _sigmoid(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return y * (1 - y)


def _tanh(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return 1 - y * y


def _gelu(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor | None:
    if z is None:
        return None
    if options["approximate"] == "tanh":
        k = math.sqrt(2 / math.pi)
        t = torch.tanh(k * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _silu(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor | None:
    if z is None:
        return None
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _mish(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor | None:
    if z is None:
        return None
    t = torch.tanh(functional.softplus(z))
    return t + z * (1 - t * t) * torch.sigmoid(z)


def _softplus(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    # the identity beyond the threshold, as torch computes it
    beyond = (options["beta"] * (y if z is None else z)).gt(options["threshold"])
    return _where(beyond, 1.0, 1 - torch.exp(-options["beta"] * y), y)


def _log_sigmoid(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return 1 - torch.exp(y)


def _softsign(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return (1 - y.abs()).square()


def _hardsigmoid(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor:
    return (y.gt(0) & y.lt(1)).to(y.dtype) / 6


def _hardswish(z: Tensor | None, y: Tensor, options: dict[str, Any]) -> Tensor | None:
    if z is None:
        return None
    return _where(z.ge(3), 1.0, _where(z.le(-3), 0.0, z / 3 + 0.5, z), z)


_INPLACE = (("inplace", False),)
_RELU = Activation("relu", _relu, _INPLACE, (0.0, math.inf))
_RELU6 = Activation("relu6", _relu6, _INPLACE, (0.0, 6.0))
_HARDTANH = Activation("hardtanh", _hardtanh, (("min_val", -1.0), ("max_val", 1.0), ("inplace", False)), (-1.0, 1.0))
_LEAKY = Activation("leaky_relu", _leaky_relu, (("negative_slope", 0.01), ("inplace", False)))
_ELU = Activation("elu", _elu, (("alpha", 1.0), ("inplace", False)))
_SELU = Activation("selu", _selu, _INPLACE)
_CELU = Activation("celu", _celu, (("alpha", 1.0), ("inplace", False)))
_SIGMOID = Activation("sigmoid", _sigmoid)
_TANH = Activation("tanh", _tanh)
_GELU = Activation("gelu", _gelu, (("approximate", "none"),))
_SILU = Activation("silu", _silu, _INPLACE)
_MISH = Activation("mish", _mish, _INPLACE)
_SOFTPLUS = Activation("softplus", _softplus, (("beta", 1.0), ("threshold", 20.0)))
_LOG_SIGMOID = Activation("logsigmoid", _log_sigmoid)
_SOFTSIGN = Activation("softsign", _softsign)
_HARDSIGMOID = Activation("hardsigmoid", _hardsigmoid, _INPLACE, (0.0, 1.0))
_HARDSWISH = Activation("hardswish", _hardswish, _INPLACE)
_PRELU = Activation("prelu", None)
_RRELU = Activation("rrelu", None)

#: What a ``TorchFunctionMode`` sees when a module or a user's code calls an activation.
FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys([functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu_], _RELU),
    **dict.fromkeys([functional.relu6], _RELU6),
    **dict.fromkeys([functional.hardtanh, functional.hardtanh_], _HARDTANH),
    **dict.fromkeys([functional.leaky_relu, functional.leaky_relu_], _LEAKY),
    **dict.fromkeys([functional.elu, functional.elu_], _ELU),
    **dict.fromkeys([functional.selu, torch.selu, torch.selu_], _SELU),
    **dict.fromkeys([functional.celu, torch.celu, torch.celu_], _CELU),
    **dict.fromkeys(
        [torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, functional.sigmoid, torch.special.expit],
        _SIGMOID,
    ),
    **dict.fromkeys([torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, functional.tanh], _TANH),
    **dict.fromkeys([functional.gelu], _GELU),
    **dict.fromkeys([functional.silu], _SILU),
    **dict.fromkeys([functional.mish], _MISH),
    **dict.fromkeys([functional.softplus], _SOFTPLUS),
    **dict.fromkeys([functional.logsigmoid], _LOG_SIGMOID),
    **dict.fromkeys([functional.softsign], _SOFTSIGN),
    **dict.fromkeys([functional.hardsigmoid], _HARDSIGMOID),
    **dict.fromkeys([functional.hardswish], _HARDSWISH),
    **dict.fromkeys([functional.prelu, torch.prelu, Tensor.prelu], _PRELU),
    **dict.fromkeys([functional.rrelu, torch.rrelu, torch.rrelu_, functional.rrelu_], _RRELU),
}

#: Modules that do no more than call one of them: their site has the module's name.
MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.LogSigmoid,
    nn.Softsign,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.PReLU,
    nn.RReLU,
)
