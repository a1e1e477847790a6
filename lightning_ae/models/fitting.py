"""Whether the boxes of a model fit each other, as far as their sizes are known before there are data."""

from __future__ import annotations

import warnings

from torch import nn

from lightning_ae.codes import Code
from lightning_ae.corruption import Corruption
from lightning_ae.losses import ReconstructionLoss

_SQUASHING = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.Softmax, nn.Softplus, nn.Hardtanh, nn.LogSigmoid, nn.LogSoftmax)
_SHAPING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)


def check_sizes_of_boxes(
    encoder: nn.Module, code: Code, decoder: nn.Module, loss: ReconstructionLoss, corruption: nn.Module
) -> None:
    """Raise unless the code takes what the encoder gives, and the loss what the decoder gives.

    Args:
        encoder: with ``in_shape`` and ``h_shape``, or without.
        code: between the two.
        decoder: with ``latent_shape`` and ``out_shape``, or without.
        loss: says which shape it wants for examples.
        corruption: one of somebody else's may give the encoder another shape than the loss sees.

    Raises:
        ValueError: naming the box.
    """
    given, latent = getattr(encoder, "h_shape", None), getattr(decoder, "latent_shape", None)
    if given is not None and latent is not None and given != code.h_shape(latent):
        raise ValueError(
            f"encoder: for {type(code).__name__} and a decoder of latents {latent} it must give "
            f"{code.h_shape(latent)}, got {given}."
        )
    event, out = getattr(encoder, "in_shape", None), getattr(decoder, "out_shape", None)
    if event is None or out is None or not isinstance(corruption, (Corruption, nn.Identity)):
        return
    expected = loss.params_shape(event)
    if tuple(out) != tuple(expected):
        raise ValueError(
            f"decoder: for examples of shape {tuple(event)} and a {type(loss).__name__} it must give "
            f"{tuple(expected)}, got {tuple(out)}. Build it with out_shape=loss.params_shape({tuple(event)})."
        )


def warn_of_second_activation(decoder: nn.Module, loss: ReconstructionLoss, *, stacklevel: int) -> None:
    """Warn if the decoder ends in an activation and the loss applies one to its output once more."""
    last = [module for module in decoder.modules() if not isinstance(module, _SHAPING)][-1:]
    if last and isinstance(last[0], _SQUASHING) and loss.output_activation != "identity":
        warnings.warn(
            f"The decoder ends in {type(last[0]).__name__}, and {type(loss).__name__} applies "
            f"{loss.output_activation} to its output once more, which squeezes the reconstruction into part "
            "of its range. Remove the decoder's last activation: the loss owns it.",
            stacklevel=stacklevel + 1,
        )
