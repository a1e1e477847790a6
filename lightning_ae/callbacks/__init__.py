"""Callbacks: monitors that see why a model does not learn, and predictions on disk."""

from lightning_ae.callbacks.dead_relu import DeadReLUMonitor
from lightning_ae.callbacks.gradient_saturation import GradientSaturationMonitor
from lightning_ae.callbacks.latent_sparsity import LatentSparsityMonitor
from lightning_ae.callbacks.predictions import PredictionWriter, load_predictions

__all__ = [
    "DeadReLUMonitor",
    "GradientSaturationMonitor",
    "LatentSparsityMonitor",
    "PredictionWriter",
    "load_predictions",
]
