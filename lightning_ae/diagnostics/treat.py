"""Remedies tried one after the other on fresh copies of a model, and kept if the held-out error falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import yaml
from lightning.pytorch.utilities import rank_zero_info

from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.monitors.latent_sparsity import Latent
from lightning_ae.diagnostics.remedies.base import ByHand, Remedy, code, merge
from lightning_ae.diagnostics.report import Report
from lightning_ae.diagnostics.trial import Fit, Fits, undisturbed_draws


class Trial(NamedTuple):
    """One short fit.

    Attributes:
        remedy: what was changed for it; None in the first.
        finding: what called for that; None where a number of one that was kept is varied.
        what: what was changed, in words, or why nothing was.
        error: share of the variance left on held-out data; NaN if there was no fit.
        kept: whether the change was kept.
        findings: how many errors and warnings were found.
    """

    remedy: Remedy | None
    finding: Finding | None
    what: str
    error: float
    kept: bool
    findings: int


@dataclass
class Treatment:
    """What was tried, what helped, and the model with the changes that did.

    Attributes:
        trials: every fit, and every remedy that could not be applied, in order.
        remedies: those that were kept, in order.
        model: the best one, trained for as long as the trials were.
        report: the diagnosis of its fit.
        before: share of the variance left on held-out data without any remedy.
        after: the same with those that were kept; never more than before.

    Example:
        >>> from lightning_ae.diagnostics.remedies import ClipGradients
        >>> print(Treatment([], [ClipGradients()], None, Report([]), 0.9, 0.2).yaml())
        trainer:
          gradient_clip_val: 1.0
    """

    trials: list[Trial]
    remedies: list[Remedy]
    model: Any
    report: Report
    before: float
    after: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether a remedy was kept."""
        return bool(self.remedies)

    def python(self) -> str:
        """Code that makes the changes to ``model`` for good, and gives a Trainer the arguments that belong to them."""
        if not self.remedies:
            return "# Nothing to change."
        imports = "import lightning as L\nimport lightning_ae as ae\nfrom lightning_ae.diagnostics import remedies"
        return f"{imports}\n\n{code(self.remedies)}"

    def yaml(self) -> str:
        """What makes the changes for good in LightningCLI's configuration."""
        config = merge(remedy.config() for remedy in self.remedies)
        return str(yaml.safe_dump(config, sort_keys=False)).rstrip() if config else "# Nothing to change."

    def __str__(self) -> str:
        lines = [f"Held-out error {self.before:.3g} → {self.after:.3g} (1: no better than a constant)."]
        for number, trial in enumerate(self.trials):
            mark = "start" if trial.remedy is None else "kept" if trial.kept else "not kept"
            error = f"{trial.error:.3g}" if trial.error == trial.error else "-"
            cause = f" [{trial.finding.cause}]" if trial.finding is not None else ""
            lines.append(f"  {number}. {mark:8} {error:>8}  {trial.what}{cause}")
        if self.remedies:
            lines += ["", self.python()]
        left = [finding for finding in self.report.findings if finding.severity != "info"]
        return "\n".join([*lines, *(["", "Still found:"] if left else []), *map(str, left)])


