"""Batches that run eagerly, whoever asks for it and in whatever order they stop asking."""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class Eager:
    """While one is held, compiled code runs eagerly: it has no hooks, and would be traced anew to get them.

    torch's own stances are to be left in the reverse of the order in which they were entered, which callbacks of one
    Trainer do not keep; here the last one to leave ends it.

    Example:
        >>> first, second = Eager(), Eager()
        >>> first.close()
        >>> torch.compile(lambda x: torch.compiler.is_compiling())(torch.ones(1))
        False
        >>> second.close()
    """

    _held: ClassVar[set[int]] = set()
    _stance: ClassVar[Any] = None

    def __init__(self) -> None:
        if not Eager._held:
            Eager._stance = torch.compiler.set_stance("force_eager")
        Eager._held.add(id(self))

    def close(self) -> None:
        """Stop asking for it; may be called again."""
        if id(self) in Eager._held:
            Eager._held.remove(id(self))
            if not Eager._held:
                Eager._stance.__exit__(None, None, None)
                Eager._stance = None
