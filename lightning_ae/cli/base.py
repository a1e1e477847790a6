"""``lightning-ae fit|validate|test|predict``: LightningCLI with short names and the shape of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_ae.callbacks import PredictionWriter
from lightning_ae.models import Autoencoder


class AutoencoderCLI(LightningCLI):
    """LightningCLI with short class names, the data's shape passed to the model, and predictions on disk.

    ``predict`` with a model of this package writes latents, reconstructions and scores with a
    :class:`PredictionWriter` in ``<default_root_dir>/predictions``, unless the Trainer is given one, and keeps none of
    them in memory.

    Args:
        *args: as for LightningCLI.
        model: an object to use as it is, of which the arguments then say nothing.
        **kwargs: as for LightningCLI.
    """

    def __init__(self, *args: Any, model: L.LightningModule | None = None, **kwargs: Any) -> None:
        self._made = model
        super().__init__(*args, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of Lightning, but for a model that there is already."""
        if self._made is None:
            super().add_core_arguments_to_parser(parser)
        else:
            parser.add_lightning_class_args(self.trainer_class, "trainer")
            parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)

    def _get(self, config: Any, key: str, default: Any = None) -> Any:
        """Where Lightning asks for the model."""
        if key == "model" and self._made is not None:
            return self._made
        return super()._get(config, key, default)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the shape of the data into models that take one."""
        if self._made is None:
            parser.link_arguments("data.in_shape", "model.init_args.in_shape", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leave the model as it was named; Lightning would build whatever classes the checkpoint asks for."""

    def before_predict(self) -> None:
        """Send predictions to disk."""
        if not isinstance(self.model, Autoencoder):
            return
        trainer: Any = self.trainer
        if not any(isinstance(callback, PredictionWriter) for callback in trainer.callbacks):
            trainer.callbacks.append(PredictionWriter(Path(trainer.default_root_dir) / "predictions"))
        self.config_init[self.subcommand]["return_predictions"] = False
