"""Several small autoencoders of one shape, trained as one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_ae.codes import Identity
from lightning_ae.losses import AlphaMix, ReconstructionLoss
from lightning_ae.models import Autoencoder
from lightning_ae.networks import LinearDecoder, LinearEncoder, MLPDecoder, MLPEncoder
from lightning_ae.networks.linear import TiedLinear
from lightning_ae.pareto.grouped import GroupedLayerNorm, GroupedLinear

_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Identity)
_LAYERS = (nn.Linear, LinearEncoder, TiedLinear, nn.LayerNorm, *_ELEMENTWISE)
_NETWORKS = (LinearEncoder, LinearDecoder, MLPEncoder, MLPDecoder)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: what a subclass may override, as training does not call it
_NOT_TRAINING = {"configure_metrics", "decode", "encode", "predict_step", "reconstruct", "test_step", "validation_step"}


def raw_losses(loss: ReconstructionLoss, params: Tensor, x: Tensor) -> Tensor:
    """Both losses of an :class:`AlphaMix`, without weights: pixel, then perceptual, ``(2, B)``."""
    terms = loss.terms(params, x)
    return torch.stack([terms["reconstruction/pixel"], terms["reconstruction/perceptual"]])


class AutoencoderGroup(L.LightningModule):
    r"""Trains ``K`` autoencoders on one stream of batches, each as if it were alone.

    The loss is :math:`\sum_k \frac1B \sum_i \alpha_k L_{pixel} + (1 - \alpha_k) L_{perceptual}`. A weight occurs in one
    of the ``K`` summands only, so its gradient is that of its own model's objective; AdamW treats each number by
    itself, so its state is that of separate training too. Nothing is logged.

    Args:
        models: autoencoders with an :class:`AlphaMix`; :func:`why_not_together` must have nothing against them.

    Shapes:
        ``(B, *event)`` to pre-activations ``(K, B, *loss.params_shape(event))``.
    """

    def __init__(self, models: Sequence[Autoencoder]) -> None:
        super().__init__()
        self._models = tuple(models)  # in a tuple, so that they are no submodules
        owners: dict[int, GroupedLinear] = {}  # by the weight of the first model's layer
        layers: list[nn.Module] = []
        for members in zip(*map(_layers, models), strict=True):
            first: Any = members[0]
            if isinstance(first, TiedLinear):
                layers.append(GroupedLinear(members, tied_to=owners[id(first.weight)]))
            elif isinstance(first, nn.Linear):
                owners[id(first.weight)] = GroupedLinear(members, shared=not layers)
                layers.append(owners[id(first.weight)])
            else:
                layers.append(GroupedLayerNorm(members) if isinstance(first, nn.LayerNorm) else first)
        self.layers = nn.Sequential(*layers)
        self.loss = models[0].loss
        self._out_shape: tuple[int, ...] = models[0].decoder.out_shape  # type: ignore[assignment]
        self._checked = False

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations of all models."""
        params: Tensor = self.layers(x.flatten(1))
        return params.reshape(*params.shape[:2], *self._out_shape)

    def on_fit_start(self) -> None:
        """Follow the Trainer: the models to its precision, the weights of both losses, ``(2, K, 1)``, to its device."""
        alphas = torch.tensor([[model.loss.alpha] for model in self._models], dtype=torch.float64)
        dtype = next(self.parameters()).dtype
        self._weights = torch.stack([alphas, 1 - alphas]).to(self.device, torch.promote_types(dtype, torch.float32))
        for model in self._models:
            model.to(dtype=dtype)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Check the first batch, as the models would."""
        if not self._checked:
            self._checked = True
            self._models[0].check_input(self._models[0].get_input(batch))
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the models' objectives."""
        return self._objective(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The same as in training."""
        return self._objective(batch)

    def _objective(self, batch: Any) -> Tensor:
        x = self._models[0].get_input(batch)
        params = self(x)
        repeated = x.expand(len(self._models), *x.shape).flatten(0, 1)
        raw = raw_losses(self.loss, params.flatten(0, 1), repeated).view(2, *params.shape[:2])
        return (self._weights * raw).sum() / len(x)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The models' AdamW, in one kernel where there is one."""
        first = self._models[0]
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(self.parameters(), lr=first.lr, weight_decay=first.weight_decay, fused=fused)

    def write_back(self) -> None:
        """Copy the numbers into the models."""
        for layer in self.layers:
            if isinstance(layer, (GroupedLinear, GroupedLayerNorm)):
                layer.write_back()


def why_not_together(models: Sequence[Autoencoder], options: Mapping[str, Any]) -> str | None:
    """The first reason not to train models as an :class:`AutoencoderGroup`: it could not, or results would differ.

    Args:
        models: the models, freshly made.
        options: those of the Trainer.

    Returns:
        A sentence for a message, or None.
    """
    reasons = (*_of_options(options), *(reason for model in models for reason in _of_model(model)))
    return next(iter(reasons), None) or next(_of_group(models), None)


def _of_options(options: Mapping[str, Any]) -> Iterator[str]:
    if options.get("gradient_clip_val") and options.get("gradient_clip_algorithm") != "value":
        yield "gradient_clip_val: the norm would be that of all models together; clip by value, or train one by one."
    if str(options.get("precision") or 32)[:2] not in ("32", "64"):
        yield "precision: with half of it, rounding alone would tell the results from those of separate training."
    for name in ("enable_checkpointing", "logger", "plugins"):
        if options.get(name):
            yield f"{name}: it would see the group instead of a model."


def _of_model(model: Autoencoder) -> Iterator[str]:
    name = type(model).__name__
    ancestors = type(model).__mro__[: type(model).__mro__.index(Autoencoder)]
    overridden = {key for cls in ancestors for key in vars(cls) if hasattr(Autoencoder, key)} - _NOT_TRAINING
    overridden |= {key for key in vars(model) if callable(getattr(Autoencoder, key, None))}
    if training := sorted(key for key in overridden if key == "_step" or not key.startswith("_")):
        yield f"{name} overrides {', '.join(training)}."
    if type(model.loss) is not AlphaMix:
        yield f"{name} has a {type(model.loss).__name__} as loss, expected an AlphaMix."
    for box, expected in (("code", Identity), ("corruption", nn.Identity)):
        if type(getattr(model, box)) is not expected:
            yield f"{name} has a {box}, {type(getattr(model, box)).__name__}."
    if len(model.penalties):
        yield f"{name} has penalties."
    if getattr(model.encoder, "input_transform", "identity") != "identity":
        yield f"{name} has an input_transform, {model.encoder.input_transform}."
    for network in (model.encoder, model.decoder):
        if not any(isinstance(network, cls) and type(network).forward is cls.forward for cls in _NETWORKS):
            yield f"{name} has a {type(network).__name__}, which is no stack of linear layers that is known."
            return
    layers = _layers(model)
    for layer in layers:
        if type(layer) not in _LAYERS:  # a subclass may do more, as one with weight normalisation does
            yield f"{name} has a {type(layer).__name__}."
    if set(model.parameters()) != {parameter for layer in layers for parameter in layer.parameters()}:
        yield f"{name} has parameters that are not weights of its layers."
    if any(getattr(part, kind, None) for part in (*model.modules(), *model.parameters()) for kind in _HOOKS):
        yield f"{name} has hooks."
    if not all(parameter.requires_grad for parameter in model.parameters()):
        yield f"{name} has frozen parameters."


def _of_group(models: Sequence[Autoencoder]) -> Iterator[str]:
    first = models[0]
    for model in models[1:]:
        for name in ("lr", "weight_decay", "batch_key"):
            if getattr(model, name) != getattr(first, name):
                yield f"the models differ in {name}: {getattr(first, name)} and {getattr(model, name)}."
        if _shape(model) != _shape(first):
            yield "the models differ in shape."
        elif not _same_losses(model, first):
            yield "the models differ in their losses, not only in alpha."


def _layers(model: Autoencoder) -> list[nn.Module]:
    return [layer for network in (model.encoder, model.decoder) for layer in _layers_of(network)]


def _layers_of(network: nn.Module) -> list[nn.Module]:
    if isinstance(network, nn.Linear):
        return [network]
    return [network.layer] if isinstance(network, LinearDecoder) else list(network.get_submodule("layers").children())


def _shape(model: Autoencoder) -> list[Any]:
    layers = [(repr(layer), [p.dtype for p in layer.parameters()]) for layer in _layers(model)]
    return [model.encoder.in_shape, model.decoder.out_shape, *layers]


def _same_losses(ours: Autoencoder, theirs: Autoencoder) -> bool:
    """Whether both score a batch of noise alike; it says more of a loss than its class and arguments."""
    x = torch.rand(2, *ours.encoder.in_shape, generator=torch.Generator().manual_seed(0))  # type: ignore[misc]
    params = torch.randn(2, *ours.decoder.out_shape, generator=torch.Generator().manual_seed(1))  # type: ignore[misc]
    a, b = (_in_double(model.loss, params, x) for model in (ours, theirs))
    return torch.equal(a.nan_to_num(), b.nan_to_num())


@torch.no_grad()
def _in_double(loss: ReconstructionLoss, params: Tensor, x: Tensor) -> Tensor:
    # a copy: the Trainer has still to choose the precision, and a given Φ may be in another than the model
    return raw_losses(copy.deepcopy(loss).cpu().double(), params.double(), x.double())
