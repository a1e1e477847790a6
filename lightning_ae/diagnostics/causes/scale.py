"""Causes in initialisation and depth: gradients that vanish or grow on their way."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from lightning_ae.diagnostics.causes.base import SQUASHING, Evidence, Look, Stage, cause
from lightning_ae.diagnostics.monitors.saturation_summary import per_layer

_GLOROT = "Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks"


@cause(Stage.SCALE, _GLOROT, follows=True)
def vanishing_gradient(e: Evidence) -> Iterator[Look]:
    """An early layer gets less than a thousandth of the gradient of a later one, and little is learnt.

    Through activations, if two or more squash and each lets less than 30 % pass; else through the weights.
    """
    norms = e.saturation.gradient_norm()
    transmission = {s: t for s, t in e.saturation.transmission().items() if not e.is_output(s)}
    if len(norms) < 2 or max(norms.values()) == 0 or (e.training is not None and e.training.shrinkage[0] > 3e-3):
        return
    largest = max(norms, key=lambda layer: norms[layer])
    positive = {layer: norm for layer, norm in norms.items() if norm > 0}
    weakest = min(positive, key=lambda layer: positive[layer])
    ratio = norms[weakest] / norms[largest]
    order = list(norms)
    # a part behind which no more layers come has no way to lose a gradient on
    early = order.index(weakest) < order.index(largest)
    closing = {
        s: t
        for s, t in transmission.items()
        if e.dead.sites[s].activation in SQUASHING and t < 0.3 and not e.is_gate(s)
    }
    if not early or ratio >= (1e-2 if e.unlearnt() and len(closing) >= 2 else 1e-3) or e.relative < 0.5:
        return
    if len(closing) >= 2:
        first = min(closing, key=lambda site: closing[site])
        yield Look(
            "error" if ratio < 1e-4 or e.unlearnt() else "warning",
            first,
            "transmission",
            closing[first],
            f"{len(closing)} squashing activations each pass on less than {max(closing.values()):.0%} of the gradient, "
            f"{first} the least ({closing[first]:.1%}); {weakest} gets {ratio:.1g} of the gradient of {largest}.",
            f"Gradients vanish on the way. Replace these activations by ReLU or GELU, {first} first; or normalise "
            "before them.",
        )
        return
    first_norms = per_layer(e.whole_saturation.first_results(), e.whole_saturation.layers, "grad", "grad_steps")
    at_first = first_norms.get(weakest, 0.0) / max(first_norms.get(largest, 0.0), 1e-30) if first_norms else ratio
    dead = any(len(u) == e.dead.sites[s].units for s, u in e.dead.dead_units().items() if not e.is_output(s))
    if at_first < 1e-2 and not dead:
        kinds = {info.activation for info in e.dead.sites.values()}
        how = (
            "He initialisation (kaiming_normal_)"
            if kinds & {"relu", "leaky_relu"}
            else "Xavier initialisation with the gain of the activation (xavier_uniform_)"
        )
        yield Look(
            "error" if e.unlearnt() else "warning",
            weakest,
            "gradient_norm",
            ratio,
            f"{weakest} gets {ratio:.1g} of the gradient of {largest}, from the first step on, though no activation "
            "stops it.",
            f"It vanishes through weights that are too small: use {how}, normalisation between layers, or residual "
            "connections.",
        )


@cause(Stage.SCALE, "Pascanu, Mikolov & Bengio 2013, https://arxiv.org/abs/1211.5063")
def exploding_gradient(e: Evidence) -> Iterator[Look]:
    """In a recurrent network the gradient is once 100 times its median, or above 1,000, and little is learnt."""
    recurrent = any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in e.model.modules())
    norms = [v for v in e.whole_saturation.curve.read("gradient_norm")[1] if math.isfinite(v)]
    if not recurrent or len(norms) < 3:
        return
    middle = sorted(norms)[len(norms) // 2]
    worst = max(norms)
    bad = e.out.get("nonfinite_losses", 0.0) > 0
    if (worst > 1e3 or (worst > 100 * middle > 0 and worst > 10)) and (bad or not e.relative < 0.5):
        clipped = e.training is not None and e.training.clips
        yield Look(
            "warning" if clipped else "error",
            "loss",
            "gradient_norm",
            worst,
            f"The gradient's norm reaches {worst:.3g} (median {middle:.3g}) in a recurrent network.",
            "It grows from step to step of the sequence: set gradient_clip_val=1.0 in the Trainer, use LSTM or GRU "
            "cells, orthogonal recurrent weights, or shorter sequences.",
        )
