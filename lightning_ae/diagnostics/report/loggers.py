"""The report where loggers show it: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ae.diagnostics.report.report import Report

_NAME = "diagnostics"


def log_report(report: Report, loggers: Iterable[Logger], step: int) -> None:
    """Send verdict, page and pictures to the loggers that take them; a failure is a warning.

    Args:
        report: what to show.
        loggers: TensorBoard's gets the report as text, and pictures if matplotlib is installed; that of Weights &
            Biases gets the page, the verdict in its summary, and the pictures. Others get nothing.
        step: the optimizer step to log them at.
    """
    for logger in loggers:
        try:
            if isinstance(logger, TensorBoardLogger):
                _to_tensorboard(report, logger, step)
            elif isinstance(logger, WandbLogger):
                _to_wandb(report, logger, step)
        except Exception as error:
            rank_zero_warn(
                f"DiagnosticsReport could not log to {type(logger).__name__}: {type(error).__name__}: {error}"
            )


def _to_tensorboard(report: Report, logger: TensorBoardLogger, step: int) -> None:
    writer = logger.experiment
    writer.add_text(_NAME, report.to_markdown(), step)
    if importlib.util.find_spec("matplotlib") is not None:
        from lightning_ae.diagnostics.report.pictures import figures

        for name, figure in figures(report).items():
            writer.add_figure(f"{_NAME}/{name}", figure, step)
    writer.flush()


def _to_wandb(report: Report, logger: WandbLogger, step: int) -> None:
    import wandb

    run = logger.experiment
    shown = {f"{_NAME}/page": wandb.Html(report.to_html(), inject=False)}
    if importlib.util.find_spec("matplotlib") is not None:
        from lightning_ae.diagnostics.report.pictures import figures

        shown |= {f"{_NAME}/{name}": wandb.Image(figure) for name, figure in figures(report).items()}
    run.log({**shown, "trainer/global_step": step})
    run.summary[f"{_NAME}/verdict"] = report.verdict
