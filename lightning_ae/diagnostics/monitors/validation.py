"""The same measures on validation data in evaluation mode, and the validation's loss over the run."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.monitors.output import OutputMonitor
from lightning_ae.diagnostics.watch.batch import first_tensor
from lightning_ae.diagnostics.watch.eager import Eager
from lightning_ae.diagnostics.watch.opened import OpenWatch
from lightning_ae.diagnostics.watch.watch import Watch
from lightning_ae.models import Autoencoder


class ValidationMonitor(L.Callback):
    """Hears what the loss compares in the first batch of the first validation loader, and keeps the logged losses.

    It opens a watch of its own, in evaluation mode as the Trainer has set it, never at the sanity check.

    Args:
        output: as for :class:`OutputMonitor`.

    Attributes:
        also: a monitor that sees the same batch, without a trainer; None for no other.
    """

    def __init__(self, output: str | None = None) -> None:
        self.output = output
        self.also: Monitor | None = None
        self._start()

    def _start(self) -> None:
        self.seen = OutputMonitor(self.output, 1)
        #: losses that validation logs, by name: steps and values
        self.losses: dict[str, tuple[list[int], list[float]]] = {}
        self._watch = Watch()
        self._open: OpenWatch | None = None
        self._eager: Eager | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """With nothing known."""
        if stage == "fit":
            self._start()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at the first batch."""
        self.close()
        if batch_idx or dataloader_idx or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.seen.counters.clear()  # what was seen earlier is of another model
        self._watch.exclude = ("penalties",) if isinstance(pl_module, Autoencoder) else ()
        self._eager = Eager()
        self._open = self._watch.open(
            pl_module, [_Pairs(self.seen), *([self.also] if self.also is not None else [])], None, batch
        )

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add it."""
        if self._open is None:
            return
        self.close()
        x = first_tensor(batch)
        with torch.no_grad():
            self.seen.counters.add("", "samples", 1 if x is None or x.ndim == 0 else len(x))
            self.seen.on_batch(None, pl_module, outputs, batch)
            self.seen.counters.flush()
            if self.also is not None:
                self.also.on_batch(None, pl_module, outputs, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the losses that were logged."""
        self.close()
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        logged = trainer.callback_metrics
        for name, value in logged.items():
            low = name.lower()
            if low.startswith(("val", "valid")) and "loss" in low and value.numel() == 1:
                steps, values = self.losses.setdefault(name, ([], []))
                steps.append(trainer.global_step)
                values.append(float(value))

    def close(self) -> None:
        """Stop looking; may be called again."""
        if self._open is not None:
            self._open.close()
            self._open = None
        if self._eager is not None:
            self._eager.close()
            self._eager = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The losses."""
        return {"losses": {name: [list(steps), list(values)] for name, (steps, values) in self.losses.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved losses."""
        self.losses = {name: (list(row[0]), list(row[1])) for name, row in state_dict["losses"].items()}


class _Pairs:
    """Hands on what concerns comparisons, without that a prediction has to need a gradient."""

    def __init__(self, seen: OutputMonitor) -> None:
        self._seen = seen

    def on_activation(self, event: Any) -> None:
        self._seen.on_activation(event)

    def on_gradient(self, site: Any, grad_z: Any, grad_y: Any) -> None:
        pass

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._seen.on_module(name, module, inputs, output)

    def on_loss(self, comparison: Any) -> None:
        self._seen.on_loss(comparison)

    def on_entry(self, name: str, module: nn.Module, x: Any) -> None:
        self._seen.on_entry(name, module, x)

    def on_pattern(self, pattern: Any) -> None:
        pass
