"""Shards that appear on disk only when they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ae.data.shards import FORMAT, MANIFEST, read_manifest


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
