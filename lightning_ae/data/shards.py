"""Rows on disk, mapped into memory: safetensors shards, and a manifest that says which count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ae.files import read_json

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
        ValueError: if it is of another format, or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected shards of collect_activations, found no {path}")
    manifest = read_json(path, "a manifest of collect_activations")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"folder: expected a manifest of format {FORMAT}, got {manifest.get('format')} in {path}")
    if fault := _fault(manifest):
        raise ValueError(f"folder: {path} is not a manifest that collect_activations wrote: {fault}.")
    return manifest


def _fault(manifest: dict[str, Any]) -> str | None:
    """What contradicts itself in a manifest, which is a file like any other: nothing in it is believed."""
    kinds = {"settings": dict, "complete": bool, "shards": list}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            return f"{name} is no {kind.__name__}"
    for name in ("rows", "batches", "examples"):
        if not _is_count(manifest.get(name)):
            return f"{name} is no whole number >= 0"
    for shard in manifest["shards"]:
        if not isinstance(shard, dict) or not isinstance(shard.get("file"), str):
            return "a shard has no file"
        if Path(shard["file"]).name != shard["file"] or not shard["file"].endswith(".safetensors"):
            return f"a shard is not a file in this folder: {shard['file']!r}"
        if not _is_count(shard.get("rows")) or not shard["rows"]:
            return f"rows of {shard['file']} is no positive whole number"
        if not _is_count(shard.get("first_batch")) or not isinstance(shard.get("fingerprint"), str):
            return f"the first batch of {shard['file']} is not recorded"
    files = [shard["file"] for shard in manifest["shards"]]
    if len(set(files)) < len(files):
        return "a shard is listed twice"
    if sum(shard["rows"] for shard in manifest["shards"]) != manifest["rows"]:
        return f"its shards have other than {manifest['rows']} rows"
    if not manifest["rows"]:
        return None
    shape = manifest.get("shape")
    if not (isinstance(shape, list) and len(shape) == 1 and _is_count(shape[0]) and shape[0]):
        return f"shape is no list of one positive number: {shape!r}"
    for name in ("mean", "mean_square"):
        values = manifest.get(name)
        if not isinstance(values, list) or len(values) != shape[0] or not all(_is_number(value) for value in values):
            return f"{name} is no list of {shape[0]} finite numbers"
    # a mean square is at least the square of the mean, but for rounding
    pairs = zip(manifest["mean"], manifest["mean_square"], strict=True)
    if any(mean**2 > square * (1 + 1e-6) + 1e-300 for mean, square in pairs):
        return "mean_square is less than the square of mean"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    # of which the square is one, too
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e150


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
        for number, shard in enumerate(self.manifest["shards"]):
            if not (path := self.folder / shard["file"]).is_file():
                raise FileNotFoundError(f"folder: the manifest lists {path}, which is missing")
            self._check_header(number)

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
            with self._opened(number) as file:
                self._mapped[number, name] = file.get_tensor(name)
        return self._mapped[number, name]

    @contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / self.manifest["shards"][number]["file"]
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"folder: {path} is not a shard that collect_activations wrote: {error}") from error

    def _check_header(self, number: int) -> None:
        """Raise unless a shard has what the manifest says; its rows are not read."""
        with self._opened(number) as file:
            found = {name: file.get_slice(name) for name in ("activations", "index")}
            shapes = {name: list(there.get_shape()) for name, there in found.items()}
            types = {name: there.get_dtype() for name, there in found.items()}
        path, rows = self.folder / self.manifest["shards"][number]["file"], self.sizes[number]
        for name, shape in shapes.items():
            if len(shape) != 2 or shape[0] != rows:
                raise ValueError(f"folder: expected {rows} rows of {name} in {path}, got the shape {tuple(shape)}")
        if shapes["activations"][1] != self.num_features:
            raise ValueError(f"folder: expected {self.num_features} features in {path}, got {shapes['activations'][1]}")
        if types["index"] != "I64" or types["activations"] not in ("F16", "BF16", "F32"):
            raise ValueError(f"folder: expected floating-point activations and an int64 index in {path}, got {types}")


def _groups(shard: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each shard that occurs, and where."""
    order = shard.argsort(stable=True)
    numbers, counts = torch.unique_consecutive(shard[order], return_counts=True)
    yield from zip(numbers.tolist(), torch.split(order, counts.tolist()), strict=True)
