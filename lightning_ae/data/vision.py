"""Image sets of torchvision, as bytes in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torchvision
from torch import Tensor

from lightning_ae.checks import check_flag, check_type
from lightning_ae.data.tensors import Arrays, InMemoryDataModule

VisionSet: TypeAlias = Literal["MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100"]


class _Known(NamedTuple):
    in_shape: tuple[int, int, int]
    files: str


_KNOWN: dict[str, _Known] = {
    "MNIST": _Known((1, 28, 28), "MNIST/raw/*-ubyte"),
    "FashionMNIST": _Known((1, 28, 28), "FashionMNIST/raw/*-ubyte"),
    "KMNIST": _Known((1, 28, 28), "KMNIST/raw/*-ubyte"),
    "USPS": _Known((1, 16, 16), "usps.bz2 and usps.t.bz2"),
    "CIFAR10": _Known((3, 32, 32), "cifar-10-batches-py/"),
    "CIFAR100": _Known((3, 32, 32), "cifar-100-python/"),
}


class VisionDataModule(InMemoryDataModule):
    """A torchvision set as ``(x, y)`` batches, without decoding an image per example.

    The pixels stay ``uint8`` in memory, of shape ``(N, C, H, W)``; a batch ``x`` is float32 in ``[0, 1]``, the same
    numbers as torchvision's ``ToTensor`` gives; ``y`` are the labels, int64.

    Args:
        dataset: the name of the torchvision class.
        root: the folder that holds it, as torchvision lays it out.
        download: fetch it if it is not there.
        batch_size: examples in a batch of one process.
        flat: give ``x`` as ``(C * H * W,)``.
        val_fraction: share of the training set held out for validation, in ``[0, 1)``.
        seed: decides what is held out, and the shuffles.
        drop_last: leave out the last, smaller batch in training.
        device_resident: keep the data on the Trainer's device, so no batch is copied there.

    Raises:
        FileNotFoundError: if the set is not under ``root``, when the data are loaded.
        TypeError: if an argument has the wrong type.
        ValueError: if ``dataset`` is not one of the names, or an argument is out of range.

    Example:
        >>> VisionDataModule("CIFAR10", root="data").in_shape  # before any download
        (3, 32, 32)
    """

    def __init__(
        self,
        dataset: VisionSet = "MNIST",
        root: str | Path = "data",
        download: bool = False,
        *,
        batch_size: int = 256,
        flat: bool = False,
        val_fraction: float = 0.1,
        seed: int = 0,
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
        check_type("dataset", dataset, str)
        check_type("root", root, str, Path)
        if dataset not in _KNOWN:
            raise ValueError(f"dataset: expected one of {', '.join(get_args(VisionSet))}, got {dataset!r}")
        self.dataset = dataset
        self.root = Path(root)
        self.download = check_flag("download", download)
        self.flat = check_flag("flat", flat)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example ``x``."""
        shape = _KNOWN[self.dataset].in_shape
        return (math.prod(shape),) if self.flat else shape

    def prepare_data(self) -> None:
        """Download the set if asked to, in one process."""
        if self.download:
            for train in (True, False):
                getattr(torchvision.datasets, self.dataset)(self.root, train=train, download=True)

    def splits(self) -> Mapping[str, Arrays]:
        """Return torchvision's ``train`` and ``test``."""
        return {"train": self._read(train=True), "test": self._read(train=False)}

    def _read(self, *, train: bool) -> tuple[Tensor, Tensor]:
        channels, height, width = _KNOWN[self.dataset].in_shape
        try:
            images = getattr(torchvision.datasets, self.dataset)(self.root, train=train)
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"root: expected {_KNOWN[self.dataset].files} of {self.dataset} in {self.root.resolve()}, found none "
                f"or damaged files; download=True fetches them"
            ) from error
        # (N, H, W) and (N, H, W, C) alike
        pixels = torch.as_tensor(images.data).reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        return pixels.reshape(-1, *self.in_shape).contiguous(), torch.as_tensor(images.targets, dtype=torch.int64)
