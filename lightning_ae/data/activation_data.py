"""Collected activations as a data module, larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ae.checks import check_one_of, check_type, check_whole
from lightning_ae.data.base import SplitDataModule, hold_out
from lightning_ae.data.block_order import BlockOrder
from lightning_ae.data.loader import Loader
from lightning_ae.data.order import EpochOrder
from lightning_ae.data.shards import ActivationShards


class ActivationSplit(NamedTuple):
    """Stretches of rows on disk.

    Attributes:
        shards: what they are in.
        starts: their first rows, int64 ``(n,)``.
        sizes: their rows, int64 ``(n,)``.
    """

    shards: ActivationShards
    starts: Tensor
    sizes: Tensor

    def rows(self, examples: Tensor) -> Tensor:
        """The row in the shards of each example of the split, int64 of the same shape."""
        ends = self.sizes.cumsum(0)
        block = torch.searchsorted(ends, examples, right=True)
        return self.starts[block] + examples - (ends - self.sizes)[block]


class ActivationLoader(Loader):
    """Batches of rows on disk, as float32; a thread reads several batches at a time, in the order of the disk.

    Args:
        split: which rows.
        order: in which order.
        buffer_rows: rows in memory, about: half are handed out while the other half is read.
    """

    def __init__(self, split: ActivationSplit, order: EpochOrder, buffer_rows: int) -> None:
        super().__init__(order)
        self.split = split
        self.buffer_rows = buffer_rows

    def _batches(self, start: int) -> Iterator[Tensor]:
        order = self.batch_sampler
        ahead = max(1, self.buffer_rows // (2 * order.batch_size))
        windows = [range(first, min(first + ahead, len(order))) for first in range(start, len(order), ahead)]
        with ThreadPoolExecutor(1, thread_name_prefix="activations") as reader:
            coming = reader.submit(self._read, self._examples(windows[0])) if windows else None
            for i in range(len(windows)):
                assert coming is not None
                parts, buffer = coming.result()
                if i + 1 < len(windows):
                    coming = reader.submit(self._read, self._examples(windows[i + 1]))
                for places in parts:
                    yield buffer.index_select(0, places).float()

    def _examples(self, window: range) -> list[Tensor]:
        return [self.batch_sampler.indices(batch_idx) for batch_idx in window]

    def _read(self, batches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The rows of some batches in the order of the disk, and where each batch's are among them."""
        rows = self.split.rows(torch.cat(batches))
        ascending, order = rows.sort()
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return list(torch.split(places, [len(batch) for batch in batches])), self.split.shards.rows(ascending)


class ActivationDataModule(SplitDataModule[ActivationSplit]):
    r"""Activations collected by :func:`collect_activations`: a batch is ``x``, float32 ``(B, D)``.

    Shards are mapped into memory, so that they may be larger than it. Training is shuffled in two stages, see
    :class:`~lightning_ae.data.block_order.BlockOrder`: blocks of neighbouring rows are permuted, and then the rows of
    each pool of ``buffer_rows``. In an epoch each row comes once; ranks see different rows, and the batches ``k`` of
    all ranks together are batch ``k`` of one device with as many times the batch size. Training resumes in the middle
    of an epoch with the same batches.

    Rows that are neighbours come from the same example, so whole blocks are held out for validation and not single
    rows: ``val_by="shards"`` holds out whole shards, which hardly any example lies in two of.

    Args:
        folder: which :func:`collect_activations` wrote.
        batch_size: rows in a batch of one process.
        val_fraction: share held out, in ``[0, 1)``; about, as blocks or shards are whole.
        val_by: what is held out.
        block_rows: rows in a block, at most (a fiftieth of the data is the other limit). Larger ones are read faster
            from slow disks.
        buffer_rows: rows that are permuted among themselves, and the number of rows in memory, about.
        seed: decides what is held out, and the shuffles.
        drop_last: leave out the last, smaller batch in training.

    Raises:
        FileNotFoundError: if the folder has no manifest or lacks a shard, when it is first asked for.
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or collecting is not finished.
        ModuleNotFoundError: if safetensors is not installed (``pip install "lightning-ae[activations]"``).

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from lightning_ae import collect_activations
        >>> batches = torch.randn(100, 4).split(20)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = collect_activations(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "1", batches, folder)
        ...     data = ActivationDataModule(folder, batch_size=32)
        ...     data.in_shape, data.num_train_examples, [len(x) for x in data.train_dataloader()]
        ((3,), 96, [32, 32, 32])
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 4096,
        *,
        val_fraction: float = 0.05,
        val_by: Literal["blocks", "shards"] = "blocks",
        block_rows: int = 256,
        buffer_rows: int = 262_144,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed, drop_last=drop_last)
        check_type("folder", folder, str, Path)
        self.folder = Path(folder)
        self.val_by = check_one_of("val_by", val_by, ("blocks", "shards"))
        self.block_rows = check_whole("block_rows", block_rows)
        self.buffer_rows = check_whole("buffer_rows", buffer_rows)
        self._shards: ActivationShards | None = None

    @property
    def shards(self) -> ActivationShards:
        """All rows, with their means and where they are from."""
        if self._shards is None:
            self._shards = ActivationShards(self.folder)
            if not self._shards.manifest["complete"]:
                raise ValueError(f"folder: collecting into {self.folder} is not finished; call it again to go on")
        return self._shards

    @property
    def in_shape(self) -> tuple[int, ...]:
        """``(D,)``."""
        return (self.shards.num_features,)

    def load(self) -> dict[str, ActivationSplit]:
        """Return the splits: ``train``, and ``val`` if some are held out."""
        shards = self.shards
        block = max(1, min(self.block_rows, len(shards) // 50))
        starts = [torch.arange(0, size, block) for size in shards.sizes]
        sizes = torch.cat([at.diff(append=torch.tensor([size])) for at, size in zip(starts, shards.sizes, strict=True)])
        of_shard = torch.cat([torch.full_like(at, number) for number, at in enumerate(starts)])
        everything = ActivationSplit(shards, torch.cat(starts) + shards.starts[of_shard], sizes)
        if not self.val_fraction:
            return {"train": everything}
        if self.val_by == "blocks":
            kept, held_out = hold_out(len(sizes), self.val_fraction, self.seed)
        else:
            chosen = hold_out(len(shards.sizes), self.val_fraction, self.seed)
            kept, held_out = (torch.isin(of_shard, which).nonzero().flatten() for which in chosen)
        return {"train": self._blocks(everything, kept), "val": self._blocks(everything, held_out)}

    @staticmethod
    def _blocks(split: ActivationSplit, which: Tensor) -> ActivationSplit:
        return ActivationSplit(split.shards, split.starts[which], split.sizes[which])

    def size(self, split: ActivationSplit) -> int:
        """Return the number of rows of a split."""
        return int(split.sizes.sum())

    def select(self, split: ActivationSplit, rows: Tensor) -> ActivationSplit:
        """Return the part of a split with the examples ``rows``, each a block of its own."""
        return ActivationSplit(split.shards, split.rows(rows), torch.ones_like(rows))

    def make_loader(self, split: ActivationSplit, order: EpochOrder, *, training: bool) -> ActivationLoader:
        """Return a loader of a split."""
        blocks = BlockOrder(
            split.sizes,
            order.batch_size,
            pool_size=self.buffer_rows,
            shuffle=order.shuffle,
            even=training,
            drop_last=training and self.drop_last,
            seed=order.seed,
            rank=order.rank,
            world_size=order.world_size,
        )
        return ActivationLoader(split, blocks, self.buffer_rows)
