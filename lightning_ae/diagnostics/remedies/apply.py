"""The callback that makes the changes of remedies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ae.diagnostics.remedies.base import Change, Options, Remedy, add_callback


class OptimizerRemedy(Remedy):
    """A change of the optimizers, whoever configures them: made by a callback when the fit starts."""

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Add it to the Trainer's callbacks."""
        if trainer_options is None:
            return Change(False, "it acts on the optimizer through a callback: give trainer_options")
        there = trainer_options.get("callbacks") or []
        there = there if isinstance(there, (list, tuple)) else [there]
        before = next((c for c in there if isinstance(c, ApplyRemedies)), None)
        earlier = () if before is None else before.remedies
        add_callback(trainer_options, ApplyRemedies([*earlier, self]), before)
        return Change(True, self.describe())

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Change the optimizers, which are configured by now; a checkpoint's state is loaded later."""

    def on_step(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Called before each training batch."""

    def on_before_zero_grad(self, model: L.LightningModule, optimizer: Any) -> None:
        """Called before gradients are zeroed, or would be."""

    def python(self) -> str:
        """The callback."""
        return f"callbacks=[ae.ApplyRemedies([remedies.{self!r}])]"


class ApplyRemedies(L.Callback):
    """Makes changes to a model and its optimizers when a fit starts, without an edit of anybody's source.

    Changes of the model are made once for each model, before a checkpoint's weights are loaded, so that a run that is
    resumed has the same ones; those of optimizers before their state is loaded. What cannot be changed is warned of.

    Args:
        remedies: from ``lightning_ae.diagnostics.remedies``, in order.

    Raises:
        TypeError: if one is no remedy.

    Example:
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder
        >>> from lightning_ae.diagnostics.remedies import ScaleLearningRate, SwapActivation
        >>> change = ApplyRemedies([SwapActivation("gelu"), ScaleLearningRate(0.5)])
        >>> model = MLPAutoencoder((1, 8, 8), 4, hidden=(16,), lr=1e-2)
        >>> trainer = L.Trainer(
        ...     max_epochs=1, accelerator="cpu", callbacks=change, logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(model, DigitsDataModule())
        >>> trainer.optimizers[0].param_groups[0]["lr"], model.decoder.layers[1]
        (0.005, GELU(approximate='none'))
    """

    def __init__(self, remedies: Sequence[Remedy]) -> None:
        super().__init__()
        if isinstance(remedies, Remedy):
            remedies = [remedies]
        for remedy in remedies:
            if not isinstance(remedy, Remedy):
                raise TypeError(f"remedies: expected remedies, got a {type(remedy).__name__}.")
        self.remedies = tuple(remedies)

    def __repr__(self) -> str:
        return f"ApplyRemedies({', '.join(map(repr, self.remedies))})"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Change the model."""
        if stage != "fit":
            return
        made = pl_module.__dict__.setdefault("_remedies_made", set())
        for remedy in self.remedies:
            if isinstance(remedy, OptimizerRemedy) or repr(remedy) in made:
                continue
            change = remedy.apply(pl_module)
            if change:
                made.add(repr(remedy))
            else:
                rank_zero_warn(f"{type(remedy).__name__} changes nothing here: {change.what}.")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Change the optimizers."""
        for remedy in self.remedies:
            if isinstance(remedy, OptimizerRemedy):
                remedy.on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let remedies act over time."""
        for remedy in self.remedies:
            if isinstance(remedy, OptimizerRemedy):
                remedy.on_step(trainer, pl_module)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let remedies act where gradients are zeroed."""
        for remedy in self.remedies:
            if isinstance(remedy, OptimizerRemedy):
                remedy.on_before_zero_grad(pl_module, optimizer)
