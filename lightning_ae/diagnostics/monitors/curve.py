"""Figures of each look, in their order: what happened when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_FOLD = 64


class Curve:
    """Numbers by the step at which they were seen; they stay on the device until they are read.

    Example:
        >>> curve = Curve()
        >>> curve.add("loss", 0, torch.tensor(2.0))
        >>> curve.add("loss", 5, torch.tensor(1.0))
        >>> curve.read("loss")
        ([0, 5], [2.0, 1.0])
    """

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, step: int, value: Tensor) -> None:
        """Append a number without dimensions."""
        self._steps.setdefault(name, []).append(step)
        values = self._values.setdefault(name, [])
        values.append(value.detach().reshape(1))
        if len(values) >= 2 * _FOLD and len(values[-_FOLD]) == 1:  # few tensors, however long the run
            values[:] = [torch.cat([value.to(values[-1].device) for value in values])]

    def read(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and numbers."""
        values = self._values.get(name, [])
        numbers: list[float] = torch.cat([value.cpu() for value in values]).double().tolist() if values else []
        return list(self._steps.get(name, [])), numbers

    @property
    def steps(self) -> dict[str, list[int]]:
        """Steps by name."""
        return self._steps

    def reduce(self, names: Sequence[str], mean: Callable[[Tensor], Tensor]) -> None:
        """Replace numbers by their mean over the ranks; of names that all ranks have seen at the same steps."""
        for name in names:
            self._values[name] = [mean(torch.cat([value.cpu() for value in self._values[name]]).float())]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            name: {"steps": steps, "values": torch.cat([value.cpu() for value in self._values[name]])}
            for name, steps in self._steps.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._steps = {name: list(row["steps"]) for name, row in state.items()}
        self._values = {name: [row["values"].clone()] for name, row in state.items()}

    def clear(self) -> None:
        """Forget everything."""
        self._steps, self._values = {}, {}
