"""What checkpoints and loggers get to know of a model's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import AttributeDict

from lightning_ae.checkpoint import load_as, with_names_of
from lightning_ae.networks.standardize import restore_scaling
from lightning_ae.settings import flat_arguments, settings


class RecordsArguments(L.LightningModule):
    """A LightningModule whose hyperparameters are the tree of its constructor's arguments."""

    def _record(self, tree: dict[str, Any]) -> None:
        # what save_hyperparameters(tree) does, but for its comparing the tree with every argument, arrays included
        self._set_hparams(tree)
        self._log_hyperparams = True

    @property
    def hparams(self) -> Any:
        """What checkpoints record: the tree of constructor arguments, and ``settings``, the numbers as they are now."""
        found = super().hparams
        if found:
            found["settings"] = settings(self)
        return found

    @property
    def hparams_initial(self) -> Any:
        """What loggers get: arguments with their defaults on one level (``"lr"``, ``"loss"``, ``"code.beta"``)."""
        now = settings(self)
        flat = flat_arguments({name: node for name, node in self.hparams.items() if name != "settings"})
        # defaults of the bases, and what was set since
        flat |= now.get("", {})
        return AttributeDict(
            {
                name: now.get(name.rpartition(".")[0], {}).get(name.rpartition(".")[2], value)
                for name, value in flat.items()
            }
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what remedies have added to layers, and take names as they are here, compiled or not."""
        checkpoint["state_dict"] = with_names_of(self, checkpoint["state_dict"])
        restore_scaling(self, checkpoint["state_dict"])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Rebuild a model of this class, or of a subclass, from a checkpoint: see :func:`lightning_ae.load`.

        Raises:
            TypeError: if the checkpoint holds another class.
        """
        if hparams_file is not None:
            raise ValueError("hparams_file: not supported; the checkpoint holds all hyperparameters.")
        trusted = kwargs.pop("trusted", ())
        return load_as(
            cls,
            checkpoint_path,
            map_location=map_location or "cpu",
            trusted=trusted,
            strict=strict is not False,
            given=kwargs,
            weights_only=weights_only is not False,
        )
