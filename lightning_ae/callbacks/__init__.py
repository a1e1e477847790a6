"""Callbacks: monitors that see why a model does not learn, reports and remedies, schedules, and predictions on disk."""

from lightning_ae.callbacks.dead_relu import DeadReLUMonitor
from lightning_ae.callbacks.diagnose import diagnose
from lightning_ae.callbacks.findings import Finding
from lightning_ae.callbacks.gradient_saturation import GradientSaturationMonitor
from lightning_ae.callbacks.greedy import GreedyLevels
from lightning_ae.callbacks.images import ReconstructionImages
from lightning_ae.callbacks.latent_sparsity import LatentSparsityMonitor
from lightning_ae.callbacks.predictions import PredictionWriter, load_predictions
from lightning_ae.callbacks.report import DiagnosticsReport, Report
from lightning_ae.callbacks.revive import DeadUnitReviver
from lightning_ae.callbacks.schedules import CosineSchedule, CyclicalSchedule, LinearSchedule

__all__ = [
    "CosineSchedule",
    "CyclicalSchedule",
    "DeadReLUMonitor",
    "DeadUnitReviver",
    "DiagnosticsReport",
    "Finding",
    "GradientSaturationMonitor",
    "GreedyLevels",
    "LatentSparsityMonitor",
    "LinearSchedule",
    "PredictionWriter",
    "ReconstructionImages",
    "Report",
    "diagnose",
    "load_predictions",
]
