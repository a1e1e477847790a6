"""The denoising autoencoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_ae.corruption import MaskingNoise
from lightning_ae.models.mlp import MLPAutoencoder
from lightning_ae.networks.shapes import Shape


class DenoisingAutoencoder(MLPAutoencoder):
    r"""Encodes a corrupted input and is scored on the clean one: :math:`E\, L(a(\tilde x), x)`.

    Corruption acts in training only, unless it was built with ``in_eval``. To denoise with other networks, give
    ``corruption`` to any other autoencoder; this class is perceptrons with a default.

    Args:
        in_shape: shape of one example; a number is a flat vector.
        latent_dim: size of the latent; with enough noise it may exceed the data's.
        corruption: None for :class:`MaskingNoise` of a quarter; see :mod:`lightning_ae.corruption`.
        **kwargs: as for :class:`MLPAutoencoder`.

    Shapes:
        ``x``: ``(B, *in_shape)``; ``z``: ``(B, latent_dim)``.

    Raises:
        ValueError: as :class:`MLPAutoencoder`.

    Source: Vincent et al. 2010, https://www.jmlr.org/papers/v11/vincent10a.html.

    Example:
        >>> DenoisingAutoencoder(64, latent_dim=8).corruption.p
        0.25
    """

    def __init__(self, in_shape: Shape, latent_dim: int, *, corruption: nn.Module | None = None, **kwargs: Any) -> None:
        corruption = MaskingNoise(0.25) if corruption is None else corruption
        super().__init__(in_shape, latent_dim, corruption=corruption, **kwargs)
