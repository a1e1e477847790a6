"""``lightning-ae fit|validate|test|predict``: LightningCLI over everything in this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_ae
from lightning_ae.callbacks import PredictionWriter


class AutoencoderCLI(LightningCLI):
    """LightningCLI with short class names, the data's shape passed to the model, and predictions on disk.

    ``predict`` writes latents, reconstructions and scores with a :class:`PredictionWriter` in
    ``<default_root_dir>/predictions``, unless the Trainer is given one, and keeps none of them in memory.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the shape of the data into models that take one."""
        parser.link_arguments("data.in_shape", "model.init_args.in_shape", apply_on="instantiate")

    def before_predict(self) -> None:
        """Send predictions to disk."""
        if not any(isinstance(callback, PredictionWriter) for callback in self.trainer.callbacks):
            folder = Path(self.trainer.default_root_dir) / "predictions"
            self.trainer.callbacks.append(PredictionWriter(folder))
        self.config_init[self.subcommand]["return_predictions"] = False


def main(args: Any = None) -> AutoencoderCLI:
    """Run the command line; ``args`` as for LightningCLI, None for those of the process."""
    return AutoencoderCLI(
        lightning_ae.Autoencoder,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=args,
    )
