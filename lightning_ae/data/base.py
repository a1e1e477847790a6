"""What all data modules of this package share: the splits and the loaders made from them."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_ae.checks import check_flag, check_seed, check_share, check_whole
from lightning_ae.data.loader import Loader
from lightning_ae.data.order import EpochOrder

SplitT = TypeVar("SplitT")


def hold_out(num_examples: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Choose examples at random to be held out, the same ones for the same seed.

    Args:
        num_examples: how many there are.
        fraction: the share to hold out, in ``(0, 1)``; at least one example is.
        seed: decides which.

    Returns:
        The examples kept and those held out, int64, each ascending.

    Raises:
        ValueError: if nothing would be kept.

    Example:
        >>> kept, held_out = hold_out(10, 0.2, seed=0)
        >>> len(kept), len(held_out)
        (8, 2)
    """
    number = max(1, round(num_examples * fraction))
    if number >= num_examples:
        raise ValueError(f"fraction: holding out {fraction} of {num_examples} examples leaves none to train on")
    shuffled = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    return shuffled[number:].sort().values, shuffled[:number].sort().values


class SplitDataModule(LightningDataModule, ABC, Generic[SplitT]):
    """Loaders for the splits ``train``, ``val``, ``test`` and ``predict``, sharded over the Trainer's processes.

    A subclass says what its splits are (:meth:`load`), how to take a part of one (:meth:`select`) and how to make a
    loader (:meth:`make_loader`). Without a ``val`` split, ``val_fraction`` of ``train`` is held out. Without
    ``predict``, prediction runs on ``test``, else ``val``, else ``train``.

    Training batches are shuffled anew each epoch, unless the Trainer's ``overfit_batches`` is set. Evaluation sees
    every example once, over all processes.

    Args:
        batch_size: examples in a batch of one process.
        val_fraction: share of ``train`` held out when there is no ``val``, in ``[0, 1)``; 0 for no validation.
        seed: decides what is held out, and the shuffles.
        drop_last: leave out the last, smaller batch in training.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
    """

    def __init__(self, *, batch_size: int, val_fraction: float = 0.1, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__()
        self.batch_size = check_whole("batch_size", batch_size)
        self.val_fraction = check_share("val_fraction", val_fraction, "[)")
        self.seed = check_seed("seed", seed)
        self.drop_last = check_flag("drop_last", drop_last)
        self._loaded: dict[str, SplitT] | None = None

    @property
    @abstractmethod
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example, known before :meth:`setup`."""

    @abstractmethod
    def load(self) -> dict[str, SplitT]:
        """Return the splits that there are; ``train`` is one of them."""

    @abstractmethod
    def size(self, split: SplitT) -> int:
        """Return the number of examples of a split."""

    @abstractmethod
    def select(self, split: SplitT, rows: Tensor) -> SplitT:
        """Return the part of a split with the examples ``rows``."""

    @abstractmethod
    def make_loader(self, split: SplitT, order: EpochOrder, *, training: bool) -> Loader:
        """Return a loader of a split."""

    @property
    def num_train_examples(self) -> int:
        """The number of training examples, over all processes and without those held out."""
        return self.size(self._load_once()["train"])

    def setup(self, stage: str | None = None) -> None:
        """Load the splits, once.

        Args:
            stage: not used; all splits are loaded together.
        """
        self._load_once()

    def train_dataloader(self) -> Loader:
        """The training batches."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> Any:
        """The validation batches, or ``[]``, with which Lightning skips validation."""
        if "val" in self._load_once():
            return self._loader("val")
        # Lightning asks whether this is meant; it is
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> Loader:
        """The test batches.

        Raises:
            ValueError: if there is no test split.
        """
        return self._loader("test")

    def predict_dataloader(self) -> Loader:
        """The batches to predict."""
        splits = self._load_once()
        return self._loader(next(name for name in ("predict", "test", "val", "train") if name in splits))

    def _load_once(self) -> dict[str, SplitT]:
        if self._loaded is None:
            splits = dict(self.load())
            if "val" not in splits and self.val_fraction > 0:
                train = splits["train"]
                kept, held_out = hold_out(self.size(train), self.val_fraction, self.seed)
                splits |= {"train": self.select(train, kept), "val": self.select(train, held_out)}
            self._loaded = splits
        return self._loaded

    def _loader(self, name: str, *, training: bool = False) -> Loader:
        splits = self._load_once()
        if name not in splits:
            raise ValueError(f"{name}: this {type(self).__name__} has no such split, only {sorted(splits)}")
        split = splits[name]
        # None on a single device, and the data-parallel rank rather than the global one under model parallelism.
        shard = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"rank": 0, "num_replicas": 1}
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0  # set by the Trainer, not declared
        order = EpochOrder(
            self.size(split),
            self.batch_size,
            shuffle=training and not overfitting,
            even=training,
            drop_last=training and self.drop_last,
            seed=self.seed,
            rank=shard["rank"],
            world_size=shard["num_replicas"],
        )
        return self.make_loader(split, order, training=training)
