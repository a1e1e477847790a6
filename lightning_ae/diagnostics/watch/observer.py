"""What the probe asks of those who look through it."""

from __future__ import annotations

from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.watch.batch import MaskFunction
from lightning_ae.diagnostics.watch.counters import Counters, Key
from lightning_ae.diagnostics.watch.site import Listener, SiteInfo


class Observer(Listener, Protocol):
    """A listener that counts on sampled steps and logs; every monitor is one.

    Attributes:
        prefix: beginning of the names under which it logs.
        every_n_steps: at which optimizer steps it looks.
        include: names of the modules to which it keeps; None for all.
        unit_dim: the axis of the units, if the user has chosen it.
        mask_fn: from the batch to 1 where a position counts.
        counters: its sums.
        sites: what is known of the sites that it counts.
    """

    prefix: str
    every_n_steps: int
    include: tuple[str, ...] | None
    unit_dim: Any
    mask_fn: MaskFunction | None
    counters: Counters
    sites: dict[str, SiteInfo]

    def on_step(self, trainer: L.Trainer | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are ready, the optimizer is about to step."""

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """The batch is done."""

    def take(self, results: dict[Key, Tensor], keep: bool) -> None:
        """Receive sums over all ranks."""

    def scalars(self) -> dict[str, float]:
        """What is logged, by name without the prefix."""
        ...

    def histograms(self) -> dict[str, Tensor]:
        """Distributions that are logged, on the host."""
        ...

    def after_look(self) -> None:
        """Called after each step looked at."""

    def settle(self, trainer: L.Trainer) -> None:
        """Bring together what only the end of a fit needs of all ranks."""
