"""Images in a folder, read as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from lightning_ae.checks import check_one_of, check_type, check_whole, describe_type
from lightning_ae.data.base import SplitDataModule
from lightning_ae.data.file_loader import FileLoader
from lightning_ae.data.order import EpochOrder

_MODES = {1: "L", 3: "RGB"}  # Pillow's names, by the number of channels


class ImageFiles(Dataset[Tensor]):
    """Image files as float32 tensors of one size, in ``[0, 1]``.

    Args:
        paths: the files.
        image_size: the shorter side is resized to it, then the centre is cut out; pixels.
        channels: 1 for grey, 3 for colour.
        transform: applied to the tensor ``(channels, image_size, image_size)``.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: int,
        channels: int = 3,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.paths = list(paths)
        self.mode = _MODES[channels]
        fit = [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*fit, transform] if transform else fit)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with Image.open(self.paths[index]) as image:
                pixels = v2.functional.pil_to_tensor(ImageOps.exif_transpose(image).convert(self.mode))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            raise ValueError(f"root: expected images, could not read {self.paths[index]}: {error}") from error
        out: Tensor = self.transform(pixels)
        return out


class ImageFolderDataModule(SplitDataModule[list[Path]]):
    """The images under a folder, without labels: a batch is ``x``, float32 in ``[0, 1]``.

    If ``root/train`` exists, the splits are ``root/train``, ``root/val`` and ``root/test``, as far as they are there;
    else all images under ``root`` are for training. Folders are searched recursively, for the suffixes that torchvision
    takes for images.

    Args:
        root: the folder.
        image_size: the shorter side is resized to it, then the centre is cut out; pixels.
        channels: 1 for grey, 3 for colour.
        batch_size: examples in a batch of one process.
        num_workers: processes that read; 0 reads in this one.
        transform: augments training images, after they have their size and dtype; one of torchvision's v2, say.
        val_fraction: share of the training images held out if there is no ``root/val``, in ``[0, 1)``.
        seed: decides what is held out, and the shuffles.
        drop_last: leave out the last, smaller batch in training.

    Raises:
        FileNotFoundError: if a folder is missing or has no image, when the data are loaded.
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range; or a file is not an image, when it is read.

    Example:
        >>> ImageFolderDataModule("photos", image_size=64).in_shape
        (3, 64, 64)
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        *,
        channels: int = 3,
        batch_size: int = 64,
        num_workers: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed, drop_last=drop_last)
        check_type("root", root, str, Path)
        self.root = Path(root)
        self.image_size = check_whole("image_size", image_size)
        self.channels = check_one_of("channels", channels, _MODES)
        self.num_workers = check_whole("num_workers", num_workers, least=0)
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: expected a function or a module, got {describe_type(transform)}.")
        self.transform = transform

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return (self.channels, self.image_size, self.image_size)

    def load(self) -> dict[str, list[Path]]:
        """Return the paths of each split, sorted."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: expected a folder of images, found none at {self.root.resolve()}")
        named = {name: self.root / name for name in ("train", "val", "test") if (self.root / name).is_dir()}
        if named and "train" not in named:
            raise FileNotFoundError(f"root: expected {self.root.resolve()}/train beside {', '.join(named)}")
        return {name: _images(folder) for name, folder in (named or {"train": self.root}).items()}

    def size(self, split: list[Path]) -> int:
        """Return the number of examples of a split."""
        return len(split)

    def select(self, split: list[Path], rows: Tensor) -> list[Path]:
        """Return the part of a split with the examples ``rows``."""
        return [split[row] for row in rows.tolist()]

    def make_loader(self, split: list[Path], order: EpochOrder, *, training: bool) -> FileLoader:
        """Return a loader of a split."""
        images = ImageFiles(split, self.image_size, self.channels, self.transform if training else None)
        return FileLoader(images, order, self.num_workers)


def _images(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"root: expected images ({', '.join(IMG_EXTENSIONS)}) under {folder.resolve()}, found none"
        )
    return paths
