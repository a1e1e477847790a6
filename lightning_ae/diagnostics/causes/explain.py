"""One cause, one voice: the order of findings, what follows from what, and that no two contradict each other."""

from __future__ import annotations

from lightning_ae.diagnostics.causes.base import CAUSES, Evidence, Finding, run

_ORDER = {"error": 0, "warning": 1, "info": 2}
#: Causes that are looked for only where nothing else is seriously wrong: they are what is left of a healthy run.
LAST = ("learning_rate_low", "too_short")
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
        found += [f for name in LAST for f in run(evidence, CAUSES[name])]
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
    declared = CAUSES[finding.cause]
    for number, earlier in enumerate(kept):
        opposite = (
            earlier.change is not None
            and finding.change is not None
            and earlier.change[0] == finding.change[0]
            and earlier.change[1] != finding.change[1]
        )
        is_root = not CAUSES[earlier.cause].follows
        serious = earlier.severity == "error" or (is_root and earlier.severity == finding.severity == "warning")
        before = CAUSES[earlier.cause].stage
        root = before <= declared.stage if is_root else before < declared.stage
        if opposite or (declared.follows and serious and root and earlier.cause != finding.cause):
            return number
    return None
