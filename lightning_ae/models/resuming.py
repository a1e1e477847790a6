"""What a run that is resumed needs besides weights: where it was, and its random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
