"""A shuffle of blocks of neighbours, for data too large to be read in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ae.checks import check_whole
from lightning_ae.data.order import EpochOrder


class BlockOrder(EpochOrder):
    r"""Like :class:`EpochOrder`, but shuffled in two stages, so that a pass reads the disk in long stretches.

    The examples lie in blocks of neighbours. Each epoch the blocks are permuted and cut into *pools* of about
    ``pool_size`` examples, as whole blocks allow; a pool's examples are permuted among themselves, and the pools come
    one after the other. Every example comes once. The order within an epoch is computed pool by pool: memory holds one
    number for each block and not for each example.

    Args:
        blocks: examples in each block, in the order of the data.
        batch_size: examples in a batch of one rank.
        pool_size: examples permuted among themselves, give or take a block; the larger, the nearer to a full shuffle.
        shuffle: draw a new order each epoch.
        even: give each rank equally many examples, repeating a few if need be.
        drop_last: leave out the last, smaller batch.
        seed: together with the epoch it decides the order.
        rank: this process, ``0 <= rank < world_size``.
        world_size: the number of processes that share the data.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: as for :class:`EpochOrder`.

    Example:
        >>> order = BlockOrder([3, 3, 2], batch_size=4, pool_size=4, shuffle=True)
        >>> sorted(torch.cat(list(order)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self,
        blocks: Sequence[int] | Tensor,
        batch_size: int,
        *,
        pool_size: int,
        shuffle: bool,
        even: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.blocks = torch.as_tensor(blocks, dtype=torch.int64)
        super().__init__(
            int(self.blocks.sum()),
            batch_size,
            shuffle=shuffle,
            even=even,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self.pool_size = check_whole("pool_size", pool_size)
        self._starts = self.blocks.cumsum(0) - self.blocks
        self._of_epoch: tuple[int, Tensor, Tensor] | None = None
        self._pools: dict[tuple[int, int], Tensor] = {}

    @property
    def epoch_indices(self) -> Tensor:
        """This rank's examples in the order of the current epoch, int64 of shape ``(n,)``; large for large data."""
        return torch.cat([self.indices(batch_idx) for batch_idx in range(len(self))])

    def indices(self, batch_idx: int) -> Tensor:
        """The examples of one batch of the current epoch on this rank.

        Args:
            batch_idx: ``0 <= batch_idx < len(self)``.

        Returns:
            int64 of shape ``(B,)``.

        Raises:
            ValueError: if ``batch_idx`` is out of range.
        """
        span = self.span(batch_idx)
        places = (self.rank + self.world_size * torch.arange(span.start, span.stop)) % self.num_examples
        if not self.shuffle:
            return places
        out = torch.empty_like(places)
        _, ends = self._blocks_of_epoch()
        pools = torch.searchsorted(ends, places, right=True)
        for pool in sorted(set(pools.tolist())):
            first = int(ends[pool - 1]) if pool else 0
            out[pools == pool] = self._pool(pool)[places[pools == pool] - first]
        return out

    def _blocks_of_epoch(self) -> tuple[Tensor, Tensor]:
        """The blocks in the order of this epoch, and where each pool ends."""
        if self._of_epoch is None or self._of_epoch[0] != self._epoch:
            permuted = torch.randperm(len(self.blocks), generator=self._random())
            ends = self.blocks[permuted].cumsum(0)
            # a pool ends with the block in which a multiple of pool_size lies
            last = (ends // self.pool_size) > ((ends - self.blocks[permuted]) // self.pool_size)
            last[-1] = True
            self._of_epoch = (self._epoch, permuted, ends[last])
            self._pools = {}
        return self._of_epoch[1:]

    def _pool(self, pool: int) -> Tensor:
        """The examples of a pool, permuted."""
        if (key := (self._epoch, pool)) not in self._pools:
            permuted, ends = self._blocks_of_epoch()
            upto = self.blocks[permuted].cumsum(0)
            first = int(ends[pool - 1]) if pool else 0
            inside = permuted[(upto > first) & (upto <= ends[pool])]
            sizes = self.blocks[inside]
            within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            examples = self._starts[inside].repeat_interleave(sizes) + within
            while len(self._pools) > 1:  # a batch may lie in two
                self._pools.pop(next(iter(self._pools)))
            self._pools[key] = examples[torch.randperm(len(examples), generator=self._random(pool))]
        return self._pools[key]
