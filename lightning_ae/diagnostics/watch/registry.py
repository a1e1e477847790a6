"""The names under which a model's modules are known, and the sites that were met in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ae.diagnostics.watch.site import WRAPPERS, Site, clean_name, structure


class Registry:
    """Names of modules and parameters, which of them are not looked at, and the sites found so far, in their order.

    Args:
        exclude: names of submodules whose calls, and what they call, are not looked at.
        unit_dim: the axis of the units for the sites with these names (or inside modules with these names), or for all.
    """

    def __init__(self, exclude: Sequence[str] = (), unit_dim: int | Mapping[str, int] | None = None) -> None:
        self.exclude = tuple(exclude)
        self.unit_dim = unit_dim
        self.sites: dict[tuple[Any, ...], Site] = {}
        self.ran: set[int] = set()
        #: number of the step, which decides what part of a large batch is counted; None to count all of it
        self.number: int | None = None
        #: whether the module that has just returned was called where gradients are recorded
        self.learning = True
        self._complaints: set[str] = set()
        self.scratch: dict[Any, Tensor] = {}
        self._structure: tuple[Any, ...] = ()
        self._parameters: dict[int, str] = {}
        self._names: dict[int, list[str]] = {}
        self._excluded: set[int] = set()
        self._wrappers: set[int] = set()

    def complain(self, who: str, error: Exception) -> None:
        """Warn, once for each listener, that it has failed."""
        if who not in self._complaints:
            self._complaints.add(who)
            rank_zero_warn(f"{who} could not read a step and goes on without it: {type(error).__name__}: {error}")

    def find(self, root: nn.Module) -> None:
        """Give names to all modules and parameters of a model, anew if any has changed."""
        now = (*self.exclude, *structure(root))
        if now == self._structure:
            return
        self._structure = now
        self._parameters = {id(p): clean_name(name) for name, p in root.named_parameters()}
        modules = dict(root.named_modules(remove_duplicate=False))
        metrics = [clean_name(name) for name, module in modules.items() if name and isinstance(module, Metric)]
        outside = (*self.exclude, *metrics)
        self._names, self._excluded, self._wrappers = {}, set(), set()
        for name, module in modules.items():
            above, _, last = name.rpartition(".")
            if last in WRAPPERS:
                self._wrappers.add(id(modules[above]))
            cleaned = clean_name(name)
            if any(cleaned == e or cleaned.startswith(f"{e}.") for e in outside):
                self._excluded.add(id(module))
            elif cleaned not in self._names.setdefault(id(module), []):
                self._names[id(module)].append(cleaned)
        self._excluded -= set(self._names)

    @property
    def parameters(self) -> dict[int, str]:
        """Names of the model's parameters by their ``id``, as of the last step that was looked at."""
        return self._parameters

    @property
    def structure(self) -> tuple[Any, ...]:
        """The same object as long as no module or parameter of the model is added, taken away or replaced."""
        return self._structure

    def names_of(self, module: nn.Module) -> list[str]:
        """All names of a module; none if it is no part of the model."""
        return self._names.get(id(module), [])

    def excluded(self, module: nn.Module) -> bool:
        """Whether it is not to be looked at, with all that it calls: metrics, and what the user has excluded."""
        return id(module) in self._excluded or isinstance(module, Metric)

    def wraps(self, module: nn.Module) -> bool:
        """Whether it only stands around a module of the same name, as ``torch.compile`` and checkpointing put it."""
        return id(module) in self._wrappers

    def chosen_dim(self, name: str, ndim: int) -> int | None:
        """The axis that the user has chosen, counted from the end."""
        chosen = self.unit_dim
        if isinstance(chosen, Mapping):
            fits = [k for k in chosen if k == name or name.startswith((f"{k}.", f"{k}#"))]
            chosen = chosen[max(fits, key=len)] if fits else None
        if chosen is None:
            return None
        if not -ndim <= chosen < ndim:
            raise ValueError(f"unit_dim: {name} has {ndim} axes, got {chosen}.")
        return chosen if chosen < 0 else chosen - ndim
