"""Rows of a sparse matrix, as of counts of genes or words, which become dense batch by batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SparseRows:
    """A matrix ``(N, d)`` in compressed rows, with the few things that a loader asks of a tensor.

    Args:
        starts: where each row begins in the other two, and the end, int64 ``(N + 1,)``.
        columns: int64 ``(entries,)``.
        values: ``(entries,)``.
        width: ``d``.

    Example:
        >>> rows = SparseRows(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), torch.tensor([5.0, 6.0, 7.0]), 3)
        >>> rows.index_select(0, torch.tensor([1, 1, 0]))
        tensor([[6., 7., 0.],
                [6., 7., 0.],
                [0., 0., 5.]])
    """

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, width: int) -> None:
        self.starts, self.columns, self.values = starts, columns, values
        self.shape = torch.Size((len(starts) - 1, width))
        self.ndim = 2

    @classmethod
    def of(cls, matrix: Any) -> SparseRows:
        """Of a SciPy matrix or array of two dimensions, or of a sparse tensor; what is double becomes single."""
        if isinstance(matrix, Tensor):
            coo: Any = torch.Tensor.to_sparse_coo
            entries: Tensor = coo(matrix.detach()).coalesce()
            row, columns = entries.indices()
            lengths = torch.bincount(row, minlength=len(matrix))
            starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            return cls(starts, columns, entries.values(), matrix.shape[1])
        matrix = matrix.tocsr(copy=True)
        matrix.sum_duplicates()
        values = torch.as_tensor(matrix.data)
        values = values.float() if values.dtype == torch.float64 else values
        starts, columns = torch.as_tensor(matrix.indptr).long(), torch.as_tensor(matrix.indices).long()
        return cls(starts, columns, values, matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device | None) -> SparseRows:
        """The same on a device."""
        starts, columns, values = (part.to(device) for part in (self.starts, self.columns, self.values))
        return SparseRows(starts, columns, values, self.shape[1])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Some rows, dense ``(len(index), d)``; as of a tensor, for dimension 0."""
        begin = self.starts[index]
        lengths = self.starts[index + 1] - begin
        row = torch.arange(len(index), device=index.device).repeat_interleave(lengths)
        # the entry within its row, from where the row begins
        place = torch.arange(len(row), device=index.device) - (lengths.cumsum(0) - lengths)[row] + begin[row]
        dense = self.values.new_zeros(len(index), self.shape[1])
        dense[row, self.columns[place]] = self.values[place]
        return dense
