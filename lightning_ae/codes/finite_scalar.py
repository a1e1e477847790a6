"""Finite scalar quantisation: a codebook that is a grid, with nothing to learn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ae.checks import check_sequence, check_whole
from lightning_ae.codes.identity import CodeOutput
from lightning_ae.codes.quantized import QuantizedCode, straight_through

#: Share of the bounds that no number reaches, so that none is halfway between two levels.
_MARGIN = 1e-3


class FiniteScalarQuantizerCode(QuantizedCode):
    r"""Each channel rounded to one of a few levels: :math:`z_i = \mathrm{round}(b_i(h_i)) / \lfloor L_i / 2 \rfloor`.

    .. math:: b_i(h) = \tfrac{(1 - \epsilon)(L_i - 1)}{2} \tanh(h + s_i) - o_i

    bounds the channel to :math:`L_i` whole numbers; for an even :math:`L_i` the offset is :math:`o_i = \tfrac12` and
    :math:`s_i = \tan(2 o_i / ((1 - \epsilon)(L_i - 1)))`, else both are 0. Rounding has the gradient of the identity,
    so :math:`\partial z / \partial h = b_i'(h_i) / \lfloor L_i / 2 \rfloor`. The codebook is the grid of
    :math:`\prod_i L_i` points in :math:`[-1, 1]`, so there are no parameters, no penalties and nothing to expire.

    The paper's levels, by size of the codebook: 2⁸ ``[8, 6, 5]``, 2¹⁰ ``[8, 5, 5, 5]``, 2¹² ``[7, 5, 5, 5, 5]``, 2¹⁴
    ``[8, 8, 8, 6, 5]``, 2¹⁶ ``[8, 8, 8, 5, 5, 5]`` (of about these sizes: 240, 1000, 4375, 15360, 64000).

    Args:
        levels: :math:`L_i` of each channel, at least 2; the paper recommends 5 or more.

    Shapes:
        ``h`` and ``z``: ``(B, g * len(levels), *spatial)`` for any ``g``; indices ``(B, g, *spatial)``, below
        ``num_codes``, with the first level's digit counting fastest.

    Raises:
        TypeError: if ``levels`` is no sequence of whole numbers.
        ValueError: if it is empty or has a number below 2; for an ``h`` of another size.

    Source: Mentzer et al. 2023, https://arxiv.org/abs/2309.15505, appendix A.1 for the bounds.

    Example:
        >>> code = FiniteScalarQuantizerCode([8, 5])
        >>> code.num_codes
        40
        >>> code(torch.tensor([[-9.0, 0.3], [9.0, 0.0]])).z
        tensor([[-1.0000,  0.5000],
                [ 0.7500,  0.0000]])
        >>> code.lookup(torch.tensor([[0], [39]]))
        tensor([[-1.0000, -1.0000],
                [ 0.7500,  1.0000]])
    """

    _levels: Tensor
    _unit: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        levels = tuple(
            check_whole("levels", size) for size in check_sequence("levels", levels, "numbers, one for each channel")
        )
        if min(levels, default=0) < 2:
            raise ValueError(f"levels: expected at least one number, each of 2 or more, got {levels}.")
        if math.prod(levels) >= 2**63:
            raise ValueError(f"levels: expected a codebook of less than 2**63 points, got {math.prod(levels)}.")
        super().__init__(math.prod(levels), len(levels))
        self.levels = levels
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        #: 1 in the precision of the model
        self.register_buffer("_unit", torch.tensor(1.0, dtype=torch.float32), persistent=False)

    def _bound(self, vectors: Tensor) -> Tensor:
        # not in the default dtype, which is bfloat16 while a Trainer of that precision runs
        half = (self._levels - 1).to(vectors) * ((1 - _MARGIN) / 2)
        offset = (self._levels % 2 == 0).to(vectors) / 2
        return (vectors + (offset / half).tan()).tanh() * half - offset

    def forward(self, h: Tensor) -> CodeOutput:
        """Rounded channels, free of charge."""
        bounded = self._bound(self._split(h))
        z = straight_through(bounded, bounded.round()) / (self._levels // 2)
        return CodeOutput(self._merge(z).to(h.dtype), {})

    @torch.no_grad()
    def indices(self, h: Tensor) -> Tensor:
        """Number of the grid point, ``(B, g, *spatial)``."""
        digits = self._bound(self._split(h)).round().long() + self._levels // 2
        return (digits * self._basis()).sum(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """The latent of indices ``(B, g, *spatial)``, in the precision of the code, at least float32."""
        digits = self._checked(indices).unsqueeze(-1) // self._basis() % self._levels
        half = self._levels // 2
        # that of _split, so that the quotients are those of forward
        return self._merge((digits - half).to(torch.promote_types(self._unit.dtype, torch.float32)) / half)

    def _basis(self) -> Tensor:
        return self._levels.cumprod(0) // self._levels

    def statistics(self, h: Tensor) -> dict[str, Tensor]:
        """Indices of the grid, and its size."""
        return {"indices": self.indices(h), "num_codes": torch.tensor(self.num_codes)}

    def extra_repr(self) -> str:
        """The levels."""
        return f"levels={list(self.levels)}"
