"""Files that others may have written: nothing in them is believed before it is looked at, and errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        what: what it should be, for the message.

    Returns:
        It, as a dict.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, nested too deep, or something else than an object; the message has the path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "cfg.json")
        ...     _ = path.write_text('{"k": 4}')
        ...     read_json(path, "a configuration")
        {'k': 4}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected {what}, found no {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is not {what}: {type(error).__name__}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: expected an object, got a {type(content).__name__}.")
    return content
