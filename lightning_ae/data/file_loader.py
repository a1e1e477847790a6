"""Batches of examples that are read from disk one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ae.checks import check_whole
from lightning_ae.data.loader import Batch, Loader
from lightning_ae.data.order import EpochOrder


class FileLoader(Loader):
    """Batches of a map-style dataset, read by worker processes that live as long as the loader.

    A :class:`torch.utils.data.DataLoader` does the reading; it is told the batches that are left of the epoch, so
    reading ahead does not disturb the place to resume from.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, the latter returning a tensor of shape ``event`` (or a tuple).
        order: which examples come in which order.
        num_workers: processes that read; 0 reads in this one.

    Raises:
        TypeError: if ``num_workers`` is not an integer.
        ValueError: if ``num_workers`` is negative or ``order`` counts other than the examples of ``dataset``.

    Example:
        >>> squares = [torch.tensor([float(i * i)]) for i in range(3)]
        >>> loader = FileLoader(squares, EpochOrder(3, batch_size=2, shuffle=False))
        >>> [batch.tolist() for batch in loader]
        [[[0.0], [1.0]], [[4.0]]]
    """

    def __init__(self, dataset: Dataset[Tensor], order: EpochOrder, num_workers: int = 0) -> None:
        super().__init__(order)
        check_whole("num_workers", num_workers, least=0)
        if order.num_examples != (given := len(dataset)):  # type: ignore[arg-type]  # torch's Dataset has no __len__
            raise ValueError(f"order: expected num_examples={given}, got {order.num_examples}")
        self._left: list[list[int]] = []
        self._reader: DataLoader[Tensor] = DataLoader(
            dataset,
            batch_sampler=self._left,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            # Of its own, so that reading leaves the global random state as it is; random transforms differ by rank.
            generator=torch.Generator().manual_seed(order.seed + order.rank),
        )

    @property
    def _iterator(self) -> Any:
        # Lightning shuts down the workers that it finds in this attribute when a run ends.
        return self._reader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._reader._iterator = iterator

    def _batches(self, start: int) -> Iterator[Batch]:
        order = self.batch_sampler
        self._left[:] = [order.indices(batch_idx).tolist() for batch_idx in range(start, len(order))]
        yield from self._reader
