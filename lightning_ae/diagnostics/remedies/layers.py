"""Remedies in the layers: how they are drawn, what trains, what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from lightning_ae.diagnostics.remedies.base import Change, Options, Remedy, modules_by_name, shown, weighted
from lightning_ae.networks.init import initialise

Scheme = Literal["he", "xavier", "orthogonal", "default"]


@dataclass(frozen=True)
class Reinitialize(Remedy):
    r"""Draw weights anew, and set biases.

    ``"he"``: :math:`\operatorname{Var} w = 2/n_{in}`; ``"xavier"``: :math:`2 g^2/(n_{in} + n_{out})` with
    :math:`g = 5/3`, that of tanh; ``"orthogonal"``: orthogonal matrices, of a recurrent layer those from state to
    state, its others uniform; ``"default"``: as the layer's own ``reset_parameters``. Layers that are neither linear
    nor convolutional get their own. Weights that a parametrization computes are drawn, too, where it has an inverse.

    Args:
        scheme: see above.
        layers: names; empty for all.
        bias: what biases become; None for small random ones, as torch draws them.

    Source: He et al. 2015, https://arxiv.org/abs/1502.01852; Glorot & Bengio 2010; Saxe et al. 2014,
    https://arxiv.org/abs/1312.6120.

    Example:
        >>> layer = nn.Sequential(nn.Linear(1000, 1000))
        >>> Reinitialize("he").apply(layer).done, round(float(layer[0].weight.detach().var()) * 1000)
        (True, 2)
    """

    draws: ClassVar[bool] = True
    scheme: Scheme = "he"
    layers: tuple[str, ...] = ()
    bias: float | None = 0.0

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme: expected one of {get_args(Scheme)}, got {self.scheme!r}.")

    def describe(self) -> str:
        """Scheme and layers."""
        where = f"of {shown(self.layers)}" if self.layers else "of all layers"
        how = {"he": "He's", "xavier": "Xavier's", "orthogonal": "orthogonal", "default": "torch's own"}[self.scheme]
        biases = "" if self.bias is None else f" and biases of {self.bias:g}"
        return f"Draw the weights {where} anew, with {how} initialisation{biases}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Draw them."""
        chosen = [(n, m) for n, m in weighted(model) if not self.layers or n in self.layers]
        with torch.no_grad():
            left = tuple(name for name, layer in chosen if not self._draw(layer))
        if len(left) == len(chosen):
            why = f": the weights of {shown(left)} are computed, or not there yet" if left else ""
            return Change(False, f"no layer that can draw its weights anew is called {shown(self.layers)}{why}")
        return Change(True, self.describe() + (f" Not those of {shown(left)}, which are computed." if left else ""))

    def _draw(self, layer: nn.Module) -> bool:
        if parametrize.is_parametrized(layer):
            return self._draw_parametrized(layer)
        plain = isinstance(layer, (nn.Linear, _ConvNd))
        lazy = any(isinstance(p, nn.UninitializedParameter) for p in layer.parameters(recurse=False))
        if lazy or (plain and "weight" not in layer._parameters):
            return False
        reset = getattr(layer, "reset_parameters", None) or layer._reset_parameters
        cast(Callable[[], None], reset)()
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        drawn = bias.clone() if plain and isinstance(bias, torch.Tensor) else None
        if self.scheme == "orthogonal":
            for name, p in layer.named_parameters(recurse=False):
                if "weight_hh" in name:
                    for block in torch.split(p, cast(int, layer.hidden_size)):
                        nn.init.orthogonal_(block)
            if plain and isinstance(weight, torch.Tensor):
                nn.init.orthogonal_(weight)
        elif plain and self.scheme != "default":
            initialise(layer, "tanh" if self.scheme == "xavier" else "relu")
        if drawn is not None:
            layer.get_parameter("bias").copy_(drawn if self.bias is None else torch.full_like(drawn, self.bias))
        return True

    def _draw_parametrized(self, layer: nn.Module) -> bool:
        """Draw what a weight norm, say, computes, and set what it computes it of."""
        computed = {name: nn.Parameter(getattr(layer, name).detach().clone()) for name in _computed(layer)}
        kind: Any = type(layer).__bases__[0]  # its class as it was before
        plain: nn.Module = kind.__new__(kind)
        plain.__dict__ |= layer.__dict__ | {"_parameters": {**layer._parameters, **computed}, "_modules": {}}
        if not self._draw(plain):
            return False
        try:
            for name, value in computed.items():
                setattr(layer, name, value.detach())
        except (RuntimeError, NotImplementedError, ValueError):  # it has no inverse
            return False
        return True


