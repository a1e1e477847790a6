"""Bringing dead units back: what is known of them, what may be changed, and the change itself."""

from lightning_ae.callbacks.revival.evidence import Evidence, Facts
from lightning_ae.callbacks.revival.plan import plan
from lightning_ae.callbacks.revival.surgery import Edit, Repair, operate

__all__ = ["Edit", "Evidence", "Facts", "Repair", "operate", "plan"]
