"""The contractive autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ae.checks import check_non_negative, check_type
from lightning_ae.models.mlp import MLPAutoencoder
from lightning_ae.networks.init import Activation
from lightning_ae.networks.shapes import Shape
from lightning_ae.penalties import JacobianPenalty, Penalty


class ContractiveAutoencoder(MLPAutoencoder):
    r"""Keeps the code from moving with the input: :math:`L(a, x) + \lambda\,\|\partial z/\partial x\|_F^2`.

    Reconstruction needs the directions along the data and the penalty removes the others. The default is the
    textbook's one sigmoid layer, whose Jacobian has a closed form.

    Args:
        in_shape: shape of one example; a number is a flat vector.
        latent_dim: size of the latent.
        contraction: :math:`\lambda`; afterwards ``model.penalties["contractive"].weight``.
        num_projections: None for the exact Jacobian, a number for Hutchinson's estimate: see
            :class:`JacobianPenalty`.
        hidden: hidden sizes of the encoder; the closed form needs none.
        latent_activation: name of the activation on the encoder's output.
        penalties: further ones.
        **kwargs: as for :class:`MLPAutoencoder`.

    Shapes:
        ``x``: ``(B, *in_shape)``; ``z``: ``(B, latent_dim)``.

    Raises:
        ValueError: as :class:`MLPAutoencoder` and :class:`JacobianPenalty`, or if ``penalties`` has a
            ``"contractive"`` of its own.

    Source: Rifai et al. 2011, https://icml.cc/2011/papers/455_icmlpaper.pdf.

    Example:
        >>> ContractiveAutoencoder(64, latent_dim=8, contraction=0.5).penalties["contractive"].weight
        0.5
    """

    def __init__(
        self,
        in_shape: Shape,
        latent_dim: int,
        *,
        contraction: float = 0.1,
        num_projections: int | None = None,
        hidden: Sequence[int] = (),
        latent_activation: Activation = "sigmoid",
        penalties: Mapping[str, Penalty] | None = None,
        **kwargs: Any,
    ) -> None:
        contraction = check_non_negative("contraction", contraction)
        check_type("penalties", penalties, Mapping, None)
        if "contractive" in (penalties or {}):
            raise ValueError("penalties: 'contractive' is the one this class adds; choose another name.")
        super().__init__(
            in_shape,
            latent_dim,
            hidden=hidden,
            latent_activation=latent_activation,
            penalties={"contractive": JacobianPenalty(contraction, num_projections), **(penalties or {})},
            **kwargs,
        )
