"""What is done about a finding."""

from lightning_ae.diagnostics.remedies.revival import DeadUnitReviver

__all__ = ["DeadUnitReviver"]
