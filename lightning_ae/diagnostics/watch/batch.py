"""What a batch is, whatever its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

#: From a batch to a tensor with 1 where a position counts and 0 where it is padding.
MaskFunction = Callable[[Any], Tensor]


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor in a batch of tensors, tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        return batch
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)
