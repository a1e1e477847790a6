"""``lightning-ae doctor``: why a model does not learn, from its configuration or its checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_ae.cli.failing import Failure, Follower, first_interrupt, shapes, told
from lightning_ae.cli.making import DoctorCLI, find_class, with_hyperparameters
from lightning_ae.cli.treating import check_held_out, treatment
from lightning_ae.diagnostics import DiagnosticsReport, Report, Treatment, diagnose
from lightning_ae.diagnostics.held_out import held_out
from lightning_ae.diagnostics.report import print_report
from lightning_ae.diagnostics.report.saved import to_dict

#: As a shell's, of what Ctrl-C has ended.
INTERRUPTED = 130


def doctor(args: Sequence[str]) -> int:
    r"""Diagnose, print what was found, and write the page.

    ``-c config.yaml``, or ``--model`` and ``--data``: builds model and data as ``lightning-ae fit`` does, with the
    user's optimizer, scheduler, precision, clipping, accumulation and callbacks, and fits ``--steps`` steps on one
    device with a :class:`lightning_ae.DiagnosticsReport`. Nothing else is written: no logs, no checkpoints. A
    ``DiagnosticsReport`` among the user's callbacks says what ``latent`` and ``output`` are.

    ``--ckpt_path FILE``: looks at as many batches with the model as it is, forwards and backwards, and leaves its
    weights alone; then at the error on training and held-out batches in evaluation mode. A model of this package is
    rebuilt from the file; any other is named by ``--model``, with hyperparameters from the file, or by ``-c``. Nothing
    in a file is executed.

    ``--treat`` tries remedies with :func:`lightning_ae.treat`, each in a fit from the start, and writes those that
    help: ``treatment.yaml``, the whole configuration with them, and ``treated.ckpt``.

    Args:
        args: the command line after ``doctor``.

    Returns:
        0 if no error was found (with ``--treat``, if none is left), 1 if one was or the fit broke off, 2 if there is no
        diagnosis, 130 if Ctrl-C has ended it; what was seen until then is reported.

    Raises:
        SystemExit: for arguments that do not parse (2), and after ``--help`` (0).

    Example:
        >>> import tempfile
        >>> model = ["--model=LinearAutoencoder", "--model.latent_dim=4", "--trainer.accelerator=cpu"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with contextlib.redirect_stdout(None):
        ...         code = doctor([*model, "--data=DigitsDataModule", "--steps=40", f"--folder={folder}"])
        ...     code, (Path(folder) / "diagnostics.html").exists()
        (0, True)
    """
    try:
        with _quiet():
            return _doctor(args)
    except Failure as failure:
        print(f"lightning-ae doctor: error: {failure}", file=sys.stderr)
        return 2


def _doctor(args: Sequence[str]) -> int:
    as_json = "--json" in args
    # what models and data print is no JSON
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        cli = _parse(args)
        report, broken, interrupted = _examine(cli)
        written = _save(report, cli.folder)
        if not as_json:
            print_report(report)
            print(f"Written to {written}.")
        if broken:
            print(f"lightning-ae doctor: {broken}", file=sys.stderr)
        treated = None
        serious = [finding for finding in report.findings if finding.severity != "info"]
        if cli.config.treat and not interrupted and serious and not broken:
            treated = treatment(cli)
            _save(treated.report, cli.folder / "treated")
        elif cli.config.treat and not as_json and not interrupted:
            print("Not treated: the fit broke off." if broken else "Nothing to treat.")
    if treated is not None and not as_json:
        _print(treated, cli.folder)
    last = report if treated is None else treated.report
    code = INTERRUPTED if interrupted else int(bool(broken) or last.worst == "error")
    if as_json:
        print(json.dumps(_tree(report, treated, cli.folder, code), indent=1))
    return code


def _parse(args: Sequence[str]) -> DoctorCLI:
    for option, base in (("--model", L.LightningModule), ("--data", L.LightningDataModule)):
        for name, following in zip(args, [*args[1:], ""], strict=True):
            if name == option:
                find_class(following, base)
            elif name.startswith(f"{option}="):
                find_class(name.partition("=")[2], base)
    try:
        given = with_hyperparameters(args)
    except (FileNotFoundError, ValueError) as error:
        raise Failure(str(error)) from error
    argv, sys.argv = sys.argv, sys.argv[:1]  # Lightning warns of arguments given twice
    try:
        cli = DoctorCLI(given)
    finally:
        sys.argv = argv
    for name in ("steps", "trials"):
        if cli.config[name] < 1:
            raise Failure(f"{name}: expected a positive number, got {cli.config[name]}.")
    return cli


def _examine(cli: DoctorCLI) -> tuple[Report, str, bool]:
    """The report, why the fit broke off if it did, and whether the user has ended it."""
    with first_interrupt() as asked:
        if cli.config.ckpt_path is not None:
            return _of_checkpoint(cli, asked), "", asked.is_set()
        report, broken = _of_fit(cli, asked)
        return report, broken, asked.is_set()


def _of_fit(cli: DoctorCLI, asked: threading.Event) -> tuple[Report, str]:
    steps = cli.config.steps
    cli.make_all()
    if cli.config.treat:
        check_held_out(cli)
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
    broken = ""
    try:
        trainer = L.Trainer(**options)
        trainer.fit(cli.model, datamodule=cli.datamodule)
    except (Exception, SystemExit) as error:  # Lightning leaves by SystemExit at the second Ctrl-C
        if callback.report is None or not follower.done:
            raise Failure(told(f"The fit failed{follower.at}", error)) from error
        broken = "" if asked.is_set() else told(f"After {follower.done} batches the fit broke off{follower.at}", error)
    if callback.report is None:
        raise Failure(
            "The data have no training batch." if not follower.done else "No step was looked at; give more --steps."
        )
    return _without_own_limit(callback.report, cli), broken


def _without_own_limit(report: Report, cli: DoctorCLI) -> Report:
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
        check_held_out(cli)
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
        raise Failure(told(f"The diagnosis failed{at}", error)) from error
    report.about = {"checkpoint": Path(cli.config.ckpt_path).name, **report.about}
    return report


# -- what is written and printed ------------------------------------------------------------------------------------


def _save(report: Report, folder: Path) -> Path:
    try:
        return report.save(folder)[1]
    except OSError as error:
        raise Failure(f"folder: {folder} cannot be written to: {error}") from error


def _print(treated: Treatment, folder: Path) -> None:
    print(f"\nTreatment\n\n{treated}")
    if treated.improved:
        print(f"\n{treated.yaml()}\n")
        print(f"The whole configuration with these changes: {folder / 'treatment.yaml'}; to run it:")
        print(f"  lightning-ae fit -c {folder / 'treatment.yaml'}")
        print(f"The model after {folder / 'treated.ckpt'}, its diagnosis: {folder / 'treated' / 'diagnostics.html'}.")


def _tree(report: Report, treated: Treatment | None, folder: Path, code: int) -> dict[str, Any]:
    """What ``--json`` prints: the report as in ``diagnostics.json``, and the treatment."""
    tree: dict[str, Any] = {"exit_code": code, "folder": str(folder), "report": to_dict(report), "treatment": None}
    if treated is not None:
        number = to_dict(Report([], output={"before": treated.before, "after": treated.after}))["output"]
        trials = [{"what": t.what, "cause": t.finding and t.finding.cause, "kept": t.kept} for t in treated.trials]
        tree["treatment"] = {
            **number,
            "remedies": [remedy.describe() for remedy in treated.remedies],
            "trials": trials,
            "report": to_dict(treated.report),
        }
    return tree


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from talking of devices, seeds and workers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
