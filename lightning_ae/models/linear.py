"""The linear autoencoder and its tie to PCA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ae.checks import check_flag
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder, check_loss
from lightning_ae.networks import LinearDecoder, LinearEncoder
from lightning_ae.networks.shapes import Shape, check_shape


class LinearAutoencoder(Autoencoder):
    r"""Linear autoencoder :math:`\hat x = D(Wx + b) + c`, tied: :math:`D = W^\top`.

    With squared error its optimum spans the principal subspace: the columns of :math:`D` span the first ``k``
    eigenvectors of the covariance, and the loss is the sum of the discarded eigenvalues. Tied, the optimal rows of
    :math:`W` are orthonormal; untied, any invertible mix of them is as good. There are no other minima, only
    saddles. Tied it has ``dk`` weights, untied ``2dk``, besides the biases.

    Args:
        in_shape: shape of one example; a number is a flat vector of that many features.
        latent_dim: ``k``.
        tied: whether the decoder is the encoder's transpose.
        bias: whether encoder and decoder have biases; without them centre the data.
        loss: None for :class:`SquaredError`.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, *in_shape)``; ``z``: ``(B, latent_dim)``.

    Raises:
        ValueError: for sizes that are not positive, or tied weights with a loss of several parameters per feature.

    Source: Baldi & Hornik 1989, https://doi.org/10.1016/0893-6080(89)90014-2; Plaut 2018,
    https://arxiv.org/abs/1804.10253.

    Example:
        >>> model = LinearAutoencoder(64, latent_dim=8)
        >>> sum(p.numel() for p in model.parameters()) == 64 * 8 + 64 + 8
        True
    """

    def __init__(
        self,
        in_shape: Shape,
        latent_dim: int,
        *,
        tied: bool = True,
        bias: bool = True,
        loss: ReconstructionLoss | None = None,
        **kwargs: Any,
    ) -> None:
        loss = check_loss(loss)
        encoder = LinearEncoder(in_shape, latent_dim, bias)
        out_shape = loss.params_shape(check_shape(in_shape))
        decoder = LinearDecoder(latent_dim, out_shape, bias, tied_to=encoder if check_flag("tied", tied) else None)
        super().__init__(encoder, decoder, loss, **kwargs)

    def components(self) -> Tensor:
        """Orthonormal basis of the span of the decoder, ``(d, latent_dim)``; compare it with PCA's components."""
        assert isinstance(self.decoder, LinearDecoder)
        basis: Tensor = torch.linalg.qr(self.decoder.weight.detach()).Q
        return basis
