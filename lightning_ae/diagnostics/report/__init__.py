"""What the monitors found: as data, as text, as a page, as pictures, and where loggers show it."""

from lightning_ae.diagnostics.report.make import make_report
from lightning_ae.diagnostics.report.printed import print_report
from lightning_ae.diagnostics.report.report import Report
from lightning_ae.diagnostics.report.show import show

__all__ = ["Report", "make_report", "print_report", "show"]
