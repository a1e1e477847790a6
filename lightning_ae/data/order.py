"""Which examples come in which order, on which rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lightning_ae.checks import check_seed, check_whole


class EpochOrder:
    r"""The batches of example indices that one rank sees in an epoch.

    All ranks draw the same permutation :math:`\pi` of the :math:`n` examples from ``(seed, epoch)``, the identity
    without ``shuffle``; rank :math:`r` of :math:`W` takes :math:`\pi_r, \pi_{r+W}, \pi_{r+2W}, \ldots`

    * ``even=True``, for training: the permutation is wrapped around to a multiple of :math:`W`, so each rank gets the
      same number of examples and the ranks' batches ``k`` together are batch ``k`` of one device with ``W`` times the
      batch size.
    * ``even=False``, for evaluation: every example exactly once over all ranks. Every rank gets the same number of
      batches, since a rank with one more would wait for the others for ever; on several ranks the sizes of a rank's
      batches therefore differ by at most one.
    * ``drop_last=True``: only full batches of ``W * batch_size`` examples, nothing wrapped.

    It also keeps the place of a pass over the data, so that training resumes in the middle of an epoch.

    Args:
        num_examples: examples over all ranks.
        batch_size: examples in a batch of one rank.
        shuffle: draw a new permutation each epoch.
        even: give each rank equally many examples, repeating a few if need be.
        drop_last: leave out the last, smaller batch.
        seed: together with the epoch it decides the permutation.
        rank: this process, ``0 <= rank < world_size``.
        world_size: the number of processes that share the data.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is out of range, if ``drop_last`` would drop everything, or if some batch of some rank
            would be empty.

    Example:
        >>> order = EpochOrder(5, batch_size=2, shuffle=False)
        >>> [batch.tolist() for batch in order]
        [[0, 1], [2, 3], [4]]
        >>> last_rank = EpochOrder(5, batch_size=2, shuffle=False, even=True, rank=1, world_size=2)
        >>> [batch.tolist() for batch in last_rank]
        [[1, 3], [0]]
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        shuffle: bool,
        even: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_examples = check_whole("num_examples", num_examples)
        self.batch_size = check_whole("batch_size", batch_size)
        self.shuffle = shuffle
        self.seed = check_seed("seed", seed)
        self.world_size = check_whole("world_size", world_size)
        self.rank = check_whole("rank", rank, least=0)
        if rank >= world_size:
            raise ValueError(f"rank: expected less than world_size={world_size}, got {rank}")

        #: Batches of the current epoch handed out so far; kept by the loader that walks this order.
        self.position = 0
        self._epoch = 0
        self._scheduled = True  # the next pass starts at (epoch, position) instead of the epoch after
        self._cached: tuple[int, Tensor] | None = None

        full = world_size * batch_size
        if drop_last:
            self._total = num_examples // full * full
            if self._total == 0:
                raise ValueError(
                    f"drop_last: expected at least world_size * batch_size = {full} examples, got {num_examples}, "
                    "so every example would be dropped"
                )
        else:
            self._total = -(-num_examples // world_size) * world_size if even else num_examples
        self._num_batches = -(-self._total // full)
        self._balanced = world_size > 1 and not even
        if self._total // world_size < self._num_batches:
            raise ValueError(
                f"batch_size: {num_examples} examples in batches of {batch_size} leave some of the {world_size} ranks "
                f"with an empty batch; expected a larger batch_size or fewer ranks"
            )

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._epoch

    @property
    def sampler(self) -> EpochOrder:
        """Itself: Lightning looks for ``set_epoch`` at ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` the current one, from its first batch.

        A place asked for by :meth:`resume` in the same epoch is kept, as Lightning sets the epoch after it has
        restored the loader.

        Args:
            epoch: counted from 0.

        Raises:
            TypeError: if ``epoch`` is not an integer.
            ValueError: if ``epoch`` is negative.
        """
        check_whole("epoch", epoch, least=0)
        if not (self._scheduled and epoch == self._epoch):
            self.position = 0
        self._epoch = epoch
        self._scheduled = True

    def resume(self, epoch: int, batch: int) -> None:
        """Let the next pass start in ``epoch`` after its first ``batch`` batches.

        Args:
            epoch: counted from 0.
            batch: batches already handed out; a finished epoch leads on to the next.

        Raises:
            TypeError: if a number is not an integer.
            ValueError: if a number is negative.
        """
        self._epoch = check_whole("epoch", epoch, least=0)
        self.position = check_whole("batch", batch, least=0)
        self._scheduled = True

    def begin(self) -> int:
        """Start a pass: in the epoch that was set, else in the one after the last pass.

        Returns:
            The first batch of the pass, 0 unless :meth:`resume` asked otherwise.
        """
        if not self._scheduled or self.position >= len(self):
            self.set_epoch(self._epoch + 1)
        self._scheduled = False
        return self.position

    @property
    def epoch_indices(self) -> Tensor:
        """This rank's examples in the order of the current epoch, int64 of shape ``(n,)``."""
        if self._cached is None or self._cached[0] != self._epoch:
            self._cached = (self._epoch, self._draw())
        return self._cached[1]

    def span(self, batch_idx: int) -> slice:
        """Where batch ``batch_idx`` lies in :attr:`epoch_indices`.

        Args:
            batch_idx: ``0 <= batch_idx < len(self)``.

        Returns:
            A slice with both ends set.

        Raises:
            ValueError: if ``batch_idx`` is out of range.
        """
        if not 0 <= batch_idx < len(self):
            raise ValueError(f"batch_idx: expected 0 <= batch_idx < {len(self)}, got {batch_idx}")
        share = (self._total - self.rank + self.world_size - 1) // self.world_size
        if not self._balanced:
            return slice(batch_idx * self.batch_size, min((batch_idx + 1) * self.batch_size, share))
        size, larger = divmod(share, self._num_batches)
        start = batch_idx * size + min(batch_idx, larger)
        return slice(start, start + size + (batch_idx < larger))

    def indices(self, batch_idx: int) -> Tensor:
        """The examples of one batch of the current epoch on this rank.

        Args:
            batch_idx: ``0 <= batch_idx < len(self)``.

        Returns:
            int64 of shape ``(B,)``.

        Raises:
            ValueError: if ``batch_idx`` is out of range.
        """
        return self.epoch_indices[self.span(batch_idx)]

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch_idx in range(len(self)):
            yield self.indices(batch_idx)

    def _draw(self) -> Tensor:
        places = torch.arange(self.rank, self._total, self.world_size) % self.num_examples
        if not self.shuffle:
            return places
        return torch.randperm(self.num_examples, generator=self._random())[places]

    def _random(self, *numbers: int) -> torch.Generator:
        # The CPU generator keeps 32 bits of its seed; SeedSequence mixes all numbers into them, whereas seed + epoch
        # would give run 1 the shuffles of run 0, one epoch late.
        mixed = int(np.random.SeedSequence([self.seed, self._epoch, *numbers]).generate_state(1)[0])
        return torch.Generator().manual_seed(mixed)
