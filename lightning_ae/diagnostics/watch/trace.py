"""Knowing a tensor again by where its numbers are, without keeping them in memory."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Trace:
    """Which numbers a tensor holds: its place in a storage that is referred to weakly.

    A pre-activation is gone as soon as the activation has been applied; held until the end of the step it would cost
    fresh pages, which take longer than all that is counted. An address alone does not tell two tensors apart that have
    had it one after the other; a storage that is gone is never taken for another.

    Attributes:
        shape: of the tensor.
        kept: the tensor, detached, if its numbers may be needed; else None.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3)
        >>> trace = Trace(x)
        >>> trace.is_of(x.view(6)), trace.is_of(x[:1]), trace.is_of(x.clone())
        (True, False, False)
        >>> del x
        >>> trace.is_of(torch.rand(2, 3))
        False
    """

    __slots__ = ("_numel", "_place", "_storage", "kept", "shape")

    def __init__(self, tensor: Tensor, keep: bool = False) -> None:
        self.shape, self._numel = tensor.shape, tensor.numel()
        self.kept = tensor.detach() if keep else None
        self._place = -1
        self._storage: StorageWeakRef | None = None
        try:
            self._place, storage = tensor.data_ptr(), tensor.untyped_storage()
            self._storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError):
            return  # sparse tensors, and those of functorch, have none

    @property
    def storage(self) -> int:
        """The identity of the storage, as :func:`storage_of` gives it; 0 if there is none."""
        return 0 if self._storage is None else int(self._storage.cdata)

    def is_of(self, other: Tensor | Trace) -> bool:
        """Whether another tensor holds these numbers, perhaps in another shape."""
        if self._storage is None or self._numel != (other._numel if isinstance(other, Trace) else other.numel()):
            return False
        if isinstance(other, Trace):
            return self._place == other._place and self.storage == other.storage
        try:
            return self._place == other.data_ptr() and self.storage == storage_of(other)
        except RuntimeError:
            return False

    def release(self) -> None:
        """No longer keep the numbers."""
        self.kept = None


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's storage while anybody refers to it, weakly or not; 0 if it has none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def same_numbers(tensor: Tensor, other: Tensor) -> bool:
    """Whether one is the other, perhaps in another shape.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3)
        >>> same_numbers(x, x.view(6)), same_numbers(x, x.clone())
        (True, False)
    """
    try:
        return tensor.data_ptr() == other.data_ptr() and tensor.numel() == other.numel()
    except RuntimeError:
        return False  # sparse tensors have no storage
