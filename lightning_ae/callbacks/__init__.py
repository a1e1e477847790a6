"""Callbacks for any LightningModule."""

from lightning_ae.callbacks.predictions import PredictionWriter, load_predictions

__all__ = ["PredictionWriter", "load_predictions"]
