"""Data that fits in memory."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_ae.checks import check_flag
from lightning_ae.data.base import SplitDataModule
from lightning_ae.data.loader import TensorLoader
from lightning_ae.data.order import EpochOrder
from lightning_ae.data.sparse_rows import SparseRows

#: or what can be taken for one: a DataFrame, a sparse matrix of SciPy's
Array: TypeAlias = Tensor | NDArray[Any] | Any
Arrays: TypeAlias = Array | tuple[Array, ...]


class TensorSplit(NamedTuple):
    """Some rows of tensors that splits share, so that holding out examples copies none.

    Attributes:
        tensors: of shape ``(N, *event)`` with the same ``N``; sparse ones as :class:`SparseRows`.
        rows: which of them, int64; ``None`` for all.
    """

    tensors: tuple[Tensor | SparseRows, ...]
    rows: Tensor | None = None


class InMemoryDataModule(SplitDataModule[TensorSplit]):
    """Base of the data modules whose splits are arrays: a subclass returns them from :meth:`splits`.

    The first array of a split is ``x``; ``uint8`` stays bytes in memory and becomes float32, in ``[0, 1]`` if
    ``scale_bytes``, batch by batch, see :class:`~lightning_ae.data.loader.TensorLoader`. NumPy's float64 becomes
    float32, once; a tensor keeps its dtype.

    Args:
        batch_size: examples in a batch of one process.
        val_fraction: share of ``train`` held out when there is no ``val``, in ``[0, 1)``; 0 for no validation.
        seed: decides what is held out, and the shuffles.
        drop_last: leave out the last, smaller batch in training.
        device_resident: keep the data on the Trainer's device, so no batch is copied there.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = False,
        device_resident: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, seed=seed, drop_last=drop_last)
        self.device_resident = check_flag("device_resident", device_resident)
        #: whether bytes are divided by 255
        self.scale_bytes = True
        self._device: torch.device | None = None  # None leaves the tensors where they are

    @abstractmethod
    def splits(self) -> Mapping[str, Arrays]:
        """Return ``train`` and, where there are, ``val``, ``test`` and ``predict``: an array, or a tuple of them."""

    def setup(self, stage: str | None = None) -> None:
        """Load the splits, once, and move them to the Trainer's device if ``device_resident``.

        Args:
            stage: not used; all splits are loaded together.
        """
        if self.device_resident and self.trainer and self._device != self.trainer.strategy.root_device:
            self._device = self.trainer.strategy.root_device
            self._loaded = None
        super().setup(stage)

    def load(self) -> dict[str, TensorSplit]:
        """Return the splits as tensors, checked."""
        splits = {name: as_tensors(name, arrays) for name, arrays in self.splits().items()}
        shapes = {name: tuple(tensors[0].shape[1:]) for name, tensors in splits.items()}
        for name, shape in shapes.items():
            if shape != shapes["train"]:
                raise ValueError(f"{name}: expected examples of shape {shapes['train']} as in train, got {shape}")
        return {name: TensorSplit(tuple(t.to(self._device) for t in tensors)) for name, tensors in splits.items()}

    def size(self, split: TensorSplit) -> int:
        """Return the number of examples of a split."""
        return len(split.tensors[0] if split.rows is None else split.rows)

    def select(self, split: TensorSplit, rows: Tensor) -> TensorSplit:
        """Return the part of a split with the examples ``rows``."""
        return TensorSplit(split.tensors, rows if split.rows is None else split.rows[rows])

    def make_loader(self, split: TensorSplit, order: EpochOrder, *, training: bool) -> TensorLoader:
        """Return a loader of a split."""
        return TensorLoader(split.tensors, order, split.rows, scale_bytes=self.scale_bytes)


