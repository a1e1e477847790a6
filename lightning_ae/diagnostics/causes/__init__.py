"""From what was measured to what is wrong and what to change first."""

from __future__ import annotations

from lightning_ae.diagnostics.causes.code import latent, penalties
from lightning_ae.diagnostics.causes.ends import data, loss, output
from lightning_ae.diagnostics.causes.evidence import Evidence, Finding
from lightning_ae.diagnostics.causes.layers import dead, saturated, steps, twice, vanishing

__all__ = ["Evidence", "Finding", "find"]

#: In the order in which a batch meets the causes.
RULES = (data, loss, twice, dead, vanishing, saturated, latent, penalties, output, steps)
_ORDER = {"error": 0, "warning": 1, "info": 2}


def find(evidence: Evidence) -> list[Finding]:
    """All findings, the worst first; those of one severity in the order in which a batch meets their causes.

    Args:
        evidence: the monitors.

    Returns:
        Findings; none if nothing is wrong.
    """
    found = [finding for rule in RULES for finding in rule(evidence)]
    return sorted(found, key=lambda finding: _ORDER[finding.severity])
