"""Findings on activations and layers."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_ae.diagnostics.causes.evidence import SQUASHING, Evidence, Finding, Severity


def twice(e: Evidence) -> Iterator[Finding]:
    """An activation on the output of another."""
    for site, before in e.output.twice.items():
        yield Finding(
            "error",
            site,
            "twice",
            2.0,
            e.n,
            f"It is applied to the output of {before}, with no layer in between.",
            f"That squeezes its output into a part of its range. Remove {before}; in a lightning_ae model "
            "the loss owns the output activation, so the decoder ends in none.",
        )


def dead(e: Evidence) -> Iterator[Finding]:
    """Units that never fire, or hardly."""
    samples, frequencies = e.dead.num_samples(), e.dead.firing_frequency()
    for site, units in e.dead.nonfinite_units().items():
        if len(units) and not e.out.get("nonfinite_data", 0.0) > 0:
            yield Finding(
                "error",
                site,
                "nonfinite_units",
                len(units),
                samples[site],
                f"{len(units)} units gave values that are NaN or infinite.",
                "Lower the learning rate, or clip gradients; look at what comes before this site.",
            )
    found = {
        site: units
        for site, units in e.dead.dead_units().items()
        if len(units) and not e.is_output(site) and not e.is_code(site)
    }
    many = {site: len(units) / e.dead.sites[site].units for site, units in found.items()}
    many = {site: share for site, share in many.items() if share >= 0.2 and samples[site] >= 100}
    if len(many) > 3:
        worst = max(many, key=lambda site: many[site])
        yield Finding(
            "error" if many[worst] >= 0.5 else "warning",
            worst,
            "dead_fraction",
            many[worst],
            samples[worst],
            f"In {len(many)} of {len(frequencies)} ReLU layers {min(many.values()):.0%} to {many[worst]:.0%} of the "
            f"units never fired in {samples[worst]:,} samples, here the most.",
            "When it is everywhere it is the learning rate, the initialisation or the depth: divide the learning rate "
            "by 10 first; then He initialisation, normalisation between layers, or fewer of them.",
        )
    for site, units in found.items():
        total, n = e.dead.sites[site].units, samples[site]
        if n < 100 or (len(many) > 3 and site in many):
            continue
        share = len(units) / total
        rate = f"in {n:,} samples (rate < {3 / n:.1g})"
        if len(units) == total:
            yield Finding(
                "error",
                site,
                "dead_fraction",
                1.0,
                n,
                f"All {total} units never fired {rate}.",
                "Nothing passes here, forward or backward. Use a smaller learning rate and He initialisation "
                "with biases of 0 (or 0.1), or LeakyReLU.",
            )
        else:
            severity: Severity = "error" if share >= 0.5 else "warning" if share >= 0.2 else "info"
            yield Finding(
                severity,
                site,
                "dead_fraction",
                share,
                n,
                f"{len(units)} of {total} units never fired {rate}.",
                "Use LeakyReLU, add DeadUnitReviver, or start biases at 0.1; if it grows while training, the learning "
                "rate is too high.",
            )
        near = int(((frequencies[site] > 0) & (frequencies[site] < 1e-5)).sum())
        if near:
            yield Finding(
                "info",
                site,
                "near_dead",
                near,
                n,
                f"{near} more fire less often than once in 100,000.",
                "They will not recover by themselves more easily than dead ones.",
            )
    hard = set(frequencies)
    for site, dormant in e.dead.dormant_units().items():
        share = len(dormant) / e.dead.sites[site].units
        if site not in hard and share > 0.25 and samples[site] >= 100 and not e.is_output(site):
            yield Finding(
                "info",
                site,
                "dormant_fraction",
                share,
                samples[site],
                f"{share:.0%} of the units are dormant (mean |a| at most {e.dead.tau:g} of the layer's).",
                "If this grew while training, the learning rate is too high, or weight decay too strong; else the "
                "layer is wider than it need be.",
            )


def vanishing(e: Evidence) -> Iterator[Finding]:
    """Gradients that vanish through squashing activations, and which comes first."""
    transmission = {s: t for s, t in e.saturation.transmission().items() if not e.is_output(s)}
    norms = e.saturation.gradient_norm()
    closing = {s: t for s, t in transmission.items() if e.dead.sites[s].activation in SQUASHING and t < 0.3}
    if len(closing) < 2 or len(norms) < 2 or max(norms.values()) == 0:
        return
    largest = max(norms, key=lambda layer: norms[layer])
    weakest = min(norms, key=lambda layer: norms[layer])
    ratio = norms[weakest] / norms[largest]
    order = list(norms)
    if ratio < 1e-3 and order.index(weakest) < order.index(largest) and e.output.shrinkage <= 3e-3:
        first = min(closing, key=lambda site: closing[site])
        yield Finding(
            "error" if ratio < 1e-4 else "warning",
            first,
            "transmission",
            closing[first],
            e.n,
            f"{len(closing)} squashing activations each pass on less than {max(closing.values()):.0%} of the gradient, "
            f"{first} the least ({closing[first]:.1%}); {weakest} gets {ratio:.1g} of the gradient of {largest}.",
            f"Gradients vanish on the way. Replace these activations by ReLU or GELU, {first} first; or "
            "normalise before them.",
        )


def saturated(e: Evidence) -> Iterator[Finding]:
    """Activations that are flat almost everywhere."""
    for site, fraction in e.saturation.saturated_fraction().items():
        if e.dead.sites[site].activation in SQUASHING and fraction > 0.5 and not e.is_output(site):
            yield Finding(
                "warning",
                site,
                "saturated_fraction",
                fraction,
                e.n,
                f"{fraction:.0%} of its elements are flat (slope < {e.saturation.eps:g}).",
                "Its inputs are too large: standardise the data, start with smaller weights (Xavier), or "
                "normalise before it.",
            )


def steps(e: Evidence) -> Iterator[Finding]:
    """Steps that are too large or too small for the weights."""
    updates = sorted(e.saturation.update_ratio().items(), key=lambda item: item[1])
    if not updates:
        return
    layer, middle = updates[len(updates) // 2]
    if middle > 0.1:
        yield Finding(
            "warning",
            layer,
            "update_ratio",
            middle,
            e.n,
            f"A step changes the weights by {middle:.0%} of their size (median of the layers).",
            "About 0.1 % is healthy: divide the learning rate by 10.",
        )
    elif 0 < middle < 1e-6 and 0.5 < e.out.get("fvu", 0.0) < 10 and not e.saturation.starved_fraction() > 0.2:
        yield Finding(
            "warning",
            layer,
            "update_ratio",
            middle,
            e.n,
            f"A step changes the weights by {middle:.1g} of their size (median of the layers).",
            "About 0.1 % is healthy: raise the learning rate by 10.",
        )
