"""The diagnosis on the command line: of some hundred steps of a fit, or of a checkpoint as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_ae.cli.failing import Failure, Follower, failed, first_interrupt, shapes
from lightning_ae.cli.making import DoctorCLI
from lightning_ae.diagnostics import DiagnosticsReport, Report, diagnose
from lightning_ae.diagnostics.held_out import held_out


def examine(cli: DoctorCLI) -> tuple[Report, Failure | None, bool]:
    """Fit some steps, or look at a checkpoint.

    Returns:
        The report, why the fit broke off if it did, and whether the user has ended it.

    Raises:
        Failure: if there is nothing to report.
    """
    with first_interrupt() as asked:
        if cli.config.ckpt_path is not None:
            return _of_checkpoint(cli, asked), None, asked.is_set()
        report, broken = _of_fit(cli, asked)
        return report, broken, asked.is_set()


def _of_fit(cli: DoctorCLI, asked: threading.Event) -> tuple[Report, Failure | None]:
    steps = cli.config.steps
    cli.make_all()
    if cli.config.treat:
        _check_held_out(cli)
    options, follower = cli.trainer_options, Follower(asked)
    callback = DiagnosticsReport(*cli.latent, every_n_steps=max(1, steps // 50), quiet=True)
    batches = options.get("accumulate_grad_batches", 1)
    options |= {
        "max_epochs": -1,
        "max_steps": steps,
        "val_check_interval": max(1, steps // 8) * batches,  # whatever an epoch is
        "check_val_every_n_epoch": None,
        "callbacks": [follower, *options["callbacks"], callback],
    }
    broken: Failure | None = None
    try:
        trainer = L.Trainer(**options)
        trainer.fit(cli.model, datamodule=cli.datamodule)
    except (Exception, SystemExit) as error:  # Lightning leaves by SystemExit at the second Ctrl-C
        if callback.report is None or not follower.done:
            raise failed(f"The fit failed{follower.at}", error) from error
        if not asked.is_set():
            broken = failed(f"After {follower.done} batches the fit broke off{follower.at}", error)
    if callback.report is None:
        raise Failure(
            "The data have no training batch." if not follower.done else "No step was looked at; give more --steps."
        )
    return _without_own_limit(callback.report), broken


def _without_own_limit(report: Report) -> Report:
    """That the fit was short is its doing, not the model's."""
    report.findings = [
        f._replace(severity="info", advice=f"The doctor has ended the fit; --steps more tell more. {f.advice}")
        if f.cause == "too_short"
        else f
        for f in report.findings
    ]
    report.findings.sort(key=lambda finding: ("error", "warning", "info").index(finding.severity))
    return report


def _of_checkpoint(cli: DoctorCLI, asked: threading.Event) -> Report:
    cli.load()
    if cli.config.treat:
        _check_held_out(cli)
    model, latent = cli.model, cli.latent
    try:
        trainer = L.Trainer(**{**cli.trainer_options, "callbacks": []})
        model.to(trainer.strategy.root_device)
        if cli.datamodule is not None:
            cli.datamodule.trainer = trainer
            cli.datamodule.prepare_data()
            cli.datamodule.setup("fit")
        seen = list[Any]()

        def until_asked(stage: str) -> Iterator[Any]:
            for batch in cli.batches(stage, cli.config.steps):
                seen[:] = [batch]
                yield batch
                if asked.is_set():
                    return

        try:
            report = diagnose(model, until_asked("train"), latent=latent.latent, output=latent.output)
        except ValueError as error:
            if "expected at least one" in str(error):
                raise Failure("The data have no training batch.") from error
            raise
        for name, stage in (("training error", "train"), ("held-out error", "val")):
            left = held_out(model, until_asked(stage)).value
            if left == left:
                report.output[name] = left
    except Failure:
        raise
    except Exception as error:
        at = f" in a batch of {shapes(seen[0])}" if seen else ""
        raise failed(f"The diagnosis failed{at}", error) from error
    report.about = {"checkpoint": Path(cli.config.ckpt_path).name, **report.about}
    return report


def _check_held_out(cli: DoctorCLI) -> None:
    owner = cli.datamodule if cli.datamodule is not None else cli.model
    if not is_overridden("val_dataloader", owner):
        raise Failure(
            f"--treat: {type(owner).__name__} has no validation data (val_dataloader), so no remedy can be judged."
        )
