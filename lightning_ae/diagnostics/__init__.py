"""Why a model does not learn, in the order of the data: watch → monitors → causes → remedies, and the report of it."""

from lightning_ae.diagnostics.attach import DiagnosticsReport
from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.diagnose import diagnose
from lightning_ae.diagnostics.monitors import DeadReLUMonitor, GradientSaturationMonitor, LatentSparsityMonitor
from lightning_ae.diagnostics.remedies import ApplyRemedies, DeadUnitReviver
from lightning_ae.diagnostics.report import Report
from lightning_ae.diagnostics.stop import StopHopeless
from lightning_ae.diagnostics.treat import Treatment, treat

__all__ = [
    "ApplyRemedies",
    "DeadReLUMonitor",
    "DeadUnitReviver",
    "DiagnosticsReport",
    "Finding",
    "GradientSaturationMonitor",
    "LatentSparsityMonitor",
    "Report",
    "StopHopeless",
    "Treatment",
    "diagnose",
    "treat",
]
