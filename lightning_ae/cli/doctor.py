"""``lightning-ae doctor``: why a model does not learn, from its configuration or its checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_ae.cli.examining import examine
from lightning_ae.cli.failing import INTERRUPTED, Failure, say
from lightning_ae.cli.making import DoctorCLI, find_class, with_hyperparameters
from lightning_ae.cli.treating import treatment
from lightning_ae.diagnostics import Report, Treatment
from lightning_ae.diagnostics.report import print_report
from lightning_ae.diagnostics.report.saved import to_dict
from lightning_ae.models import Autoencoder


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
        say(failure)
        return failure.code


def _doctor(args: Sequence[str]) -> int:
    as_json = "--json" in args
    # what models and data print is no JSON
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        cli = _parse(args)
        report, broken, interrupted = examine(cli)
        written = _save(report, cli.folder)
        if not as_json:
            print_report(report)
            print(f"Written to {written}.")
        if broken:
            say(broken)
        treated, no_yaml = None, ""
        serious = [finding for finding in report.findings if finding.severity != "info"]
        if cli.config.treat and not interrupted and serious and not broken:
            treated, no_yaml = treatment(cli)
            if treated.improved:
                _save(treated.report, cli.folder / "treated")
        elif cli.config.treat and not as_json and not interrupted:
            print("Not treated: the fit broke off." if broken else "Nothing to treat.")
    if treated is not None and not as_json:
        _print(treated, cli.folder, no_yaml)
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


# -- what is written and printed ------------------------------------------------------------------------------------


def _save(report: Report, folder: Path) -> Path:
    try:
        return report.save(folder)[1]
    except OSError as error:
        raise Failure(f"folder: {folder} cannot be written to: {error}") from error


def _print(treated: Treatment, folder: Path, no_yaml: str) -> None:
    print(f"\nTreatment\n\n{treated}\n")
    if not treated.improved:
        print("No remedy helped.")
        return
    print(f"{treated.yaml()}\n")
    if no_yaml:
        print(f"No configuration was written: {no_yaml}")
    else:
        print(f"The whole configuration with these changes: {folder / 'treatment.yaml'}; to run it:")
        print(f"  lightning-ae fit -c {folder / 'treatment.yaml'}")
    print(f"The treated model: {folder / 'treated.ckpt'}, its diagnosis: {folder / 'treated' / 'diagnostics.html'}.")
    if not isinstance(treated.model, Autoencoder):
        print("Its weights are those of a model with the remedies that change it: make them before you load it.")


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
