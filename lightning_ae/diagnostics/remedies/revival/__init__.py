"""New life for units that never fire: what fired, what may be changed, and the change."""

from lightning_ae.diagnostics.remedies.revival.revive import DeadUnitReviver

__all__ = ["DeadUnitReviver"]
