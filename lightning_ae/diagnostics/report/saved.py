"""The report as strict JSON, and back."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.monitors.output import Moment
from lightning_ae.diagnostics.report.record import Example, Examples, Line, Record

#: Raised when a reader of the version before would misunderstand the file.
VERSION = 1
KIND = "lightning_ae.diagnostics"
NAME = "diagnostics.json"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class SavedRemedy(NamedTuple):
    """A remedy as a saved report knows it: in words and as code; it cannot be applied.

    Attributes:
        words: what it changes, a sentence.
        code: the change as Python.
    """

    words: str
    code: str

    def describe(self) -> str:
        """What it changes, a sentence."""
        return self.words

    def python(self) -> str:
        """The change as Python."""
        return self.code

    def __str__(self) -> str:
        return self.words


def to_dict(record: Record) -> dict[str, Any]:
    """The tree that :data:`NAME` holds, as in :meth:`lightning_ae.Report.save`: numbers, texts, lists and dicts alone.

    Numbers that are not finite are the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
    """
    tree: dict[str, Any] = {"kind": KIND, "version": VERSION, "verdict": record.verdict}
    for part in fields(record):
        tree[part.name] = getattr(record, part.name)
    tree["findings"] = [_finding(finding) for finding in record.findings]
    tree["history"] = [moment._asdict() for moment in record.history]
    tree["curves"] = {name: line._asdict() for name, line in record.curves.items()}
    if record.examples is not None:
        rows = {name: [e._asdict() for e in getattr(record.examples, name)] for name in ("first", "worst")}
        tree["examples"] = {**vars(record.examples), **rows}
    return {name: _strict(value) for name, value in tree.items()}


def _finding(finding: Finding) -> dict[str, Any]:
    tree: dict[str, Any] = {**finding._asdict()}
    remedies = getattr(finding, "remedies", ())
    return tree | {"remedies": [{"describe": remedy.describe(), "python": remedy.python()} for remedy in remedies]}


def _strict(value: Any) -> Any:
    """Only what JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write(record: Record, folder: Path) -> Path:
    """Write :data:`NAME`; what was there is replaced when all is written."""
    path = folder / NAME
    text = json.dumps(to_dict(record), allow_nan=False, indent=None, separators=(",", ":"))
    half = path.with_suffix(".json.part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)
    return path


def read(path: str | Path) -> dict[str, Any]:
    """The attributes of a report, by name.

    Raises:
        FileNotFoundError: if there is neither such a file nor one in such a folder.
        ValueError: if it is no report, or one of a later version.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"path: expected {NAME} or the folder it is in, and there is no {path}.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {path} is no report: not JSON ({error}).") from error
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise ValueError(f'path: {path} is no report: expected a JSON object with "kind": "{KIND}".')
    version = tree.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"path: {path} is a report of version {version}, and this lightning_ae reads versions up to {VERSION}: "
            "install a later one."
        )
    try:
        return _parts(tree)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"path: {path} is no whole report: {type(error).__name__}: {error}.") from error


def _parts(tree: dict[str, Any]) -> dict[str, Any]:
    found = {part.name: tree[part.name] for part in fields(Record) if part.name in tree}
    found["findings"] = [_read_finding(row) for row in tree["findings"]]
    for name in ("sites", "layers", "latent", "output", "frequencies", "dormancy", "latents"):
        found[name] = _numbers(dict(tree.get(name, {})))
    found["over_time"] = {int(step): _numbers(row) for step, row in tree.get("over_time", {}).items()}
    found["history"] = [Moment(**_numbers(row)) for row in tree.get("history", [])]
    found["curves"] = {name: Line(**_numbers(row)) for name, row in tree.get("curves", {}).items()}
    found["first_seen"] = {name: int(step) for name, step in tree.get("first_seen", {}).items()}
    if tree.get("examples") is not None:
        rows = {
            name: [Example(**{**row, "error": _numbers(row["error"])}) for row in tree["examples"][name]]
            for name in ("first", "worst")
        }
        found["examples"] = Examples(**{**tree["examples"], **rows})
    return found


def _read_finding(row: dict[str, Any]) -> Finding:
    row = dict(row)
    remedies = tuple(SavedRemedy(remedy["describe"], remedy["python"]) for remedy in row.pop("remedies", []))
    values: dict[str, Any] = {name: row[name] for name in Finding._fields if name in row}
    values["value"] = _numbers(values["value"])
    values["change"] = None if values["change"] is None else tuple(values["change"])
    values["symptoms"] = tuple(values["symptoms"])
    if "remedies" in Finding._fields:
        values["remedies"] = remedies
    return Finding(**values)


def _numbers(value: Any) -> Any:
    """Texts for what is not finite are numbers again."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
