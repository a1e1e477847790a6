"""Sums on the device: what monitors add to on sampled steps, and how it is read, reduced, saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, str]  # site, field


class Counters:
    """Named sums of sites over the last samples: of a current and of the previous span.

    A unit that fired only long ago is to be seen as dead now, so sums are over a rolling horizon: when enough samples
    have come, the current span becomes the previous one. What is reported is the sum of both. Counts are int64 and
    other sums float64 (float32 on MPS, which has no other).

    What is added waits, numbers on the host and tensors as they are, until :meth:`flush` or until something is read,
    so a batch costs few calls. A tensor must not be changed meanwhile.

    Example:
        >>> counters = Counters()
        >>> counters.add("encoder.1", "fired", torch.tensor([3, 0]))
        >>> counters.rotate()
        >>> counters.totals()["encoder.1", "fired"]
        tensor([3, 0])
    """

    def __init__(self) -> None:
        self._current: dict[Key, Tensor] = {}
        self._previous: dict[Key, Tensor] = {}
        self._numbers: dict[Key, int] = {}
        self._waiting: dict[Key, tuple[Tensor, torch.dtype]] = {}

    def get(
        self,
        site: str,
        field: str,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.int64,
        device: torch.device | None = None,
    ) -> Tensor:
        """The current sum, to be added to in place; zeros at first, or if its shape is no longer what it was."""
        key = (site, field)
        found = self._current.get(key)
        if found is not None and found.shape == torch.Size(shape):
            if device is not None and found.device != device:
                found = self._current[key] = _to(found, device)
            return found
        before = self._previous.get(key)
        if before is not None and before.shape != torch.Size(shape):
            del self._previous[key]
        with torch.inference_mode(False):
            fresh = self._current[key] = torch.zeros(tuple(shape), dtype=_on(dtype, device), device=device)
        return fresh

    def add(self, site: str, field: str, value: Tensor | int, dtype: torch.dtype = torch.int64) -> None:
        """Add a tensor, or a whole number; no synchronisation in either case."""
        key = (site, field)
        if not isinstance(value, Tensor):
            self._numbers[key] = self._numbers.get(key, 0) + value
            return
        if key in self._waiting:
            self.flush()
        self._waiting[key] = (value, dtype)

    def flush(self) -> None:
        """Add up the tensors that wait, all of a kind and device in one call; numbers wait until something is read."""
        waiting, self._waiting = self._waiting, {}
        groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        for key, (value, dtype) in waiting.items():
            device = value.device
            total = self._current.get(key)
            if total is None or total.shape != value.shape or total.device != device:
                total = self.get(*key, value.shape, dtype, device)
            totals, values = groups.setdefault((dtype, device), ([], []))
            totals.append(total)
            values.append(value)
        with torch.no_grad():
            for totals, values in groups.values():
                torch._foreach_add_(totals, values)

    def _settle(self) -> None:
        """Add up all that waits."""
        self.flush()
        numbers, self._numbers = self._numbers, {}
        for (site, field), number in numbers.items():
            self.get(site, field).add_(number)

    def rotate(self) -> None:
        """Begin a new span."""
        self._settle()
        self._previous, self._current = self._current, {}

    def clear(self) -> None:
        """Forget everything."""
        self._current, self._previous = {}, {}
        self._numbers, self._waiting = {}, {}

    def forget(self, site: str) -> None:
        """Drop all sums of a site."""
        self._settle()
        for span in (self._current, self._previous):
            for key in [key for key in span if key[0] == site]:
                del span[key]

    def keys(self) -> list[Key]:
        """What there is, in the order in which it was first met."""
        self._settle()
        return list(dict.fromkeys([*self._previous, *self._current]))

    def totals(self) -> dict[Key, Tensor]:
        """Sums over both spans, on this rank."""
        return {key: self._total(key) for key in self.keys()}

    def _total(self, key: Key) -> Tensor:
        current, previous = self._current.get(key), self._previous.get(key)
        if current is None or previous is None:
            found = previous if current is None else current
            assert found is not None
            return found
        return current + _to(previous, current.device)

    def spans(self) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """Current and previous sums."""
        self._settle()
        return self._current, self._previous

    def load(self, current: dict[Key, Tensor], previous: dict[Key, Tensor]) -> None:
        """Take up saved sums; they go to a device with the first thing added to them."""
        self.clear()
        self._current = {key: value.clone() for key, value in current.items()}
        self._previous = {key: value.clone() for key, value in previous.items()}


def reduce_and_read(
    sums: dict[Any, Tensor],
    shapes: dict[Any, tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] | None,
) -> dict[Any, Tensor]:
    """All sums in one flat buffer: one reduction over the ranks, one copy to the host.

    Args:
        sums: tensors of this rank.
        shapes: what all ranks have agreed on, in the same order: shape and dtype by key.
        device: where to gather.
        reduce: adds a tensor up over the ranks; None on one device.
    """
    if not shapes:
        return {}
    if reduce is None and device.type == "cpu" and all(key in sums and sums[key].is_cpu for key in shapes):
        # what is on the host already needs no buffer, which takes several small kernels for each sum
        return {
            key: sums[key].clone() if dtype == torch.int64 else sums[key].to(torch.float64, copy=True)
            for key, (_, dtype) in shapes.items()
        }
    if device.type == "mps":
        device = torch.device("cpu")  # float32, the widest there, would not hold the counts
    sizes = {key: torch.Size(shape).numel() for key, (shape, _) in shapes.items()}
    pieces = {}
    for key, (shape, _) in shapes.items():
        found = sums.get(key)
        if found is None or found.shape != torch.Size(shape):
            found = torch.zeros(sizes[key], dtype=torch.float64)
        pieces[key] = (found.cpu() if device.type == "cpu" else found).double().reshape(-1)
    on_host = [key for key, piece in pieces.items() if piece.device.type == "cpu"]
    if on_host:  # one copy for all numbers
        together = torch.cat([pieces[key] for key in on_host]).to(device)
        pieces.update(zip(on_host, torch.split(together, [sizes[key] for key in on_host]), strict=True))
    flat = torch.cat([piece.to(device) for piece in pieces.values()])
    flat = (reduce(flat) if reduce is not None else flat).cpu()
    parts = torch.split(flat, list(sizes.values()))
    return {
        key: part.reshape(shape).round().long() if dtype == torch.int64 else part.reshape(shape)
        for part, (key, (shape, dtype)) in zip(parts, shapes.items(), strict=True)
    }


class Since(Mapping[Key, Tensor]):
    """Of sums those since earlier ones, each worked out when it is asked for: most never are.

    Example:
        >>> since = Since({("a", "n"): torch.tensor(5)}, {("a", "n"): torch.tensor(3)})
        >>> since["a", "n"], list(since)
        (tensor(2), [('a', 'n')])
    """

    def __init__(self, sums: Mapping[Key, Tensor], earlier: Mapping[Key, Tensor]) -> None:
        self._sums, self._earlier = sums, earlier

    def __getitem__(self, key: Key) -> Tensor:
        value, before = self._sums[key], self._earlier.get(key)
        return value if before is None or before.shape != value.shape else value - before.to(value.device)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def nested(sums: Mapping[Key, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sums by site and field, for a checkpoint."""
    found: dict[str, dict[str, Tensor]] = {}
    for (site, field), value in sums.items():
        found.setdefault(site, {})[field] = value.detach().cpu().clone()
    return found


def flat(nested: Mapping[str, Mapping[str, Tensor]]) -> dict[Key, Tensor]:
    """What :func:`nested` was given."""
    return {(site, field): value for site, fields in nested.items() for field, value in fields.items()}


def _on(dtype: torch.dtype, device: torch.device | None) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 and device is not None and device.type == "mps" else dtype


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, _on(tensor.dtype, device))
