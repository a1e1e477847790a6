"""What is done about a finding: changes that need no edit of anybody's source, and the callback that makes them."""

from lightning_ae.diagnostics.remedies.activations import InsertActivation, SwapActivation
from lightning_ae.diagnostics.remedies.apply import ApplyRemedies, OptimizerRemedy
from lightning_ae.diagnostics.remedies.base import ByHand, Change, Remedy, Together, TrainerRemedy
from lightning_ae.diagnostics.remedies.layers import (
    Reinitialize,
    RequireGradients,
    SetBias,
    SetDropout,
    SetNormMomentum,
)
from lightning_ae.diagnostics.remedies.optimizers import (
    ScaleLearningRate,
    ScaleWeightDecay,
    TrainForgotten,
    UseAdam,
    ZeroGradients,
)
from lightning_ae.diagnostics.remedies.prescribe import prescribe
from lightning_ae.diagnostics.remedies.revival import DeadUnitReviver
from lightning_ae.diagnostics.remedies.scaling import ScaleOutput, StandardizeInput
from lightning_ae.diagnostics.remedies.settings import BatchSize, ClipGradients, ReviveUnits, StopEarly, TrainLonger
from lightning_ae.diagnostics.remedies.terms import ExchangeLoss, RestartCodebook, SetWeight, WarmUpWeight

__all__ = [
    "ApplyRemedies",
    "BatchSize",
    "ByHand",
    "Change",
    "ClipGradients",
    "DeadUnitReviver",
    "ExchangeLoss",
    "InsertActivation",
    "OptimizerRemedy",
    "Reinitialize",
    "Remedy",
    "RequireGradients",
    "RestartCodebook",
    "ReviveUnits",
    "ScaleLearningRate",
    "ScaleOutput",
    "ScaleWeightDecay",
    "SetBias",
    "SetDropout",
    "SetNormMomentum",
    "SetWeight",
    "StandardizeInput",
    "StopEarly",
    "SwapActivation",
    "Together",
    "TrainForgotten",
    "TrainLonger",
    "TrainerRemedy",
    "UseAdam",
    "WarmUpWeight",
    "ZeroGradients",
    "prescribe",
]