class TensorDataModule(InMemoryDataModule):
    """Tensors, NumPy arrays, tables or sparse matrices as a data module.

    Each split is an array of shape ``(N, *event)``, or a tuple of arrays with the same ``N`` whose first is ``x``;
    batches have the same form. A DataFrame (pandas, polars) of numbers is ``(N, columns)``; a SciPy matrix or a sparse
    tensor stays sparse in memory and becomes dense batch by batch. For dtypes see :class:`InMemoryDataModule`.

    Args:
        train: the training examples.
        val: the validation examples; ``val_fraction`` of ``train`` by default.
        test: the test examples.
        predict: the examples to predict; ``test`` by default, else ``val``, else ``train``.
        batch_size: examples in a batch of one process.
        val_fraction: share of ``train`` held out if ``val`` is not given, in ``[0, 1)``; 0 for no validation.
        seed: decides what is held out, and the shuffles.
        drop_last: leave out the last, smaller batch in training.
        device_resident: keep the data on the Trainer's device, so no batch is copied there.
        scale_bytes: whether ``uint8`` is grey levels, to be divided by 255, or numbers such as counts, to be left as
            they are. None for grey levels where examples are images, ``(H, W)`` or ``(C, *space)``, and for numbers,
            with a warning, where they are rows.

    Raises:
        TypeError: if a split is not an array or a tuple of arrays, or another argument has the wrong type.
        ValueError: if a split is empty, its arrays differ in length, or its examples differ in shape from ``train``.

    Example:
        >>> data = TensorDataModule(torch.rand(50, 3), batch_size=16, val_fraction=0.2)
        >>> data.in_shape, data.num_train_examples
        ((3,), 40)
        >>> [len(x) for x in data.train_dataloader()]
        [16, 16, 8]
    """

    def __init__(
        self,
        train: Arrays,
        val: Arrays | None = None,
        test: Arrays | None = None,
        predict: Arrays | None = None,
        *,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = False,
        device_resident: bool = False,
        scale_bytes: bool | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_fraction=val_fraction,
            seed=seed,
            drop_last=drop_last,
            device_resident=device_resident,
        )
        others = {"val": val, "test": test, "predict": predict}
        self._given = {"train": as_tensors("train", train)}
        self._given |= {name: as_tensors(name, arrays) for name, arrays in others.items() if arrays is not None}
        self.load()  # the errors at the door
        images = len(self.in_shape) > 1
        if scale_bytes is None and not images and self._given["train"][0].dtype == torch.uint8:
            warnings.warn(
                f"scale_bytes: train: bytes in rows of {self.in_shape[0]} are taken for numbers, such as counts, and "
                "not divided by 255. Say True for images that were flattened, or False.",
                stacklevel=2,
            )
        self.scale_bytes = images if scale_bytes is None else check_flag("scale_bytes", scale_bytes)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example ``x``."""
        return tuple(self._given["train"][0].shape[1:])

    def splits(self) -> Mapping[str, tuple[Tensor | SparseRows, ...]]:
        """Return the arrays given."""
        return self._given


def as_tensors(name: str, arrays: Arrays) -> tuple[Tensor | SparseRows, ...]:
    """Turn an array, or several of the same length, into tensors that share its memory where they can.

    Args:
        name: what to call the argument in a message.
        arrays: a tensor, NumPy array, DataFrame or sparse matrix of shape ``(N, *event)``, or a tuple of them.

    Returns:
        The tensors; NumPy's float64 as float32; sparse ones as :class:`SparseRows`.

    Raises:
        TypeError: if ``arrays`` is something else, or of a dtype that torch does not know.
        ValueError: if there is no array, or one is empty or 0-dimensional, or lengths differ.

    Example:
        >>> [t.dtype for t in as_tensors("train", (np.zeros((2, 3)), np.arange(2)))]
        [torch.float32, torch.int64]
    """
    tensors = tuple(_as_tensor(name, array) for array in (arrays if isinstance(arrays, (tuple, list)) else (arrays,)))
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not shapes or any(len(shape) == 0 or 0 in shape for shape in shapes):
        raise ValueError(f"{name}: expected arrays of shape (N, ...) that are not empty, got shapes {shapes}")
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"{name}: expected arrays with the same first dimension, got shapes {shapes}")
    return tensors


def _as_tensor(name: str, array: Array) -> Tensor | SparseRows:
    if isinstance(array, Tensor) and array.layout == torch.strided:
        return array.detach()
    if isinstance(array, SparseRows):
        return array
    # of somebody else's library, which need not be there
    if isinstance(array, Tensor) or (type(array).__module__.startswith("scipy.sparse") and hasattr(array, "tocsr")):
        if len(array.shape) != 2 or array.dtype.__str__() == "object":
            raise ValueError(f"{name}: expected a sparse matrix of numbers (N, d), got one of shape {array.shape}")
        return SparseRows.of(array)
    if callable(getattr(array, "to_numpy", None)) and not isinstance(array, type):
        array = _from_table(name, array)
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{name}: expected a tensor, a NumPy array, a DataFrame, a sparse matrix or a tuple of them, got "
            f"{type(array).__name__}"
        )
    dtype = np.float32 if array.dtype == np.float64 else array.dtype
    try:
        # torch wants C order and memory it may write to; np.require copies only what is not so.
        return torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of a dtype that torch knows, got {array.dtype}") from error


def _from_table(name: str, table: Any) -> NDArray[Any]:
    """The numbers of a DataFrame or a Series."""
    numbers = _numbers_of(table)
    if numbers is None:
        columns = [str(column) for column in getattr(table, "columns", ()) if _numbers_of(table[column]) is None]
        raise TypeError(
            f"{name}: expected columns of numbers, got others in {columns or 'the table'}; encode or drop them"
        )
    return numbers


def _numbers_of(table: Any) -> NDArray[Any] | None:
    array: NDArray[Any] = np.asarray(table.to_numpy())
    if array.dtype.kind in "biufc":
        return array
    if array.dtype.kind != "O" or any(isinstance(value, (str, bytes)) for value in array.flat):
        return None
    # gaps: pandas has a value of its own for them, others None
    for options in ({"dtype": np.float64, "na_value": np.nan}, {}):
        try:
            return np.asarray(table.to_numpy(**options)).astype(np.float64)
        except (TypeError, ValueError):
            continue
    return None