def _computed(layer: nn.Module) -> list[str]:
    return list(cast(nn.ModuleDict, layer.parametrizations))


@dataclass(frozen=True)
class SetBias(Remedy):
    """Set the biases of layers: 0.1 lets ReLUs begin alive.

    Args:
        layers: names.
        value: what biases become.

    Source: Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.3.1.

    Example:
        >>> layer = nn.Sequential(nn.Linear(3, 2))
        >>> SetBias(("0",)).apply(layer).done, layer[0].bias.tolist()
        (True, [0.10000000149011612, 0.10000000149011612])
    """

    draws: ClassVar[bool] = True
    layers: tuple[str, ...]
    value: float = 0.1

    def describe(self) -> str:
        """Layers and value."""
        return f"Start the biases of {shown(self.layers)} at {self.value:g}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set them."""
        known = modules_by_name(model)
        found = [b for n in self.layers if isinstance(b := getattr(known.get(n), "bias", None), nn.Parameter)]
        with torch.no_grad():
            for bias in found:
                bias.fill_(self.value)
        return Change(bool(found), self.describe() if found else f"{shown(self.layers)}: no such layer with a bias")


@dataclass(frozen=True)
class RequireGradients(Remedy):
    """Let frozen layers ask for gradients.

    Args:
        layers: names of the layers; empty for all.

    Example:
        >>> layer = nn.Linear(2, 1).requires_grad_(False)
        >>> RequireGradients().apply(layer).done, layer.weight.requires_grad
        (True, True)
    """

    layers: tuple[str, ...] = ()

    def describe(self) -> str:
        """Which."""
        return f"Train {shown(self.layers) or 'all layers'}: requires_grad_(True)."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set the flags."""
        known = modules_by_name(model)
        chosen = [known[n] for n in self.layers if n in known] if self.layers else [model]
        frozen = [p for module in chosen for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
        for p in frozen:
            p.requires_grad_(True)
        return Change(bool(frozen), self.describe() if frozen else "no parameter was frozen")


@dataclass(frozen=True)
class SetDropout(Remedy):
    """Set the rate of dropouts.

    Args:
        sites: names of the modules.
        rate: share that is dropped from now on.

    Example:
        >>> network = nn.Sequential(nn.Dropout(0.9))
        >>> SetDropout(("0",)).apply(network).done, network[0].p
        (True, 0.0)
    """

    sites: tuple[str, ...]
    rate: float = 0.0

    def describe(self) -> str:
        """Which, and how much."""
        return f"Drop {self.rate:.0%} at {shown(self.sites)}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set the rates."""
        known = modules_by_name(model)
        found = [m for n in self.sites if isinstance(m := known.get(n), _DropoutNd)]
        for module in found:
            module.p = self.rate
        return Change(bool(found), self.describe() if found else "it is called in forward() as a function")


@dataclass(frozen=True)
class SetNormMomentum(Remedy):
    """Set how fast running statistics of batch normalisations follow.

    Args:
        momentum: share of a batch in them.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(4, momentum=1e-5))
        >>> SetNormMomentum().apply(network).done, network[0].momentum
        (True, 0.1)
    """

    momentum: float = 0.1

    def describe(self) -> str:
        """The momentum."""
        return f"Set the momentum of batch normalisations to {self.momentum:g}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set it."""
        found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        for module in found:
            module.momentum = self.momentum
        return Change(bool(found), self.describe() if found else "there is no batch normalisation")
