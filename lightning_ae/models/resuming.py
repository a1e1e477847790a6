"""What a run that is resumed needs besides weights: where it was, random numbers, and gradients not yet used."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_ae.models.sharding import shards_parameters


def settle_epoch(checkpoint: dict[str, Any]) -> None:
    """Write down where in its epoch a run is, so that Lightning goes on there whatever ended it."""
    # Lightning 2.6 counts an epoch as done when the fit ends in it, and begins the next one with what was left of it;
    # and with max_steps it takes an epoch that is done for one whose last batch was just handed out, and skips one
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = loop.get("epoch_progress"), loop.get("epoch_loop.batch_progress")
    if not epochs or not batches or batches["current"]["ready"] == 0:
        return
    counts, done = epochs["current"], batches["current"]
    if not batches["is_last_batch"]:
        if counts["completed"] == counts["ready"] > 0:
            for kind in ("total", "current"):
                for stage in ("processed", "completed"):
                    epochs[kind][stage] -= 1
            checkpoint["epoch"] -= 1
    elif counts["processed"] == counts["started"] and done["completed"] == done["processed"]:
        done.update(dict.fromkeys(done, 0))
        batches["is_last_batch"] = False
        for kind in ("total", "current"):
            epochs[kind]["completed"] = epochs[kind]["processed"]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random numbers of the host and of the device."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Take them up."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def gradients_so_far(trainer: Any, model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the name of their parameter that a run has added up for its next step; empty between two steps.

    With several ranks their mean, which is what the step of a run that starts from it sees.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return {}
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    amid = batches.ready != batches.processed  # an exception has ended this batch
    if not trainer.lightning_module.automatic_optimization:  # when it steps, only the model knows
        held = any(p.grad is not None for p in model.parameters())
    elif amid:
        held = batches.processed % trainer.accumulate_grad_batches > 0
    else:
        held = batches.ready > 0 and trainer.fit_loop._should_accumulate()
    if not held:
        return {}
    if shards_parameters(trainer) or amid:
        rank_zero_warn(
            "The checkpoint is written between two optimizer steps and cannot hold the gradients of the batches since "
            "the last one: a run resumed from it does without them."
        )
        return {}
    kept = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    if trainer.world_size > 1:  # a reduction may be in place
        return {name: trainer.strategy.reduce(grad.clone(), reduce_op="mean") for name, grad in kept.items()}
    return {name: grad.clone() for name, grad in kept.items()}


def set_gradients(gradients: dict[str, Tensor], model: nn.Module) -> None:
    """Give parameters the gradients they had when the checkpoint was written."""
    for name, parameter in model.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter, copy=True)
