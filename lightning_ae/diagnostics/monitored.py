"""What the callbacks that give a verdict share: the monitors of their Trainer, and evidence read from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch

from lightning_ae.diagnostics.causes import Evidence
from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.monitors.dead_relu import DeadReLUMonitor
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.monitors.latent_sparsity import Latent, LatentSparsityMonitor
from lightning_ae.diagnostics.monitors.output import OutputMonitor
from lightning_ae.diagnostics.monitors.training import TrainingMonitor
from lightning_ae.diagnostics.monitors.validation import ValidationMonitor
from lightning_ae.models import Autoencoder


class Monitored(L.Callback):
    """Base: finds the monitors on its Trainer, brings along those that are missing, and hands its hooks on to these.

    Args:
        latent: as for :class:`LatentSparsityMonitor`; None for a model of ours.
        output: name of the module, or of the activation, that gives the reconstruction, in a model that is not ours.
        every_n_steps: how often the monitors that it brings along look, in optimizer steps.

    Raises:
        ValueError: if ``every_n_steps`` is not positive.
    """

    def __init__(self, latent: Latent | None, output: str | None, every_n_steps: int) -> None:
        super().__init__()
        self.latent, self.output, self.every_n_steps = latent, output, every_n_steps
        self._always: list[Monitor] = [OutputMonitor(output, every_n_steps), TrainingMonitor(every_n_steps)]
        self._own: list[Monitor] = list(self._always)
        #: None for one that reads another's
        self._validation: ValidationMonitor | None = ValidationMonitor(output)
        self._all: dict[type, Any] = {}
        #: steps, and looks of the monitors, when causes were asked last
        self._asked = (0, 0)

    # -- the monitors -----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the monitors, or bring them along."""
        if stage != "fit":
            return
        kinds: dict[type, Any] = {
            DeadReLUMonitor: lambda: DeadReLUMonitor(self.every_n_steps),
            GradientSaturationMonitor: lambda: GradientSaturationMonitor(self.every_n_steps, output=self.output),
        }
        if self.latent is not None or isinstance(pl_module, Autoencoder):
            kinds[LatentSparsityMonitor] = lambda: LatentSparsityMonitor(self.latent, self.every_n_steps)
        there: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        given: dict[type, Any] = {kind: next((c for c in there if isinstance(c, kind)), None) for kind in kinds}
        self._own = [*self._always, *(make() for kind, make in kinds.items() if given[kind] is None)]
        self._all = {type(monitor): monitor for monitor in self._own}
        self._all |= {kind: monitor for kind, monitor in given.items() if monitor is not None}
        self._asked = (0, 0)
        for monitor in self._own:
            monitor.setup(trainer, pl_module, stage)
        self._validation = self._validation or ValidationMonitor(self.output)
        self._validation.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_before_backward(trainer, pl_module, loss)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_validation_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand on to its own monitors."""
        if self._validation is not None:
            self._validation.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand on to its own monitors."""
        if self._validation is not None:
            self._validation.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand on to its own monitors."""
        if self._validation is not None:
            self._validation.on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.on_exception(trainer, pl_module, exception)
        if self._validation is not None:
            self._validation.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hand on to its own monitors."""
        for monitor in self._own:
            monitor.teardown(trainer, pl_module, stage)
        if self._validation is not None:
            self._validation.teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The sums of its own monitors."""
        return {
            "monitors": {type(monitor).__name__: monitor.state_dict() for monitor in self._own},
            "validation": {"losses": {}} if self._validation is None else self._validation.state_dict(),
            "asked": list(self._asked),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        for monitor in self._own:
            if type(monitor).__name__ in state_dict.get("monitors", {}):
                monitor.load_state_dict(state_dict["monitors"][type(monitor).__name__])
        if self._validation is not None:
            self._validation.load_state_dict(state_dict.get("validation", {"losses": {}}))
        self._asked = tuple(state_dict.get("asked", (0, 0)))

    # -- reading them -----------------------------------------------------------------------------------------

    @property
    def comparison(self) -> str | None:
        """Name of the comparison that matters, as the losses were heard; None if there was none."""
        found: str | None = self._all[OutputMonitor].main() if self._all else None
        return found

    @property
    def _looks(self) -> int:
        """How many steps were looked at."""
        return int(self._all[OutputMonitor]._looks) if self._all else 0

    def _is_due(self, trainer: L.Trainer, looks: int, growth: float) -> bool:
        """Whether causes are worth asking: there is something new, and the steps have grown by this share."""
        steps = trainer.global_step
        if looks <= self._asked[1] or steps < (1 + growth) * self._asked[0]:
            return False
        self._asked = (steps, looks)
        return True

    def _evidence(self, module: L.LightningModule) -> Evidence:
        found = self._all
        return Evidence(
            module,
            found[DeadReLUMonitor],
            found[GradientSaturationMonitor],
            found.get(LatentSparsityMonitor),
            found[OutputMonitor],
            found[TrainingMonitor],
            self._validation,
        )

    @contextlib.contextmanager
    def _evidence_so_far(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[Evidence]:
        """Evidence in the middle of a run, to be read within the context.

        It is of this rank alone, so no rank waits for another, and leaves the monitors as they are: with several ranks
        sums that were brought together at the last log are read beside those of this rank, both as shares.
        """
        monitors = list(self._all.values())
        before = [(monitor._late, monitor._reduced) for monitor in monitors]
        # the watch may be open, and is to hear nothing of this
        with torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                for monitor in monitors:
                    # read once, however many causes ask for it
                    monitor._late, monitor._reduced = None, monitor.results()
                self._all[TrainingMonitor].compare(trainer, module)
                yield self._evidence(module)
            finally:
                for monitor, kept in zip(monitors, before, strict=True):
                    monitor._late, monitor._reduced = kept
