"""The report as a callback."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.monitored import Monitored
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.monitors.latent_sparsity import Latent
from lightning_ae.diagnostics.monitors.saturation_summary import transmission
from lightning_ae.diagnostics.monitors.training import TrainingMonitor
from lightning_ae.diagnostics.report import Report, make_report, show
from lightning_ae.diagnostics.report.examples import ExampleMonitor


class DiagnosticsReport(Monitored):
    """Says at the end of a fit why the model has not learnt, if it has not: findings with evidence, cause and advice.

    It reads the three monitors that it finds on the Trainer and brings along those that are missing, and looks at data,
    reconstructions and loss besides. At the end of the fit, or where it broke off, it prints a table and writes
    a page, ``diagnostics.html``, into the log folder, with ``.json`` (see :meth:`Report.load`), ``.md`` and pictures
    beside it. TensorBoard and Weights & Biases show it too, where their loggers are on the Trainer. :attr:`report`
    holds all of it.

    Args:
        latent: as for :class:`LatentSparsityMonitor`; None for a model of ours.
        output: name of the module, or of the activation, that gives the reconstruction, in a model that is not ours;
            None for what one of torch's losses, or a difference that is squared, compares with the batch.
        every_n_steps: how often the monitors that it brings along look, in optimizer steps.
        folder: where to write; None for the log folder, and without a logger nowhere.
        quiet: do not print.

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
        self._over_time: dict[int, dict[str, float]] = {}
        self._examples = ExampleMonitor(every_n_steps)
        self._always.append(self._examples)
        self._own = list(self._always)
        self._seen: Any = None

    @property
    def findings(self) -> list[Finding]:
        """What was found, the worst first; none before the end of the fit."""
        return [] if self.report is None else self.report.findings

    # -- while it runs ----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the monitors, or bring them along."""
        if stage == "fit":
            self.report, self._over_time, self._seen = None, {}, None
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
        return {**super().state_dict(), "over_time": dict(self._over_time)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        super().load_state_dict(state_dict)
        self._over_time = dict(state_dict.get("over_time", {}))

    # -- the report -------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the monitors for the last time, and report; a failure of the report is no failure of the fit."""
        super().on_train_end(trainer, pl_module)
        try:
            self._make(trainer, pl_module)
        except Exception as error:
            rank_zero_warn(f"DiagnosticsReport could not be made: {type(error).__name__}: {error}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Report what was seen until then."""
        super().on_exception(trainer, pl_module, exception)
        if trainer.world_size == 1 and self._all:
            with contextlib.suppress(Exception):  # the exception that came first is the one to see
                training = self._all[TrainingMonitor]
                assert isinstance(training, TrainingMonitor)
                training.compare(trainer, pl_module)
                self._make(trainer, pl_module)

    def _make(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report = make_report(self._evidence(pl_module), self._examples)
        self.report.over_time = dict(self._over_time)
        log_folder = trainer.log_dir if trainer.loggers else None
        folder = self.folder or (None if log_folder is None else Path(log_folder))
        self._show(trainer, self.report, folder)

    @rank_zero_only
    def _show(self, trainer: L.Trainer, report: Report, folder: Path | None) -> None:
        show(report, trainer, folder, self.quiet)
