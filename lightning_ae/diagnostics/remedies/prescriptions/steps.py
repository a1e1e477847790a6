"""For causes in the steps and in generalisation."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Finding
from lightning_ae.diagnostics.remedies.base import Remedy, Together
from lightning_ae.diagnostics.remedies.layers import SetNormMomentum
from lightning_ae.diagnostics.remedies.optimizers import ScaleLearningRate, ScaleWeightDecay, UseAdam
from lightning_ae.diagnostics.remedies.prescriptions.base import remedies_of
from lightning_ae.diagnostics.remedies.settings import BatchSize, ClipGradients, StopEarly, TrainLonger

#: Share of the weights that a step of a healthy run changes, and that the very first one of Adam does.
_UPDATE, _FIRST_UPDATE = 2e-3, 2e-2
#: Steps below which a run is called too short.
_FEW = 200


def lower_rate(e: Evidence) -> float:
    """A power of ten that brings steps near to what is healthy."""
    now, first = e.update, e.whole_saturation.first_update_ratio()
    ratios = [now / _UPDATE] if now == now else []
    ratios += [first / _FIRST_UPDATE] if first == first else []
    worst = max((r for r in ratios if math.isfinite(r) and r > 0), default=10.0)
    return float(10.0 ** -min(4, max(1, round(math.log10(worst)))))


def adam(e: Evidence) -> Remedy:
    """Adam with its usual rate, or three times that if there are few steps to make."""
    return UseAdam(3e-3 if e.steps < 500 else 1e-3)


def plain(e: Evidence) -> bool:
    """Whether an optimizer takes gradients as large as they are."""
    return e.training is not None and any(held.kind == "SGD" for held in e.training.settings)


@remedies_of("learning_rate_high", "oscillation")
def _learning_rate_high(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    factor = lower_rate(e)
    if plain(e):
        yield adam(e)
    yield ScaleLearningRate(factor)
    yield ScaleLearningRate(factor / 10 if factor > 1e-4 else 0.1)
    yield Together((ScaleLearningRate(factor), ClipGradients()))


@remedies_of("learning_rate_low")
def _learning_rate_low(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    if plain(e):
        yield adam(e)
    # steps that in the whole run can change the weights about as much as they are large
    wanted = min(1e-2, max(_UPDATE, 1 / max(1, e.steps)))
    factor = wanted / e.update if e.update > 0 else 10.0
    yield ScaleLearningRate(float(f"{min(1e4, max(3.0, factor)):.1g}"))
    yield ScaleLearningRate(10.0)


@remedies_of("too_short")
def _too_short(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    if plain(e) and e.steps >= 50:
        yield adam(e)
    if e.steps >= 50 and e.update < _UPDATE:  # larger steps cost less than more of them
        yield ScaleLearningRate(3.0)
    yield TrainLonger(max(4, math.ceil(_FEW / max(1, e.steps))))
    yield ScaleLearningRate(3.0)


@remedies_of("weight_decay")
def _weight_decay(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield ScaleWeightDecay(0.0)


@remedies_of("train_eval_mismatch")
def _train_eval_mismatch(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    small = finding.measure == "batch_rows" or e.output.batch_size < 16
    if small:
        yield BatchSize(32)
    yield SetNormMomentum()


@remedies_of("overfitting")
def _overfitting(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    if finding.measure == "overfitting":
        yield StopEarly(finding.site)
