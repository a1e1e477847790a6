"""Callbacks: monitors that see why a model does not learn, and predictions on disk."""

from lightning_ae.callbacks.dead_relu import DeadReLUMonitor
from lightning_ae.callbacks.predictions import PredictionWriter, load_predictions

__all__ = ["DeadReLUMonitor", "PredictionWriter", "load_predictions"]
