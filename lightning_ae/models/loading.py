"""Any model from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_ae.checkpoint import load_recorded
from lightning_ae.models.base import Autoencoder


def load(
    path: str | Path,
    *,
    cls: type[Autoencoder] | None = None,
    map_location: Any = "cpu",
    trusted: Iterable[str] = (),
    strict: bool = True,
    **given: Any,
) -> Autoencoder:
    """Rebuild the model of a checkpoint, whichever variant it is, and load its weights.

    The file is read with ``weights_only=True``: no code in it is run.

    Args:
        path: a checkpoint written by Lightning's ``ModelCheckpoint`` or ``trainer.save_checkpoint``.
        cls: the class to build instead of the recorded one, for a class that was renamed or moved.
        map_location: the model's device, as in :func:`torch.load`.
        trusted: packages or modules, besides this one, whose classes the checkpoint may name.
        strict: whether the weights must fit the model exactly.
        **given: parts to use instead of the recorded ones, and those that are not recorded (your own
            ``nn.Module`` or function); a dotted path reaches inside, as in
            ``load(path, **{"penalties.flow.residual": residual})``.

    Returns:
        The model, in training mode as from Lightning's own loading: call ``.eval()`` before inference. Weights are
        float32, or float64 where they were saved so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a readable checkpoint of this package, or a part must be passed again.

    Example:
        >>> import tempfile, lightning as L
        >>> from lightning_ae import LinearAutoencoder
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, enable_model_summary=False)
        >>> trainer.strategy.connect(LinearAutoencoder(4, latent_dim=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save_checkpoint(f"{folder}/model.ckpt")
        ...     type(load(f"{folder}/model.ckpt")).__name__
        'LinearAutoencoder'
    """
    return load_recorded(path, cls, map_location=map_location, trusted=trusted, strict=strict, given=given)
