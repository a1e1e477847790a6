"""Findings on the latent and its penalties."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.evidence import Evidence, Finding


def latent(e: Evidence) -> Iterator[Finding]:
    """Latents that carry nothing, or that nobody reads."""
    yield from _codebook(e)
    if e.latent is None or not e.code.get("samples", 0) > 1:
        return
    n = int(e.code["samples"])
    variance = e.latent.variance()
    constant, dead = len(e.latent.constant_latents()), e.code["dead_fraction"]
    if e.code["l0"] < 0.5 * len(variance) and 0 < dead < 1:
        # most latents of a sparse code are off most of the time: only never says something
        constant -= round(dead * len(variance))
        yield Finding(
            # in few codes a latent that is rarely on may be off throughout
            "warning" if dead > 0.1 and n * e.code["l0"] / len(variance) >= 30 else "info",
            "latent",
            "dead_fraction",
            dead,
            n,
            f"{dead:.1%} of the {len(variance)} latents were never on in {n:,} codes (rate < {3 / n:.1g}).",
            "A smaller penalty, or for codes that select the largest auxiliary-k or resampling (with dead_after well "
            "below the examples of a run), bring them back; or make the code narrower.",
        )
    if dead < 1 and constant > 0:
        all_of_them = constant == len(variance)
        yield Finding(
            "error" if all_of_them else "warning",
            "latent",
            "constant",
            constant / len(variance),
            n,
            f"{constant} of {len(variance)} latents never vary.",
            "They carry nothing: look at dead or saturated sites in the encoder first; else make the code narrower.",
        )
    unread = len(e.latent.unread_latents())
    if unread:
        yield Finding(
            "warning",
            "latent",
            "unread",
            unread / len(variance),
            n,
            f"{unread} of {len(variance)} latents vary, and the decoder takes nothing from them.",
            "Check that the decoder's first layer sees the whole code, or make the code narrower.",
        )
    if "kl" in e.code:
        kl = e.latent.kl_per_dimension()
        off = int((kl < 0.01).sum())
        if e.says_nothing or off / len(kl) > 0.5:
            yield Finding(
                # dimensions that are not needed collapse in a healthy model too
                "error" if e.says_nothing else "warning" if off > 0.9 * len(kl) else "info",
                "latent",
                "collapsed",
                off / len(kl),
                n,
                f"The posterior of {off} of {len(kl)} latents is the prior (KL < 0.01 nats); an example's code carries "
                f"{float(kl.sum()):.2g} nats in all.",
                "The KL term wins before the latent is of use: lower β, raise it slowly from 0, or grant free bits.",
            )


def _codebook(e: Evidence) -> Iterator[Finding]:
    if e.latent is None or e.code.get("codebook_usage", 1.0) >= 0.5:
        return
    usage, counts = e.code["codebook_usage"], e.latent.results()["latent", "codes"]
    chosen = int(counts.sum())
    if chosen < 5 * len(counts):
        return  # too few to use them all
    yield Finding(
        "warning",
        "latent",
        "codebook_usage",
        usage,
        chosen,
        f"{usage:.0%} of the codes are used (perplexity {e.code['perplexity']:.1f}).",
        "Start the codebook from data (k-means), expire codes that are not used, or make it smaller.",
    )


def penalties(e: Evidence) -> Iterator[Finding]:
    """Penalties that leave no code, or do nothing."""
    reconstruction = abs(e.out.get("term/reconstruction", 0.0))
    for name, weight in e.output.weights.items():
        raw = e.out.get(f"term/{name}")
        if raw is None or reconstruction == 0 or weight == 0:
            continue
        share = abs(weight * raw) / reconstruction
        if e.code.get("dead_fraction") == 1.0 or (e.code.get("l1", math.inf) < 1e-4 and share > 1e-4):
            yield Finding(
                "error",
                "latent",
                "zero_code",
                weight,
                e.n,
                f"The code is zero, under {name!r} with weight {weight:g}.",
                f"It costs more to say anything than saying it saves: divide the weight of {name!r} by 10.",
            )
        elif 0 < share < 1e-6:  # one that is 0 has not been called for, as auxiliary-k as long as nothing is dead
            yield Finding(
                "info",
                "loss",
                f"penalty {name}",
                share,
                e.n,
                f"{name!r} is {share:.1g} of the reconstruction loss.",
                f"It does nothing: raise its weight ({weight:g}) by several orders of magnitude, or drop it.",
            )
    if e.code.get("dead_fraction") == 1.0 and not e.output.weights:
        yield Finding(
            "error",
            "latent",
            "zero_code",
            0.0,
            e.n,
            "The code is zero.",
            "Look for dead units and saturation in the encoder.",
        )
