"""Logging off the hot path: terms stay on the device and are read on log steps and epoch ends only.

Everything happens in hooks, not in the steps: torch.compile traces the steps, which so stay free of side effects.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_ae.models.running import RunningMeans


class LoggedModule(L.LightningModule):
    """A LightningModule whose steps return ``{"loss", "output", "terms"}`` and leave the logging to hooks.

    ``terms`` are the batch means of what is logged; a training step also leaves them in ``_uncounted``. A subclass
    says where ``x`` is in a batch, checks the first one, chooses the metrics, and makes the prediction they score.
    """

    def __init__(self) -> None:
        super().__init__()
        self._train_means = RunningMeans()
        #: batch means and batch size of a training step that are not in ``_train_means`` yet
        self._uncounted: tuple[dict[str, Tensor], int] | None = None
        self._eval_means: dict[int, RunningMeans] = {}
        self._eval_metrics: dict[int, MetricCollection] = {}
        self._resumed: dict[str, Any] | None = None

    @abstractmethod
    def get_input(self, batch: Any) -> Tensor:
        """``x`` of a batch."""

    @abstractmethod
    def check_first_batch(self, batch: Any) -> None:
        """Raise if the first batch of a run cannot be trained on."""

    @abstractmethod
    def configure_metrics(self, x: Tensor) -> MetricCollection:
        """Metrics of ``(prediction, x)`` for data like ``x``."""

    @abstractmethod
    def _predict(self, output: Any, x: Tensor) -> Tensor:
        """The prediction that the metrics compare with ``x``."""

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        return reduced if isinstance(reduced, Tensor) else tensor

    def _log(self, values: Mapping[str, Tensor], *, loss: str, on_epoch: bool) -> None:
        # already reduced; sync_dist at epoch ends only tells Lightning so
        # and the keys have the dataloader's index where there are several
        options: Any = {
            "on_step": not on_epoch,
            "on_epoch": on_epoch,
            "sync_dist": on_epoch,
            "batch_size": 1,
            "add_dataloader_idx": False,
        }
        self.log_dict({name: value for name, value in values.items() if name != loss}, **options)
        if loss in values:
            self.log(loss, values[loss], prog_bar=True, **options)

    # -- training ---------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Check the first batch."""
        self.check_first_batch(batch)
        return None

    def on_train_epoch_start(self) -> None:
        """Start the epoch's means."""
        self._train_means.reset()

    def _count_step(self) -> bool:
        """Add the last training step to the means, unless that was done."""
        if self._uncounted is None:
            return False  # or a subclass with a training step of its own
        self._train_means.update(*self._uncounted)
        self._uncounted = None
        return True

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        """Add the batch to the means; on log steps, log those since the last one."""
        self._count_step()
        if self._is_log_step():
            means = self._train_means.recent(self._sum_over_ranks)
            self._log({f"train/{name}": value for name, value in means.items()}, loss="train/loss", on_epoch=False)

    def _is_log_step(self) -> bool:
        # asked as Lightning's own monitors ask; with accumulation only the batch that steps counts
        trainer: Any = self.trainer
        if trainer.fit_loop._should_accumulate() and self.automatic_optimization:
            return False
        return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means."""
        means = self._train_means.total(self._sum_over_ranks)
        values = {f"train/{name}_epoch": value for name, value in means.items()}
        self._log(values, loss="train/loss_epoch", on_epoch=True)

    # -- validation and test ----------------------------------------------------------------------------------

    def _start_evaluation(self) -> None:
        self._eval_means.clear()
        self._eval_metrics.clear()

    def _evaluate_batch(self, outputs: STEP_OUTPUT, batch: Any, loader: int) -> None:
        if not isinstance(outputs, Mapping) or "terms" not in outputs:
            return
        x = self.get_input(batch)
        if loader not in self._eval_means:
            self._eval_means[loader] = RunningMeans()
            self._eval_metrics[loader] = self.configure_metrics(x).to(self.device)
        self._eval_means[loader].update(outputs["terms"], x.shape[0])
        self._eval_metrics[loader].update(self._predict(outputs["output"], x).float(), x.float())

    def _log_evaluation(self, stage: str) -> None:
        for loader, means in self._eval_means.items():
            suffix = f"/dataloader_idx_{loader}" if len(self._eval_means) > 1 else ""
            values = {**means.total(self._sum_over_ranks), **self._eval_metrics[loader].compute()}
            named = {f"{stage}/{name}{suffix}": value for name, value in values.items()}
            self._log(named, loss=f"{stage}/loss{suffix}", on_epoch=True)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the first batch."""
        self.check_first_batch(batch)

    def on_validation_epoch_start(self) -> None:
        """Start means and metrics."""
        self._start_evaluation()

    def on_validation_batch_end(
        self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the batch to means and metrics."""
        self._evaluate_batch(outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log means and metrics."""
        self._log_evaluation("val")

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the first batch."""
        self.check_first_batch(batch)

    def on_test_epoch_start(self) -> None:
        """Start means and metrics."""
        self._start_evaluation()

    def on_test_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to means and metrics."""
        self._evaluate_batch(outputs, batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log means and metrics."""
        self._log_evaluation("test")

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the first batch."""
        self.check_first_batch(batch)

    # -- resuming ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run needs to equal an uninterrupted one: the random state and the epoch's means.

        On one device only: the file is written by one rank, and the others' random states are not in it.
        """
        if self._trainer is not None and self._trainer.world_size == 1:
            # ModelCheckpoint saves before on_train_batch_end of the module: what follows there has to be in the file
            logs_next = self._count_step() and self._is_log_step()
            cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            checkpoint["lightning_ae"] = {
                "rng": torch.get_rng_state(),
                "cuda_rng": cuda,
                "train_means": self._train_means.state_dict(read=logs_next),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the interrupted run until training starts."""
        self._resumed = checkpoint.get("lightning_ae")

    def on_train_start(self) -> None:
        """Go on where the interrupted run was."""
        resumed, self._resumed = self._resumed, None
        if resumed is None or self.trainer.world_size > 1:
            return
        self._train_means.load_state_dict(resumed["train_means"], self.device)
        torch.set_rng_state(resumed["rng"].cpu())
        if resumed["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(resumed["cuda_rng"].cpu(), self.device)
