"""Encoder and decoder of a dictionary: one linear map each, made to be read row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.checks import check_tensor, check_whole
from lightning_ae.networks.shapes import check_input
from lightning_ae.rebuildable import Rebuildable


class DictionaryEncoder(Rebuildable, nn.Module):
    r"""Encoder of a dictionary :math:`h = W x + b`.

    Args:
        in_features: :math:`d`.
        num_latents: :math:`n`.

    Shapes:
        ``(B, in_features)`` to ``(B, num_latents)``; ``weight`` is ``(num_latents, in_features)``, ``bias``
        ``(num_latents,)``.

    Raises:
        ValueError: for sizes that are not positive, or a batch of another shape.

    Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features.

    Example:
        >>> DictionaryEncoder(4, 16)(torch.zeros(2, 4)).shape
        torch.Size([2, 16])
    """

    def __init__(self, in_features: int, num_latents: int) -> None:
        super().__init__()
        self.in_features = in_features = check_whole("in_features", in_features)
        self.num_latents = num_latents = check_whole("num_latents", num_latents)
        #: of ``h``, without the batch dimension
        self.h_shape = (num_latents,)
        self.weight = nn.Parameter(functional.normalize(torch.randn(num_latents, in_features), dim=1))
        self.bias = nn.Parameter(torch.zeros(num_latents))

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations."""
        check_input(x, (self.in_features,), self)
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, num_latents={self.num_latents}"


class DictionaryDecoder(Rebuildable, nn.Module):
    r"""Decoder of a dictionary :math:`D z`, without a bias.

    Args:
        num_latents: :math:`n`.
        in_features: :math:`d`.

    Shapes:
        ``z``: a tensor ``(B, num_latents)`` or a :class:`SparseCode`, to ``(B, in_features)``. The parameter is
        ``atoms`` ``(num_latents, in_features)``, whose rows are the atoms; ``weight`` is its transpose, as in
        :class:`LinearDecoder`.

    Raises:
        ValueError: for sizes that are not positive, or a batch of another shape.

    Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features.

    Example:
        >>> DictionaryDecoder(16, 4)(torch.zeros(2, 16)).shape
        torch.Size([2, 4])
    """

    def __init__(self, num_latents: int, in_features: int) -> None:
        super().__init__()
        self.num_latents = num_latents = check_whole("num_latents", num_latents)
        self.in_features = in_features = check_whole("in_features", in_features)
        #: of ``z``, without the batch dimension
        self.latent_shape = (num_latents,)
        self.atoms = nn.Parameter(functional.normalize(torch.randn(num_latents, in_features), dim=1))

    @property
    def weight(self) -> Tensor:
        """:math:`D`, ``(in_features, num_latents)``; its columns are the atoms."""
        return self.atoms.t()

    def forward(self, z: Any) -> Tensor:
        """Sum of the atoms, each times its coefficient."""
        if not isinstance(z, Tensor):
            if not hasattr(z, "decode"):
                check_tensor("z", z)
            out: Tensor = z.decode(self.atoms)
            return out
        check_input(z, (self.num_latents,), self, "z")
        return functional.linear(z, self.atoms.t())

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_latents={self.num_latents}, in_features={self.in_features}"
