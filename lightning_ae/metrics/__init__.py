"""Metrics that torchmetrics lacks, and the choice among its own for reconstructions."""

from lightning_ae.metrics.bits import BitsPerDim
from lightning_ae.metrics.reconstruction import reconstruction_metrics
from lightning_ae.metrics.subspace import SubspaceAngle, subspace_angles
from lightning_ae.metrics.variance import FractionVarianceUnexplained

__all__ = [
    "BitsPerDim",
    "FractionVarianceUnexplained",
    "SubspaceAngle",
    "reconstruction_metrics",
    "subspace_angles",
]
