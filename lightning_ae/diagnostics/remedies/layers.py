"""Remedies in the model: how it is drawn, what its activations are, what trains, what is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_ae.diagnostics.remedies.base import (
    Change,
    Options,
    Remedy,
    modules_by_name,
    note,
    replace_module,
    weighted,
)
from lightning_ae.diagnostics.watch.activations import MODULES
from lightning_ae.models import Autoencoder
from lightning_ae.networks.init import Activation, initialise, make_activation

Scheme = Literal["he", "xavier", "orthogonal", "default"]
Swap = Literal["relu", "leaky_relu", "gelu", "tanh", "sigmoid", "softmax", "log_softmax", "identity"]
_NAMED = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax"}


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Reinitialize(Remedy):
    r"""Draw weights anew, and set biases.

    ``"he"``: :math:`\operatorname{Var} w = 2/n_{in}`; ``"xavier"``: :math:`2 g^2/(n_{in} + n_{out})` with
    :math:`g = 5/3`, that of tanh; ``"orthogonal"``: orthogonal matrices, of a recurrent layer those from state to
    state, its others uniform; ``"default"``: as the layer's own ``reset_parameters``. Layers that are neither linear
    nor convolutional get their own.

    Args:
        scheme: see above.
        layers: names; empty for all.
        bias: what biases become.

    Source: He et al. 2015, https://arxiv.org/abs/1502.01852; Glorot & Bengio 2010; Saxe et al. 2014,
    https://arxiv.org/abs/1312.6120.

    Example:
        >>> layer = nn.Sequential(nn.Linear(1000, 1000))
        >>> Reinitialize("he").apply(layer).done, round(float(layer[0].weight.detach().var()) * 1000)
        (True, 2)
    """

    scheme: Scheme = "he"
    layers: tuple[str, ...] = ()
    bias: float = 0.0

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme: expected one of {get_args(Scheme)}, got {self.scheme!r}.")

    def describe(self) -> str:
        """Scheme and layers."""
        where = f"of {_shown(self.layers)}" if self.layers else "of all layers"
        how = {"he": "He's", "xavier": "Xavier's", "orthogonal": "orthogonal", "default": "torch's own"}[self.scheme]
        return f"Draw the weights {where} anew, with {how} initialisation and biases of {self.bias:g}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Draw them."""
        chosen = [(n, m) for n, m in weighted(model) if not self.layers or n in self.layers]
        if not chosen:
            return Change(False, f"no layer that can draw its weights anew is called {_shown(self.layers)}")
        with torch.no_grad():
            for _, layer in chosen:
                self._draw(layer)
        return Change(True, self.describe())

    def _draw(self, layer: nn.Module) -> None:
        layer.reset_parameters()  # type: ignore[operator]
        weight = getattr(layer, "weight", None)
        plain = isinstance(weight, torch.Tensor) and weight.ndim > 1 and not isinstance(layer, nn.Embedding)
        if self.scheme == "orthogonal":
            for name, p in layer.named_parameters(recurse=False):
                if p.ndim == 2 and ("weight_hh" in name or plain):
                    for block in torch.split(p, p.shape[1]) if "weight_hh" in name else [p]:
                        nn.init.orthogonal_(block)
        elif plain and self.scheme != "default":
            initialise(layer, "tanh" if self.scheme == "xavier" else "relu")
        if plain and getattr(layer, "bias", None) is not None:
            layer.get_parameter("bias").fill_(self.bias)


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

    layers: tuple[str, ...]
    value: float = 0.1

    def describe(self) -> str:
        """Layers and value."""
        return f"Start the biases of {_shown(self.layers)} at {self.value:g}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set them."""
        known = modules_by_name(model)
        found = [b for n in self.layers if (b := getattr(known.get(n), "bias", None)) is not None]
        with torch.no_grad():
            for bias in found:
                bias.fill_(self.value)
        return Change(bool(found), self.describe() if found else f"{_shown(self.layers)}: no such layer with a bias")


