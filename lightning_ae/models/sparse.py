"""The sparse autoencoder of the textbook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lightning_ae.checks import check_flag
from lightning_ae.codes import Code, L1Code
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder
from lightning_ae.networks import LinearDecoder


class SparseAutoencoder(Autoencoder):
    r"""Reconstruction plus a charge that keeps few latents active: :math:`\|x - \hat x\|^2 + \lambda\|z\|_1`.

    For any encoder and decoder; other codes charge otherwise or select outright. With an orthonormal linear decoder
    the optimum is known, ``soft_threshold(D.T @ x, weight / 2)``, and with any linear decoder it is the LASSO
    (:func:`sparse_encode`).

    A norm of the code is a matter of its scale: a decoder that doubles its weights halves the charge at the same
    reconstruction. ``unit_norm`` rules that out for a linear decoder; for others use weight decay, a code that is
    charged by count (:class:`JumpReLUCode`), or a target (``target_l0``).

    Args:
        encoder: any module from ``(B, *event)`` to ``h``.
        decoder: any module from ``z`` to pre-activations.
        code: None for ``L1Code(0.1)``.
        loss: None for :class:`SquaredError`.
        unit_norm: keep the atoms, columns of a :class:`LinearDecoder`, at norm 1: they are normalised at the start
            and after each optimizer step.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, *event)``; ``z``: what the code gives; every term: ``(B,)``.

    Raises:
        ValueError: if ``unit_norm`` is asked of another decoder.

    Source: Olshausen & Field 1996, https://doi.org/10.1038/381607a0; Goodfellow, Bengio & Courville 2016, Deep
    Learning, section 14.2.1.

    Example:
        >>> from lightning_ae import mlp_pair
        >>> model = SparseAutoencoder(*mlp_pair(64, 32), code=L1Code(0.5, "relu"))
        >>> sorted(model.terms(torch.ones(2, 64), model(torch.ones(2, 64))))
        ['l1', 'reconstruction']
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        code: Code | None = None,
        loss: ReconstructionLoss | None = None,
        *,
        unit_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, decoder, loss, code=L1Code(0.1) if code is None else code, **kwargs)
        self.unit_norm = check_flag("unit_norm", unit_norm)
        if self.unit_norm and not isinstance(decoder, LinearDecoder):
            raise ValueError(
                f"unit_norm: expected a LinearDecoder, whose columns are atoms, got {type(decoder).__name__}."
            )
        self._normalise()

    @torch.no_grad()
    def _normalise(self) -> None:
        if self.unit_norm and isinstance(self.decoder, LinearDecoder):
            self.decoder.weight.copy_(functional.normalize(self.decoder.weight, dim=0))

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The step, after which atoms have norm 1 again if ``unit_norm``."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._normalise()
