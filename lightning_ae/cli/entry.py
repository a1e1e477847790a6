"""What ``lightning-ae`` and ``python -m lightning_ae`` run."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L

from lightning_ae.cli.base import AutoencoderCLI
from lightning_ae.cli.checkpoints import model_of_checkpoint_alone
from lightning_ae.cli.doctor import doctor

_EPILOG = "Why does a model not learn? See also: lightning-ae doctor --help"


def main(args: Sequence[str] | dict[str, Any] | None = None) -> AutoencoderCLI | int:
    """Run the command line.

    Args:
        args: arguments in place of the process's, or a whole configuration as a dict.

    Returns:
        The finished run: its ``trainer``, ``model`` and ``datamodule``; of ``doctor`` the exit code.
    """
    given, model = sys.argv[1:] if args is None else args, None
    if not isinstance(given, dict):
        if given[:1] == ["doctor"]:
            return doctor(given[1:])
        model = model_of_checkpoint_alone(given)
    # Lightning warns that --optimizer replaces the model's own, which is what it is for
    warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden")
    return AutoencoderCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"epilog": _EPILOG},
        args=None if args is None else given,
        model=model,
    )


def command() -> int | None:
    """What is installed: :func:`main`, with classes in the current folder as for ``python -m``, and an exit code."""
    here = os.getcwd()  # and not "", as parsers go into the folder of a configuration
    if here not in sys.path:
        sys.path.insert(0, here)
    done = main()
    return done if isinstance(done, int) else None
