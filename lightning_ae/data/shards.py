"""Rows on disk: safetensors shards that appear only when whole, and a manifest that says which count."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file that is there either whole or not at all, whenever the process or the machine dies.

    Args:
        path: the file's name.
        write: writes to the temporary name that it is given.
    """
    part = path.with_name(f"{path.name}.part")
    part.touch()
    mode = part.stat().st_mode
    write(part)
    part.chmod(mode)  # safetensors keeps what it writes from everybody else
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    if os.name == "posix":  # the new name is in the folder, which has a cache of its own
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class ShardWriter:
    r"""Gathers rows and writes them in shards; goes on where an earlier one was ended.

    After each shard the manifest is replaced. It holds the running means :math:`\bar x` and :math:`\overline{x^2}` of
    each feature in float64, updated shard by shard, so that they do not depend on interruptions.

    Args:
        folder: where to write; made if need be.
        settings: what has to be the same when going on, as JSON values.
        shard_rows: rows in a shard, at least; a call of :meth:`add` is not split.

    Raises:
        ValueError: if the folder has shards that were written with other settings.
        ModuleNotFoundError: if safetensors is not installed.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], shard_rows: int) -> None:
        import safetensors.torch  # noqa: F401  fail now rather than after the first shard

        self.folder = folder
        self.shard_rows = shard_rows
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            part.unlink()
        self.manifest: dict[str, Any] = {"format": FORMAT, "settings": settings, "complete": False, "rows": 0}
        self.manifest |= {"batches": 0, "examples": 0, "shape": None, "mean": None, "mean_square": None, "shards": []}
        if (folder / MANIFEST).exists():
            found = read_manifest(folder)
            for name, value in settings.items():
                if (there := found["settings"].get(name)) != value:
                    raise ValueError(
                        f"out_dir: {folder} has shards collected with {name} = {there!r}, now it is {value!r}; "
                        "go on with the same, or choose another folder"
                    )
            self.manifest = found
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._batches, self._examples = self.manifest["batches"], self.manifest["examples"]
        self._first_batch = ""

    @property
    def examples(self) -> int:
        """Examples in all batches so far."""
        return int(self._examples)

    def add(self, rows: Tensor, index: Tensor, examples: int, fingerprint: Callable[[], str]) -> None:
        """Add what came of one batch.

        Args:
            rows: ``(N, D)``.
            index: where each is from, int64 ``(N, P)``.
            examples: in the batch.
            fingerprint: tells the batch from others; called for the first batch of a shard.
        """
        if not self._pending:
            self._first_batch = fingerprint()
        self._pending.append((rows, index))
        self._batches += 1
        self._examples += examples
        if sum(len(rows) for rows, _ in self._pending) >= self.shard_rows:
            self._flush()

    def finish(self) -> None:
        """Write the rest, and that there is no more."""
        if self._pending and any(len(rows) for rows, _ in self._pending):
            self._flush()
        self.manifest["complete"] = True
        self._save_manifest()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        rows = torch.cat([rows for rows, _ in self._pending])
        index = torch.cat([index for _, index in self._pending])
        self._pending = []
        manifest = dict(self.manifest)
        name = f"shard-{len(manifest['shards']):05d}.safetensors"
        write_whole(self.folder / name, lambda path: save_file({"activations": rows, "index": index}, path))
        share = len(rows) / (manifest["rows"] + len(rows))
        mean, mean_square = _moments(rows)
        for key, of_shard in (("mean", mean), ("mean_square", mean_square)):
            before = torch.zeros_like(mean) if manifest[key] is None else torch.tensor(manifest[key], dtype=mean.dtype)
            manifest[key] = (before + share * (of_shard - before)).tolist()
        manifest["rows"] += len(rows)
        shard = {"file": name, "rows": len(rows), "first_batch": manifest["batches"], "fingerprint": self._first_batch}
        manifest["shards"] = [*manifest["shards"], shard]
        manifest |= {"shape": [rows.shape[1]], "batches": self._batches, "examples": self._examples}
        self.manifest = manifest
        self._save_manifest()

    def _save_manifest(self) -> None:
        text = json.dumps(self.manifest)
        write_whole(self.folder / MANIFEST, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each column, in float64, without a copy of everything that wide."""
    total = torch.zeros(2, rows.shape[1], dtype=torch.float64)
    for part in torch.split(rows, 4096):
        wide = part.double()
        total[0] += wide.sum(0)
        total[1] += wide.square().sum(0)
    total /= len(rows)
    return total[0], total[1]


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
