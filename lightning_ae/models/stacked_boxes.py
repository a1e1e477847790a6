"""Encoder and decoder of a stack: the boxes of its levels as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightning_ae.models.base import Autoencoder


class _Parts(nn.Module, ABC):
    """A box made of parts that are registered under ``levels``: it has their parameters, and no state of its own."""

    def __init__(self, levels: Sequence[Autoencoder]) -> None:
        super().__init__()
        self._levels = tuple(levels)

    @abstractmethod
    def _parts(self) -> list[nn.Module]:
        """The parts, in the order in which they are called."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The parts too: weight priors, and all that looks at parameters of a box, find them here."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        # not where all names of a module are asked for: the one that counts is that under levels
        for i, part in enumerate(self._parts() if remove_duplicate else []):
            yield from part.named_modules(memo, f"{prefix}.{i}" if prefix else str(i), remove_duplicate)

    def train(self, mode: bool = True) -> _Parts:
        """Set the mode of the parts, which are no children: what goes through those may put others in their place."""
        super().train(mode)
        for part in self._parts():
            part.train(mode)
        return self


class StackedEncoder(_Parts):
    """The encoders of all levels and the codes between them: ``(B, *event)`` to the last level's ``h``."""

    def _parts(self) -> list[nn.Module]:
        return [part for level in self._levels for part in (level.encoder, level.code)][:-1]

    def forward(self, x: Tensor) -> Tensor:
        """Encode, without randomness."""
        for level in self._levels[:-1]:
            x = level.encode(x)
        h: Tensor = self._levels[-1].encoder(x)
        return h


class StackedDecoder(_Parts):
    """The decoders of all levels, from the last one's ``z`` down to pre-activations ``(B, *params)`` of the data."""

    def _parts(self) -> list[nn.Module]:
        return [level.decoder for level in reversed(self._levels)]

    def forward(self, z: Tensor, params: Tensor | None = None) -> Tensor:
        """Decode; ``params`` is the last decoder's output, if that has been called already."""
        return self.down(self._levels[-1].decoder(z) if params is None else params, len(self._levels))

    def down(self, params: Tensor, depth: int) -> Tensor:
        """Decode from the output of the decoder of level ``depth - 1``, which is called level k from 0."""
        for below, above in reversed(list(pairwise(self._levels[:depth]))):
            params = below.decoder(above.loss.mean(params))
        return params
