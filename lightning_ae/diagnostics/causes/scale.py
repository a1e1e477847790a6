"""Causes in initialisation and depth: gradients that vanish or grow on their way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from lightning_ae.diagnostics.causes.base import SQUASHING, Evidence, Look, Stage, cause
from lightning_ae.diagnostics.monitors.saturation_summary import per_layer

_GLOROT = "Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks"


@cause(Stage.SCALE, _GLOROT)
def vanishing_gradient(e: Evidence) -> Iterator[Look]:
    """An early layer gets hardly any of the gradient of a later one, and little is learnt.

    Through activations, if two or more squash and each lets less than 30 % pass: less than 0.3 % of it, or than 1 % if
    nothing is learnt. Through weights, if that was so in the first step: less than 0.1 %.
    """
    norms = e.saturation.gradient_norm()
    if len(norms) < 2 or not e.unlearnt(0.5) or (e.training is not None and e.training.shrinkage[0] > 3e-3):
        return
    whole = e.whole_saturation
    first = per_layer(whole.first_results(), whole.layers, "grad", "grad_steps") or norms
    zeros = [layer for layer, square in whole.first_weights().items() if square == 0 and layer in norms]
    if len(zeros) > 1 and 2 * len(zeros) >= len(norms):
        yield Look(
            "error" if e.unlearnt() else "warning",
            zeros[0],
            "weight_norm",
            0.0,
            f"The weights of {len(zeros)} of {len(norms)} layers are zero in the first step, {zeros[0]} among them.",
            "No gradient passes a layer of zeros, and its units are all alike: draw weights at random, with He or "
            "Xavier initialisation.",
        )
        return
    now, at_first = _weakest(norms), _weakest(first)
    closing = {
        s: t
        for s, t in e.saturation.transmission().items()
        if e.dead.sites[s].activation in SQUASHING and t < 0.3 and not e.is_gate(s) and not e.is_output(s)
    }
    if len(closing) >= 2:
        found = min((w for w in (now, at_first) if w is not None), key=lambda w: w.ratio, default=None)
        if found is None or found.ratio >= (1e-2 if e.unlearnt() else 3e-3):
            return
        least = min(closing, key=lambda site: closing[site])
        yield Look(
            "error" if found.ratio < 1e-4 or e.unlearnt() else "warning",
            least,
            "transmission",
            closing[least],
            f"{len(closing)} squashing activations each pass on less than {max(closing.values()):.0%} of the gradient, "
            f"{least} the least ({closing[least]:.1%}); {found.layer} gets {found.ratio:.1g} of the gradient of "
            f"{found.largest}.",
            f"Gradients vanish on the way. Replace these activations by ReLU or GELU, {least} first; or normalise "
            "before them.",
        )
    elif at_first is not None and at_first.ratio < 1e-3:
        kinds = {info.activation for info in e.dead.sites.values()}
        how = (
            "He initialisation (kaiming_normal_)"
            if kinds & {"relu", "leaky_relu"}
            else "Xavier initialisation with the gain of the activation (xavier_uniform_)"
        )
        yield Look(
            "error" if e.unlearnt() else "warning",
            at_first.layer,
            "gradient_norm",
            at_first.ratio,
            f"{at_first.layer} gets {at_first.ratio:.1g} of the gradient of {at_first.largest} from the first step on, "
            "though no activation stops it.",
            f"It vanishes through weights that are too small: use {how}, normalisation between layers, or residual "
            "connections.",
        )


class _Weakest(NamedTuple):
    layer: str
    largest: str
    ratio: float


def _weakest(norms: Mapping[str, float]) -> _Weakest | None:
    """The layer with the least gradient before the one with the largest; None if gradients do not shrink that way."""
    order = list(norms)
    largest = max(norms, key=lambda layer: norms[layer])
    before = {layer: norms[layer] for layer in order[: order.index(largest)] if norms[layer] > 0}
    if not before or norms[largest] == 0:
        return None
    layer = min(before, key=lambda name: before[name])
    return _Weakest(layer, largest, before[layer] / norms[largest])


@cause(Stage.SCALE, "Pascanu, Mikolov & Bengio 2013, https://arxiv.org/abs/1211.5063", heals="rate")
def exploding_gradient(e: Evidence) -> Iterator[Look]:
    """In a recurrent network the gradient is above 100 in the first step, or once 100 times its median later."""
    recurrent = any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in e.model.modules())
    norms = [v for v in e.whole_saturation.curve.read("gradient_norm")[1] if math.isfinite(v)]
    if not recurrent or len(norms) < 3:
        return
    middle = sorted(norms)[len(norms) // 2]
    worst, bad = max(norms), e.out.get("nonfinite_losses", 0.0) > 0
    # steps that are too large make gradients explode too, but not the first one
    if (norms[0] > 100 and (bad or not e.relative < 0.15)) or (
        worst > 100 * middle > 0 and worst > 10 and norms[0] > 10 and (bad or not e.relative < 0.5)
    ):
        clipped = e.training is not None and e.training.clips
        yield Look(
            "warning" if clipped or (e.relative < 0.5 and not bad) else "error",
            "loss",
            "gradient_norm",
            worst,
            f"The gradient's norm reaches {worst:.3g} (median {middle:.3g}) in a recurrent network.",
            "It grows from step to step of the sequence: "
            + ("it is clipped, so now " if clipped else "set gradient_clip_val=1.0 in the Trainer, ")
            + "use LSTM or GRU cells, orthogonal recurrent weights, or shorter sequences.",
        )
