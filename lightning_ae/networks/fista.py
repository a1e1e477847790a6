"""Sparse inference in a fixed dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ae.checks import check_flag, check_non_negative, check_tensor, check_whole


@torch.no_grad()
def sparse_encode(
    x: Tensor,
    dictionary: Tensor,
    weight: float,
    *,
    positive: bool = False,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
) -> Tensor:
    r"""The sparse code of data in a fixed dictionary: :math:`\arg\min_z \|x - Dz\|^2 + \lambda\|z\|_1`, by FISTA.

    .. math:: z_{t+1} = S_{\eta\lambda/2}\!\left(y_t - \eta D^\top(D y_t - x)\right), \qquad
        y_{t+1} = z_{t+1} + \tfrac{\tau_t - 1}{\tau_{t+1}}(z_{t+1} - z_t)

    with the soft-threshold :math:`S`, :math:`\eta = 1/\sigma_{max}^2(D)`, and momentum that starts again whenever it
    points uphill. Iteration stops once the duality gap certifies every example's objective. scikit-learn's
    ``sparse_encode(x, D.T, algorithm="lasso_cd", alpha=lam / 2)`` minimises half of this. No gradients are recorded:
    for those take :class:`LISTAEncoder`.

    Args:
        x: data, ``(B, d)``.
        dictionary: :math:`D`, ``(d, k)``, its columns the atoms: ``decoder.weight`` of a :class:`LinearDecoder`.
        weight: :math:`\lambda \ge 0`, in units of ``x`` squared over those of ``z``.
        positive: whether all of :math:`z` is to be :math:`\ge 0`.
        max_steps: iterations at most.
        tolerance: largest gap between an example's objective and the minimum, as a share of its :math:`\|x\|^2`; single
            precision reaches about 1e-6.

    Returns:
        The codes, ``(B, k)``, with exact zeros; in float32 or wider.

    Raises:
        ValueError: if the shapes do not fit or a number is out of range.

    Source: Beck & Teboulle 2009, https://doi.org/10.1137/080716542; the restart: O'Donoghue & Candès 2015,
    https://arxiv.org/abs/1204.3982.

    Example:
        >>> sparse_encode(torch.tensor([[2.0, 0.3]]), torch.eye(2), weight=1.0)
        tensor([[1.5000, 0.0000]])
    """
    check_tensor("x", x)
    check_tensor("dictionary", dictionary)
    if x.ndim != 2 or dictionary.ndim != 2 or x.shape[1] != dictionary.shape[0]:
        raise ValueError(
            f"dictionary: expected x (B, d) and a dictionary (d, k), got {tuple(x.shape)} and "
            f"{tuple(dictionary.shape)}."
        )
    if not dictionary.isfinite().all():
        raise ValueError("dictionary: expected finite numbers, got some that are NaN or infinite.")
    weight, tolerance = check_non_negative("weight", weight), check_non_negative("tolerance", tolerance)
    max_steps, positive = check_whole("max_steps", max_steps, least=0), check_flag("positive", positive)
    dtype = torch.promote_types(torch.promote_types(x.dtype, dictionary.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return _fista(x.to(dtype), dictionary.to(dtype), weight, positive, max_steps, tolerance)


def _fista(x: Tensor, atoms: Tensor, weight: float, positive: bool, max_steps: int, tolerance: float) -> Tensor:
    z = x.new_zeros(x.shape[0], atoms.shape[1])
    if not z.numel():
        return z
    lipschitz = torch.linalg.matrix_norm(atoms, 2).square().clamp_min(torch.finfo(x.dtype).tiny)
    threshold = (weight / 2) / lipschitz
    low = torch.full_like(threshold, -torch.inf) if positive else -threshold
    y, momentum = z, x.new_ones(x.shape[0], 1)
    for step in range(max_steps):
        c = y - (y @ atoms.t() - x) @ atoms / lipschitz
        new = c - c.clamp(low, threshold)
        # each example has momentum of its own, lost when it points away from where the gradient step went
        uphill = ((y - new) * (new - z)).sum(1, keepdim=True) > 0
        following = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        y = new + torch.where(uphill, 0.0, (momentum - 1) / following) * (new - z)
        z, momentum = new, following
        if step % 10 == 9 and bool((_gap(x, atoms, z, weight, positive) <= tolerance * x.square().sum(1)).all()):
            break
    return z


def _gap(x: Tensor, atoms: Tensor, z: Tensor, weight: float, positive: bool) -> Tensor:
    """Objective of ``z`` less that of a feasible dual point, an upper bound on its distance from the minimum."""
    residual = x - z @ atoms.t()
    slopes = 2 * residual @ atoms
    steepest = (slopes if positive else slopes.abs()).amax(1).clamp_min(torch.finfo(x.dtype).tiny)
    dual = 2 * residual * (weight / steepest).clamp_max(1.0)[:, None]
    primal = residual.square().sum(1) + weight * z.abs().sum(1)
    return primal - ((dual * x).sum(1) - dual.square().sum(1) / 4)
