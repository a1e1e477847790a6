"""One cause, one voice: the order of findings, what follows from what, and that no two contradict each other."""

from __future__ import annotations

from lightning_ae.diagnostics.causes.base import CAUSES, Evidence, Finding, run

_ORDER = {"error": 0, "warning": 1, "info": 2}
#: Causes that are looked for only where nothing else is seriously wrong: they are what is left of a healthy run.
LAST = ("learning_rate_low", "too_short")
#: What a cause explains besides what is mostly seen of others.
_EXPLAINS = {
    "input_scale": ("vanishing_gradient", "exploding_gradient"),
    "target_scale": ("vanishing_gradient", "exploding_gradient"),
    "nonfinite_loss": ("learning_rate_high", "no_gradient", "log_variance_explodes"),
    "codebook_collapse": ("dead_units",),
}
#: What is seen of a network that has hardly moved.
_OF_TOO_FEW_STEPS = ("constant_output", "constant_latents")


def find(evidence: Evidence) -> list[Finding]:
    """All findings, the worst first; those of one severity in the order in which a batch meets their causes.

    Within a severity causes come before what is mostly seen of others. What follows from a cause that is as serious and
    comes before is listed under it. Of two findings whose advice
    would turn one number in opposite directions the later one is listed under the earlier.

    Args:
        evidence: the monitors.

    Returns:
        Findings; none if nothing is wrong.
    """
    found = [f for name, declared in CAUSES.items() if name not in LAST for f in run(evidence, declared)]
    found = _without_weak(found)
    if all(f.cause in _OF_TOO_FEW_STEPS for f in found if f.severity == "error"):
        left = [f for name in LAST for f in run(evidence, CAUSES[name])]
        if any(f.severity != "info" for f in left):  # what a network that has hardly moved shows is no error by itself
            found = [f._replace(severity="info") if f.cause in _OF_TOO_FEW_STEPS else f for f in found]
        found += left
    found.sort(key=lambda f: (_ORDER[f.severity], CAUSES[f.cause].follows, CAUSES[f.cause].stage))
    kept: list[Finding] = []
    for finding in found:
        above = _above(kept, finding)
        if above is None:
            kept.append(finding)
        else:
            kept[above] = kept[above]._replace(
                symptoms=(*kept[above].symptoms, f"{finding.site}: {finding.evidence} ({finding.cause})")
            )
    return kept


def _without_weak(found: list[Finding]) -> list[Finding]:
    """Without what says no more than that a network has stood still, where another cause says why it has."""
    strong = [f for f in found if f.severity == "error" and not CAUSES[f.cause].follows and not _is_weak(f)]
    return [f for f in found if not _is_weak(f)] if strong else found


def _is_weak(finding: Finding) -> bool:
    return finding.cause == "learning_rate_high" and finding.measure in ("gradient_norm", "update_ratio")


def _above(kept: list[Finding], finding: Finding) -> int | None:
    """Number of the finding under which one belongs."""
    for number, earlier in enumerate(kept):
        if _contradicts(earlier, finding) or _explains(earlier, finding):
            return number
    return None


def _contradicts(earlier: Finding, finding: Finding) -> bool:
    """Whether both would turn one number, in opposite directions."""
    a, b = earlier.change, finding.change
    return a is not None and b is not None and a[0] == b[0] and a[1] != b[1]


def _explains(earlier: Finding, finding: Finding) -> bool:
    """Whether what is mostly seen of others is seen of this one."""
    above, below = CAUSES[earlier.cause], CAUSES[finding.cause]
    if earlier.severity == "error" and finding.cause in _EXPLAINS.get(earlier.cause, ()):
        return True
    if not below.follows or earlier.cause == finding.cause:
        return False
    if earlier.cause in LAST:
        return finding.cause in (*_OF_TOO_FEW_STEPS, "dead_units", "dormant_units")
    if above.follows:
        return earlier.severity == "error" and above.stage < below.stage
    serious = earlier.severity == "error" or earlier.severity == finding.severity == "warning"
    return serious and above.stage <= below.stage
