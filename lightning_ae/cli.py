"""``lightning-ae fit|validate|test|predict``: LightningCLI over everything in this package."""

from __future__ import annotations

import math
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_ae
from lightning_ae.callbacks import PredictionWriter
from lightning_ae.checkpoint import read_tree
from lightning_ae.rebuildable import resolve


class AutoencoderCLI(LightningCLI):
    """LightningCLI with short class names, the data's shape passed to the model, and predictions on disk.

    ``predict`` writes latents, reconstructions and scores with a :class:`PredictionWriter` in
    ``<default_root_dir>/predictions``, unless the Trainer is given one, and keeps none of them in memory.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the shape of the data into models that take one."""
        parser.link_arguments("data.in_shape", "model.init_args.in_shape", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leave the model as it was named; Lightning would build whatever classes the checkpoint asks for."""

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
    if known.ckpt_path in (None, "last", "best", "hpc", "registry") or known.config is not None or named:
        return list(args)
    if "fit" in rest:
        raise ValueError(
            "fit from a checkpoint needs the configuration of the interrupted run, with its optimizer and Trainer: "
            "lightning-ae fit -c <log_dir>/config.yaml --ckpt_path ..."
        )
    tree = read_tree(known.ckpt_path)
    _check_tree(tree, known.ckpt_path)
    # YAML rather than JSON, which has no infinity
    return [*args, "--model=" + yaml.safe_dump(_plain(tree), default_flow_style=True, width=math.inf).strip()]


def _check_tree(node: Any, path: str) -> None:
    """Raise unless all classes are this package's and everything is recorded: the CLI imports what it is told."""
    if isinstance(node, Mapping):
        if "not_recorded" in node or "same_as" in node:
            raise ValueError(
                f"{path}: its model has parts that are tied by hand or are not of lightning_ae. Name the model with "
                "--model or --config, or load it in Python with lightning_ae.load."
            )
        if "class_path" in node:
            resolve(node["class_path"], (lightning_ae.__name__,))
        for item in node.values():
            _check_tree(item, path)
    elif isinstance(node, (list, tuple)):
        for item in node:
            _check_tree(item, path)
    elif not isinstance(node, (bool, int, float, str, type(None))):
        raise ValueError(f"{path}: its model has a {type(node).__name__} among its arguments; name it with --model.")


def _plain(node: Any) -> Any:
    """Tuples as lists."""
    if isinstance(node, Mapping):
        return {key: _plain(item) for key, item in node.items()}
    return [_plain(item) for item in node] if isinstance(node, (list, tuple)) else node


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


def command() -> None:
    """What ``lightning-ae`` runs: :func:`main`, whose result would be taken for a failure's message."""
    main()
