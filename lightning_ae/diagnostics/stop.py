"""Ending a fit that cannot succeed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ae.diagnostics.attach import DiagnosticsReport
from lightning_ae.diagnostics.causes import CAUSES, Evidence, Finding, find
from lightning_ae.diagnostics.causes.base import Heals, Severity
from lightning_ae.diagnostics.monitored import Monitored
from lightning_ae.diagnostics.monitors.latent_sparsity import Latent
from lightning_ae.diagnostics.remedies import DeadUnitReviver

#: Less than this share of what a constant leaves is left: something was learnt, and the run is not hopeless.
LEARNT = 0.9
#: From one look to the next the steps grow by this share; where something was learnt, by the second.
_GROWTH, _GROWTH_LEARNT = 0.15, 0.25
#: Share of the planned steps for which a cause has to stand, by what would heal it, and steps at least.
_STANDS = {"rate": 0.04, "never": 0.1, "weights": 0.1, "steps": 0.25}
_STANDS_AT_LEAST = {"rate": 32, "never": 64, "weights": 64, "steps": 100}
_SERIOUS = {"error": 0, "warning": 1, "info": 2}
#: Errors with which nothing at all can be learnt; with others that do not go away some runs learn something.
_CERTAIN = {"constant_softmax", "broadcast_pair", "constant_data", "no_gradient"}
_NOT_FINITE = {"nonfinite_data", "nonfinite_loss", "learning_rate_high"}
#: What says no more than that little was learnt.
_NO_CAUSE = {"too_short", "constant_output", "constant_latents", "overfitting"}
#: Measures of causes that do not heal by themselves, and that yet may: frozen parts are thawed, a parity has no trace.
_MAY_HEAL = {"frozen", "correlation"}


class _Verdict(NamedTuple):
    """What one look says: a finding that cannot heal, why it ends the fit, and whether something was learnt."""

    finding: Finding | None
    reason: str | None
    learnt: bool


class StopHopeless(Monitored):
    r"""Ends a fit when an error that cannot heal by itself has stood for some looks, and nothing is learnt.

    A *look* is an evaluation of all causes, as for :class:`DiagnosticsReport`. It is made when the monitors have seen
    something new and the steps have grown by 15 % since the last one, so a run of 1,000 steps has about 30 and one of
    100,000 about 60. Two numbers make a look cheap for a run that is well: if less than 90 % of what the best constant
    leaves is left, no cause is asked, and the monitors that it has brought along look more rarely.

    A fit is ended if for ``patience`` looks in a row

    * nothing was learnt (more than 90 % of what a constant leaves is left, or no loss was finite since), nor does the
      error fall so fast that something would be by the planned end of the fit;
    * there is a finding at least as severe as ``severity`` that does not go away by going on, by ``heals`` in
      :data:`lightning_ae.diagnostics.causes.CAUSES`. What makes learning impossible (a loss that is not finite any
      more, no gradient, data that do not vary, predictions that are broadcast, a softmax over one unit) ends the fit at
      once. Other causes have to stand for a share of the planned steps: what another learning ``"rate"`` would heal,
      where no schedule turns it, 4 %; what ``"never"`` heals, with which some runs yet learn, or other ``"weights"`` of
      the terms would, in a model of ours where they are constant, 10 %; what more ``"steps"`` may heal, as vanishing
      gradients, dead units or data of a wild scale, a quarter, and all the time if no end is planned.

    That a run is short, that the output is constant, or a part frozen, ends nothing.

    It reads the monitors of a :class:`DiagnosticsReport` on the same Trainer, before or after it in the list, whose
    report then says why the fit ended; alone it brings its own. Ranks stop together, by the verdict of the first one.

    Attributes:
        reason: why the fit was ended; None if it was not. It is logged, and ``callback_metrics["hopeless"]`` is then
            the step.
        finding: the error.

    Args:
        severity: the least severity that ends a fit.
        patience: for how many looks in a row.
        trial: of Optuna. It is pruned: once the fit has ended and all callbacks are through, ``fit`` raises
            ``optuna.TrialPruned``.
        latent: as for :class:`LatentSparsityMonitor`; None for a model of ours.
        output: as for :class:`DiagnosticsReport`.
        every_n_steps: how often the monitors that it brings along look at first, in optimizer steps: they look 16
            times so, and then 8 times while the steps double.

    Raises:
        ValueError: if a number is not positive, or the severity has another name.
        ImportError: if a trial is given and optuna is not installed.

    Source: Pei et al. 2024, BTTackler, https://arxiv.org/abs/2602.23630, for ending trials by diagnosis.

    Example:
        >>> import torch
        >>> from lightning_ae import MLPAutoencoder, TensorDataModule
        >>> model = MLPAutoencoder(6, 2, hidden=(8,), lr=1e3)
        >>> stop = StopHopeless()
        >>> trainer = L.Trainer(
        ...     max_steps=400, accelerator="cpu", callbacks=stop, logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(model, TensorDataModule(torch.rand(256, 6), batch_size=32, val_fraction=0.0))
        >>> stop.finding.cause, trainer.global_step < 100
        ('learning_rate_high', True)
    """

    def __init__(
        self,
        severity: Severity = "error",
        patience: int = 3,
        trial: Any = None,
        latent: Latent | None = None,
        output: str | None = None,
        every_n_steps: int = 8,
    ) -> None:
        super().__init__(latent, output, every_n_steps)
        if severity not in _SERIOUS:
            raise ValueError(f"severity: expected one of {list(_SERIOUS)}, got {severity!r}.")
        if not isinstance(patience, int) or patience <= 0:
            raise ValueError(f"patience: expected a positive whole number, got {patience!r}.")
        if trial is not None:
            import optuna  # noqa: F401  # to say now that it is missing, and not after the fit
        self.severity, self.patience, self.trial = severity, patience, trial
        self._start()

    def _start(self) -> None:
        self.reason: str | None = None
        self.finding: Finding | None = None
        self._host: DiagnosticsReport | None = None
        self._learnt = self._failed = False
        #: looks in a row that found each cause: the step, and what was left to learn
        self._standing: dict[str, list[tuple[int, float]]] = {}
        self._settings: tuple[Any, ...] = ()

    # -- looking ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find a report whose monitors it can read, or bring its own."""
        if stage != "fit":
            return
        self._start()
        there: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._host = next((c for c in there if isinstance(c, DiagnosticsReport)), None)
        if self._host is None:
            super().setup(trainer, pl_module, stage)
        else:
            self._own, self._all, self._validation = [], {}, None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        source = self if self._host is None else self._host
        # all ranks come here at the same steps
        growth = _GROWTH_LEARNT if self._learnt else _GROWTH
        if self.reason is not None or not self._is_due(trainer, source._looks, growth):
            return
        verdict = self._look(source, trainer, pl_module) if trainer.is_global_zero else None
        if trainer.world_size > 1:
            verdict = trainer.strategy.broadcast(verdict, src=0)
        assert verdict is not None
        self._learnt = verdict.learnt
        self._look_more_rarely(trainer)
        if verdict.reason is not None:
            self._stop(trainer, verdict)

    def _look_more_rarely(self, trainer: L.Trainer) -> None:
        doublings = math.floor(math.log2(max(1.0, trainer.global_step / (8 * self.every_n_steps))))
        for monitor in self._own:
            monitor.every_n_steps = self.every_n_steps * 2**doublings * (2 if self._learnt else 1)

    def _look(self, source: Monitored, trainer: L.Trainer, module: L.LightningModule) -> _Verdict:
        try:
            with source._evidence_so_far(trainer, module) as evidence:
                return self._judge(evidence, trainer)
        except Exception as error:  # a verdict that cannot be had is no reason for training to end
            if not self._failed:
                rank_zero_warn(f"StopHopeless could not look and goes on: {type(error).__name__}: {error}")
            self._failed = True
            return _Verdict(None, None, False)

    def _judge(self, e: Evidence, trainer: L.Trainer) -> _Verdict:
        if e.relative < LEARNT:
            self._standing.clear()
            return _Verdict(None, None, True)
        step = trainer.global_step
        settings = (_rates(trainer), dict(e.output.weights))
        steady = self._settings in ((), settings)
        self._settings = settings
        if not steady:  # by a callback's hand, or by a user's
            self._standing.clear()
        findings = find(e)
        if self._host is not None:
            self._host.note(findings, step)
        lasting = [
            f for f in findings if _SERIOUS[f.severity] <= _SERIOUS[self.severity] and self._lasts(f, e, trainer)
        ]
        self._standing = {f.cause: [*self._standing.get(f.cause, []), (step, _level(e.relative))] for f in lasting}
        if step > 0.9 * _planned(trainer):
            lasting = []  # there is nothing left to save
        for finding in lasting:
            looks = self._standing[finding.cause]
            if (
                len(looks) >= self.patience
                and _stood(finding, looks, trainer)
                and not _falls(looks, self.patience, trainer)
            ):
                left = "" if e.relative != e.relative else f", {e.relative:.0%} of what a constant leaves is left"
                reason = (
                    f"The fit was ended at step {step}: it cannot succeed. For {len(looks)} looks, since step "
                    f"{looks[0][0]}{left}, and [{finding.severity}] {finding.site}: {finding.evidence}"
                )
                return _Verdict(finding, reason, False)
        return _Verdict(None, None, False)

    def _lasts(self, finding: Finding, e: Evidence, trainer: L.Trainer) -> bool:
        """Whether it does not go away by going on as it is."""
        heals, losses = _heals(finding), e.curve("loss")[1]
        finite = all(math.isfinite(loss) for loss in losses[-2:])
        if finding.cause == "nonfinite_data" or (finding.cause in _NOT_FINITE and not all(map(math.isfinite, losses))):
            return not any(math.isfinite(loss) for loss in losses[-2:])
        if e.relative != e.relative and finite and finding.cause not in _CERTAIN:
            return False
        if finding.cause in _NO_CAUSE or finding.measure in _MAY_HEAL:
            return False
        revived = any(isinstance(c, DeadUnitReviver) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if revived and finding.cause in ("dead_units", "no_gradient"):
            return False
        if CAUSES[finding.cause].heals == "rate":
            return not trainer.lr_scheduler_configs
        # weights that a module turns by itself are not seen
        known = e.ours and bool(e.output.weights)
        return known if heals == "weights" or finding.cause == "posterior_collapse" else True

    # -- stopping ---------------------------------------------------------------------------------------------

    def _stop(self, trainer: L.Trainer, verdict: _Verdict) -> None:
        self.reason, self.finding = verdict.reason, verdict.finding
        trainer.should_stop = True
        trainer.callback_metrics["hopeless"] = torch.tensor(float(trainer.global_step))
        if self._host is not None:
            self._host.stopped = self.reason
        if self.trial is not None:
            self.trial.set_user_attr("hopeless", self.reason)
        rank_zero_info(f"StopHopeless: {self.reason}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prune the trial, when all else is done."""
        super().teardown(trainer, pl_module, stage)
        if self.trial is None or self.reason is None or stage != "fit":
            return
        import optuna

        # Lightning would call these next, and does not after an exception
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[callbacks.index(self) + 1 :]:
            callback.teardown(trainer, pl_module, stage)
        pl_module.teardown(stage)
        raise optuna.TrialPruned(self.reason)

    # -- saving -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The sums of its own monitors, and what stood at the last looks."""
        standing = {cause: [list(look) for look in looks] for cause, looks in self._standing.items()}
        return {**super().state_dict(), "standing": standing, "learnt": self._learnt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        super().load_state_dict(state_dict)
        self._learnt = state_dict.get("learnt", False)
        self._standing = {
            cause: [(look[0], look[1]) for look in looks] for cause, looks in state_dict.get("standing", {}).items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without the report, which belongs to a running Trainer, and the trial, which holds a connection."""
        return {**self.__dict__, "_host": None, "trial": None}


def _heals(finding: Finding) -> Heals:
    """By what it can go away, which its measure may tell better than its cause."""
    if finding.cause == "dead_units" and finding.value == 1:
        return "never"  # nothing passes, forward or backward
    if finding.cause == "learning_rate_high" and finding.measure == "gradient_norm":
        return "steps"  # gradients fall on a plateau, too
    return CAUSES[finding.cause].heals


def _rates(trainer: L.Trainer) -> tuple[float, ...]:
    return tuple(float(group["lr"]) for o in trainer.optimizers for group in o.param_groups if "lr" in group)


def _level(relative: float) -> float:
    """What is left to learn; errors beyond that of a constant by their logarithm, since they fall by factors."""
    return relative if not relative > 1 else 1 + math.log(relative)


def _planned(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole fit; infinite if there is no limit, or it is not known in steps."""
    batches, epochs = trainer.num_training_batches, trainer.fit_loop.max_epochs
    done, seen = trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1
    limit = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if epochs is not None and epochs != -1 and math.isfinite(batches):
        limit = min(limit, epochs * batches * done / max(1, seen))
    return limit


def _stood(finding: Finding, looks: list[tuple[int, float]], trainer: L.Trainer) -> bool:
    """Whether it has stood for as long as what would heal it may take."""
    if finding.cause in _CERTAIN or math.isnan(looks[-1][1]):
        return True
    heals, planned = _heals(finding), _planned(trainer)
    if heals != "steps" and not math.isfinite(planned):
        planned = 3000.0
    return looks[-1][0] - looks[0][0] >= max(_STANDS_AT_LEAST[heals], _STANDS[heals] * planned)


def _falls(looks: list[tuple[int, float]], patience: int, trainer: L.Trainer) -> bool:
    """Whether the error falls so fast that it will be that of a run that learns by the planned end.

    As fast as in the last two fifths of the steps, or in the looks for which one has patience.
    """
    last, now = looks[-1]
    recent = [look for look in looks if look[0] >= 0.6 * last]
    first, before = min(recent[0], looks[-min(len(looks), patience)])
    if math.isnan(now) or math.isnan(before):
        return False
    left = _planned(trainer) - last
    left = left if math.isfinite(left) else 10.0 * (last - first)
    fall = before - now - 0.005  # less than that is chance
    return fall > 0 and now - fall * left / max(1, last - first) < LEARNT
