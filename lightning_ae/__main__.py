"""``python -m lightning_ae``."""

from lightning_ae.cli import main

if __name__ == "__main__":
    main()
