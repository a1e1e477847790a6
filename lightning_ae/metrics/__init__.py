"""Metrics that torchmetrics lacks, and the choice among its own for reconstructions."""

from lightning_ae.metrics.bits import BitsPerDim
from lightning_ae.metrics.dictionary import (
    FeatureDensity,
    Shrinkage,
    atom_recovery,
    dead_fraction,
    decoder_overlap,
    log10_density,
    max_cosine,
)
from lightning_ae.metrics.disentanglement import DCI, dci, mutual_information_gap, sap
from lightning_ae.metrics.downstream import LossRecovered, loss_recovered
from lightning_ae.metrics.latents import active_units, codebook_usage, effective_rank, kl_per_dimension, perplexity
from lightning_ae.metrics.reconstruction import reconstruction_metrics
from lightning_ae.metrics.scales import ScaleError
from lightning_ae.metrics.sparsity import gini, hoyer, l0, lifetime_sparsity, population_sparsity
from lightning_ae.metrics.subspace import SubspaceAngle, subspace_angles
from lightning_ae.metrics.variance import FractionVarianceUnexplained

__all__ = [
    "DCI",
    "BitsPerDim",
    "FeatureDensity",
    "FractionVarianceUnexplained",
    "LossRecovered",
    "ScaleError",
    "Shrinkage",
    "SubspaceAngle",
    "active_units",
    "atom_recovery",
    "codebook_usage",
    "dci",
    "dead_fraction",
    "decoder_overlap",
    "effective_rank",
    "gini",
    "hoyer",
    "kl_per_dimension",
    "l0",
    "lifetime_sparsity",
    "log10_density",
    "loss_recovered",
    "max_cosine",
    "mutual_information_gap",
    "perplexity",
    "population_sparsity",
    "reconstruction_metrics",
    "sap",
    "subspace_angles",
]
