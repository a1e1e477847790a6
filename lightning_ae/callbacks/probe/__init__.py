"""Seeing what a model does while it trains: the shared probe and the base of the monitors on it."""

from lightning_ae.callbacks.probe.monitor import Monitor, SiteInfo
from lightning_ae.callbacks.probe.site import Event, Site
from lightning_ae.callbacks.probe.watch import Watch

__all__ = ["Event", "Monitor", "Site", "SiteInfo", "Watch"]
