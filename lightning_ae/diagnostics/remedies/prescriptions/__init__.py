"""Which remedies a cause calls for, by where it is."""

from lightning_ae.diagnostics.remedies.prescriptions import data, network, steps
from lightning_ae.diagnostics.remedies.prescriptions.base import PRESCRIPTIONS

__all__ = ["PRESCRIPTIONS", "data", "network", "steps"]