def treat(
    make_model: Callable[[], L.LightningModule],
    data: Any,
    *,
    trials: int = 4,
    steps: int = 300,
    seed: int = 0,
    latent: Latent | None = None,
    trainer_options: dict[str, Any] | None = None,
) -> Treatment:
    r"""Fit shortly, apply the remedy of the first finding to a fresh model, keep it if that helps, and go on.

    Each trial starts from the same seed. A remedy is kept if the squared error on held-out data, relative to that of
    the best constant, falls by more than two standard errors (paired, over the examples) and by more than 1 % of what
    was left; else the next remedy of the finding is tried, then that of the next finding. When no error and no warning
    is found any more, or nothing is left to try for them, numbers of what was kept that are guesses, as a learning
    rate's, are varied by a factor of three, likewise. It ends when that is done, too, or after so many trials. The
    start is one of the models compared, so the result is never worse, on these data.

    Args:
        make_model: gives a new model at each call.
        data: a data module, or ``(training loader, validation loader)``. Held out is the validation part, all of it:
            at each call the same examples in one order.
        trials: fits after the first.
        steps: optimizer steps of a fit, about.
        seed: of each fit.
        latent: as for :class:`lightning_ae.DiagnosticsReport`.
        trainer_options: further arguments of the Trainer, as ``{"accelerator": "gpu"}``; None for the CPU.

    Returns:
        The treatment; print it.

    Raises:
        TypeError: if ``make_model`` is a model and not what makes one, or gives something else.
        ValueError: if a number is not positive, there are no held-out data, or nothing that the model compares with a
            target is heard on them.

    Source: Zhang et al. 2021, AUTOTRAINER: An Automatic DNN Training Problem Detection and Repair System (ICSE).

    Example:
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder
        >>> treatment = treat(lambda: MLPAutoencoder((1, 8, 8), 8, hidden=(32,), lr=3.0), DigitsDataModule(), steps=60)
        >>> treatment.improved, treatment.after < 0.5 * treatment.before
        (True, True)
    """
    _check(make_model, trials, steps)
    options = {"accelerator": "cpu", "devices": 1, **(trainer_options or {})}
    with undisturbed_draws(data):
        return _treat(Fits(make_model, data, {"max_steps": steps, **options}, seed, latent), trials)


def _treat(fits: Fits, trials: int) -> Treatment:
    best = fits.fit([])
    assert isinstance(best, Fit)
    first, kept, tried, done = best.left.value, list[Remedy](), set[str](), 0
    told = [Trial(None, None, "as it is", first, False, _count(best.report))]
    while done < trials:
        chosen = _next(best.report, tried, kept)
        if chosen is None:
            break
        finding, remedy, base = chosen
        tried.add(repr(remedy))
        if isinstance(remedy, ByHand):
            told.append(Trial(remedy, finding, remedy.describe(), math.nan, False, 0))
            continue
        fit = fits.fit([*base, remedy])
        if isinstance(fit, str):
            told.append(Trial(remedy, finding, f"{remedy.describe()} Not applied: {fit}.", math.nan, False, 0))
            continue
        done += 1
        better = fit.left.better_than(best.left)
        told.append(Trial(remedy, finding, remedy.describe(), fit.left.value, better, _count(fit.report)))
        rank_zero_info(f"treat: {remedy.describe()} {best.left.value:.4g} → {fit.left.value:.4g}")
        if better:
            best, kept = fit, [*base, remedy]
    return Treatment(told, kept, best.model, best.report, first, best.left.value, best.options)


def _check(make_model: Any, trials: int, steps: int) -> None:
    if isinstance(make_model, L.LightningModule) or not callable(make_model):
        raise TypeError(
            f"make_model: expected a function that makes a new model at each call, got a {type(make_model).__name__}; "
            "give lambda: YourModel(...)."
        )
    for name, value in (("trials", trials), ("steps", steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {value!r}.")


def _count(report: Report) -> int:
    return sum(finding.severity != "info" for finding in report.findings)


def _next(report: Report, tried: set[str], kept: list[Remedy]) -> tuple[Finding | None, Remedy, list[Remedy]] | None:
    """The next remedy to try, what calls for it, and the kept ones to which it is added.

    It is the first one that was not tried of the first finding that is no mere information; if there is none, another
    number for one of those that were kept, which it replaces.
    """
    for finding in report.findings:
        for remedy in finding.remedies if finding.severity != "info" else ():
            if repr(remedy) not in tried:
                return finding, remedy, kept
    for number, one in enumerate(kept):
        for remedy in one.neighbours():
            if repr(remedy) not in tried:
                return None, remedy, [*kept[:number], *kept[number + 1 :]]
    return None
