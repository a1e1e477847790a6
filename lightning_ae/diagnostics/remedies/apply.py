"""The callback that makes the changes of remedies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ae.diagnostics.remedies.base import Change, Options, Remedy, Together, add_callback


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
        """Change the optimizers, which are configured by now; the state that fits them so is loaded later."""

    def on_step(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Called before each training batch."""

    def on_before_zero_grad(self, model: L.LightningModule, optimizer: Any) -> None:
        """Called before gradients are zeroed, or would be."""

    def arguments(self) -> dict[str, Any]:
        """The callback."""
        return {"callbacks": [f"ae.ApplyRemedies([remedies.{self!r}])"]}

    def statements(self) -> list[str]:
        """None: the callback does it."""
        return []


class ApplyRemedies(L.Callback):
    """Makes changes to a model and its optimizers when a fit starts, without an edit of anybody's source.

    Changes of the model are made once for each model, before a checkpoint's weights are loaded; those of optimizers
    once for each optimizer: before its state is loaded if that was saved with them, so that a run that is resumed has
    them once, else after. What cannot be changed is warned of, and so are new weights that a checkpoint's replace.

    Args:
        remedies: from ``lightning_ae.diagnostics.remedies``, in order; one that is given twice is made once.

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
        #: what is made; a :class:`Together` is taken apart
        self.remedies = tuple(part for remedy in remedies for part in _parts(remedy))
        self._loaded: set[str] | None = None

    def __repr__(self) -> str:
        return f"ApplyRemedies({', '.join(map(repr, self.remedies))})"

    @property
    def state_key(self) -> str:
        """One for each list of remedies, so that several callbacks have each their own."""
        return f"ApplyRemedies{list(self.remedies)!r}"

    def state_dict(self) -> dict[str, Any]:
        """Which remedies the checkpoint's weights and optimizers were made with."""
        return {"remedies": [repr(remedy) for remedy in self.remedies]}

    @property
    def _of_optimizers(self) -> list[OptimizerRemedy]:
        return [remedy for remedy in self.remedies if isinstance(remedy, OptimizerRemedy)]

    def _is_new(self, remedy: Remedy) -> bool:
        """Whether a checkpoint was loaded that was saved without it."""
        return self._loaded is not None and repr(remedy) not in self._loaded

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Change the model."""
        if stage != "fit":
            return
        self._loaded = None
        made = pl_module.__dict__.setdefault("_remedies_made", set())
        for remedy in self.remedies:
            if isinstance(remedy, OptimizerRemedy) or repr(remedy) in made:
                continue
            change = remedy.apply(pl_module)
            if change:
                made.add(repr(remedy))
            else:
                rank_zero_warn(f"{type(remedy).__name__} changes nothing here: {change.what}.")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """See which remedies the checkpoint was saved with, whichever callback has made them."""
        states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
        self._loaded = {name for state in states for name in state.get("remedies", ())}
        for remedy in self.remedies:
            if remedy.draws and self._is_new(remedy):
                rank_zero_warn(
                    f"{type(remedy).__name__} is undone by the weights of the checkpoint, which was saved without it."
                )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Change the optimizers that the checkpoint's state, if there is one, fits only when they are changed."""
        for remedy in self._of_optimizers:
            if not self._is_new(remedy):
                remedy.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Change the optimizers whose state was saved without the change."""
        for remedy in self._of_optimizers:
            if self._is_new(remedy):
                remedy.on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let remedies act over time."""
        for remedy in self._of_optimizers:
            remedy.on_step(trainer, pl_module)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let remedies act where gradients are zeroed."""
        for remedy in self._of_optimizers:
            remedy.on_before_zero_grad(pl_module, optimizer)


def _parts(remedy: Remedy) -> list[Remedy]:
    return [part for r in remedy.remedies for part in _parts(r)] if isinstance(remedy, Together) else [remedy]
