"""``lightning-ae fit|validate|test|predict``: LightningCLI with short names and the shape of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_ae.callbacks import PredictionWriter
from lightning_ae.models import Autoencoder


class AutoencoderCLI(LightningCLI):
    """LightningCLI with short class names, the data's shape passed to the model, and predictions on disk.

    ``predict`` with a model of this package writes latents, reconstructions and scores with a
    :class:`PredictionWriter` in ``<default_root_dir>/predictions``, unless the Trainer is given one, and keeps none of
    them in memory.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the shape of the data into models that take one."""
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
