"""Predictions on disk, shard by shard, for data of any size."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_ae.checks import check_one_of, check_type, check_whole

Format = Literal["npz", "safetensors"]
#: What this writer writes; other files in the folder are somebody else's.
_SHARD = re.compile(r"rank\d+-\d{5,}\.(npz|safetensors)")
_LEFT_OVER = re.compile(rf"{_SHARD.pattern}(\.part)?")


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returns, with the position of each example in the data.

    Files are ``rank0-00000.npz``, ``rank0-00001.npz`` and so on; each holds ``index`` and one array for each key of
    the prediction. Memory holds one shard at a time if the Trainer is called with ``return_predictions=False``. A
    shard appears under its name only when it is whole.

    Args:
        folder: where to write; made if need be. Shards of an earlier run in it are removed, other files are left alone.
        format: ``"npz"``, or ``"safetensors"`` if that package is installed.
        shard_size: examples in a shard, at least; a batch is not split.

    Raises:
        ValueError: if the format has another name or ``shard_size`` is not positive.
        ModuleNotFoundError: if safetensors is asked for and not installed.

    Example:
        >>> import tempfile
        >>> from lightning_ae import LinearAutoencoder, TensorDataModule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = L.Trainer(
        ...         accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        ...         callbacks=PredictionWriter(folder),
        ...     )
        ...     data = TensorDataModule(torch.rand(10, 4), batch_size=4, val_fraction=0.0)
        ...     _ = trainer.predict(LinearAutoencoder(4, 2), data, return_predictions=False)
        ...     {name: tuple(array.shape) for name, array in load_predictions(folder).items()}
        {'reconstruction': (10, 4), 'score': (10,), 'z': (10, 2)}
    """

    def __init__(self, folder: str | Path, format: Format = "npz", shard_size: int = 10_000) -> None:
        super().__init__(write_interval="batch")
        check_type("folder", folder, str, Path)
        check_one_of("format", format, ("npz", "safetensors"))
        if format == "safetensors":
            import safetensors.numpy  # noqa: F401  fail now rather than after the first shard
        self.folder = Path(folder)
        self.format = format
        self.shard_size = check_whole("shard_size", shard_size)
        self._pending: list[dict[str, np.ndarray]] = []
        self._seen = 0
        self._shards = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the folder, without what an earlier run left in it."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("rank*-*"):
                if _LEFT_OVER.fullmatch(path.name) and path.is_file():
                    path.unlink()
        trainer.strategy.barrier()
        if hasattr(trainer.predict_dataloaders, "indices"):
            # Lightning looks for indices in torch's own loader only; ours says them itself
            warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
        self._pending, self._seen, self._shards = [], 0, 0

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Collect a batch; write a shard when there is enough."""
        if not isinstance(prediction, Mapping):
            raise TypeError(f"PredictionWriter expects predict_step to give a dict, got {type(prediction).__name__}.")
        if dataloader_idx > 0:
            raise ValueError("PredictionWriter expects one dataloader; predict each with a writer of its own.")
        arrays = {name: _to_numpy(value) for name, value in prediction.items()}
        size = len(next(iter(arrays.values())))
        arrays["index"] = self._index(trainer, batch_indices, batch_idx, size)
        self._seen += size
        self._pending.append(arrays)
        if sum(len(part["index"]) for part in self._pending) >= self.shard_size:
            self._flush(trainer)

    def _index(self, trainer: L.Trainer, batch_indices: Sequence[int] | None, batch_idx: int, size: int) -> np.ndarray:
        loader: Any = trainer.predict_dataloaders
        if hasattr(loader, "indices"):
            return _to_numpy(loader.indices(batch_idx))
        if batch_indices:
            return np.asarray(batch_indices)
        if trainer.world_size > 1:
            raise ValueError(
                f"PredictionWriter cannot tell which examples a {type(loader).__name__} gives to which rank; "
                "use a data module of lightning_ae, or one device."
            )
        return np.arange(self._seen, self._seen + size)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last shard."""
        self._flush(trainer)
        trainer.strategy.barrier()

    def _flush(self, trainer: L.Trainer) -> None:
        if not self._pending:
            return
        shard = {name: np.concatenate([part[name] for part in self._pending]) for name in self._pending[0]}
        path = self.folder / f"rank{trainer.global_rank}-{self._shards:05d}.{self.format}"
        part = path.with_name(f"{path.name}.part")
        if self.format == "npz":
            with part.open("wb") as file:
                np.savez(file, **cast("dict[str, Any]", shard))
        else:
            from safetensors.numpy import save_file

            save_file(shard, part)
        part.rename(path)
        self._pending = []
        self._shards += 1


def _to_numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return np.ascontiguousarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())


def load_predictions(folder: str | Path) -> dict[str, Tensor]:
    """Read all shards of a :class:`PredictionWriter` into memory, in the order of the data.

    Args:
        folder: the writer's.

    Returns:
        A tensor ``(N, ...)`` for each key; examples that several ranks predicted appear once.

    Raises:
        FileNotFoundError: if there are no shards in the folder.
        ValueError: if one cannot be read, or does not go with the others.
    """
    check_type("folder", folder, str, Path)
    paths = sorted(path for path in Path(folder).glob("rank*-*") if _SHARD.fullmatch(path.name))
    if not paths:
        raise FileNotFoundError(f"No shards (rank0-00000.npz or .safetensors, …) in {folder}.")
    shards = [_read(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        layouts = [{name: array.shape[1:] for name, array in one.items()} for one in (shard, shards[0])]
        if layouts[0] != layouts[1]:
            raise ValueError(f"{path} has {layouts[0]}, but {paths[0]} has {layouts[1]}: of another run?")
    whole = {name: np.concatenate([shard[name] for shard in shards]) for name in sorted(shards[0])}
    _, order = np.unique(whole.pop("index"), return_index=True)
    return {name: torch.from_numpy(array[order]) for name, array in whole.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                shard: dict[str, np.ndarray] = dict(arrays)
        else:
            from safetensors.numpy import load_file

            shard = load_file(path)
    except ImportError:
        raise
    except Exception as error:  # a damaged file fails in every possible way
        raise ValueError(f"{path} is not a shard that PredictionWriter wrote: {error}") from error
    index = shard.get("index")
    if index is None or index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(f"{path} is not a shard that PredictionWriter wrote: it has no index of whole numbers.")
    lengths = {name: array.shape[:1] for name, array in shard.items()}
    if set(lengths.values()) != {index.shape}:
        raise ValueError(f"{path} is not a shard that PredictionWriter wrote: its arrays have lengths {lengths}.")
    return shard
