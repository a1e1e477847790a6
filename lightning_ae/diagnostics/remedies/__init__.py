"""What is done about a finding: dead units are brought back."""

from lightning_ae.diagnostics.remedies.revive import DeadUnitReviver

__all__ = ["DeadUnitReviver"]
