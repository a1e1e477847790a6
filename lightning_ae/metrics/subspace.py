"""How far two subspaces are apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ae.checks import check_tensor
from lightning_ae.metrics.sparsity import widen


def subspace_angles(a: Tensor, b: Tensor) -> Tensor:
    r"""Principal angles between the column spans of two matrices, largest first.

    With orthonormal bases :math:`Q_a, Q_b` the cosines are the singular values of :math:`Q_a^\top Q_b`; small
    angles are taken from the sines, the singular values of :math:`Q_b - Q_a Q_a^\top Q_b`, where cosines lose
    half of the digits.

    Args:
        a: ``(d, k)`` with independent columns.
        b: ``(d, m)`` with independent columns.

    Returns:
        Angles in radians from 0 to π/2, ``(min(k, m),)``; NaN if any entry is not finite.

    Raises:
        ValueError: if the two are no matrices with the same number of rows.

    Source: Björck & Golub 1973, https://doi.org/10.2307/2005662; Knyazev & Argentati 2002,
    https://doi.org/10.1137/S1064827500377332.

    Example:
        >>> x, y = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])
        >>> subspace_angles(x, y).rad2deg()
        tensor([45.])
    """
    check_tensor("a", a)
    check_tensor("b", b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0] or not a.numel() * b.numel():
        raise ValueError(
            f"a and b: expected two matrices (d, k) and (d, m) with as many rows, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    with torch.autocast(a.device.type, enabled=False):
        a, b = widen(a), widen(b)
        common = torch.promote_types(a.dtype, b.dtype)
        finite = a.isfinite().all() & b.isfinite().all()
        # LAPACK makes something of NaN, or raises
        qa, qb = (torch.linalg.qr(torch.where(finite, m, 0).to(common)).Q for m in (a, b))
        overlap = qa.t() @ qb
        cosines = torch.linalg.svdvals(overlap).flip(0)  # ascending, so that angles descend
        sines = torch.linalg.svdvals(qb - qa @ overlap)
    angles = torch.where(cosines.square() > 0.5, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos())
    return torch.where(finite, angles, torch.nan)


class SubspaceAngle(Metric):
    """Largest principal angle between the span of a matrix and a fixed one, e.g. a decoder's and PCA's.

    Args:
        reference: ``(d, k)``, whose columns span the subspace to compare with.

    Shapes:
        updates with ``(d, m)``; the result is an angle in radians, without dimensions.

    Raises:
        ValueError: if the reference is no matrix, or the numbers of rows differ.

    Source: as :func:`subspace_angles`.

    Example:
        >>> metric = SubspaceAngle(torch.eye(3)[:, :2])
        >>> metric.update(torch.eye(3)[:, 1:])
        >>> metric.compute().rad2deg()
        tensor(90.)
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    angle: Tensor
    reference: Tensor

    def __init__(self, reference: Tensor) -> None:
        super().__init__()
        check_tensor("reference", reference)
        if reference.ndim != 2 or not reference.numel():
            raise ValueError(f"reference: expected a matrix (d, k), got {tuple(reference.shape)}.")
        self.register_buffer("reference", reference.detach().clone(), persistent=False)
        # every rank has the same weights, so the largest is also each one's own
        self.add_state("angle", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, matrix: Tensor) -> None:
        """Compare the span of a matrix; the last one counts."""
        check_tensor("matrix", matrix)
        if matrix.ndim != 2 or matrix.shape[0] != self.reference.shape[0]:
            raise ValueError(
                f"matrix: expected ({self.reference.shape[0]}, m) as the reference is, got {tuple(matrix.shape)}."
            )
        reference = self.reference.to(matrix.device)
        self.angle = subspace_angles(matrix.detach(), reference)[0].to(self.angle.dtype)

    def compute(self) -> Tensor:
        """The angle of the last update."""
        return self.angle
