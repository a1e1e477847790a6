"""From what was measured to what is wrong and what to change first: one family of causes a file."""

from __future__ import annotations

from lightning_ae.diagnostics.causes import (
    activations,
    data,
    generalisation,
    latent,
    output,
    pairing,
    scale,
    steps,
    targets,
    terms,
    wiring,
)
from lightning_ae.diagnostics.causes.base import CAUSES, Cause, Evidence, Finding, Stage
from lightning_ae.diagnostics.causes.explain import find

__all__ = [
    "CAUSES",
    "Cause",
    "Evidence",
    "Finding",
    "Stage",
    "activations",
    "data",
    "find",
    "generalisation",
    "latent",
    "output",
    "pairing",
    "scale",
    "steps",
    "targets",
    "terms",
    "wiring",
]
