"""New life for units that never fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ae.diagnostics.remedies.revival.evidence import Evidence
from lightning_ae.diagnostics.remedies.revival.plan import Method, plan
from lightning_ae.diagnostics.remedies.revival.surgery import Repair, operate
from lightning_ae.models import Autoencoder
from lightning_ae.models.sharding import shards_parameters


class DeadUnitReviver(L.Callback):
    r"""Gives units that fired on no validation example a new start; touches nothing else.

    A ReLU unit :math:`a_j = \max(0, w_j^\top x + b_j)` whose pre-activation is negative on all data gets no gradient,
    so it stays dead. After every n-th validation, each unit (channel, for a convolution) of an activation with a hard
    zero that was at its lower end for every example, on all ranks together, is repaired when training goes on:

    * ``"redo"``: :math:`w_j \sim N(0, 2/n_{in})`, :math:`b_j = 0`; scale, shift and running statistics of a
      normalisation in between 1, 0, 0 and 1; outgoing weights 0. The model's function on the validation data stays what
      it was, since the unit gave 0 before and nobody reads it now; its outgoing weights grow as it proves useful. (Of a
      layer that is dead altogether before another one that is, they stay: nothing got through, and something should.)
    * ``"bias"``: :math:`b_j \leftarrow b_j + \beta` (a normalisation's shift, if there is one), again after each
      validation until it fires. It keeps what the unit had learnt, but may take long.

    The optimizers' moments, and gradients accumulated so far, of exactly the changed entries become 0.

    Counting rides on the regular validation loop (never the sanity check), which costs no second pass and works for any
    LightningModule; a fit without validation is warned of, and revives nothing. The validation data decide alone: none
    of n examples bounds a unit's firing rate at :math:`3/n` (95 %), so a unit for cases rarer than that may be taken
    for dead, if it fires in training or not; ``revive/samples`` is n. What is found is done before the next training
    batch, so checkpoints hold weights as they were validated, with the work still to do, and no unit is left new and
    untrained at the end. Random numbers come from a generator of its own: a resumed run equals an uninterrupted one.

    With ``"redo"``, units are left alone, with a warning that names the site and says why, where it could harm others:
    tied or frozen weights, weights that are computed (weight norm) or grouped, outputs read by more than linear layers
    and convolutions, outputs that another branch is added to, or that do not reach their readers as 0 (normalised after
    the activation; Hardtanh). Behind a normalisation over several units (LayerNorm) only scale and shift start anew:
    other incoming weights would move its statistics, and with them the units that are alive.

    Logged when repaired: ``revive/units``, ``revive/samples`` and, where not 0, ``revive/<site>/units``.

    Args:
        method: see above.
        every_n_validations: after which validations; with Lightning's defaults there is one each epoch.
        bias: :math:`\beta` of ``"bias"``.
        include: names of sites or of modules around them, e.g. ``["encoder"]``; None for all.
        stop_after: last epoch, counted from 0, in which dead units are looked for; None to go on to the end.
        seed: of the random numbers.

    Attributes:
        history: ``(epoch, site, units)`` of each repair, in order; saved in checkpoints.

    Raises:
        ValueError: if an argument is out of range; at the start of a fit, for strategies that shard parameters (FSDP,
            ModelParallel, DeepSpeed).

    Source: Sokar et al. 2023, https://arxiv.org/abs/2302.12902, here with :math:`\tau = 0` and counts instead of means.

    Example:
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder
        >>> reviver = DeadUnitReviver()
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(
        ...     max_epochs=2, accelerator="cpu", callbacks=reviver, enable_checkpointing=False, **quiet
        ... )
        >>> model = MLPAutoencoder((1, 8, 8), 2, hidden=(16,), activation="relu")
        >>> with torch.no_grad():
        ...     _ = model.encoder.layers[0].bias[3].fill_(-100.0)
        >>> trainer.fit(model, DigitsDataModule())
        >>> epoch, site, units = reviver.history[0]
        >>> epoch, site, 3 in units
        (0, 'encoder.layers.1', True)
    """

    def __init__(
        self,
        method: Method = "redo",
        every_n_validations: int = 1,
        bias: float = 0.1,
        include: Sequence[str] | None = None,
        stop_after: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if method not in get_args(Method):
            raise ValueError(f"method: expected one of {list(get_args(Method))}, got {method!r}.")
        if not isinstance(every_n_validations, int) or every_n_validations <= 0:
            raise ValueError(f"every_n_validations: expected a positive whole number, got {every_n_validations!r}.")
        if not 0 < bias < float("inf"):
            raise ValueError(f"bias: expected a positive number, got {bias}.")
        if isinstance(include, str):
            raise TypeError(f"include: expected a list of names, got the string {include!r}.")
        self.method: Method = method
        self.every_n_validations = every_n_validations
        self.bias = bias
        self.include = None if include is None else tuple(include)
        self.stop_after = stop_after
        self.seed = seed
        self.history: list[tuple[int, str, list[int]]] = []
        self._validations = 0
        self._pending: list[Repair] | None = None
        self._samples = 0
        self._evidence: Evidence | None = None
        self._warned: set[str] = set()

    # -- looking ----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what is not right yet; forget an earlier fit."""
        if stage != "fit":
            return
        if shards_parameters(trainer):
            raise ValueError(
                "DeadUnitReviver: expected a strategy with whole parameters on each device (one device, DDP), got "
                f"{type(trainer.strategy).__name__}, which shards them."
            )
        self._drop()
        self.history, self._validations, self._pending, self._samples = [], 0, None, 0
        self._warned.clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if it will have nothing to look at."""
        if not trainer.enable_validation:
            rank_zero_warn("DeadUnitReviver counts during validation, and this fit has none: no unit will be revived.")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether this validation counts."""
        self._drop()
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validations += 1
        in_time = self.stop_after is None or trainer.current_epoch <= self.stop_after
        if in_time and self._validations % self.every_n_validations == 0:
            self._evidence = Evidence(exclude=("penalties",) if isinstance(pl_module, Autoencoder) else ())

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count."""
        if self._evidence is not None:
            self._evidence.open(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop to count."""
        if self._evidence is not None:
            self._evidence.close()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the dead, before a checkpoint is written."""
        if self._evidence is None:
            return
        sums = self._evidence.gather(trainer)
        repairs, reasons = plan(
            self._evidence, sums, pl_module, self.method, self.bias, trainer.current_epoch, self.include
        )
        self._pending = repairs
        self._samples = max((int(value) for (_, field), value in sums.items() if field == "examples"), default=0)
        self._drop()
        for site, reason in reasons.items():
            if site not in self._warned:
                self._warned.add(site)
                rank_zero_warn(f"DeadUnitReviver leaves dead units of {site} alone: {reason}.")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._drop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._drop()

    def _drop(self) -> None:
        if self._evidence is not None:
            self._evidence.close()
            self._evidence = None

    # -- reviving ---------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Repair what the last validation found, and log."""
        if self._pending is None:
            return
        repairs, self._pending = self._pending, None
        self.revive(trainer, pl_module, repairs)
        metrics = {"revive/units": float(sum(len(repair.units) for repair in repairs))}
        metrics["revive/samples"] = float(self._samples)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for repair in repairs:
            self.history.append((repair.epoch, repair.site, repair.units.tolist()))
            metrics[f"revive/{repair.site}/units"] = float(len(repair.units))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def revive(self, trainer: L.Trainer, module: L.LightningModule, repairs: Sequence[Repair]) -> None:
        """Carry out repairs, the same on all ranks.

        A model that knows better what its units should begin with, such as a dictionary that resamples atoms from
        examples it reconstructs badly (Bricken et al. 2023), is to be asked here, site by site, before
        :func:`operate`.
        """
        operate(trainer, module, repairs, self.seed * 1_000_003 + self._validations)

    # -- saving -----------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Two revivers of one Trainer may have different settings."""
        return self._generate_state_key(method=self.method, include=self.include)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open."""
        return {**self.__dict__, "_evidence": None}

    def state_dict(self) -> dict[str, Any]:
        """History, and what is still to do."""
        return {
            "history": [list(row) for row in self.history],
            "validations": self._validations,
            "samples": self._samples,
            "pending": None if self._pending is None else [repair.to_list() for repair in self._pending],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where it was."""
        self.history = [(epoch, site, list(units)) for epoch, site, units in state_dict["history"]]
        self._validations = state_dict["validations"]
        self._samples = state_dict["samples"]
        pending = state_dict["pending"]
        self._pending = None if pending is None else [Repair.from_list(row) for row in pending]
