"""Linear encoder and decoder, tied or not."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.checks import check_flag, check_type, check_whole
from lightning_ae.networks.init import initialise
from lightning_ae.networks.shapes import Shape, check_input, check_shape
from lightning_ae.rebuildable import Rebuildable


class TiedLinear(nn.Module):
    r"""The transpose of a linear layer: :math:`y = W^\top x + b` with the other layer's own :math:`W`.

    The weight is the same parameter, not a copy: one gradient, one optimizer state.

    Args:
        source: the layer whose ``weight`` ``(k, d)`` is shared.
        bias: whether to add a bias ``(d,)`` of its own.

    Shapes:
        ``(B, k)`` to ``(B, d)``.

    Example:
        >>> import torch
        >>> layer = nn.Linear(3, 2)
        >>> TiedLinear(layer).weight is layer.weight
        True
    """

    def __init__(self, source: nn.Linear | LinearEncoder, bias: bool = True) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = nn.Parameter(self.weight.detach().new_zeros(self.weight.shape[1])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the transpose."""
        return functional.linear(x, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        """Sizes, as :class:`torch.nn.Linear` shows them."""
        out_features, in_features = self.weight.shape[1], self.weight.shape[0]
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"


class LinearEncoder(Rebuildable, nn.Linear):
    r"""Linear encoder :math:`h = W x + b` on the flattened input.

    Args:
        in_shape: shape of one example; a number is a flat vector.
        latent_dim: ``k``.
        bias: whether to add :math:`b`.

    Shapes:
        ``(B, *in_shape)`` to ``(B, latent_dim)``; ``weight`` is ``(latent_dim, prod(in_shape))``.

    Raises:
        ValueError: for sizes that are not positive, or a batch of another shape.

    Source: Baldi & Hornik 1989, https://doi.org/10.1016/0893-6080(89)90014-2.

    Example:
        >>> import torch
        >>> LinearEncoder((1, 8, 8), 3)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, in_shape: Shape, latent_dim: int, bias: bool = True) -> None:
        self.in_shape = check_shape(in_shape)
        #: of ``h``, without the batch dimension
        self.h_shape = (check_whole("latent_dim", latent_dim),)
        super().__init__(math.prod(self.in_shape), self.h_shape[0], check_flag("bias", bias))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Project."""
        check_input(x, self.in_shape, self)
        return super().forward(x.flatten(1))


class LinearDecoder(Rebuildable, nn.Module):
    r"""Linear decoder :math:`a = D z + c`, reshaped to the data; tied: :math:`D = W^\top` of an encoder.

    Args:
        latent_dim: ``k``.
        out_shape: shape of one example; a number is a flat vector.
        bias: whether to add :math:`c`.
        tied_to: the encoder whose weight is shared.

    Shapes:
        ``(B, latent_dim)`` to ``(B, *out_shape)``; ``weight`` is ``(prod(out_shape), latent_dim)``.

    Raises:
        ValueError: for sizes that are not positive, or that differ from those of the encoder it is tied to.

    Source: Baldi & Hornik 1989, https://doi.org/10.1016/0893-6080(89)90014-2.

    Example:
        >>> encoder = LinearEncoder(4, 2)
        >>> sum(p.numel() for p in nn.ModuleList([encoder, LinearDecoder(2, 4, tied_to=encoder)]).parameters())
        14
    """

    def __init__(
        self, latent_dim: int, out_shape: Shape, bias: bool = True, tied_to: LinearEncoder | None = None
    ) -> None:
        super().__init__()
        #: of ``z``, without the batch dimension
        latent_dim, bias = check_whole("latent_dim", latent_dim), check_flag("bias", bias)
        self.latent_shape = (latent_dim,)
        self.out_shape = check_shape(out_shape, "out_shape")
        check_type("tied_to", tied_to, LinearEncoder, None)
        size = math.prod(self.out_shape)
        if tied_to is None:
            self.layer: nn.Module = nn.Linear(latent_dim, size, bias)
            initialise(self.layer)
        elif tied_to.weight.shape == (latent_dim, size):
            self.layer = TiedLinear(tied_to, bias)
        else:
            raise ValueError(
                f"tied_to: expected an encoder with weight {(latent_dim, size)}, got {tuple(tied_to.weight.shape)}."
            )

    @property
    def weight(self) -> Tensor:
        """:math:`D`, ``(d, k)``; its columns are the atoms."""
        weight = self.layer.get_parameter("weight")
        return weight.t() if isinstance(self.layer, TiedLinear) else weight

    def forward(self, z: Tensor) -> Tensor:
        """Reconstruct."""
        check_input(z, self.latent_shape, self, "z")
        out: Tensor = self.layer(z)
        return out.reshape(-1, *self.out_shape)
