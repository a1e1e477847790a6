"""What the monitors share: when they look, how they count, and how that is logged, saved and resumed."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.monitors.curve import Curve
from lightning_ae.diagnostics.watch.batch import MaskFunction
from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.counters import Counters, Key, Since, flat, nested, reduce_and_read
from lightning_ae.diagnostics.watch.patterns import Pattern
from lightning_ae.diagnostics.watch.probe import Probe
from lightning_ae.diagnostics.watch.site import Event, Site, SiteInfo

M = TypeVar("M", bound="Monitor")


class Monitor(L.Callback):
    """Base of the callbacks that look at a model while it trains, without being felt.

    All monitors of a Trainer share one probe. It looks at every ``every_n_steps``-th optimizer step, with all the
    batches that accumulate into it, never at validation or at the sanity check. On these steps compiled code runs
    eagerly, so that nothing is missed; between them nothing is attached. Of an activation of more than 65,536 numbers
    in a batch of 64 or more every k-th example is counted, from one that changes with the step, and 32 at least; the
    number of samples that is given is of those counted. Sums stay on the device; a log is one reduction over the ranks
    and one copy to the host. Weights are the same with and without monitors (under ``torch.compile`` up to rounding).

    Args:
        every_n_steps: look at every so many optimizer steps (batches, with manual optimization).
        horizon: verdicts rest on the last samples looked at: from this many to twice as many, and what comes until the
            next log.
        include: names of modules; only sites with these names or inside these modules count. None for all. Of several
            monitors of one kind the later ones log under ``dead_relu#1/…`` and so on.
        unit_dim: the axis of the units of a site, by its name or that of a module around it, or for all sites. Found
            from the layer before the activation unless given.
        mask_fn: from the batch to a tensor with 1 where a position counts and 0 where it is padding, ``(B,)``,
            ``(B, T)``, ….

    Raises:
        ValueError: if a number is not positive, or two monitors of one Trainer disagree on ``unit_dim`` or ``mask_fn``.
    """

    #: Beginning of the names under which it logs.
    prefix: str = ""

    def __init__(
        self,
        every_n_steps: int,
        horizon: int,
        include: Sequence[str] | None = None,
        unit_dim: int | Mapping[str, int] | None = None,
        mask_fn: MaskFunction | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("every_n_steps", every_n_steps), ("horizon", horizon)):
            if not isinstance(number, int) or number <= 0:
                raise ValueError(f"{name}: expected a positive whole number, got {number!r}.")
        if isinstance(include, str):
            raise TypeError(f"include: expected a list of names, got the string {include!r}.")
        self.every_n_steps = every_n_steps
        self.horizon = horizon
        self.include = None if include is None else tuple(include)
        self.unit_dim = unit_dim
        self.mask_fn = mask_fn
        self._written: str | None = None
        self.counters = Counters()
        self.sites: dict[str, SiteInfo] = {}
        self._probe: Probe | None = None
        self._reduced: dict[Key, Tensor] | None = None
        self._previous_samples = 0
        self._now: dict[Key, Tensor] = {}
        self.curve = Curve()
        self._fresh_start()

    def _fresh_start(self) -> None:
        """No sums were taken yet."""
        self.curve.clear()
        self._looks = self._span_began = 0
        #: sums as they were after so many looks
        self._marks: list[tuple[int, dict[Key, Tensor]]] = []
        #: those of the first look alone
        self._first: dict[Key, Tensor] = {}
        self._late: dict[Key, Tensor] | None = None
        self._taken: dict[Key, Tensor] = {}
        self._taken_before: dict[Key, Tensor] = {}
        self._interval: Mapping[Key, Tensor] = {}

    # -- what a monitor does ----------------------------------------------------------------------------------

    def hears(self, event: str) -> bool:
        """Whether it does anything with an event: the watch does not look for what nobody hears."""
        return getattr(type(self), event, None) is not getattr(Monitor, event)

    def on_activation(self, event: Event) -> None:
        """An activation was applied."""

    def on_gradient(self, site: Site, grad_z: Tensor, grad_y: Tensor) -> None:
        """A gradient has passed an activation."""

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A module has returned."""

    def on_loss(self, comparison: Comparison) -> None:
        """A loss has compared a prediction with a target."""

    def on_entry(self, name: str, module: nn.Module, x: Tensor) -> None:
        """A module with weights has read data."""

    def on_pattern(self, pattern: Pattern) -> None:
        """Something was recognised in how the model is wired."""

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """The batch is done."""

    def on_step(self, trainer: L.Trainer | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are ready, the optimizer is about to step."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """What is logged, by name without the prefix; names without a slash go to ``callback_metrics`` too."""

    def histograms(self) -> dict[str, Tensor]:
        """Distributions that are logged, on the host."""
        return {}

    @property
    def _number(self) -> int | None:
        # decides what part of a large batch is counted; outside a fit all of it is
        return None if self._probe is None else self._probe.watch.number

    def wants(self, site: Site) -> bool:
        """Whether a site is among those that count; remembers it."""
        name = site.name
        if name not in self.sites:
            if self.include is not None and not any(
                name == inside or name.startswith((f"{inside}.", f"{inside}#")) for inside in self.include
            ):
                return False
            self.sites[name] = SiteInfo(name, site.activation.name, site.units, site.interval is not None)
        return True

    def results(self) -> dict[Key, Tensor]:
        """Sums over all ranks, on the host: as they are now, or with several ranks as of the last log."""
        if self._reduced is not None:
            return self._reduced
        return _read(self.counters.totals())

    def take(self, results: dict[Key, Tensor], keep: bool) -> None:
        """Receive sums over all ranks; begin a new span if the current one is long enough."""
        self._reduced = results if keep else None
        self._now = results
        self._interval, self._taken = Since(results, self._taken), results
        current = int(results.get(("", "samples"), torch.tensor(0))) - self._previous_samples
        if current >= self.horizon:
            dropped = self.counters.spans()[1]
            self._marks = [(n, dict(Since(sums, dropped))) for n, sums in self._marks if n >= self._span_began]
            self._span_began = self._looks
            self.counters.rotate()
            self._previous_samples = current
            self._taken = self._taken_before = dict(Since(results, self._taken_before))

    # -- what happened when -----------------------------------------------------------------------------------

    def after_look(self) -> None:
        """Called after each step looked at: marks the sums after 1, 2, 4, 8, … of them."""
        self._looks += 1
        self._late = None
        if self._looks & (self._looks - 1) == 0:
            sums = {key: value.clone() for key, value in self.counters.totals().items()}
            self._first = self._first or sums
            self._marks = [*self._marks[-1:], (self._looks, sums)]

    def _latest_sums(self) -> dict[Key, Tensor]:
        """Of this rank, those of the last third to two thirds of the looks; all of them if there are too few."""
        totals = self.counters.totals()
        enough = [sums for n, sums in self._marks if self._looks - n >= max(2, self._looks / 3)]
        return dict(Since(totals, enough[-1])) if enough else dict(totals)

    def late_results(self) -> dict[Key, Tensor]:
        """Sums of the later part of what was looked at, on the host: what a verdict rests on.

        A short run would else be averaged with its own beginning: units that died at the third step would count as
        alive, and a network that has learnt as one that has not. With several ranks as of the end of the fit.
        """
        if self._late is None:
            self._late = _read(self._latest_sums())
        return self._late

    def first_results(self) -> dict[Key, Tensor]:
        """Sums of the first step looked at, of this rank, on the host."""
        return {key: value.cpu() for key, value in self._first.items()}

    def late(self: M) -> M:
        """A view of this monitor whose figures rest on :meth:`late_results`."""
        view = copy.copy(self)
        view._reduced = view._now = self.late_results()
        view._taken = {}
        return view

    def forget_site(self, site: str) -> None:
        """Drop all sums of a site, whose shapes are no longer what they were."""
        self.counters.forget(site)
        self._marks = [(n, {k: v for k, v in sums.items() if k[0] != site}) for n, sums in self._marks]
        for sums in (self._first, self._taken, self._taken_before):
            for key in [key for key in sums if key[0] == site]:
                del sums[key]

    def settle(self, trainer: L.Trainer) -> None:
        """Bring late sums and curves of all ranks together; all of them call it, at the end of the fit."""
        if trainer.world_size > 1 and self._probe is not None:
            self._late = self._probe.reduced(self, self._latest_sums())
            device, same = trainer.strategy.root_device, dict(self.curve.steps)
            for rank in range(trainer.world_size):
                theirs = trainer.strategy.broadcast(self.curve.steps, src=rank)
                same = {name: steps for name, steps in same.items() if theirs.get(name) == steps}
            self.curve.reduce(sorted(same), lambda values: trainer.strategy.reduce(values.to(device)).cpu())

    def interval(self) -> Mapping[Key, Tensor]:
        """Sums since the last log but one: what a curve over time is made of."""
        return self._interval

    def since_log(self, results: dict[Key, Tensor]) -> Mapping[Key, Tensor]:
        """Of all sums, those since the last log."""
        return Since(results, self._taken)

    # -- Lightning --------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Two monitors of one kind may have different settings."""
        # Lightning asks for it six times a step, looked at or not: in a fit it is written out once
        if self._written is None or self._probe is None:
            self._written = self._generate_state_key(**self._settings())
        return self._written

    def _settings(self) -> dict[str, Any]:
        return {"every_n_steps": self.every_n_steps, "horizon": self.horizon, "include": self.include}

    def __getstate__(self) -> dict[str, Any]:
        """Without the probe, which belongs to a running Trainer."""
        return {**self.__dict__, "_probe": None}

    @property
    def _drives(self) -> bool:
        return self._probe is not None and self._probe.monitors[0] is self

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer."""
        if stage != "fit":
            return
        self.counters.clear()
        self.sites.clear()
        self._reduced, self._previous_samples, self._written = None, 0, None
        self._fresh_start()
        self._probe = Probe.of(trainer)
        self._probe.join(self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the sums of an interrupted run: they are global, so one rank has them."""
        if trainer.global_rank > 0:
            self.counters.clear()
            self._marks, self._first = [], {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time to."""
        if self._drives and self._probe is not None:
            self._probe.start(trainer, pl_module, batch)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at gradients."""
        if self._drives and self._probe is not None:
            self._probe.step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop looking; log on log steps."""
        if self._drives and self._probe is not None:
            self._probe.end(trainer, pl_module, outputs, batch)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log, so that what watches metrics after validation has them."""
        if self._drives and self._probe is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._probe.log(trainer, agree=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what has not been."""
        if self._drives and self._probe is not None:
            self._probe.close()  # the module may have skipped the rest of the epoch
            self._probe.log(trainer, agree=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what has not been; warn of what was never seen."""
        if self._drives and self._probe is not None:
            self._probe.finish(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        if self._probe is not None:
            self._probe.leave()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        if self._probe is not None:
            self._probe.leave()

    # -- saving -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Sums over all ranks, as tensors, numbers and names; with several ranks all have to call it."""
        spans = self.counters.spans() if self._probe is None else self._probe.reduced_spans(self)
        return {
            "current": nested(spans[0]),
            "previous": nested(spans[1]),
            "previous_samples": self._previous_samples,
            "taken": nested(self._taken),
            "sites": [list(site) for site in self.sites.values()],
            "curve": self.curve.state(),
            "looks": [self._looks, self._span_began],
            "marks": [[n, nested(sums)] for n, sums in self._marks],
            "first": nested(self._first),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        self.counters.load(flat(state_dict["current"]), flat(state_dict["previous"]))
        self._previous_samples = state_dict["previous_samples"]
        self._taken, self._taken_before = flat(state_dict["taken"]), flat(state_dict["previous"])
        self.sites = {row[0]: SiteInfo(*row) for row in state_dict["sites"]}
        self._reduced = None
        self.curve.load(state_dict.get("curve", {}))
        self._looks, self._span_began = state_dict.get("looks", [0, 0])
        self._marks = [(n, flat(sums)) for n, sums in state_dict.get("marks", [])]
        self._first = flat(state_dict.get("first", {}))


def _read(sums: dict[Key, Tensor]) -> dict[Key, Tensor]:
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in sums.items()}
    return reduce_and_read(sums, shapes, next((v.device for v in reversed(sums.values())), torch.device("cpu")), None)
