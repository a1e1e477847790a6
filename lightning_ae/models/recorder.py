"""Logging off the hot path: terms stay on the device and are read on log steps and epoch ends only.

A callback that every model brings along, rather than hooks of the model: a user's own hooks need no ``super()``, the
steps that torch.compile traces have no side effects, and ModelCheckpoint, which runs last, saves what is counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import MetricCollection

from lightning_ae.boxes import AutoencoderLike
from lightning_ae.codes.identity import Code
from lightning_ae.codes.ranks import Ranks
from lightning_ae.losses.base import ReconstructionLoss, full_precision
from lightning_ae.metrics.masked import masked_metrics
from lightning_ae.models.batches import warn_of_unused_mask
from lightning_ae.models.impossible import impossible
from lightning_ae.models.resuming import (
    gradients_so_far,
    random_state,
    set_gradients,
    set_random_state,
    settle_epoch,
)
from lightning_ae.models.running import RunningMeans
from lightning_ae.models.sharding import shards_parameters
from lightning_ae.models.single_batch import refuse_single_last_batch


class Recorded(AutoencoderLike, Protocol):
    """A model that also says what to check and what to measure of a batch: an Autoencoder."""

    @property
    def loss(self) -> ReconstructionLoss:
        """Scores pre-activations against ``x``."""

    @property
    def penalties(self) -> nn.ModuleDict:
        """By the name under which they are logged."""

    def check_input(self, x: Tensor) -> None:
        """Raise an error for data that the model is not made for."""

    def observed(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """``x``, and a mask of what is there."""

    def configure_metrics(self, x: Tensor) -> MetricCollection:
        """Metrics for data like the first batch."""


class Recorder(L.Callback):
    """Checks first batches, logs terms and metrics, and keeps the random state for a resumed run.

    ``train/<term>`` is the mean over the examples since the last log step, ``train/<term>_epoch`` that over the epoch;
    ``val/`` and ``test/`` hold the means over the set and the model's metrics.
    """

    def __init__(self) -> None:
        self._checked: set[tuple[str, int]] = set()
        self._warned = False
        self._train_means = RunningMeans()
        self._eval_means: dict[int, RunningMeans] = {}
        self._eval_metrics: dict[int, MetricCollection] = {}
        self._random_state: dict[str, Tensor] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._before_validation: dict[str, Tensor] | None = None
        self._codes: list[Code] = []
        self._hooks: list[RemovableHandle] = []

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, loader: int = 0) -> None:
        stage = (str(trainer.state.stage), loader)
        if stage not in self._checked:
            self._checked.add(stage)
            model = _recorded(pl_module)
            warn_of_unused_mask(batch, model.observed(batch))
            model.check_input(model.observed(batch)[0])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at the data again in each run."""
        self._checked.clear()
        self._warned = False

    # -- training ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the random numbers of the interrupted run; with several ranks, give each its own."""
        self._manage_codes(pl_module, True)
        loaders, reads = trainer.train_dataloader, type(pl_module).get_input  # type: ignore[attr-defined]
        if isinstance(loaders, (list, tuple)) and len(loaders) > 1 and reads.__module__.startswith(f"{__package__}."):
            rank_zero_warn(
                f"A list of {len(loaders)} loaders: of their batches {type(pl_module).__name__} is trained on the "
                "first alone. Concatenate the data, or override get_input."
            )
        for penalty in _recorded(pl_module).penalties.values():
            penalty.on_train_start(pl_module)  # type: ignore[operator]
        shard = trainer.distributed_sampler_kwargs
        if shard is not None and shard["num_replicas"] > 1:
            # ranks are seeded alike, and would corrupt their examples alike
            mixed = np.random.SeedSequence([torch.initial_seed() % 2**63, shard["rank"], trainer.global_step])
            torch.manual_seed(int(mixed.generate_state(1)[0]))
        elif self._random_state is not None:
            set_random_state(self._random_state, pl_module.device)
        self._random_state = None
        set_gradients(self._gradients, pl_module)
        self._gradients = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the first batch, and start the epoch's means with it."""
        if not any(stage == str(trainer.state.stage) for stage, _ in self._checked):
            self._hooks = refuse_single_last_batch(trainer, pl_module)
        self._check(trainer, pl_module, batch)
        if batch_idx == 0:
            self._train_means.reset()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let codes see to their state after a step; add the batch to the means; on log steps, log them."""
        self._unhook()
        # here, as a DataLoader draws a number when validation begins, before the first hook
        self._before_validation = random_state(pl_module.device)
        if self._codes and has_stepped(trainer):
            ranks = _TrainerRanks(trainer)
            for code in self._codes:
                code.after_step(ranks)
        if not isinstance(outputs, Mapping) or "terms" not in outputs:
            return  # a training step of the user's own
        self._train_means.update(outputs["terms"], _recorded(pl_module).get_input(batch).shape[0])
        if is_log_step(trainer):
            means = self._train_means.recent(_sum_over_ranks(trainer))
            self._warn_if_impossible(means, trainer, pl_module)
            _log(pl_module, {f"train/{name}": value for name, value in means.items()}, "train/loss", on_epoch=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's means."""
        means = self._train_means.total(_sum_over_ranks(trainer))
        self._warn_if_impossible(means, trainer, pl_module)
        values = {f"train/{name}_epoch": value for name, value in means.items()}
        _log(pl_module, values, "train/loss_epoch", on_epoch=True)

    def _warn_if_impossible(
        self, means: Mapping[str, Tensor], trainer: L.Trainer, model: L.LightningModule, stage: str = "train"
    ) -> None:
        if not self._warned:
            # read from the device at once, where the logger is about to
            values = torch.stack([value.float() for value in means.values()]).tolist() if means else []
            said = impossible(dict(zip(means, values, strict=True)), _recorded(model).loss.lower_bound)
            if said:
                self._warned = True
                rank_zero_warn(f"{stage}/{said} at step {trainer.global_step}.")

    def _manage_codes(self, model: L.LightningModule, managed: bool) -> None:
        codes = [module for module in model.modules() if isinstance(module, Code)]
        for code in codes:
            code.managed = managed
        # most have nothing to do after a step
        self._codes = [code for code in codes if type(code).after_step is not Code.after_step]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave codes to themselves."""
        self._manage_codes(pl_module, False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave codes to themselves."""
        self._unhook()
        self._manage_codes(pl_module, False)

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    # -- validation and test ----------------------------------------------------------------------------------

    def _start(self) -> None:
        self._eval_means.clear()
        self._eval_metrics.clear()

    def _add(self, pl_module: L.LightningModule, outputs: Any, batch: Any, loader: int) -> None:
        if not isinstance(outputs, Mapping) or "terms" not in outputs:
            return
        model = _recorded(pl_module)
        x, mask = model.observed(batch)
        if loader not in self._eval_means:
            self._eval_means[loader] = RunningMeans()
            chosen = model.configure_metrics(x) if mask is None else masked_metrics()
            self._eval_metrics[loader] = chosen.to(pl_module.device)
        self._eval_means[loader].update(outputs["terms"], x.shape[0])
        masked = () if mask is None else (mask,)
        prediction = model.loss.prediction(outputs["output"].params, x, *masked)
        # torchmetrics takes views: channels_last or transposed data have none
        compared = full_precision(prediction).contiguous(), full_precision(x).contiguous()
        self._eval_metrics[loader].update(*compared, **({} if mask is None else {"mask": mask}))

    def _finish(self, trainer: L.Trainer, model: L.LightningModule, stage: str) -> None:
        for loader, means in self._eval_means.items():
            suffix = f"/dataloader_idx_{loader}" if len(self._eval_means) > 1 else ""
            found = means.total(_sum_over_ranks(trainer))
            self._warn_if_impossible(found, trainer, model, stage)
            values = {**found, **self._eval_metrics[loader].compute()}
            named = {f"{stage}/{name}{suffix}": value for name, value in values.items()}
            _log(model, named, f"{stage}/loss{suffix}", on_epoch=True)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start means and metrics."""
        self._start()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the first batch."""
        self._check(trainer, pl_module, batch, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to means and metrics."""
        self._add(pl_module, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give back the random state, so that validation changes nothing in training; log means and metrics."""
        if trainer.state.fn == TrainerFn.FITTING and self._before_validation is not None:
            set_random_state(self._before_validation, pl_module.device)
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start means and metrics."""
        self._start()

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the first batch."""
        self._check(trainer, pl_module, batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to means and metrics."""
        self._add(pl_module, outputs, batch, dataloader_idx)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log means and metrics."""
        self._finish(trainer, pl_module, "test")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the first batch."""
        self._check(trainer, pl_module, batch, dataloader_idx)

    # -- resuming ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run needs to equal an uninterrupted one.

        The gradients of an accumulation that is not over; on one device the random state and the epoch's means, which
        are the ranks' own where there are several, and the file is written by one. Where in its epoch the run is, is
        written down so that Lightning goes on there whatever ended it.
        """
        settle_epoch(checkpoint)
        kept: dict[str, Any] = {"gradients": gradients} if (gradients := gradients_so_far(trainer, pl_module)) else {}
        if trainer.world_size == 1:
            kept["random_state"] = random_state(pl_module.device)
            kept["train_means"] = self._train_means.state_dict()
        if kept:
            checkpoint["lightning_ae"] = kept

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the interrupted run, if it is to go on."""
        state = checkpoint.get("lightning_ae", {})
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._gradients = state.get("gradients", {})
        if trainer.world_size == 1 and "random_state" in state:
            self._random_state = state["random_state"]
            self._train_means.load_state_dict(state["train_means"], trainer.strategy.root_device)


def _recorded(pl_module: L.LightningModule) -> Recorded:
    """The model that brought the Recorder along."""
    return cast(Recorded, pl_module)


class _TrainerRanks(Ranks):
    """The ranks of a Trainer."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self.sharded = shards_parameters(trainer)
        self._strategy = trainer.strategy

    def sum(self, tensor: Tensor) -> Tensor:
        # a reduction may be in place
        return self._strategy.reduce(tensor.clone(), reduce_op="sum") if self.world_size > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return self._strategy.all_gather(tensor) if self.world_size > 1 else tensor[None]


def has_stepped(trainer: Any) -> bool:
    """Whether the optimizer steps with this batch."""
    # with accumulation only the last batch's; asked as Lightning's own monitors ask
    return not (trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization)


def is_log_step(trainer: Any) -> bool:
    """Whether Lightning's own monitors log after this batch; with accumulation only one that steps counts."""
    return has_stepped(trainer) and bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)


def _log(model: L.LightningModule, values: Mapping[str, Tensor], loss: str, *, on_epoch: bool) -> None:
    # already reduced: sync_dist at epoch ends only tells Lightning so; and the keys name the dataloader themselves
    options: Any = {
        "on_step": not on_epoch,
        "on_epoch": on_epoch,
        "sync_dist": on_epoch,
        "batch_size": 1,
        "add_dataloader_idx": False,
    }
    model.log_dict({name: value for name, value in values.items() if name != loss}, **options)
    if loss in values:
        model.log(loss, values[loss], prog_bar=True, **options)


def _sum_over_ranks(trainer: L.Trainer) -> Any:
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")
