"""Finding latents and laying them out as rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.watch.counters import Counters
from lightning_ae.diagnostics.watch.site import clean_name
from lightning_ae.metrics.sparsity import sparseness, widen

#: Elements of a batch from which the measures that sort or compare a whole code are taken.
SHAPE_ELEMENTS = 2**16
#: Widest code whose covariance is kept.
WIDEST_COVARIANCE = 256
PARTS = ("z", "mean", "log_variance", "kl", "indices", "num_codes")
Latent = str | Mapping[str, str | int] | Callable[[Any, Any], Any]


class Rows(NamedTuple):
    """Codes as rows.

    Attributes:
        shape: that they came in.
        raw: all rows, ``(n, D)``.
        values: 0 in the rows that do not count: padding, and those that are not finite.
        counts: which rows do, ``(n,)``.
        number: how many these are, on the device.
        nonfinite: how many would, but are not finite.
    """

    shape: torch.Size
    raw: Tensor
    values: Tensor
    counts: Tensor
    number: Tensor
    nonfinite: Tensor


def rows_of(what: str, z: Any, unit_dim: int | None, mask: Tensor | None) -> Rows:
    """Codes of any shape as rows.

    Args:
        what: its name, for messages.
        z: floating-point codes, ``(B, ...)``, or something with ``to_dense()``.
        unit_dim: the axis of the latents; None for the last one, of maps ``(B, C, H, W)`` the channels.
        mask: above 0 where a row counts, over the first axes of the positions; None if all do.

    Raises:
        ValueError: if they are no codes, have no such axis, or the mask has another shape.
    """
    moved = _moved(what, z, unit_dim)
    values = widen(moved.flatten(0, -2))
    counts = (values - values).sum(1).eq(0)  # of what is finite nothing is left; with no booleans, which are slow
    nonfinite = ~counts
    if mask is not None:
        chosen = _spread(mask, moved.shape[:-1]).to(values.device)
        counts, nonfinite = counts & chosen, nonfinite & chosen
    kept = torch.where(counts[:, None], values, torch.zeros_like(values))
    return Rows(_dense(z).shape, values, kept, counts, counts.sum(), nonfinite.sum())


def as_rows(what: str, z: Any, unit_dim: int | None) -> Tensor:
    """Codes of any shape as rows ``(n, D)``, all of them."""
    return _moved(what, z, unit_dim).flatten(0, -2)


def _dense(z: Any) -> Any:
    return z.to_dense() if not isinstance(z, Tensor) and hasattr(z, "to_dense") else z


def _moved(what: str, z: Any, unit_dim: int | None) -> Tensor:
    z = _dense(z)
    if not isinstance(z, Tensor) or z.ndim < 2 or not z.is_floating_point():
        raise ValueError(f"latent: {what}: expected floating-point codes (B, ...), got {describe(z)}.")
    axis = unit_dim if unit_dim is not None else (1 if z.ndim >= 4 else -1)
    if not -z.ndim <= axis < z.ndim:
        raise ValueError(f"unit_dim: the latent is {tuple(z.shape)}, got {axis}.")
    return z.detach().movedim(axis, -1)


def module_names(latent: Latent | None) -> dict[str, tuple[str, int]]:
    """Modules by the part that they give, and which item of their output it is."""
    if latent is None or (callable(latent) and not isinstance(latent, (nn.Module, type))):
        return {}
    if not isinstance(latent, (str, Mapping)):
        raise TypeError(
            f"latent: expected a module's name, a dict of names or a function, got {describe(latent)}"
            f"{'; give its name' if isinstance(latent, nn.Module) else ''}."
        )
    given = {"z": latent} if isinstance(latent, str) else dict(latent)
    codes = given.pop("num_codes", None)
    if not given or not set(given) <= set(PARTS):
        raise ValueError(f"latent: expected names for some of {list(PARTS)}, got {sorted(latent)}.")
    if ("indices" in given) != isinstance(codes, int):
        raise ValueError(f"latent: indices and the number num_codes belong together, got {latent}.")
    found = {}
    for part, name in given.items():
        fits = re.fullmatch(r"([^\[\]]+)(?:\[(\d+)\])?", name) if isinstance(name, str) else None
        if fits is None:
            raise ValueError(f"latent: expected a module's name such as 'encoder.2' or 'encoder[1]', got {name!r}.")
        found[part] = (clean_name(fits[1]), int(fits[2] or 0))
    return found


def _spread(mask: Tensor, shape: torch.Size) -> Tensor:
    """Which rows count, for a mask over the first axes of their positions; or an example counts if any of it does."""
    chosen = mask > 0
    if chosen.shape == shape[: chosen.ndim]:
        return chosen.reshape(*chosen.shape, *(1 for _ in shape[chosen.ndim :])).expand(shape).flatten()
    if chosen.numel() == shape.numel():
        return chosen.flatten()
    if chosen.ndim > 1 and len(chosen) == shape[0] and len(shape) == 1:
        return chosen.flatten(1).any(1)
    raise ValueError(f"mask_fn: the latent has rows {tuple(shape)}, got a mask of shape {tuple(mask.shape)}.")


def describe(z: Any) -> str:
    """What was given, for messages."""
    return f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__


def add_rows(counters: Counters, rows: Rows, eps: float) -> None:
    """Add up what the figures of a latent are made of."""
    add, z = counters.add, rows.values
    add("latent", "rows", rows.number)
    add("latent", "nonfinite", rows.nonfinite)
    magnitude = z.abs()
    add("latent", "fired", (magnitude > eps).sum(0))
    wide = widest(z)
    add("z", "abs", magnitude.sum(0, dtype=wide.dtype), torch.float64)
    total = wide.sum(0)
    add("z", "sum", total, torch.float64)
    # over the rows of this batch: a constant that moves while training is a constant
    off = torch.where(rows.counts[:, None], wide - total / rows.number.clamp(min=1), 0.0)
    add("z", "within", off.square().sum(0), torch.float64)
    if z.shape[1] <= WIDEST_COVARIANCE:
        add("z", "cross", wide.t() @ wide, torch.float64)  # float64: the covariance is a difference
    else:
        add("z", "square", wide.square().sum(0), torch.float64)
    if z.shape[1] > 1:
        head = magnitude[: max(1, SHAPE_ELEMENTS // z.shape[1])]
        sums = sparseness(head).nan_to_num(0.0, 0.0, 0.0).sum(1, dtype=wide.dtype)
        for name, value in zip(("hoyer", "gini", "population_sparsity"), sums.unbind(), strict=True):
            add("latent", name, value, torch.float64)
        add("latent", "shaped", head.ne(0).any(1).sum())


def widest(z: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return z if z.device.type == "mps" else z.double()


class Reads(Protocol):
    """Who asks for the gradient of a latent, and keeps those of a batch."""

    _read: list[Tensor]


class KeepGradient:
    """A hook that keeps the gradient of one tensor until the batch is done."""

    def __init__(self, reader: Reads) -> None:
        self._reader, self._read = reader, reader._read

    def __call__(self, grad: Tensor) -> None:
        """Keep it."""
        # not if the graph has outlived its batch
        if not torch.is_grad_enabled() and self._read is self._reader._read:
            self._read.append(grad)
