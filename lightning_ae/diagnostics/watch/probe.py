"""The one probe of a Trainer, on which all its monitors sit."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ae.diagnostics.watch.batch import first_tensor
from lightning_ae.diagnostics.watch.counters import Key, reduce_and_read
from lightning_ae.diagnostics.watch.eager import Eager
from lightning_ae.diagnostics.watch.histograms import log_histogram
from lightning_ae.diagnostics.watch.observer import Observer
from lightning_ae.diagnostics.watch.opened import OpenWatch
from lightning_ae.diagnostics.watch.site import SiteInfo, clean_name
from lightning_ae.diagnostics.watch.watch import Watch
from lightning_ae.models import Autoencoder
from lightning_ae.models.recorder import is_log_step

Shapes = dict[tuple[int, Key], tuple[tuple[int, ...], torch.dtype]]


class Probe:
    """Decides which steps are looked at, opens and closes the watch, reduces and logs.

    Args:
        trainer: whose.
    """

    _probes: ClassVar[weakref.WeakKeyDictionary[L.Trainer, Probe]] = weakref.WeakKeyDictionary()

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.monitors: list[Observer] = []
        self.watch = Watch()
        self._open: OpenWatch | None = None
        self._eager: Eager | None = None
        self._listening: list[Observer] = []
        self._looking = False
        self._fresh = False
        self._sampled = False
        self._shapes: Shapes | None = None
        self._step = 0
        self._over = False

    @classmethod
    def of(cls, trainer: L.Trainer) -> Probe:
        """The probe of a Trainer, made with the first monitor."""
        if trainer not in cls._probes:
            cls._probes[trainer] = cls(trainer)
        return cls._probes[trainer]

    def join(self, monitor: Observer) -> None:
        """Add a monitor; its settings of the watch must be those of the others."""
        if self._over:
            self.monitors, self._over = [], False  # the Trainer may have other callbacks by now
        if monitor not in self.monitors:
            self.monitors.append(monitor)
        for name in ("unit_dim", "mask_fn"):
            given = [getattr(m, name) for m in self.monitors if getattr(m, name) is not None]
            if any(value != given[0] for value in given[1:]):
                raise ValueError(f"{name}: the monitors of one Trainer share it, got {given}.")
        self._shapes, self._fresh, self._sampled = None, False, False
        self.watch = Watch()

    # -- looking ----------------------------------------------------------------------------------------------

    def start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """A batch begins."""
        self.close()
        self._looking = False
        if not trainer.training:
            return
        # all batches that accumulate into one step have the same number
        number = trainer.global_step if module.automatic_optimization else trainer.fit_loop.total_batch_idx
        self._listening = [m for m in self.monitors if number % m.every_n_steps == 0]
        if not self._listening:
            return
        options = {
            name: next((v for m in self.monitors if (v := getattr(m, name)) is not None), None)
            for name in ("unit_dim", "mask_fn")
        }
        self.watch.unit_dim = options["unit_dim"]
        self.watch.number = number
        self.watch.exclude = ("penalties",) if isinstance(module, Autoencoder) else ()
        mask = None if options["mask_fn"] is None else options["mask_fn"](batch).to(module.device, torch.float32)
        self._eager = Eager()
        self._open = self.watch.open(module, self._listening, mask, batch)
        self._looking = True

    def looks_at(self, monitor: Observer) -> bool:
        """Whether this monitor looks at the batch that is running."""
        return self._looking and any(m is monitor for m in self._listening)

    def step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        if self._open is None:
            return
        if module.automatic_optimization:
            self.close()  # forward and backward are done, and the optimizer need not be followed
        with torch._C.DisableTorchFunction():
            for monitor in self._listening:
                monitor.on_step(trainer, module, optimizer)

    def end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any) -> None:
        """A batch is done."""
        if self._looking:
            self._looking = False
            self.close()
            self._fresh = self._sampled = True
            x = first_tensor(batch)
            with torch.no_grad():
                for monitor in self._listening:
                    monitor.counters.add("", "samples", 1 if x is None or x.ndim == 0 else len(x))
                    monitor.on_batch(trainer, module, outputs, batch)
                    monitor.counters.flush()
                    if not trainer.fit_loop._should_accumulate():
                        monitor.after_look()
        if not self._fresh:
            return
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped
        # on the last batch too: callbacks that look at metrics at the end of the epoch may come before this one
        if trainer.is_last_batch or is_log_step(trainer):
            self.log(trainer, agree=trainer.is_last_batch)

    def leave(self) -> None:
        """The fit is over, one way or the other."""
        self.close()
        self._over = True

    def close(self) -> None:
        """Take everything off; may be called again."""
        if self._open is not None:
            self._open.close()
            self._open = None
        if self._eager is not None:
            self._eager.close()
            self._eager = None

    # -- reading ----------------------------------------------------------------------------------------------

    def log(self, trainer: L.Trainer, agree: bool) -> None:
        """Reduce, read and log, if anything was looked at since the last time."""
        if not self._fresh:
            return
        self._fresh = False
        self._read(trainer, agree)
        metrics: dict[str, float] = {}
        for monitor in self.monitors:
            found = {
                f"{self._label(monitor)}/{name}": value for name, value in monitor.scalars().items() if value == value
            }
            metrics.update(found)
            summary = {name: value for name, value in found.items() if name.count("/") == 1}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in summary.items()})
        step = self._step
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            for monitor in self.monitors:
                for name, values in monitor.histograms().items():
                    log_histogram(logger, f"{self._label(monitor)}/{name}", values, step)

    def _label(self, monitor: Observer) -> str:
        """What its names begin with; of several monitors of one kind the later ones are numbered."""
        same = [m for m in self.monitors if m.prefix == monitor.prefix]
        number = same.index(monitor)
        return f"{monitor.prefix}#{number}" if number else monitor.prefix

    def finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The fit is over: read for the last time, and say what was never seen."""
        self.close()
        self.log(trainer, agree=True)
        if self._sampled:
            self._read(trainer, agree=True)
            for monitor in self.monitors:
                monitor.settle(trainer)
            parts = {clean_name(name) for name, _ in module.named_modules()}
            for monitor in self.monitors:
                # a part without activations is no mistake
                if monitor.include is not None and not monitor.sites and not parts & set(monitor.include):
                    there = [site.name for site in self.watch.sites.values()]
                    rank_zero_warn(
                        f"include: {type(monitor).__name__} saw no activation in {list(monitor.include)}, only {there}."
                    )
            silent = self.watch.silent(module)
            if silent:
                rank_zero_warn(
                    f"The monitors never saw {', '.join(silent[:5])}{' and more' * (len(silent) > 5)} at work: not "
                    "used in training, or called from scripted or exported code, where nothing can be seen."
                )

    def _read(self, trainer: L.Trainer, agree: bool) -> None:
        several = trainer.world_size > 1
        sums = {(i, key): value for i, m in enumerate(self.monitors) for key, value in m.counters.totals().items()}
        if agree or not several or self._shapes is None:
            self._shapes = self._agree(trainer, sums)
        reduce = (lambda flat: trainer.strategy.reduce(flat, reduce_op="sum")) if several else None
        read = reduce_and_read(sums, self._shapes, trainer.strategy.root_device, reduce)
        for i, monitor in enumerate(self.monitors):
            own = {key: value for (j, key), value in read.items() if j == i}
            monitor.take(own, keep=several)

    def _agree(self, trainer: L.Trainer, sums: dict[tuple[int, Key], Tensor]) -> Shapes:
        """Shapes of the sums of all ranks: a branch that one rank alone has taken must not leave the others waiting."""
        shapes: Shapes = {key: (tuple(value.shape), value.dtype) for key, value in sums.items()}
        if trainer.world_size == 1:
            return shapes
        mine = (shapes, [list(monitor.sites.values()) for monitor in self.monitors])
        union: Shapes = {}
        for rank in range(trainer.world_size):
            theirs, sites = trainer.strategy.broadcast(mine, src=rank)
            for key, shape in theirs.items():
                union.setdefault(key, shape)
            for monitor, found in zip(self.monitors, sites, strict=True):
                for site in found:
                    monitor.sites.setdefault(site[0], SiteInfo(*site))
        return union

    def reduced(self, monitor: Observer, sums: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Sums of a monitor over all ranks, all of which call it."""
        trainer = self._trainer()
        assert trainer is not None
        number = self.monitors.index(monitor)
        shapes = self._agree(trainer, {(number, key): value for key, value in sums.items()})
        read = reduce_and_read(
            {(number, key): value for key, value in sums.items()},
            shapes,
            trainer.strategy.root_device,
            lambda flat: trainer.strategy.reduce(flat, reduce_op="sum"),
        )
        return {key: value for (_, key), value in read.items()}

    def reduced_spans(self, monitor: Observer) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """Current and previous sums over all ranks."""
        trainer = self._trainer()
        spans = monitor.counters.spans()
        if trainer is None or trainer.world_size == 1 or monitor not in self.monitors:
            return spans
        sums = {(i, key): value for i, span in enumerate(spans) for key, value in span.items()}
        shapes = self._agree(trainer, sums)
        read = reduce_and_read(
            sums, shapes, trainer.strategy.root_device, lambda flat: trainer.strategy.reduce(flat, reduce_op="sum")
        )
        current, previous = ({key: v for (j, key), v in read.items() if j == i} for i in (0, 1))
        return current, previous
