"""The command line: LightningCLI over everything in this package, and what it adds to Lightning's subcommands."""

from lightning_ae.cli.base import AutoencoderCLI
from lightning_ae.cli.doctor import doctor
from lightning_ae.cli.entry import command, main

__all__ = ["AutoencoderCLI", "command", "doctor", "main"]
