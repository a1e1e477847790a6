"""``lightning-ae fit|validate|test|predict``: LightningCLI over everything in this package."""

from __future__ import annotations

import json
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_ae
from lightning_ae.callbacks import PredictionWriter
from lightning_ae.checkpoint import read_tree, resolve


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
        trainer: Any = self.trainer
        if not any(isinstance(callback, PredictionWriter) for callback in trainer.callbacks):
            trainer.callbacks.append(PredictionWriter(Path(trainer.default_root_dir) / "predictions"))
        self.config_init[self.subcommand]["return_predictions"] = False


def with_model_of_checkpoint(args: Sequence[str]) -> list[str]:
    """Add ``--model`` from the checkpoint where ``--ckpt_path`` is given and no model is.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it holds a class, or a part, that this package cannot build by itself.
    """
    peek = ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--ckpt_path")
    peek.add_argument("-c", "--config")
    known, rest = peek.parse_known_args(args)
    named = any(arg.startswith(("--model", "--print_config", "-h", "--help")) for arg in rest)
    if known.ckpt_path is None or known.config is not None or named:
        return list(args)
    tree = read_tree(known.ckpt_path)
    resolve(tree["class_path"], (lightning_ae.__name__,))
    try:
        text = json.dumps(tree)
    except TypeError as error:
        raise ValueError(f"{known.ckpt_path}: the model has tensors among its arguments; pass --model.") from error
    return [*args, f"--model={text}"]


def main(args: Sequence[str] | dict[str, Any] | None = None) -> AutoencoderCLI:
    """Run the command line.

    Args:
        args: arguments in place of the process's, or a whole configuration as a dict.

    Returns:
        The finished run: its ``trainer``, ``model`` and ``datamodule``.
    """
    if args is None:
        sys.argv[1:] = with_model_of_checkpoint(sys.argv[1:])
    elif not isinstance(args, dict):
        args = with_model_of_checkpoint(args)
    # Lightning warns that --optimizer replaces the model's own, which is what it is for
    warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden")
    return AutoencoderCLI(
        lightning_ae.Autoencoder,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=args,
    )
