"""What the user is told when a model, its data or its arguments fail."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import lightning.pytorch
import torch
from torch import Tensor

#: Whose frames say nothing about what a user has written.
_INNER = (
    *(str(Path(module.__file__ or "").parent) for module in (lightning.pytorch, jsonargparse, torch)),
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "diagnostics"),
    contextlib.__file__,
)
#: And, further in, those of who calls and who watches a module.
_BETWEEN = (str(Path(torch.nn.modules.module.__file__)), str(Path(__file__).parents[1] / "diagnostics"))


#: As a shell's, of what Ctrl-C has ended.
INTERRUPTED = 130


class Failure(Exception):
    """Why there is no diagnosis, in words for the terminal, and the lines of code that led there, where they matter.

    Args:
        said: the words.
        frames: the lines of code.
        code: with which the process ends.
    """

    def __init__(self, said: str, frames: str = "", code: int = 2) -> None:
        super().__init__(said)
        self.frames, self.code = frames, code


def failed(what: str, error: BaseException) -> Failure:
    """What failed and why, with the part of the traceback that begins in the user's own code.

    Example:
        >>> print(failed("The model failed", ValueError("no such layer")))
        The model failed: ValueError: no such layer
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = next((i for i, frame in enumerate(frames) if not frame.filename.startswith(_INNER)), len(frames))
    lines = traceback.format_list([frame for frame in frames[own:] if not frame.filename.startswith(_BETWEEN)])
    return Failure(f"{what}: {type(error).__name__}: {error}", "".join(lines).rstrip())


def say(failure: Failure) -> None:
    """Print it, as Python does: the lines of code first."""
    if failure.frames:
        print(f"Traceback (most recent call last):\n{failure.frames}", file=sys.stderr)
    print(f"lightning-ae doctor: error: {failure}", file=sys.stderr)


def shapes(batch: Any) -> str:
    """What a batch holds.

    Example:
        >>> shapes((torch.zeros(32, 1, 8, 8), {"label": torch.zeros(32, dtype=torch.int64)}))
        "((32, 1, 8, 8) float32, {'label': (32,) int64})"
    """
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {shapes(item)}" for key, item in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(map(shapes, batch))})"
    return type(batch).__name__


class Follower(L.Callback):
    """Knows the batch at which a fit is, and ends the fit after it when asked to.

    Args:
        asked: set when it is to end.
    """

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked
        self.done = 0
        self.at = ""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember it."""
        self.at = f" in a training batch of {shapes(batch)}"

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remember it."""
        self.at = f" in a validation batch of {shapes(batch)}"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count it, and end."""
        self.done += 1
        if self.asked.is_set():
            trainer.should_stop = True


@contextlib.contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """Within it, the first Ctrl-C sets an event instead of raising; the second raises."""
    asked = threading.Event()

    def on_interrupt(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nInterrupted: what was seen until now follows.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
