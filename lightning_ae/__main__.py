"""``python -m lightning_ae``."""

import sys

from lightning_ae.cli import command

if __name__ == "__main__":
    sys.exit(command())
