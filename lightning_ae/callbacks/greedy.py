"""Training a stack level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ae.checks import check_sequence, check_whole
from lightning_ae.models import StackedAutoencoder
from lightning_ae.models.sharding import shards_parameters


class GreedyLevels(L.Callback):
    r"""Trains a :class:`StackedAutoencoder` level by level from the data upwards, then all levels together.

    Each level is trained for its epochs on the codes of those below, which no longer change; ``model.training_level``
    says which one it is. What is not trained is frozen: no gradients (so no weight decay in torch's optimizers),
    evaluation mode for batch normalisation and dropout. Fine-tuning then starts from there with the objective of all
    levels. Each phase begins with a new optimizer state, as moments are those of another objective. Schedulers go on; a
    learning rate for each phase is one of theirs.

    What is minimised is another quantity in each phase, and the reconstruction is from another depth, so that the best
    of all epochs is one of the first level's: what keeps or stops by ``val/loss`` or ``val/reconstruction`` should not
    be left to do so before fine-tuning.

    The phase follows from the epoch alone and is the model's, so a run resumes from any checkpoint to what it would
    have been. Gradient flags and modes are what they were before when the fit is over, one way or the other. If it ends
    before fine-tuning, ``model.training_level`` is left as it was; set it to None to go on with all levels.

    Each phase is compiled anew under ``torch.compile``, which counts towards its limit
    (``torch._dynamo.config.recompile_limit``).

    Logged when a phase begins: ``greedy/level``, the level that is trained, or their number for all together.

    Args:
        epochs_per_level: for each level, or one number for all.
        finetune_epochs: after which the fit stops; 0 for none, None to go on as long as the Trainer does.

    Raises:
        TypeError: when a fit starts, if the model is no :class:`StackedAutoencoder`.
        ValueError: if a number is out of range; when a fit starts, if there is not one for each level, for DDP without
            ``find_unused_parameters``, and for strategies that shard parameters.

    Source: Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647; Bengio et al. 2007,
    https://papers.nips.cc/paper/3048.

    Example:
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder, StackedAutoencoder
        >>> levels = [MLPAutoencoder((1, 8, 8), 16, hidden=()), MLPAutoencoder(16, 4, hidden=())]
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> greedy = GreedyLevels(epochs_per_level=1, finetune_epochs=1)
        >>> trainer = L.Trainer(
        ...     max_epochs=3, accelerator="cpu", callbacks=greedy, enable_checkpointing=False, **quiet
        ... )
        >>> trainer.fit(StackedAutoencoder(levels), DigitsDataModule())
        >>> float(trainer.callback_metrics["greedy/level"])
        2.0
    """

    def __init__(self, epochs_per_level: int | Sequence[int], finetune_epochs: int | None = None) -> None:
        super().__init__()
        name = "epochs_per_level"
        self.epochs_per_level: int | list[int]
        if isinstance(epochs_per_level, Sequence):
            self.epochs_per_level = [check_whole(name, epochs) for epochs in check_sequence(name, epochs_per_level)]
            if not self.epochs_per_level:
                raise ValueError(f"{name}: expected a number, or one for each level, got none.")
        else:
            self.epochs_per_level = check_whole(name, epochs_per_level)
        self.finetune_epochs = (
            None if finetune_epochs is None else check_whole("finetune_epochs", finetune_epochs, least=0)
        )
        self._before: list[tuple[Any, str, bool]] = []
        self._applied: int | str | None = "nothing yet"
        self._level: float | None = None
        self._logged: float | None = None

    def level_of(self, epoch: int, num_levels: int) -> int | None:
        """The level that is trained in an epoch, counted from 0; None if all are."""
        for level, epochs in enumerate(self._epochs(num_levels)):
            if epoch < epochs:
                return level
            epoch -= epochs
        # after the last epoch of all: nothing is trained any more, and it stays the last one's
        return num_levels - 1 if self.finetune_epochs == 0 else None

    def _epochs(self, num_levels: int) -> list[int]:
        if isinstance(self.epochs_per_level, int):
            return [self.epochs_per_level] * num_levels
        return list(self.epochs_per_level)

    # -- Lightning --------------------------------------------------------------------------------------------

    # not the callback's state: Lightning would miss the callback wherever the file is used without it
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What was logged last, which a resumed run does not log again."""
        checkpoint["greedy_level"] = self._logged

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on after it."""
        self._logged = checkpoint.get("greedy_level")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what is not right."""
        if stage != "fit":
            return
        self._logged = None  # before a checkpoint's is loaded
        if not isinstance(pl_module, StackedAutoencoder):
            raise TypeError(f"GreedyLevels: expected a StackedAutoencoder, got a {type(pl_module).__name__}.")
        n, epochs = len(pl_module.levels), self._epochs(len(pl_module.levels))
        if len(epochs) != n:
            raise ValueError(f"epochs_per_level: expected {n} numbers, one for each level, got {epochs}.")
        if shards_parameters(trainer):
            raise ValueError(
                "GreedyLevels: expected a strategy with whole parameters on each device (one device, DDP), got "
                f"{type(trainer.strategy).__name__}, which shards them."
            )
        if isinstance(trainer.strategy, DDPStrategy) and not trainer.strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError(
                "GreedyLevels: under DDP most parameters get no gradient while a level is trained; pass "
                "strategy='ddp_find_unused_parameters_true' to the Trainer."
            )
        total = sum(epochs) + (1 if self.finetune_epochs is None else self.finetune_epochs)
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < total:
            rank_zero_warn(
                f"GreedyLevels: {sum(epochs)} epochs for the levels and "
                f"{'some' if self.finetune_epochs is None else self.finetune_epochs} for fine-tuning do not fit into "
                f"max_epochs={trainer.max_epochs}."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: StackedAutoencoder) -> None:  # type: ignore[override]
        """Remember what is frozen already; begin the phase of this epoch, or go on with it if Lightning does."""
        self._before = list(_flags(pl_module))
        self._applied = "nothing yet"
        self._begin(trainer, pl_module)
        self._stop(trainer, pl_module, trainer.current_epoch)  # a run that was over already

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: StackedAutoencoder) -> None:  # type: ignore[override]
        """Begin the phase of this epoch."""
        self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log the phase with its first batch, as only then a resumed run knows its step."""
        if self._level is not None and self._level != self._logged:
            self._logged = self._level
            for logger in trainer.loggers:
                logger.log_metrics(
                    {"greedy/level": self._level}, step=trainer.fit_loop.epoch_loop._batches_that_stepped
                )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: StackedAutoencoder) -> None:  # type: ignore[override]
        """Stop after the last epoch of fine-tuning."""
        self._stop(trainer, pl_module, trainer.current_epoch + 1)

    def _stop(self, trainer: L.Trainer, model: StackedAutoencoder, epochs: int) -> None:
        if self.finetune_epochs is not None and epochs >= sum(self._epochs(len(model.levels))) + self.finetune_epochs:
            trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing frozen."""
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing frozen."""
        self._restore()

    # -- phases -----------------------------------------------------------------------------------------------

    def _begin(self, trainer: L.Trainer, model: StackedAutoencoder) -> None:
        level = self.level_of(trainer.current_epoch, len(model.levels))
        if level == self._applied:
            return
        self._applied = level
        # a checkpoint has its level already, and a state that goes on
        if level != model.training_level:
            for optimizer in trainer.optimizers:
                _start_anew(optimizer)
        model.training_level = level
        self._freeze(model, level)
        self._level = float(len(model.levels) if level is None else level)
        trainer.callback_metrics["greedy/level"] = torch.tensor(self._level)

    def _freeze(self, model: StackedAutoencoder, level: int | None) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)
        if level is None:
            return
        trained = set(model.levels[level].parameters())
        for parameter in model.parameters():
            if parameter not in trained:
                parameter.requires_grad = False
        for k, other in enumerate(model.levels):
            if k != level:
                other.eval()

    def _restore(self) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)
        self._before = []


def _flags(model: nn.Module) -> Iterator[tuple[Any, str, bool]]:
    for parameter in model.parameters():
        yield parameter, "requires_grad", parameter.requires_grad
    for module in model.modules():
        yield module, "training", module.training


def _start_anew(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Adagrad):
        optimizer.state.clear()
        return
    # alone among torch's it does not make its state in the first step
    for group in optimizer.param_groups:
        for state in (optimizer.state[parameter] for parameter in group["params"]):
            state["step"].zero_()
            state["sum"].fill_(group["initial_accumulator_value"])
