"""Sums of batch means, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """Example-weighted means of named terms over the batches so far, and since the last reading.

    An update is two small kernels and no host synchronisation; a reading is one reduction over the ranks.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._count = 0
        self._read_sums: Tensor | None = None
        self._read_count = 0

    def update(self, means: dict[str, Tensor], batch_size: int) -> None:
        """Add a batch: its means (tensors without dimensions, detached) and its number of examples."""
        batch = torch.stack(list(means.values()))
        if self._sums is None:
            # float64 so that an epoch of any length adds up; MPS has none
            dtype = torch.float32 if batch.device.type == "mps" else torch.float64
            self._names = tuple(means)
            self._sums = torch.zeros(len(means), dtype=dtype, device=batch.device)
        elif self._names != tuple(means):
            raise ValueError(f"The terms changed within an epoch: expected {self._names}, got {tuple(means)}.")
        self._sums.add_(batch, alpha=batch_size)
        self._count += batch_size

    def total(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Means over all batches and ranks; ``reduce`` adds a tensor up over the ranks."""
        return self._means(self._sums, self._count, reduce)

    def recent(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Means over the batches since the last call, on all ranks."""
        if self._sums is None:
            return {}
        sums = self._sums if self._read_sums is None else self._sums - self._read_sums
        means = self._means(sums, self._count - self._read_count, reduce)
        self._read_sums, self._read_count = self._sums.clone(), self._count
        return means

    def _means(self, sums: Tensor | None, count: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if sums is None or count == 0:
            return {}
        flat = reduce(torch.cat([sums, sums.new_tensor([count])]))
        return dict(zip(self._names, (flat[:-1] / flat[-1]).unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name in vars(self):
            value = state[name]
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
