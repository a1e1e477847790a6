"""Seeing what a model does while it trains: activations, gradients, losses and modules, on sampled steps."""

from lightning_ae.diagnostics.watch.probe import Probe
from lightning_ae.diagnostics.watch.site import Event, Site, SiteInfo
from lightning_ae.diagnostics.watch.watch import Watch

__all__ = ["Event", "Probe", "Site", "SiteInfo", "Watch"]
