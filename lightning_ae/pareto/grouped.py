"""Layers of several networks of one shape in one product each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class GroupedLinear(nn.Module):
    r"""``K`` linear layers :math:`y_k = W_k h_k + b_k` at once.

    Args:
        layers: the layers, whose numbers are copied; all with a bias, or none.
        shared: whether all have the same input, which makes them one wide layer.
        tied_to: the group whose weights these are, transposed.

    Shapes:
        ``(K, B, in)``, shared ``(B, in)``, to ``(K, B, out)``; ``bias`` is ``(K, out)``, ``weight`` ``(K, in, out)``,
        shared ``(K, out, in)``: the layout in which its gradient comes out of the product, which saves a copy.

    Example:
        >>> layers = [nn.Linear(3, 2), nn.Linear(3, 2)]
        >>> GroupedLinear(layers)(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 2])
        >>> GroupedLinear(layers, shared=True)(torch.zeros(5, 3)).shape
        torch.Size([2, 5, 2])
    """

    def __init__(self, layers: Sequence[Any], *, shared: bool = False, tied_to: GroupedLinear | None = None) -> None:
        super().__init__()
        self._layers = tuple(layers)  # in a tuple, so that they are no submodules
        self.shared = shared
        self.tied = tied_to is not None
        if tied_to is None:
            #: whether ``weight`` is (K, in, out), as seen from here
            self.transposed = not shared
            weights = torch.stack([layer.weight.detach() for layer in layers])
            self.weight = nn.Parameter(weights if shared else weights.mT.contiguous())
        else:
            self.transposed = not tied_to.transposed
            self.weight = tied_to.weight
        self.bias = None if layers[0].bias is None else _stack([layer.bias for layer in layers])

    def forward(self, h: Tensor) -> Tensor:
        """Multiply."""
        if self.shared:
            bias = None if self.bias is None else self.bias.flatten()
            wide = functional.linear(h, self.weight.flatten(0, 1), bias)
            return wide.view(len(h), *self.weight.shape[:2]).transpose(0, 1)
        weight = self.weight if self.transposed else self.weight.mT
        return torch.bmm(h, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], h, weight)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the numbers into the layers."""
        for k, layer in enumerate(self._layers):
            if not self.tied:
                layer.weight.copy_(self.weight[k].t() if self.transposed else self.weight[k])
            if self.bias is not None:
                layer.bias.copy_(self.bias[k])


class GroupedLayerNorm(nn.Module):
    """``K`` layer normalisations at once, over the last dimension of ``(K, B, d)``.

    Args:
        layers: the layers, whose numbers are copied.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self._layers = tuple(layers)
        self.weight = _stack([layer.weight for layer in layers])
        self.bias = _stack([layer.bias for layer in layers])
        self.eps: float = layers[0].eps

    def forward(self, h: Tensor) -> Tensor:
        """Normalise."""
        normal = functional.layer_norm(h, h.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias[:, None], normal, self.weight[:, None])

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the numbers into the layers."""
        for layer, weight, bias in zip(self._layers, self.weight, self.bias, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


def _stack(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach() for parameter in parameters]))
