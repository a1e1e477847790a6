"""Iterables of batches that Lightning leaves alone and can resume in the middle of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_ae.data.order import EpochOrder
from lightning_ae.data.sparse_rows import SparseRows

Batch: TypeAlias = Tensor | tuple[Tensor, ...]


class Loader(ABC):
    """Hands out the batches of an :class:`~lightning_ae.data.order.EpochOrder`.

    Not a :class:`torch.utils.data.DataLoader`, so Lightning neither replaces its sampler nor rebuilds it: the order
    knows the rank and the epoch already. Under Lightning the epoch comes from the Trainer; in a loop of your own each
    pass is a new epoch. A pass that was broken off is not continued, unless :meth:`load_state_dict` asks for it.

    Args:
        order: which examples come in which order.
    """

    def __init__(self, order: EpochOrder) -> None:
        #: Called so because Lightning sets the epoch of ``batch_sampler.sampler``. There is no ``sampler``: with one,
        #: ``overfit_batches`` would try to rebuild the loader as a ``DataLoader``.
        self.batch_sampler = order

    @abstractmethod
    def _batches(self, start: int) -> Iterator[Batch]:
        """Yield the batches of the current epoch from batch ``start`` on."""

    @property
    def num_examples(self) -> int:
        """The number of examples over all ranks."""
        return self.batch_sampler.num_examples

    @property
    def batch_size(self) -> int:
        """The number of examples in a full batch of one rank."""
        return self.batch_sampler.batch_size

    def indices(self, batch_idx: int) -> Tensor:
        """Which examples, of ``range(num_examples)``, are in a batch of the current epoch.

        Args:
            batch_idx: ``0 <= batch_idx < len(self)``.

        Returns:
            int64 of shape ``(B,)``, in the order of the batch.

        Raises:
            ValueError: if ``batch_idx`` is out of range.
        """
        return self.batch_sampler.indices(batch_idx)

    def state_dict(self) -> dict[str, int]:
        """The place in the data: ``epoch``, and ``batch``, the batches of it handed out so far."""
        return {"epoch": self.batch_sampler.epoch, "batch": self.batch_sampler.position}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue from the place that :meth:`state_dict` told.

        Args:
            state_dict: with the keys ``epoch`` and ``batch``.

        Raises:
            TypeError: if a value is not an integer.
            ValueError: if a key is missing or a value is negative.
        """
        if missing := {"epoch", "batch"} - state_dict.keys():
            raise ValueError(f"state_dict: expected the keys 'epoch' and 'batch', missing {sorted(missing)}")
        self.batch_sampler.resume(state_dict["epoch"], state_dict["batch"])

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the place is looked up at the first batch, as Lightning sets the epoch after calling iter().
        start = self.batch_sampler.begin()
        for batch_idx, batch in enumerate(self._batches(start), start):
            self.batch_sampler.position = batch_idx + 1
            yield batch


class TensorLoader(Loader):
    """Batches gathered from tensors in memory, one indexed copy a batch.

    The first tensor is ``x``. Bytes stay bytes in memory and become float32 in ``[0, 1]`` batch by batch, unless they
    are no images; other integers (counts) and booleans become float32 unscaled; floating dtypes are kept. The other
    tensors keep their dtype. Sparse rows become dense. A batch is a tensor if there is one tensor, else a tuple.

    Args:
        tensors: of shape ``(N, *event)`` with the same ``N``, on one device. The batches are made there.
        order: which examples come in which order.
        rows: the examples that ``order`` counts, int64 of shape ``(order.num_examples,)``; all ``N`` by default.
        scale_bytes: whether bytes of ``x`` are divided by 255.

    Raises:
        ValueError: if there is no tensor, if lengths or devices differ, or if ``order`` counts other than the examples
            given.

    Example:
        >>> x = torch.tensor([[0], [51], [255]], dtype=torch.uint8)
        >>> loader = TensorLoader([x, torch.arange(3)], EpochOrder(3, batch_size=2, shuffle=False))
        >>> next(iter(loader))
        (tensor([[0.0000], [0.2000]]), tensor([0, 1]))
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | SparseRows],
        order: EpochOrder,
        rows: Tensor | None = None,
        *,
        scale_bytes: bool = True,
    ) -> None:
        super().__init__(order)
        self.scale_bytes = scale_bytes
        self.tensors = tuple(tensors)
        self.rows = rows
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
            raise ValueError(f"tensors: expected at least one, all with the same first dimension, got shapes {shapes}")
        if len(devices := {tensor.device for tensor in self.tensors}) > 1:
            raise ValueError(f"tensors: expected all on one device, got {sorted(map(str, devices))}")
        given = len(self.tensors[0]) if rows is None else len(rows)
        if order.num_examples != given:
            raise ValueError(f"order: expected num_examples={given}, got {order.num_examples}")

    def _batches(self, start: int) -> Iterator[Batch]:
        order = self.batch_sampler
        x, *others = self.tensors
        rows = order.epoch_indices if self.rows is None else self.rows[order.epoch_indices]
        rows = rows.to(x.device)
        for batch_idx in range(start, len(order)):
            chosen = rows[order.span(batch_idx)]
            batch = _as_floating(x.index_select(0, chosen), self.scale_bytes)
            yield (batch, *(other.index_select(0, chosen) for other in others)) if others else batch


def _as_floating(x: Tensor, scale_bytes: bool) -> Tensor:
    if x.is_floating_point() or x.is_complex():
        return x
    floating = x.to(torch.float32)
    return floating.div_(255) if scale_bytes and x.dtype == torch.uint8 else floating
