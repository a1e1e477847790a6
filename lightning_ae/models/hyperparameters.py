"""What checkpoints and loggers get to know of a model's arguments."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.utilities.data import AttributeDict

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
        """Make room for what remedies have added to layers, before the weights are loaded."""
        restore_scaling(self, checkpoint["state_dict"])
