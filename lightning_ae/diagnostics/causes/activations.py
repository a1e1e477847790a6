"""What activations show: units that never fire, and those that are flat."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import SQUASHING, Evidence, Look, Severity, Stage, cause

_LU = "Lu et al. 2019, https://arxiv.org/abs/1903.06733; Sokar et al. 2023, https://arxiv.org/abs/2302.12902"
_EVERYWHERE = (
    "When it is everywhere it is the learning rate, the initialisation or the depth: divide the learning rate by 10 "
    "first; then He initialisation, normalisation between layers, or fewer of them."
)


@cause(Stage.ACTIVATIONS, "IEEE 754", follows=True)
def nonfinite_units(e: Evidence) -> Iterator[Look]:
    """Units of an activation give values that are not finite."""
    samples = e.dead.num_samples()
    for site, units in e.dead.nonfinite_units().items():
        if len(units):
            yield Look(
                "error",
                site,
                "nonfinite_units",
                len(units),
                f"{len(units)} units gave values that are NaN or infinite.",
                "Lower the learning rate, or clip gradients; look at what comes before this site.",
                ("learning_rate", -1),
                samples[site],
            )


@cause(Stage.ACTIVATIONS, _LU, follows=True)
def dead_units(e: Evidence) -> Iterator[Look]:
    """Units of an activation with a hard zero fired in none of n samples (rate < 3/n), of at least 100."""
    samples, frequencies = e.dead.num_samples(), e.dead.firing_frequency()
    found = {
        site: units
        for site, units in e.dead.dead_units().items()
        if len(units) and not e.is_output(site) and not e.is_code(site) and samples[site] >= 100
    }
    found = {site: units for site, units in found.items() if _first_to_say(e, site)}
    shares = {site: len(units) / e.dead.sites[site].units for site, units in found.items()}
    many = {site: share for site, share in shares.items() if share >= 0.2}
    if len(many) > 3:
        worst = max(many, key=lambda site: many[site])
        yield Look(
            _milder(e, "error" if many[worst] >= 0.5 else "warning"),
            worst,
            "dead_fraction",
            many[worst],
            f"In {len(many)} of {len(frequencies)} ReLU layers {min(many.values()):.0%} to {many[worst]:.0%} of the "
            f"units never fired in {samples[worst]:,} samples, here the most.",
            _EVERYWHERE,
            ("learning_rate", -1),
            samples[worst],
        )
    for site, units in found.items():
        if len(many) > 3 and site in many:
            continue
        total, n = e.dead.sites[site].units, samples[site]
        rate = f"in {n:,} samples (rate < {3 / n:.1g})"
        if len(units) == total:
            yield Look(
                "error",
                site,
                "dead_fraction",
                1.0,
                f"All {total} units never fired {rate}.",
                "Nothing passes here, forward or backward. Use a smaller learning rate and He initialisation with "
                "biases of 0 (or 0.1), or LeakyReLU.",
                ("learning_rate", -1),
                n,
            )
        else:
            share = shares[site]
            yield Look(
                _milder(e, "error" if share >= 0.5 else "info"),
                site,
                "dead_fraction",
                share,
                f"{len(units)} of {total} units never fired {rate}.",
                "Use LeakyReLU, add DeadUnitReviver, or start biases at 0.1; if it grows while training, the learning "
                "rate is too high.",
                None,
                n,
            )
        near = int(((frequencies[site] > 0) & (frequencies[site] < 1e-5)).sum())
        if near:
            yield Look(
                "info",
                site,
                "near_dead",
                near,
                f"{near} more fire less often than once in 100,000.",
                "They will not recover by themselves more easily than dead ones.",
                None,
                n,
            )


def _first_to_say(e: Evidence, site: str) -> bool:
    """Whether it does not act on what another activation gives, whose units then fire as often."""
    frequencies = e.dead.firing_frequency()
    before = e.output.after.get(site)
    return before not in frequencies or not frequencies[before].equal(frequencies[site])


def _milder(e: Evidence, severity: Severity) -> Severity:
    """Units that died cost little where all was learnt without them."""
    if e.relative < 0.15:
        return "info"
    return {"error": "warning", "warning": "info", "info": "info"}[severity] if e.relative < 0.5 else severity  # type: ignore[return-value]


@cause(Stage.ACTIVATIONS, _LU, follows=True)
def dormant_units(e: Evidence) -> Iterator[Look]:
    """More than a quarter of the units of an activation without a hard zero are dormant."""
    samples, hard = e.dead.num_samples(), set(e.dead.firing_frequency())
    for site, dormant in e.dead.dormant_units().items():
        share = len(dormant) / e.dead.sites[site].units
        if site not in hard and share > 0.25 and samples[site] >= 100 and not e.is_output(site):
            yield Look(
                "info",
                site,
                "dormant_fraction",
                share,
                f"{share:.0%} of the units are dormant (mean |a| at most {e.dead.tau:g} of the layer's).",
                "If this grew while training, the learning rate is too high, or weight decay too strong; else the "
                "layer is wider than it need be.",
                None,
                samples[site],
            )


@cause(Stage.ACTIVATIONS, "Glorot & Bengio 2010; LeCun et al. 1998, Efficient BackProp", follows=True)
def saturated(e: Evidence) -> Iterator[Look]:
    """More than half of the elements of a squashing activation are flat, gates of recurrent cells left out."""
    for site, fraction in e.saturation.saturated_fraction().items():
        hidden = e.dead.sites[site].activation in SQUASHING and not e.is_output(site) and not e.is_gate(site)
        if hidden and fraction > 0.5 and not e.relative < 0.3 and (e.relative == e.relative or fraction > 0.8):
            yield Look(
                "error" if fraction > 0.7 and e.unlearnt() else "warning",
                site,
                "saturated_fraction",
                fraction,
                f"{fraction:.0%} of its elements are flat (slope < {e.saturation.eps:g}).",
                "Its inputs are too large: standardise the data, start with smaller weights (Xavier), or normalise "
                "before it.",
            )
