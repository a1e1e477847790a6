"""What the schedules share: when a number of the model is set, that it is read, and how it is logged and resumed."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ae.callbacks.schedules.reads import Read, Reads
from lightning_ae.callbacks.schedules.targets import Target
from lightning_ae.checks import check_finite, check_flag, check_type
from lightning_ae.diagnostics.watch.eager import Eager
from lightning_ae.models.recorder import has_stepped, is_log_step

#: Steps in which something may come to read the number, as a codebook does that begins after the first of them.
_PATIENCE = 10


class Schedule(L.Callback):
    r"""Base of the schedules: :math:`v(t) = a + (b - a)\,s(t)`; a subclass gives the share :math:`s`.

    See :class:`LinearSchedule` for what all of them have in common.
    """

    def __init__(
        self,
        attribute: str,
        start: float,
        end: float,
        *,
        begin: int | float = 0,
        duration: int | float = 1.0,
        whole: bool = False,
    ) -> None:
        super().__init__()
        check_type("attribute", attribute, str)
        if not all(attribute.split(".")):
            raise ValueError(f"attribute: expected a dotted path, got {attribute!r}.")
        start, end = check_finite("start", start), check_finite("end", end)
        begin, duration = check_finite("begin", begin), check_finite("duration", duration)
        if begin < 0 or (isinstance(begin, float) and begin >= 1):
            raise ValueError(f"begin: expected steps >= 0 (an int) or a fraction in [0, 1) (a float), got {begin!r}.")
        if duration <= 0 or (isinstance(duration, float) and duration > 1):
            expected = "steps >= 1 (an int) or a fraction in (0, 1] (a float)"
            raise ValueError(f"duration: expected {expected}, got {duration!r}.")
        self.attribute = attribute
        self.start, self.end = start, end
        self.begin: int | float = begin
        self.duration: int | float = duration
        self.whole = check_flag("whole", whole)
        self._target: Target | None = None
        self._total: int | None = None
        self._current: float | None = None
        self._planned = False
        self._checked = False  # kept in checkpoints: a resumed run need not run steps eagerly
        self._unread = 0
        self._said = False
        self._session: _Session | None = None

    @abstractmethod
    def share(self, step: int, duration: int) -> float:
        """How far it is from ``start`` (0) to ``end`` (1), ``step`` steps after its beginning, before its end."""

    def span(self, total: int | None = None) -> tuple[int, int]:
        """The steps at which it begins and ends.

        Args:
            total: steps of the run; None if unknown.

        Raises:
            ValueError: if it is unknown, and the schedule is in fractions of it.
        """
        fraction = next((x for x in (self.begin, self.duration) if isinstance(x, float) and x > 0), None)
        if total is None and fraction is not None:
            raise ValueError(
                f"duration: {type(self).__name__}({self.attribute!r}) is in fractions of the run ({fraction}), whose "
                "length is unknown: give begin and duration as whole numbers of steps, or set max_steps."
            )
        run = total or 0
        first = round(self.begin * run) if isinstance(self.begin, float) else self.begin
        if not isinstance(self.duration, float):
            return first, first + self.duration
        # rounded once where both are fractions, so that 0.3 and 0.7 end with the run
        last = round(
            (self.begin + self.duration) * run if isinstance(self.begin, float) else first + self.duration * run
        )
        return first, max(last, first + 1)

    def value(self, step: int, total: int | None = None) -> float:
        """The value for an optimizer step of a run of ``total`` steps."""
        first, last = self.span(total)
        if step >= last:
            value = float(self.end)
        elif step <= first:
            value = float(self.start)
        else:
            value = float(self.start + (self.end - self.start) * self.share(step - first, last - first))
        return round(value) if self.whole else value

    # -- Lightning --------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """One for each attribute, and settings."""
        return self._generate_state_key(
            attribute=self.attribute, start=self.start, end=self.end, begin=self.begin, duration=self.duration
        )

    def state_dict(self) -> dict[str, Any]:
        """Whether it was seen to that the attribute is read; the value itself follows from the step."""
        return {"checked": self._checked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self._checked = state_dict["checked"]

    def __getstate__(self) -> dict[str, Any]:
        """Without the model."""
        return {**self.__dict__, "_target": None, "_session": None}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing was seen of this run's model; a checkpoint of the run, read after this, may know better."""
        self._checked, self._unread = False, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the attribute."""
        self._target = Target(pl_module, self.attribute, self.whole)
        self._planned = self._said = False
        self._current = None
        earlier = _all(trainer)[: _all(trainer).index(self)]
        same = [s for s in earlier if s._target is not None and s._target.place == self._target.place]
        if same:
            raise ValueError(
                f"attribute: {self.attribute!r} has two schedules, {type(same[0]).__name__}({same[0].attribute!r}) and "
                f"{type(self).__name__}({self.attribute!r})."
            )

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the value with which the run begins."""
        self._set(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the value with which the run begins; warn if it ends before the schedule."""
        self._set(trainer, pl_module)
        total, last = self._total, self.span(self._total)[1]
        if total is not None and last > total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._said = True
            reached = self.value(max(total - 1, 0), total)
            rank_zero_warn(
                f"{self._name}: the run ends at step {total}, before the schedule does at {last}: it will reach "
                f"{reached:g} instead of {self.end:g}. Train for longer, or shorten the schedule."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set all schedules' values, then begin to see whether they are read."""
        schedules = _all(trainer)
        if schedules[0] is not self:
            return
        self._judge(trainer)
        for schedule in schedules:
            schedule._set(trainer, pl_module)
        if self._session is not None:
            return
        step = _step(trainer, pl_module)
        active = [s for s in schedules if not s._checked and step >= s.span(s._total)[0]]
        if active:
            self._session = _Session(active)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log on log steps."""
        if self._session is not None and has_stepped(trainer):
            self._session.eager.close()  # what is read after the step is still heard
        if _all(trainer)[0] is self and is_log_step(trainer):
            self._publish(trainer)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            values = {f"schedule/{s.attribute}": s._current for s in _all(trainer) if s._current is not None}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """For what watches metrics after validation."""
        self._judge(trainer)
        if trainer.state.fn == "fit":
            self._publish(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """For what watches metrics at the end of an epoch."""
        self._judge(trainer)
        self._publish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if the run was shorter than was to be foreseen."""
        self._judge(trainer)
        self._warn_if_unread(0)
        done, last = _step(trainer, pl_module), self.span(self._total)[1]
        if done < last and not self._said and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{self._name}: the run has ended at step {done}, before the schedule did at {last}: it has reached "
                f"{self._current:g} instead of {self.end:g}."
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._leave()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._leave()
        self._target = None

    def __repr__(self) -> str:
        """Attribute and ends."""
        return f"{self._name[:-1]}, {self.start}, {self.end})"

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}({self.attribute!r})"

    def _judge(self, trainer: L.Trainer) -> None:
        """Once the step is done to which the watched batches belong, warn of what was not read."""
        if self._session is not None and has_stepped(trainer):
            session = self._session
            self._leave()
            for schedule, found in zip(session.schedules, session.found, strict=True):
                schedule._checked = found.seen
                schedule._unread += not found.seen
                schedule._warn_if_unread(_PATIENCE - 1)

    def _warn_if_unread(self, patience: int) -> None:
        if self._checked or self._unread <= patience or self._target is None:
            return
        self._checked = True
        rank_zero_warn(
            f"{self._name}: it was set and nothing read it in {self._unread} steps of training, so the schedule has no "
            "effect, unless a later phase of the training reads it. Is it this attribute of "
            f"{type(self._target.owner).__name__} that the loss depends on?"
        )

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _set(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert self._target is not None
        if not self._planned:
            estimate = trainer.estimated_stepping_batches
            self._total = int(estimate) if 0 <= estimate < math.inf else None
            self._planned = True
        # again even if it is the same: a checkpoint, or a callback that swaps weights, may have brought another
        self._current = self.value(_step(trainer, module), self._total)
        self._target.set(self._current)

    def _publish(self, trainer: L.Trainer) -> None:
        for schedule in _all(trainer):
            if schedule._current is not None:
                trainer.callback_metrics[f"schedule/{schedule.attribute}"] = torch.tensor(schedule._current)


class _Session:
    """The batches of one step, and what follows it, in which it is seen which attributes are read."""

    def __init__(self, schedules: list[Schedule]) -> None:
        self.schedules = schedules
        self.reads = Reads()
        self.eager = Eager()
        self.found: list[Read] = []
        try:
            self.found = [self.reads.watch(s._target) for s in schedules if s._target is not None]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.reads.close()
        self.eager.close()


def _all(trainer: L.Trainer) -> list[Schedule]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Schedule)]  # type: ignore[attr-defined]


def _step(trainer: L.Trainer, module: L.LightningModule) -> int:
    # with manual optimization there may be any number of optimizer steps in a batch
    return trainer.global_step if module.automatic_optimization else trainer.fit_loop.epoch_loop._batches_that_stepped
