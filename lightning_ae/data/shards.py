"""Rows on disk, mapped into memory: safetensors shards, and a manifest that says which count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Args:
        folder: where the shards are.

    Returns:
        It, as a dict.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"folder: expected shards of collect_activations, found no {path}")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"folder: expected a manifest of format {FORMAT}, got {manifest.get('format')} in {path}")
    return manifest


class ActivationShards:
    r"""Rows on disk as one array ``(N, D)`` that is mapped into memory, not read into it.

    Args:
        folder: which :func:`collect_activations` wrote.

    Attributes:
        manifest: what the writer says: settings, shards, counts, ``complete``.
        mean: :math:`\bar x` of each feature, float32 ``(D,)``.
        mean_square: :math:`\overline{x^2}` of each feature, float32 ``(D,)``.

    Raises:
        FileNotFoundError: if there is no manifest, or a shard is missing.
        ValueError: if a shard is not what the manifest says, or there are no rows.
        ModuleNotFoundError: if safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from lightning_ae import collect_activations
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = collect_activations(model, "0", torch.eye(4).split(2), folder)
        ...     len(shards), torch.allclose(shards.rows(torch.tensor([2])), model[0](torch.eye(4)[2:3]))
        (4, True)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["rows"]:
            raise ValueError(f"folder: expected activations, there are none in {self.folder}")
        self.mean = torch.tensor(self.manifest["mean"], dtype=torch.float32)
        self.mean_square = torch.tensor(self.manifest["mean_square"], dtype=torch.float32)
        self.sizes = [int(shard["rows"]) for shard in self.manifest["shards"]]
        #: where each shard starts, and the end, int64 ``(S + 1,)``
        self.starts = torch.tensor([0, *self.sizes]).cumsum(0)
        self._mapped: dict[tuple[int, str], Tensor] = {}
        for shard in self.manifest["shards"]:
            if not (path := self.folder / shard["file"]).exists():
                raise FileNotFoundError(f"folder: the manifest lists {path}, which is missing")

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # another process maps for itself

    @property
    def num_features(self) -> int:
        """``D``."""
        return int(self.manifest["shape"][0])

    def rows(self, which: Tensor) -> Tensor:
        """Some rows, in the dtype in which they are stored.

        Args:
            which: int64 ``(B,)``; ascending ones are read fastest.

        Returns:
            ``(B, D)``, a copy.

        Raises:
            IndexError: if there is no such row.
        """
        return self._gather("activations", which)

    def index(self, which: Tensor) -> Tensor:
        """Where some rows are from: the example, counted over all batches, and the position in it.

        Args:
            which: int64 ``(B,)``.

        Returns:
            int64 ``(B, P)``, with ``P`` the dimensions of the layer's output but that of the features.

        Raises:
            IndexError: if there is no such row.
        """
        return self._gather("index", which)

    def _gather(self, name: str, which: Tensor) -> Tensor:
        if len(which) and not (int(which.min()) >= 0 and int(which.max()) < len(self)):
            raise IndexError(f"which: expected rows in [0, {len(self)}), got [{int(which.min())}, {int(which.max())}]")
        shard = torch.searchsorted(self.starts, which, right=True) - 1
        parts = list(_groups(shard))
        if len(parts) == 1:
            ((number, _),) = parts
            return self._tensor(number, name).index_select(0, which - self.starts[number])
        like = self._tensor(0, name)
        out = like.new_empty(len(which), like.shape[1])
        for number, places in parts:
            out[places] = self._tensor(number, name).index_select(0, which[places] - self.starts[number])
        return out

    def _tensor(self, number: int, name: str) -> Tensor:
        if (number, name) not in self._mapped:
            from safetensors import safe_open

            path = self.folder / self.manifest["shards"][number]["file"]
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            if len(tensor) != self.sizes[number]:
                raise ValueError(f"folder: expected {self.sizes[number]} rows in {path}, got {len(tensor)}")
            self._mapped[number, name] = tensor
        return self._mapped[number, name]


def _groups(shard: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each shard that occurs, and where."""
    order = shard.argsort(stable=True)
    numbers, counts = torch.unique_consecutive(shard[order], return_counts=True)
    yield from zip(numbers.tolist(), torch.split(order, counts.tolist()), strict=True)
