"""Where a report goes at the end of a fit: into a folder, to loggers, and onto the terminal."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ae.diagnostics.report.loggers import log_report
from lightning_ae.diagnostics.report.printed import print_report
from lightning_ae.diagnostics.report.report import Report


def show(report: Report, trainer: L.Trainer, folder: Path | None, quiet: bool) -> None:
    """Write, log and print; one that fails is a warning and keeps none of the others.

    Args:
        report: what to show.
        trainer: whose loggers show it.
        folder: where to write; None for nowhere.
        quiet: do not print.
    """
    written: Path | None = None
    if folder is not None:
        try:
            written = report.save(folder)[1]
        except Exception as error:
            rank_zero_warn(f"DiagnosticsReport could not write to {folder}: {type(error).__name__}: {error}")
    log_report(report, trainer.loggers, trainer.global_step)
    if not quiet:
        print_report(report)
        if written is not None:
            print(f"Written to {written}.")
