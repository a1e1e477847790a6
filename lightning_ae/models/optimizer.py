"""AdamW as every model configures it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


def adamw(parameters: Any, model: L.LightningModule, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused (one pass over all weights in each step) where that is possible.

    Fused it is half to a third of the cost of a step of a small network, and a large part of that of a wide one. It is
    not where gradients are scaled, or clipped in mixed precision, which Lightning refuses of a fused optimizer.

    Args:
        parameters: as for :class:`torch.optim.AdamW`.
        model: whose Trainer, if there is one, says how it trains.
        lr: learning rate.
        weight_decay: decoupled.
    """
    trainer = model._trainer
    precision = "" if trainer is None else str(trainer.precision)
    clips = type(model).configure_gradient_clipping is not L.LightningModule.configure_gradient_clipping
    clipped = trainer is not None and (bool(trainer.gradient_clip_val) or clips)
    fused = precision != "16-mixed" and not (precision.endswith("-mixed") and clipped)
    fused = fused and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
