"""Codes of which only what is on is stored, and their two linear maps with sparse gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._pytree import register_pytree_node

from lightning_ae.checks import check_floating, check_tensor, check_whole

Select = Callable[[Tensor], tuple[Tensor, Tensor]]


class SparseCode:
    r"""A code ``(B, num_latents)`` of which ``m`` entries of each row are stored; the others are 0.

    Args:
        values: ``(B, m)``; zeros among them are entries that are off.
        indices: int64 ``(B, m)``, the latent of each value; no latent twice in a row.
        num_latents: ``n``.

    Raises:
        TypeError: if they are no tensors, or the indices not int64.
        ValueError: if the shapes differ, or ``num_latents`` is not positive.

    Example:
        >>> z = SparseCode(torch.tensor([[3.0, 2.0]]), torch.tensor([[0, 3]]), num_latents=4)
        >>> z.to_dense()
        tensor([[3., 0., 0., 2.]])
        >>> z.decode(torch.eye(4))
        tensor([[3., 0., 0., 2.]])
    """

    def __init__(self, values: Tensor, indices: Tensor, num_latents: int, *, _order: Order | None = None) -> None:
        check_tensor("values", values)
        check_tensor("indices", indices)
        if values.shape != indices.shape or values.ndim != 2:
            raise ValueError(
                f"SparseCode: expected values and indices (B, m), got {tuple(values.shape)} and {tuple(indices.shape)}."
            )
        if indices.dtype != torch.int64:
            raise TypeError(f"indices: expected int64, got {indices.dtype}; convert them, as with indices.long().")
        self.values = values
        self.indices = indices
        self.num_latents = check_whole("num_latents", num_latents)
        self._order = _order

    def __len__(self) -> int:
        """Number of examples."""
        return self.values.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> SparseCode:
        """Some of the examples."""
        return SparseCode(self.values[rows], self.indices[rows], self.num_latents)

    def __repr__(self) -> str:
        """Shape, entries, type."""
        return f"SparseCode(shape={tuple(self.shape)}, entries={self.values.shape[1]}, dtype={self.dtype})"

    @property
    def shape(self) -> torch.Size:
        """``(B, num_latents)``, as if it were dense."""
        return torch.Size((self.values.shape[0], self.num_latents))

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        """Whether the values have a graph."""
        return self.values.requires_grad

    def _with(self, values: Tensor) -> SparseCode:
        return SparseCode(values, self.indices, self.num_latents, _order=self._order)

    def detach(self) -> SparseCode:
        """The same, cut from the graph."""
        return self._with(self.values.detach())

    def prefix(self, size: int) -> SparseCode:
        """The same with all latents from ``size`` on set to 0."""
        return self._with(torch.where(self.indices < size, self.values, torch.zeros_like(self.values)))

    def to(self, *args: Any, **kwargs: Any) -> SparseCode:
        """On another device, or with values of another type."""
        values = self.values.to(*args, **kwargs)
        return SparseCode(values, self.indices.to(values.device), self.num_latents)

    def cpu(self) -> SparseCode:
        """On the CPU."""
        return self.to("cpu")

    def to_dense(self) -> Tensor:
        """As a tensor ``(B, num_latents)``, with a gradient."""
        return self.values.new_zeros(self.shape).scatter_add(1, self.indices, self.values)

    def decode(self, atoms: Tensor) -> Tensor:
        r"""Sum of atoms :math:`\sum_i z_i d_i` ``(B, d)``, for ``atoms`` ``(num_latents, d)``, their rows."""
        check_floating("atoms", atoms)
        if atoms.ndim != 2 or atoms.shape[0] != self.num_latents:
            raise ValueError(f"atoms: expected ({self.num_latents}, d), got {tuple(atoms.shape)}.")
        if self._order is None:
            self._order = order_by_latent(self.indices, self.num_latents)
        decoded: Tensor = _Decode.apply(self.values.to(atoms.dtype), self.indices, atoms, *self._order)
        return decoded

    def fired(self) -> Tensor:
        """Which latents are on in any example, bool ``(num_latents,)``."""
        counts = torch.zeros(self.num_latents, dtype=torch.int32, device=self.device)
        return counts.index_add_(0, self.indices.flatten(), (self.values != 0).flatten().int()) > 0


def _leaves(z: SparseCode) -> tuple[list[Any], int]:
    return [z.values, z.indices], z.num_latents


def _from_leaves(leaves: Iterable[Any], num_latents: int) -> SparseCode:
    z = SparseCode.__new__(SparseCode)  # unchecked, as what stands for tensors may come back here
    z.values, z.indices = leaves
    z.num_latents, z._order = num_latents, None
    return z


# so that it may be an input or output of torch.export and torch.func
register_pytree_node(SparseCode, _leaves, _from_leaves, serialized_type_name="lightning_ae.SparseCode")


class Order(NamedTuple):
    """Entries of a code sorted by latent.

    Attributes:
        entries: where each was in the flattened values, ``(B * m,)``.
        examples: of which example it is, ``(B * m,)``.
        starts: of each latent the first, ``(num_latents,)``.
    """

    entries: Tensor
    examples: Tensor
    starts: Tensor


def order_by_latent(indices: Tensor, num_latents: int) -> Order:
    """Sort the entries of a code."""
    # int32: the CPU has a radix sort for it
    latents, entries = indices.flatten().int().sort()
    every = torch.arange(num_latents, device=latents.device, dtype=torch.int32)
    return Order(entries, entries // max(1, indices.shape[1]), torch.searchsorted(latents, every))


def _sum_rows(values: Tensor, x: Tensor, entries: Tensor, examples: Tensor, starts: Tensor) -> Tensor:
    """For each latent the sum of rows of ``x``, each times the value of that latent in it: :math:`Z^T x`."""
    weights = values.flatten().index_select(0, entries)
    return functional.embedding_bag(examples, x, starts, per_sample_weights=weights, mode="sum")


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, atoms: Tensor, *order: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, atoms, *order)
        return functional.embedding_bag(indices, atoms, per_sample_weights=values, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, atoms, *order = ctx.saved_tensors
        grad = grad.contiguous()
        to_values = _dot_rows(grad, atoms, indices) if ctx.needs_input_grad[0] else None
        to_atoms = _sum_rows(values, grad, *order) if ctx.needs_input_grad[2] else None
        return to_values, None, to_atoms, None, None, None


def _dot_rows(x: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    r"""Products :math:`x_b \cdot r_{i(b,j)}`, ``(B, m)``, without gathering the rows."""
    bags, width = indices.shape
    starts = torch.arange(0, bags * width, max(1, width), device=x.device)[:bags]
    owner = torch.arange(bags, device=x.device).repeat_interleave(width)
    flat: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, rows, indices.flatten(), starts, owner, 0, -1
    )
    return flat.view(bags, width)


class _Attach(torch.autograd.Function):
    """Selected values with the gradient of the linear map that they came from."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        centre: Tensor,
        values: Tensor,
        centred: Tensor,
        indices: Tensor,
        *order: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, values, centred, indices, *order)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, values, centred, indices, *order = ctx.saved_tensors
        grad = torch.where(values > 0, grad, torch.zeros_like(grad)).to(weight.dtype)
        to_x = to_weight = to_centre = None
        if ctx.needs_input_grad[0]:
            to_x = functional.embedding_bag(indices, weight, per_sample_weights=grad, mode="sum").to(centred.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = _sum_rows(grad, centred.to(weight.dtype), *order)
        to_bias = grad.new_zeros(weight.shape[0]).index_add_(0, indices.flatten(), grad.flatten())
        if ctx.needs_input_grad[3]:
            to_centre = -(to_bias @ weight)  # the sum of all gradients of x, without having them
        return to_x, to_weight, to_bias, to_centre, None, None, None, None, None, None


def select_linear(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, select: Select) -> SparseCode:
    r"""Select from :math:`h = W(x - c) + b` and keep only that; the gradient of :math:`W` is a sparse sum, too.

    Args:
        x: ``(B, d)``.
        weight: :math:`W`, ``(n, d)``.
        bias: :math:`b`, ``(n,)``.
        centre: :math:`c`, ``(d,)``.
        select: from ``h`` ``(B, n)`` to values of at least 0 and indices, ``(B, m)`` each. A value that is positive
            must be that of ``h``, and gets a gradient; the others get none.

    Returns:
        The code.

    Raises:
        ValueError: if ``x`` is not ``(B, d)``.
    """
    check_floating("x", x)
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: expected a batch (B, {weight.shape[1]}), got {tuple(x.shape)}.")
    with torch.no_grad():
        centred = x - centre
        values, indices = select(functional.linear(centred, weight, bias))
        order = order_by_latent(indices, weight.shape[0])
    attached: Tensor = _Attach.apply(x, weight, bias, centre, values, centred, indices, *order)
    return SparseCode(attached, indices, weight.shape[0], _order=order)


def select_from(h: Tensor, select: Select) -> SparseCode:
    """Select from ``h`` ``(B, n)`` itself, as :func:`select_linear` does from what it computes.

    Raises:
        ValueError: if ``h`` has other dimensions.
    """
    check_floating("h", h)
    if h.ndim != 2:
        raise ValueError(f"h: expected pre-activations (B, n), got {tuple(h.shape)}; flatten them in the encoder.")
    values, indices = select(h.detach())
    kept = torch.where(values <= 0, torch.zeros_like(values), h.gather(1, indices))  # NaN stays NaN
    return SparseCode(kept, indices, h.shape[1])
