"""Reconstruction losses: ``loss(params, x) -> (B,)`` and ``loss.mean(params) -> x̂``."""

from lightning_ae.losses.base import ActivatedLoss, PointwiseLoss, ReconstructionLoss, SquaredError
from lightning_ae.losses.counts import NegativeBinomialNLL, PoissonNLL, ZeroInflatedNegativeBinomialNLL
from lightning_ae.losses.discretized import (
    DiscretizedGaussianMixtureNLL,
    DiscretizedLogisticMixtureNLL,
    DiscretizedMixtureNLL,
)
from lightning_ae.losses.likelihoods import GaussianNLL, LaplaceNLL, Likelihood
from lightning_ae.losses.lpips import LPIPSLoss
from lightning_ae.losses.multiscale import MultiScaleSSIMLoss
from lightning_ae.losses.perceptual import FeatureLoss, FrozenModule, ImageGradients, TorchvisionFeatures
from lightning_ae.losses.ssim import SSIMLoss, SSIMParts, ssim
from lightning_ae.losses.unit_interval import BernoulliNLL, ContinuousBernoulliNLL
from lightning_ae.losses.weighted import AlphaMix, WeightedLoss

__all__ = [
    "ActivatedLoss",
    "AlphaMix",
    "BernoulliNLL",
    "ContinuousBernoulliNLL",
    "DiscretizedGaussianMixtureNLL",
    "DiscretizedLogisticMixtureNLL",
    "DiscretizedMixtureNLL",
    "FeatureLoss",
    "FrozenModule",
    "GaussianNLL",
    "ImageGradients",
    "LPIPSLoss",
    "LaplaceNLL",
    "Likelihood",
    "MultiScaleSSIMLoss",
    "NegativeBinomialNLL",
    "PointwiseLoss",
    "PoissonNLL",
    "ReconstructionLoss",
    "SSIMLoss",
    "SSIMParts",
    "SquaredError",
    "TorchvisionFeatures",
    "WeightedLoss",
    "ZeroInflatedNegativeBinomialNLL",
    "ssim",
]
