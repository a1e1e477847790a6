"""For causes in the data, the targets and their pairing with the output."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Finding
from lightning_ae.diagnostics.remedies.activations import SwapActivation
from lightning_ae.diagnostics.remedies.anatomy import (
    entry,
    last_layer,
    output_activations,
    sites_of,
)
from lightning_ae.diagnostics.remedies.base import Remedy, Together
from lightning_ae.diagnostics.remedies.layers import (
    Reinitialize,
    SetDropout,
)
from lightning_ae.diagnostics.remedies.prescriptions.base import remedies_of
from lightning_ae.diagnostics.remedies.prescriptions.steps import adam, plain
from lightning_ae.diagnostics.remedies.scaling import ScaleOutput, StandardizeInput
from lightning_ae.diagnostics.remedies.terms import ExchangeLoss


@remedies_of("input_scale")
def _input_scale(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield from _rescaled(e)
    found = entry(e)
    if found is not None:
        yield StandardizeInput(*found)


def _rescaled(e: Evidence) -> Iterator[Remedy]:
    """Of a reconstruction: what it reads and what it gives in numbers of size 1."""
    mean, std, layer = e.out.get("x_mean", 0.0), e.out.get("x_std", 0.0), last_layer(e)
    if not e.reconstructs or layer is None or not (math.isfinite(std) and std > 0):
        return
    free: list[Remedy] = []
    if math.isfinite(e.output.range[1]) or math.isfinite(e.output.range[0]):
        free = [ExchangeLoss("SquaredError")] if e.ours else [SwapActivation("identity", output_activations(e))]
    found = entry(e)
    yield Together((*free, *_scaled(e, layer, mean, std), *([StandardizeInput(*found)] if found else [])))


def _scaled(e: Evidence, layer: str, mean: float, std: float) -> list[Remedy]:
    """Mean and spread of the targets for a layer's output.

    Gradients grow with the square of the spread, which Adam does not feel and plain gradient descent does.
    """
    return [ScaleOutput(layer, mean, std), *([adam(e)] if plain(e) and not 0.3 < std < 3 else [])]


@remedies_of("narrow_range")
def _narrow_range(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    yield from _rescaled(e)


@remedies_of("target_out_of_reach")
def _target_out_of_reach(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    if e.ours:
        yield from _rescaled(e)
        yield ExchangeLoss("SquaredError")
        return
    sites, layer = output_activations(e), last_layer(e)
    if not sites:
        return
    free = SwapActivation("identity", sites)
    mean, std = e.out.get("x_mean", 0.0), e.out.get("x_std", 0.0)
    if layer is not None and std > 3 and math.isfinite(std):
        yield from _rescaled(e)
        yield Together((free, *_scaled(e, layer, mean, std)))
    yield free
    if layer is not None:  # what was off may have begun far away
        yield Together((free, Reinitialize("default", (layer,))))


@remedies_of("target_scale")
def _target_scale(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    mean, std, layer = e.out.get("x_mean", 0.0), e.out.get("x_std", 0.0), last_layer(e)
    if layer is not None and math.isfinite(std) and std > 0:
        some = _scaled(e, layer, mean, std)
        yield some[0] if len(some) == 1 else Together(tuple(some))


@remedies_of("constant_softmax")
def _constant_softmax(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    sites = sites_of(e, "softmax") or sites_of(e, "log_softmax")
    if not sites:
        return
    if e.out.get("binary", 0.0) > 0.999 or e.pair is None:
        yield SwapActivation("sigmoid", sites[-1:])
        return
    mean, std, layer = e.out.get("x_mean", 0.0), e.out.get("x_std", 0.0), last_layer(e)
    free = SwapActivation("identity", sites[-1:])
    if layer is not None and math.isfinite(std) and std > 0:
        found = entry(e)
        yield Together((free, *_scaled(e, layer, mean, std), *([StandardizeInput(*found)] if found else [])))
    yield free


@remedies_of("double_activation")
def _double_activation(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    if finding.site in e.output.twice:
        yield SwapActivation("identity", (e.output.twice[finding.site],))
        return
    for pair in e.pairs.values():
        names = [frame for name, frame in zip(pair.path, pair.frames, strict=False) if name not in ("dropout", "layer")]
        if pair.loss == "nll_loss" and pair.path[:1] != ["log_softmax"]:
            if pair.path[:1] == ["softmax"]:
                yield SwapActivation("log_softmax", tuple(names[:1]))
        elif names:
            yield SwapActivation("identity", tuple(names))


@remedies_of("softmax_multilabel")
def _softmax_multilabel(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    sites = sites_of(e, "softmax")
    if sites and not any(pair.loss == "cross_entropy" for pair in e.pairs.values()):
        yield SwapActivation("sigmoid", sites[-1:])


@remedies_of("class_activation")
def _class_activation(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    sites = output_activations(e)
    if sites and not e.ours:
        yield SwapActivation("softmax", sites)
        yield SwapActivation("identity", sites)


@remedies_of("label_loss")
def _label_loss(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    """The loss is called in training_step; steps that do not shrink with its gradient are the next best."""
    if plain(e):
        yield adam(e)


@remedies_of("squared_error_sigmoid")
def _squared_error_sigmoid(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    layer = last_layer(e)
    anew = [] if layer is None else [Reinitialize("default", (layer,))]
    if e.ours:
        # what is confidently wrong in the first step takes many steps to come back, whatever the loss
        yield Together((ExchangeLoss("BernoulliNLL"), *anew))
        yield ExchangeLoss("BernoulliNLL")
    yield from anew
    if e.output.activation == "tanh" and output_activations(e):
        yield Together((SwapActivation("identity", output_activations(e)), *anew))


@remedies_of("dropout_on_output")
def _dropout_on_output(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    names = tuple(f for p in e.pairs.values() for n, f in zip(p.path, p.frames, strict=False) if n == "dropout")
    if names and any(name in e.output.dropouts for name in names):
        yield SetDropout(tuple(dict.fromkeys(names)))


@remedies_of("stuck_outputs")
def _stuck_outputs(e: Evidence, finding: Finding) -> Iterator[Remedy]:
    layer, sites = last_layer(e), output_activations(e)
    anew = [] if layer is None else [Reinitialize("default", (layer,))]
    if e.ours:
        yield Together((ExchangeLoss("SquaredError"), *anew))
    elif sites:
        yield Together((SwapActivation("identity", sites), *anew))
