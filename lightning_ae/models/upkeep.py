"""What a dictionary needs between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ae.models.sharding import shards_parameters

if TYPE_CHECKING:
    from lightning_ae.models.dictionary import DictionaryAutoencoder

#: Training batches on which the scale of the data is estimated.
SCALE_BATCHES = 10
#: Training batches between two looks at which latents are dead; each waits for the device once.
LOOK_EVERY = 50


class DictionaryUpkeep(L.Callback):
    """Scales the data, keeps atoms at norm 1, counts dead latents and resamples them: a model brings it along.

    A callback rather than hooks of the model, so that a user's own hooks need no ``super()``. Ranks count for
    themselves, and agree on the minimum every 50 batches and before a checkpoint is written. Validation has no part in
    any of it.
    """

    def __init__(self) -> None:
        self._scaled = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: DictionaryAutoencoder) -> None:  # type: ignore[override]
        """Refuse what cannot work; see what is known already."""
        if shards_parameters(trainer):
            raise ValueError(
                "DictionaryAutoencoder: expected a strategy with whole weights on each device (one device, DDP), got "
                f"{type(trainer.strategy).__name__}, which shards them."
            )
        self._scaled = int(pl_module.norm_batches)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: DictionaryAutoencoder, batch: Any, batch_idx: int
    ) -> None:
        """Estimate the scale, on the first batches; know the dead before a step that may be compiled."""
        pl_module.dead_latents()
        if self._scaled < SCALE_BATCHES:
            self._scaled += 1
            pl_module.observe(pl_module.get_input(batch), lambda t: trainer.strategy.reduce(t, reduce_op="mean"))

    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: DictionaryAutoencoder, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the gradient from changing norms."""
        pl_module.project_gradient()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: DictionaryAutoencoder, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Norms, counts, and now and then the dead."""
        pl_module.normalize_atoms()
        if not isinstance(outputs, Mapping) or "output" not in outputs:
            return  # a training step of the user's own
        pl_module.count(outputs["output"].z, trainer.world_size)
        number = trainer.fit_loop.total_batch_idx + 1
        due = pl_module.resample_every > 0 and number % pl_module.resample_every == 0
        if due or number % LOOK_EVERY == 0:
            dead = pl_module.find_dead(_smallest(trainer))
            if due and len(dead):
                x = pl_module.get_input(batch)
                generator = torch.Generator(x.device).manual_seed(number)
                drawn = pl_module.resample(x, outputs["output"].params, len(dead), generator)
                drawn = trainer.strategy.broadcast(drawn) if trainer.world_size > 1 else drawn
                pl_module.start_anew(dead, drawn, trainer.optimizers)

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: DictionaryAutoencoder, checkpoint: dict[str, Any]
    ) -> None:
        """Agree on the counts, which the file's weights share memory with."""
        reduce = _smallest(trainer)
        if reduce is not None and trainer.state.fn == TrainerFn.FITTING:  # also of a validation in between
            pl_module.since_fired.copy_(reduce(pl_module.since_fired))


def _smallest(trainer: L.Trainer) -> Any:
    if trainer.world_size == 1:
        return None
    return lambda tensor: trainer.strategy.reduce(tensor.clone(), reduce_op="min")
