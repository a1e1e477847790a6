"""Declaring which remedies a cause calls for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Finding
from lightning_ae.diagnostics.remedies.base import Remedy

Prescription = Callable[[Evidence, Finding], Iterator[Remedy]]
#: Prescriptions by the name of the cause.
PRESCRIPTIONS: dict[str, Prescription] = {}


def remedies_of(*causes: str) -> Callable[[Prescription], Prescription]:
    """Declare the remedies of causes: a generator of them, the first to try first."""

    def declare(rule: Prescription) -> Prescription:
        PRESCRIPTIONS.update(dict.fromkeys(causes, rule))
        return rule

    return declare
