"""Reconstruction losses: ``loss(params, x) -> (B,)`` and ``loss.mean(params) -> x̂``."""

from lightning_ae.losses.base import PointwiseLoss, ReconstructionLoss, SquaredError
from lightning_ae.losses.counts import NegativeBinomialNLL, PoissonNLL, ZeroInflatedNegativeBinomialNLL
from lightning_ae.losses.likelihoods import (
    BernoulliNLL,
    ContinuousBernoulliNLL,
    GaussianNLL,
    LaplaceNLL,
    Likelihood,
)

__all__ = [
    "BernoulliNLL",
    "ContinuousBernoulliNLL",
    "GaussianNLL",
    "LaplaceNLL",
    "Likelihood",
    "NegativeBinomialNLL",
    "PointwiseLoss",
    "PoissonNLL",
    "ReconstructionLoss",
    "SquaredError",
    "ZeroInflatedNegativeBinomialNLL",
]
