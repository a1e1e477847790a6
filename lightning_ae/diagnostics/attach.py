"""The report as a callback."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_ae.diagnostics.causes import CAUSES, Finding, Stage, find
from lightning_ae.diagnostics.monitored import Monitored
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.monitors.latent_sparsity import Latent
from lightning_ae.diagnostics.monitors.saturation_summary import transmission
from lightning_ae.diagnostics.monitors.training import TrainingMonitor
from lightning_ae.diagnostics.report import Report, make_report, show
from lightning_ae.diagnostics.report.examples import ExampleMonitor

#: What every run shows in its beginning.
_OF_A_BEGINNING = {"too_short", "learning_rate_low", "constant_output", "constant_latents"}
#: What a healthy one may show for a while, or that only the end of a run can tell.
_EARLY = _OF_A_BEGINNING | {"overfitting", "posterior_collapse", "vanishing_gradient", "oscillation"}


def _is_certain(finding: Finding) -> bool:
    """Whether seeing it once is enough: what is so from the first batch on, and stays so."""
    cause = CAUSES[finding.cause]
    first = cause.stage in (Stage.CERTAIN, Stage.DATA, Stage.WIRING)
    return first and cause.heals == "never" and not cause.follows


class DiagnosticsReport(Monitored):
    """Says at the end of a fit why the model has not learnt, if it has not: findings with evidence, cause and advice.

    It reads the three monitors that it finds on the Trainer and brings along those that are missing, and looks at data,
    reconstructions and loss besides. While the fit runs, errors that are certain are warned of at the end of an epoch
    or of a validation, once each, and :meth:`peek` gives what is known so far. At the end of the fit, or where it broke
    off, it prints a table and writes a page, ``diagnostics.html``, into the log folder, with ``.json`` (see
    :meth:`Report.load`), ``.md`` and pictures beside it. TensorBoard and Weights & Biases show it too, where their
    loggers are on the Trainer. :attr:`report` holds all of it.

    Args:
        latent: as for :class:`LatentSparsityMonitor`; None for a model of ours.
        output: name of the module, or of the activation, that gives the reconstruction, in a model that is not ours;
            None for what one of torch's losses, or a difference that is squared, compares with the batch.
        every_n_steps: how often the monitors that it brings along look, in optimizer steps.
        folder: where to write; None for the log folder, and without a logger nowhere.
        quiet: do not print, and do not warn while it runs.

    Raises:
        ValueError: if ``every_n_steps`` is not positive.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder, SquaredError
        >>> model = MLPAutoencoder((1, 8, 8), 2, hidden=(16,), loss=SquaredError("sigmoid"))
        >>> with torch.no_grad():
        ...     _ = model.decoder.layers[-1].bias.fill_(-12.0)  # all black, and confident of it
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     diagnostics = DiagnosticsReport(every_n_steps=2, folder=folder, quiet=True)
        ...     trainer = L.Trainer(
        ...         max_epochs=1, accelerator="cpu", callbacks=diagnostics, logger=False, enable_checkpointing=False,
        ...         enable_progress_bar=False, enable_model_summary=False,
        ...     )
        ...     trainer.fit(model, DigitsDataModule())
        >>> diagnostics.findings[0].measure
        'starved_fraction'
    """

    def __init__(
        self,
        latent: Latent | None = None,
        output: str | None = None,
        every_n_steps: int = 25,
        folder: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(latent, output, every_n_steps)
        self.folder, self.quiet = None if folder is None else Path(folder), quiet
        self.report: Report | None = None
        #: why the fit was ended early, if :class:`StopHopeless` has ended it
        self.stopped: str | None = None
        self._over_time: dict[int, dict[str, float]] = {}
        self._examples = ExampleMonitor(every_n_steps)
        self._always.append(self._examples)
        self._own = list(self._always)
        self._seen: Any = None
        self._trainer: weakref.ref[L.Trainer] | None = None
        #: step at which each cause was first found
        self._first_seen: dict[str, int] = {}
        self._warned: set[str] = set()
        self._suspected: set[str] = set()

    @property
    def findings(self) -> list[Finding]:
        """What was found, the worst first; none before the end of the fit."""
        return [] if self.report is None else self.report.findings

    # -- while it runs ----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the monitors, or bring them along."""
        if stage == "fit":
            self.report, self.stopped, self._over_time, self._seen = None, None, {}, None
            self._first_seen, self._warned, self._suspected = {}, set(), set()
            self._trainer = weakref.ref(trainer)
        super().setup(trainer, pl_module, stage)
        if self._validation is not None:
            self._validation.also = self._examples

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what was logged."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._remember(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember what was logged."""
        super().on_train_epoch_end(trainer, pl_module)
        self._remember(trainer)
        self._ask(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of what is certain: an epoch may be the whole run."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Look for causes, if the steps have grown by a tenth since the last time; warn of those that are certain.

        The first rank alone looks, at what it has seen itself, so that none waits for another.
        """
        if not trainer.is_global_zero or not self._is_due(trainer, self._looks, 0.1):
            return
        try:
            with self._evidence_so_far(trainer, module) as evidence:
                findings = find(evidence)
        except Exception as error:  # no reason for training to end
            if "" not in self._warned:
                rank_zero_warn(f"DiagnosticsReport could not look and goes on: {type(error).__name__}: {error}")
            self._warned.add("")
            return
        self.note(findings, trainer.global_step)
        errors = {
            f.cause: f
            for f in reversed(findings)
            # what is frozen may be thawed later
            if f.severity == "error" and f.cause not in _EARLY and f.measure != "frozen"
        }
        for cause, finding in errors.items():
            if cause not in self._warned and (cause in self._suspected or _is_certain(finding)) and not self.quiet:
                self._warned.add(cause)
                rank_zero_warn(
                    f"At step {trainer.global_step}: [error] {finding.site}: {finding.evidence} {finding.advice}"
                )
        self._suspected = set(errors)

    def note(self, findings: Iterable[Finding], step: int) -> None:
        """Remember at which step each cause was first found; called with what a look in the middle has found."""
        for finding in findings:
            if finding.cause not in _OF_A_BEGINNING:
                self._first_seen.setdefault(finding.cause, step)

    def peek(self) -> Report:
        """What is known so far, in the middle of a fit; the run goes on as if nobody had asked.

        With several ranks it is what this rank has seen. After the fit it is :attr:`report`.

        Raises:
            RuntimeError: if nothing was looked at yet.
        """
        trainer = None if self._trainer is None else self._trainer()
        if self.report is not None:
            return self.report
        if trainer is None or trainer.lightning_module is None or not self._looks:
            raise RuntimeError("peek: nothing was looked at yet; a fit has to have made a step.")
        with self._evidence_so_far(trainer, trainer.lightning_module) as evidence:
            report = make_report(evidence, self._examples)
        self._complete(report)
        return report

    def _remember(self, trainer: L.Trainer) -> None:
        saturation = self._all[GradientSaturationMonitor]
        assert isinstance(saturation, GradientSaturationMonitor)
        now = getattr(saturation, "_now", None)
        if now is not None and now is not self._seen:
            self._seen = now
            passed = transmission(saturation.interval())
            if passed:  # after a resume there is nothing new yet
                self._over_time[trainer.global_step] = passed

    def state_dict(self) -> dict[str, Any]:
        """The sums of its own monitors."""
        return {
            **super().state_dict(),
            "over_time": dict(self._over_time),
            "first_seen": dict(self._first_seen),
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        super().load_state_dict(state_dict)
        self._over_time = dict(state_dict.get("over_time", {}))
        self._first_seen = dict(state_dict.get("first_seen", {}))
        self._warned = set(state_dict.get("warned", ()))

    def __getstate__(self) -> dict[str, Any]:
        """Without the Trainer."""
        return {**self.__dict__, "_trainer": None}

    # -- the report -------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the monitors for the last time, and report; a failure of the report is no failure of the fit."""
        super().on_train_end(trainer, pl_module)
        if trainer.world_size > 1:
            self._first_seen = trainer.strategy.broadcast(self._first_seen, src=0)
        try:
            self._make(trainer, pl_module)
        except Exception as error:
            rank_zero_warn(f"DiagnosticsReport could not be made: {type(error).__name__}: {error}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Report what was seen until then."""
        super().on_exception(trainer, pl_module, exception)
        if trainer.world_size == 1 and self._all and self.report is None:
            with contextlib.suppress(Exception):  # the exception that came first is the one to see
                training = self._all[TrainingMonitor]
                assert isinstance(training, TrainingMonitor)
                training.compare(trainer, pl_module)
                self._make(trainer, pl_module)

    def _make(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report = make_report(self._evidence(pl_module), self._examples)
        for finding in self.report.findings:
            self._first_seen.setdefault(finding.cause, trainer.global_step)
        self._complete(self.report)
        log_folder = trainer.log_dir if trainer.loggers else None
        folder = self.folder or (None if log_folder is None else Path(log_folder))
        self._show(trainer, self.report, folder)

    def _complete(self, report: Report) -> None:
        """Add what the callback alone knows."""
        report.over_time = dict(self._over_time)
        report.first_seen, report.stopped = dict(self._first_seen), self.stopped

    @rank_zero_only
    def _show(self, trainer: L.Trainer, report: Report, folder: Path | None) -> None:
        show(report, trainer, folder, self.quiet)