@dataclass(frozen=True)
class SwapActivation(Remedy):
    """Put another activation module in the place of some.

    Of a model of ours all activations of the network are swapped, and its checkpoints know; a function called in
    somebody's ``forward`` cannot be.

    Args:
        to: the new one.
        sites: names of the modules; empty for all of the kinds of ``kinds``.
        kinds: only modules of these kinds, as ``("sigmoid", "tanh")``; empty for all.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Sigmoid())
        >>> SwapActivation("gelu", kinds=("tanh",)).apply(network).done, network[1], network[3]
        (True, GELU(approximate='none'), Sigmoid())
    """

    to: Swap
    sites: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.to not in get_args(Swap):
            raise ValueError(f"to: expected one of {get_args(Swap)}, got {self.to!r}.")

    def describe(self) -> str:
        """From what to what."""
        which = _shown(self.sites) if self.sites else " and ".join(self.kinds) or "all activations"
        return f"Remove the activation {which}." if self.to == "identity" else f"Put {self.to} in the place of {which}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Swap them."""
        chosen = [n for n, kind in activation_modules(model) if self._wants(n, kind)]
        if not chosen:
            missing = [n for n in self.sites if n not in modules_by_name(model)]
            why = f"{_shown(tuple(missing))} is called in forward() as a function, not a module" if missing else "none"
            return Change(False, why if missing else "there is no such activation module")
        if isinstance(model, Autoencoder):
            return self._swap_ours(model)
        for name in chosen:
            replace_module(model, name, self._new())
        return Change(True, self.describe())

    def _wants(self, name: str, kind: str) -> bool:
        return (not self.sites or name in self.sites) and (not self.kinds or kind in self.kinds) and kind != self.to

    def _new(self) -> nn.Module:
        if self.to == "softmax":
            return nn.Softmax(-1)
        return nn.LogSoftmax(-1) if self.to == "log_softmax" else make_activation(self.to)

    def _swap_ours(self, model: Autoencoder) -> Change:
        if self.to not in get_args(Activation):
            return Change(False, f"the networks of this package have no {self.to}; the loss owns the output activation")
        # a code's and a loss's activation are no business of the network's
        networks = [part for box in (model.encoder, model.decoder) for part in box.modules()]
        holders = [p for p in (model, *networks) if "activation" in (getattr(p, "_init_args", None) or {})]
        names = [n for n, _ in activation_modules(model) if n.split(".")[0] in ("encoder", "decoder")]
        if not holders or not names:
            return Change(False, "its network has no activations of this package's")
        for name in names:
            replace_module(model, name, self._new())
        for part in holders:
            part.__dict__["_init_args"]["activation"] = self.to
        note(model)
        return Change(True, f"activation = {self.to!r}")


def activation_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and kinds of the activation modules, those of a loss of ours left out."""
    for name, module in modules_by_name(model).items():
        if isinstance(module, (*MODULES, *_NAMED)) and not name.startswith("loss."):
            kind = _NAMED.get(type(module), "")
            yield name, kind or "".join(f"_{c.lower()}" if c.isupper() else c for c in _spelled(module)).lstrip("_")


def _spelled(module: nn.Module) -> str:
    """The class's name as functions are: ReLU → Relu, LeakyReLU → LeakyRelu."""
    name = type(module).__name__
    for old, new in (("ReLU", "Relu"), ("GELU", "Gelu"), ("SiLU", "Silu"), ("ELU", "Elu")):
        name = name.replace(old, new)
    return name


@dataclass(frozen=True)
class InsertActivation(Remedy):
    """Put an activation after a layer.

    Args:
        layers: names of the layers.
        activation: which.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
        >>> InsertActivation(("0",)).apply(network).done, network[0][1]
        (True, ReLU())
    """

    layers: tuple[str, ...]
    activation: Activation = "relu"

    def describe(self) -> str:
        """Which, and where."""
        return f"Put {self.activation} after {_shown(self.layers)}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Wrap the layers."""
        if isinstance(model, Autoencoder):
            return Change(False, "checkpoints of this package do not record it: give the network its activation")
        known = modules_by_name(model)
        found = [name for name in self.layers if name in known]
        for name in found:
            replace_module(model, name, nn.Sequential(known[name], make_activation(self.activation)))
        return Change(bool(found), self.describe() if found else f"there is no layer {_shown(self.layers)}")


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
        return f"Train {_shown(self.layers) or 'all layers'}: requires_grad_(True)."

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
        return f"Drop {self.rate:.0%} at {_shown(self.sites)}."

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
