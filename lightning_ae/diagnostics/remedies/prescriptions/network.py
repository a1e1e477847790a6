"""For causes in the wiring, in gradients, activations and the code."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import SQUASHING, Evidence, Finding
from lightning_ae.diagnostics.remedies.activations import InsertActivation, SwapActivation
from lightning_ae.diagnostics.remedies.anatomy import (
    anew,
    before,
    entry,
    output_activations,
    recurrent_layers,
    sites_of,
)
from lightning_ae.diagnostics.remedies.base import Remedy, Together
from lightning_ae.diagnostics.remedies.layers import (
    Reinitialize,
    RequireGradients,
    Scheme,
    SetBias,
    SetDropout,
)
from lightning_ae.diagnostics.remedies.optimizers import (
    ScaleLearningRate,
    TrainForgotten,
    ZeroGradients,
)
from lightning_ae.diagnostics.remedies.prescriptions.base import remedies_of
from lightning_ae.diagnostics.remedies.prescriptions.steps import lower_rate
from lightning_ae.diagnostics.remedies.scaling import StandardizeInput
from lightning_ae.diagnostics.remedies.settings import ClipGradients, ReviveUnits
from lightning_ae.diagnostics.remedies.terms import RestartCodebook, SetWeight, WarmUpWeight


@remedies_of("gradients_pile_up")
def _gradients_pile_up(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    if e.training is not None and e.training.automatic:
        yield ZeroGradients()


@remedies_of("not_trained")
def _not_trained(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    if finding.measure == "frozen":
        yield Together((RequireGradients(), TrainForgotten()))
    elif finding.measure == "forgotten":
        yield TrainForgotten()


@remedies_of("linear_stack")
def _linear_stack(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    inner = tuple(dict.fromkeys(name for name, _, _ in e.output.linear.values()))
    if inner and not e.ours:
        yield InsertActivation(inner)


@remedies_of("dropout_on_code")
def _dropout_on_code(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield SetDropout((finding.site,))


@remedies_of("no_gradient", "constant_output", "zero_code", "constant_latents")
def _no_gradient(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    """What is flat may have begun flat, or have been thrown there."""
    if finding.change is not None:
        yield ScaleLearningRate(lower_rate(e))
    yield anew(e, _scheme(e))


def _scheme(e: Evidence) -> Scheme:
    kinds = {info.activation for info in e.dead.sites.values()}
    return "he" if kinds & {"relu", "leaky_relu", "gelu", "silu"} or not kinds & SQUASHING else "xavier"


@remedies_of("vanishing_gradient")
def _vanishing_gradient(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    flat = tuple(kind for kind in ("sigmoid", "tanh") if any(info.activation == kind for info in e.dead.sites.values()))
    hidden = tuple(n for k in flat for n in sites_of(e, k) if n not in output_activations(e))
    if finding.measure == "transmission" and hidden:
        swap = SwapActivation("relu") if e.ours else SwapActivation("relu", hidden)
        yield Together((swap, anew(e, "he")))
    yield anew(e, _scheme(e))


@remedies_of("exploding_gradient")
def _exploding_gradient(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    layers = recurrent_layers(e)
    if layers:
        yield Together((Reinitialize("orthogonal", layers), ClipGradients()))
    yield ClipGradients()


@remedies_of("log_variance_explodes")
def _log_variance_explodes(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    weight = e.output.weights.get("kl")
    if weight is not None and weight < 0:
        yield SetWeight("kl", -weight)
    yield Together((Reinitialize("default"), ClipGradients()))
    yield Together((ScaleLearningRate(0.1), ClipGradients()))


@remedies_of("dead_units")
def _dead_units(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    layer = before(e, finding.site)
    first = e.whole_dead.first_results().get((finding.site, "fired"))
    dead_at_first = 1.0 if first is None else 1.0 - float((first > 0).float().mean())
    if finding.value == 1.0 or (finding.change is not None and dead_at_first == 1.0):
        yield anew(e, "he")
    if finding.change is not None or dead_at_first < 0.5 * finding.value:  # they died while training
        yield ScaleLearningRate(lower_rate(e))
    yield SwapActivation("leaky_relu") if e.ours else SwapActivation("leaky_relu", (finding.site,))
    if layer is not None:
        yield SetBias((layer,))
    yield ReviveUnits()


@remedies_of("dormant_units")
def _dormant_units(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield ScaleLearningRate(0.1)


@remedies_of("saturated")
def _saturated(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield anew(e, "xavier")
    found = entry(e)
    if found is not None:
        yield Together((StandardizeInput(*found), anew(e, "xavier")))


@remedies_of("nonfinite_units")
def _nonfinite_units(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield Together((ScaleLearningRate(lower_rate(e)), ClipGradients()))


@remedies_of("penalty_dominates")
def _penalty_dominates(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    name = finding.measure.removeprefix("penalty ")
    if finding.measure == "zero_code":
        name = next((n for n, w in e.output.weights.items() if w == finding.value), "")
    weight = e.output.weights.get(name)
    if weight is None or finding.severity == "info":
        return
    # so that it begins at a twentieth of the reconstruction
    begun = [abs(v) for v in e.curve(f"terms/{name}")[1][:1] if math.isfinite(v) and v != 0]
    size = abs(e.out.get("term/reconstruction", 0.0))
    wanted = 0.05 * size / begun[0] if begun and size > 0 else abs(weight) / 10
    yield SetWeight(name, float(f"{min(abs(weight) / 10, wanted):.2g}"))
    yield SetWeight(name, abs(weight) / 10)


@remedies_of("posterior_collapse")
def _posterior_collapse(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    beta = e.output.weights.get("kl")
    if beta is None:
        return
    if beta > 1:
        yield SetWeight("kl", 1.0)
    yield WarmUpWeight("kl", min(beta, 1.0))
    yield SetWeight("kl", beta / 10)


@remedies_of("codebook_collapse")
def _codebook_collapse(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield RestartCodebook()


@remedies_of("dead_latents")
def _dead_latents(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    for name, weight in e.output.weights.items():
        yield SetWeight(name, weight / 3)
