"""Causes in the objective: a penalty that swallows the reconstruction, or does nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause


@cause(
    Stage.TERMS,
    "Bowman et al. 2016, https://arxiv.org/abs/1511.06349, for the KL term; Tibshirani 1996 for L1",
    heals="weights",
)
def penalty_dominates(e: Evidence) -> Iterator[Look]:
    """A weighted penalty is larger than the reconstruction while nothing is reconstructed, or the code is zero."""
    reconstruction = abs(e.out.get("term/reconstruction", 0.0))
    for name, weight in e.output.weights.items():
        raw = e.out.get(f"term/{name}")
        if raw is None or reconstruction == 0 or weight == 0 or name in ("kl", "commitment", "codebook"):
            continue
        share = abs(weight * raw) / reconstruction
        _, over_time = e.curve(f"terms/{name}")
        first = max((abs(v) for v in over_time[: max(1, len(over_time) // 10)] if math.isfinite(v)), default=0.0)
        begun = abs(weight) * first / reconstruction
        empty = e.code.get("dead_fraction") == 1.0 or (e.code.get("l1", math.inf) < 1e-4 and share > 1e-4)
        if empty and (begun > 0.05 or share > 0.05 or weight > 1):
            yield Look(
                "error",
                "latent",
                "zero_code",
                weight,
                f"The code is zero, under {name!r} with weight {weight:g}.",
                f"It costs more to say anything than saying it saves: divide the weight of {name!r} by 10.",
                (f"weight of {name}", -1),
            )
        elif (share > 1 or begun > 3) and e.unlearnt(0.8):
            yield Look(
                "error",
                "loss",
                f"penalty {name}",
                share,
                f"{name!r} with weight {weight:g} is {share:.3g} times the reconstruction loss ({begun:.3g} times at "
                f"first), and {e.relative:.0%} of the variance is unexplained.",
                f"The optimizer serves the penalty first: divide the weight of {name!r} by 10.",
                (f"weight of {name}", -1),
            )
        elif 0 < share < 1e-6:  # one that is 0 has not been called for, as auxiliary-k as long as nothing is dead
            yield Look(
                "info",
                "loss",
                f"penalty {name}",
                share,
                f"{name!r} is {share:.1g} of the reconstruction loss.",
                f"It does nothing: raise its weight ({weight:g}) by several orders of magnitude, or drop it.",
                (f"weight of {name}", +1),
            )
    if not e.output.weights:
        yield from _elsewhere(e)


def _elsewhere(e: Evidence) -> Iterator[Look]:
    """Of a model that is not ours: what of the loss is not the call that compares."""
    if e.main is None or not e.reconstructs or not e.unlearnt(0.7):
        return
    results = e.output.late_results()
    calls, total = float(results.get((e.main, "raws"), 0)), e.out.get("loss", 0.0)
    _, first_losses = e.curve("loss")
    if not calls or not total > 0:
        return
    raw = float(results[e.main, "raw"]) / calls
    rest = [(loss - own) / loss for loss, own in zip(first_losses, e.curve("raw")[1], strict=False) if loss > 0]
    consistent = bool(rest) and all(r > -0.01 for r in rest)
    if consistent and (1 - raw / total > 0.8 or (rest[0] > 0.8 and e.unlearnt(0.8))):
        share = raw / total
        yield Look(
            "error",
            "loss",
            "share",
            share,
            f"The reconstruction is {share:.1%} of the loss ({1 - rest[0]:.1%} at first), and {e.relative:.0%} of the "
            "variance is unexplained.",
            "Another term swallows it: divide the weight of the largest penalty by 10.",
            ("weight of the penalty", -1),
        )


@cause(Stage.LATENT, "a code of zeros carries nothing", follows=True, heals="weights")
def zero_code(e: Evidence) -> Iterator[Look]:
    """The code is zero for every example, and no penalty asks for it."""
    if e.code.get("dead_fraction") == 1.0 and not any(e.output.weights.values()):
        yield Look(
            "error",
            "latent",
            "zero_code",
            0.0,
            "The code is zero.",
            "Look for dead units and saturation in the encoder.",
        )
