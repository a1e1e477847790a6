"""Handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lightning_ae.checks import check_flag, check_share
from lightning_ae.data.base import hold_out
from lightning_ae.data.tensors import Arrays, InMemoryDataModule


class DigitsDataModule(InMemoryDataModule):
    """1797 handwritten digits of 8×8 pixels, from scikit-learn; batches are ``(x, y)``.

    ``x`` is float32 in ``[0, 1]`` (16 grey levels divided by 16), ``y`` the digit, int64.

    Args:
        batch_size: examples in a batch of one process.
        val_fraction: share of the training examples held out for validation, in ``[0, 1)``.
        test_fraction: share of all examples held out for testing, in ``[0, 1)``; it is taken first.
        flat: give ``x`` as ``(64,)`` instead of ``(1, 8, 8)``.
        seed: decides the splits, and the shuffles.
        drop_last: leave out the last, smaller batch in training.
        device_resident: keep the data on the Trainer's device, so no batch is copied there.

    Raises:
        ImportError: if scikit-learn is not installed, when the data are loaded.
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Source: E. Alpaydin and C. Kaynak 1998, https://archive.ics.uci.edu/dataset/80 (the test part).

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        flat: bool = False,
        seed: int = 0,
        *,
        drop_last: bool = False,
        device_resident: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_fraction=val_fraction,
            seed=seed,
            drop_last=drop_last,
            device_resident=device_resident,
        )
        self.test_fraction = check_share("test_fraction", test_fraction, "[)")
        self.flat = check_flag("flat", flat)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example ``x``."""
        return (64,) if self.flat else (1, 8, 8)

    def splits(self) -> Mapping[str, Arrays]:
        """Return ``train`` and, unless ``test_fraction`` is 0, ``test``."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError('DigitsDataModule needs scikit-learn: pip install "lightning-ae[recipes]"') from error
        pixels, labels = load_digits(return_X_y=True)
        x = (pixels / 16).astype(np.float32).reshape(-1, *self.in_shape)
        y = labels.astype(np.int64)
        if self.test_fraction == 0:
            return {"train": (x, y)}
        train, test = (rows.numpy() for rows in hold_out(len(x), self.test_fraction, self.seed))
        return {"train": (x[train], y[train]), "test": (x[test], y[test])}
