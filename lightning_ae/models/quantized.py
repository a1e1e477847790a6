"""The vector-quantised autoencoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_tensor, check_type, describe_type
from lightning_ae.codes.quantized import QuantizedCode, VectorQuantizerCode
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder
from lightning_ae.models.batches import corrupted


class VectorQuantizedAutoencoder(Autoencoder):
    r"""Latents that are one of finitely many: :math:`L(\mathrm{decoder}(e_i), x) + \beta\,\|h - \mathrm{sg}(e_i)\|^2`.

    With a :class:`VectorQuantizerCode` the VQ-VAE; with a :class:`FiniteScalarQuantizerCode`, whose codebook is a grid,
    there is no second term. For convolutional networks the latent is a map with a code at each position, as from
    ``conv_pair(..., spatial=True)``; of a flat latent each group of the code's ``dim`` numbers gets one.

    As loss and commitment are sums over the example, :math:`\beta` weighs them against each other as they are: a
    likelihood in nats, a squared distance in the units of ``h``.

    Args:
        encoder: any module from ``(B, *event)`` to ``h``.
        decoder: any module from ``z``, of the shape of ``h``, to pre-activations.
        loss: None for :class:`SquaredError`.
        code: a :class:`VectorQuantizerCode` or :class:`FiniteScalarQuantizerCode`; None for
            ``VectorQuantizerCode(512, dim)`` with as many channels as the decoder's latent has.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, *event)``; ``z``: ``(B, g * dim, *spatial)``; indices ``(B, g, *spatial)``; every term ``(B,)``.

    Raises:
        TypeError: if the code is another.
        ValueError: if encoder, code and decoder do not fit, as far as their sizes are known; if no code is given and
            the decoder has no ``latent_shape``.

    Source: van den Oord et al. 2017, https://arxiv.org/abs/1711.00937; Mentzer et al. 2023,
    https://arxiv.org/abs/2309.15505.

    Example:
        >>> from lightning_ae import FiniteScalarQuantizerCode, conv_pair
        >>> pair = conv_pair((1, 28, 28), 3, spatial=True)
        >>> model = VectorQuantizedAutoencoder(*pair, code=FiniteScalarQuantizerCode([8, 6, 5]))
        >>> indices = model.indices(torch.rand(2, 1, 28, 28))
        >>> indices.shape, model.decode_indices(indices).shape
        (torch.Size([2, 1, 7, 7]), torch.Size([2, 1, 28, 28]))
    """

    code: QuantizedCode

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        loss: ReconstructionLoss | None = None,
        *,
        code: QuantizedCode | None = None,
        **kwargs: Any,
    ) -> None:
        if code is None:
            check_type("decoder", decoder, nn.Module)
            shape = getattr(decoder, "latent_shape", None)
            if shape is None:
                raise ValueError(
                    f"code: expected one, as the decoder, a {type(decoder).__name__}, has no latent_shape; got None."
                )
            code = VectorQuantizerCode(512, shape[0])
        if not isinstance(code, QuantizedCode):
            raise TypeError(f"code: expected a VectorQuantizerCode or its like, got {describe_type(code)}.")
        super().__init__(encoder, decoder, loss, code=code, **kwargs)

    @torch.no_grad()
    def indices(self, x: Tensor) -> Tensor:
        """The codes of clean data, whole numbers ``(B, g, *spatial)``."""
        return self.code.indices(self.encoder(self._there(x)[0]))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """The reconstruction from codes ``(B, g, *spatial)``, output activation applied.

        Raises:
            ValueError: for numbers that are no codes; the host waits for the device to see that.
        """
        check_tensor("indices", indices)
        if not bool(((indices >= 0) & (indices < self.code.num_codes)).all()):
            raise ValueError(
                f"indices: expected numbers from 0 to {self.code.num_codes - 1}, got some from {int(indices.min())} to "
                f"{int(indices.max())}."
            )
        z = self.code.lookup(indices)
        return self.decode(z.to(next(self.decoder.parameters(), z).dtype))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As in :class:`Autoencoder`, and the ``indices``."""
        x, mask = self.observed(batch)
        h = self.encoder(corrupted(self.corruption, x, mask))
        z = self.code.encode(h)
        params = self.decoder(z)
        given = (params, x) if mask is None else (params, x, mask)
        prediction, score = self.loss.prediction(*given), self._reconstruction_score(params, x, mask)
        return {"z": z, "reconstruction": prediction, "score": score, "indices": self.code.indices(h)}

    def bits_per_example(self) -> float:
        """Size of the indices of one example, each as likely as any other: ``vectors * log2(num_codes)``.

        Raises:
            ValueError: if the decoder has no ``latent_shape``.
        """
        shape = getattr(self.decoder, "latent_shape", None)
        if shape is None:
            raise ValueError(f"latent_shape: {type(self.decoder).__name__} does not tell its latent's shape.")
        vectors: int = math.prod(shape) // self.code.dim
        return vectors * math.log2(self.code.num_codes)
