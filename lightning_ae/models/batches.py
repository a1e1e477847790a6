"""Reading a batch: where x is in it, and which of its numbers are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import outline

Missing = Literal["refuse", "mask"]


def input_of(batch: Any, batch_key: str) -> Tensor:
    """``x`` of a batch that is a tensor, a tuple or list with ``x`` first, or a dict with ``batch_key``."""
    x = batch
    if isinstance(batch, Mapping):
        if batch_key not in batch:
            names = sorted(map(str, batch))
            raise ValueError(f"batch_key: the batch has no {batch_key!r}, only {names}.")
        x = batch[batch_key]
    if isinstance(x, (tuple, list)) and x:
        x = x[0]
    if not isinstance(x, Tensor):
        raise TypeError(
            f"batch: expected a tensor, a tuple or list with one first, or a dict with one of these under "
            f"{batch_key!r} (batch_key), got {outline(batch)}. Of several loaders name each, "
            "{'a': loader, 'b': loader}, and the one to train on as batch_key."
        )
    return x


def mask_of(batch: Any, mask_key: str | int, x: Tensor) -> Tensor:
    """The mask in a batch, as booleans of the shape of ``x``: true where a number is there.

    Raises:
        TypeError: if there is something else than a tensor.
        ValueError: if there is nothing, or its shape cannot be broadcast to that of ``x``.
    """
    keyed = isinstance(batch, Mapping) if isinstance(mask_key, str) else isinstance(batch, (tuple, list))
    if not keyed or not (mask_key in batch if isinstance(mask_key, str) else -len(batch) <= mask_key < len(batch)):
        raise ValueError(f"mask_key: the batch {outline(batch)} has no {mask_key!r}.")
    mask = batch[mask_key]
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask_key: expected a tensor at {mask_key!r}, got a {type(mask).__name__}.")
    if mask.ndim < x.ndim and mask.shape == x.shape[: mask.ndim]:
        mask = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))  # (B,) or (B, T) for (B, T, D)
    try:
        return mask.ne(0).expand(x.shape)
    except RuntimeError:
        raise ValueError(f"mask_key: a mask {tuple(mask.shape)} cannot be broadcast to x {tuple(x.shape)}.") from None


def without_missing(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with 0 where the mask is false."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def split_missing(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with 0 in the place of NaN, and the mask of what is there."""
    mask = ~x.isnan()
    return without_missing(x, mask), mask


def corrupted(corruption: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """What the encoder sees of ``x`` in a step: noise on what is there alone."""
    seen: Tensor = corruption(x)
    return seen if mask is None or seen.shape != mask.shape else without_missing(seen, mask)


def imputed(model: AutoencoderLike, batch: Any, output: AutoencoderOutput) -> Tensor:
    """``x`` with predictions in the place of what is missing, so that they count as neither right nor wrong."""
    x, mask = model.observed(batch)
    if mask is None:
        return x
    return torch.where(mask, x, model.loss.prediction(output.params, x, mask).detach().to(x.dtype))


def warn_of_unused_mask(batch: Any, observed: tuple[Tensor, Tensor | None]) -> None:
    """Warn if a batch seems to bring a mask along that nobody reads."""
    x, mask = observed
    if mask is None and isinstance(batch, (tuple, list)) and len(batch) > 1:
        second = batch[1]
        if isinstance(second, Tensor) and second.dtype == torch.bool and second.shape == x.shape:
            rank_zero_warn(
                "The second item of a batch holds booleans of the shape of x, as a mask does, and is not used: give "
                "the model mask_key=1, or leave it out."
            )
