"""Callbacks: what acts on a run (schedules, greedy, pictures, predictions); and the public names of the diagnostics."""

from lightning_ae.callbacks.greedy import GreedyLevels
from lightning_ae.callbacks.images import ReconstructionImages
from lightning_ae.callbacks.predictions import PredictionWriter, load_predictions
from lightning_ae.callbacks.schedules import CosineSchedule, CyclicalSchedule, LinearSchedule
from lightning_ae.diagnostics import (
    DeadReLUMonitor,
    DeadUnitReviver,
    DiagnosticsReport,
    Finding,
    GradientSaturationMonitor,
    LatentSparsityMonitor,
    Report,
    diagnose,
)

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
