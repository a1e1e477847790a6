"""Metrics that torchmetrics lacks, and the choice among its own for reconstructions."""

from lightning_ae.metrics.bits import BitsPerDim
from lightning_ae.metrics.latents import active_units, codebook_usage, effective_rank, kl_per_dimension, perplexity
from lightning_ae.metrics.reconstruction import reconstruction_metrics
from lightning_ae.metrics.sparsity import gini, hoyer, l0, lifetime_sparsity, population_sparsity
from lightning_ae.metrics.subspace import SubspaceAngle, subspace_angles
from lightning_ae.metrics.variance import FractionVarianceUnexplained

__all__ = [
    "BitsPerDim",
    "FractionVarianceUnexplained",
    "SubspaceAngle",
    "active_units",
    "codebook_usage",
    "effective_rank",
    "gini",
    "hoyer",
    "kl_per_dimension",
    "l0",
    "lifetime_sparsity",
    "perplexity",
    "population_sparsity",
    "reconstruction_metrics",
    "subspace_angles",
]
