"""Physical laws that a reconstruction must obey, and residuals for the common ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import check_finite, check_flag, check_floating, check_positive, describe_type
from lightning_ae.losses.base import full_precision
from lightning_ae.penalties.base import Penalty
from lightning_ae.rebuildable import Rebuildable


class ConstraintPenalty(Penalty):
    r"""A law that the reconstruction must obey: :math:`\|r(\hat x)\|^2`, zero where it holds.

    With ``conserve`` the law is that the residual is unchanged, :math:`\|r(\hat x) - r(x)\|^2`: a total that
    is conserved rather than zero. :class:`Total` and :class:`Divergence` are shipped residuals.

    Args:
        residual: from ``(B, *event)`` to ``(B, ...)``; any function or module.
        weight: its weight in the objective.
        conserve: penalise the change of the residual instead of the residual.

    Shapes:
        the raw term: ``(B,)``, in units of the residual squared.

    Source: Raissi, Perdikaris & Karniadakis 2019, https://doi.org/10.1016/j.jcp.2018.10.045.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> model = LinearAutoencoder(3, latent_dim=2, penalties={"mass": ConstraintPenalty(Total(), conserve=True)})
        >>> sorted(model.terms(torch.ones(2, 3), model(torch.ones(2, 3))))
        ['mass', 'reconstruction']
    """

    def __init__(self, residual: Callable[[Tensor], Tensor], weight: float = 1.0, conserve: bool = False) -> None:
        super().__init__(weight)
        if not callable(residual):
            raise TypeError(f"residual: expected a function or a module, got {describe_type(residual)}.")
        self.residual = residual
        self.conserve = check_flag("conserve", conserve)

    def forward(self, x: Tensor, output: AutoencoderOutput, model: AutoencoderLike) -> Tensor:
        """Squared norm of each example's residual."""
        mask = getattr(output, "mask", None)
        masked = () if mask is None else (mask,)
        residual = self.residual(full_precision(model.loss.prediction(output.params, x, *masked)))
        if self.conserve:
            residual = residual - self.residual(full_precision(x))
        return residual.reshape(x.shape[0], -1).square().sum(1)


class Total(Rebuildable, nn.Module):
    r"""Residual :math:`\sum_i x_i \, \Delta V`, of an extensive quantity; use it with ``conserve``.

    Args:
        volume: :math:`\Delta V` of one cell.

    Shapes:
        ``(B, *event)`` to ``(B, 1)``.

    Example:
        >>> Total()(torch.ones(1, 2, 2))
        tensor([[4.]])
    """

    def __init__(self, volume: float = 1.0) -> None:
        super().__init__()
        self.volume = check_finite("volume", volume)

    def forward(self, x: Tensor) -> Tensor:
        """Sum each example."""
        check_floating("x", x, least_dims=2)
        return x.flatten(1).sum(1, keepdim=True) * self.volume


class Divergence(Rebuildable, nn.Module):
    r"""Residual :math:`\nabla \cdot v` of a vector field on a regular grid, by central differences.

    Channel ``i`` is the component along spatial dimension ``i``. Points at the border have no central
    difference and are left out.

    Args:
        spacing: distance of grid points.

    Shapes:
        ``(B, n, *spatial)`` with ``n`` spatial dimensions to ``(B, *(s - 2 for s in spatial))``.

    Raises:
        ValueError: if there is not one channel for each spatial dimension, or a side is shorter than 3.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        >>> Divergence()(torch.stack([y, -x])[None]).abs().max()  # (y, −x) flows in as much as out
        tensor(0.)
    """

    def __init__(self, spacing: float = 1.0) -> None:
        super().__init__()
        self.spacing = check_positive("spacing", spacing)

    def forward(self, v: Tensor) -> Tensor:
        """Divergence at the inner points."""
        check_floating("v", v)
        dims = v.ndim - 2
        if dims < 1 or v.shape[1] != dims or min(v.shape[2:]) < 3:
            raise ValueError(
                f"v: Divergence: expected (B, n, *spatial) with n sides of at least 3, got {tuple(v.shape)}."
            )
        total = torch.zeros((), device=v.device)
        for i in range(dims):
            component = v[:, i]
            for j in range(dims):
                size = component.shape[j + 1]
                if i != j:
                    component = component.narrow(j + 1, 1, size - 2)
            size = component.shape[i + 1]
            difference = component.narrow(i + 1, 2, size - 2) - component.narrow(i + 1, 0, size - 2)
            total = total + difference / (2 * self.spacing)
        return total
