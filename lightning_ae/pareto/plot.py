"""The picture of a front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Front(Protocol):
    """What a picture shows of a front: see :class:`ParetoFront`."""

    @property
    def alphas(self) -> Tensor:
        """``(n,)``, which colour the points."""

    @property
    def objectives(self) -> Tensor:
        """``(n, 2)``, where the points are."""

    def __len__(self) -> int: ...

    def non_dominated(self) -> Tensor:
        """Which points are full, ``(n,)`` of bool."""

    def knee(self) -> int:
        """Index of the point in the ring."""

    def hypervolume(self, reference: Sequence[float]) -> float:
        """The area that is shaded."""


def plot(front: Front, target: Any, reference: Sequence[float] | None) -> Any:
    """Draw a front on axes, or into a file: see :meth:`ParetoFront.plot`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('ParetoFront.plot needs matplotlib: pip install "lightning-ae[recipes]"') from error
    if not isinstance(target, (str, Path)):
        _draw(front, target, reference)
        return target
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    _draw(front, axes, reference)
    figure.savefig(target, dpi=150)
    return axes


def _draw(front: Front, axes: Any, reference: Sequence[float] | None) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    kept = front.non_dominated().tolist()
    x, y = front.objectives.T.tolist()
    stairs = sorted((a, b) for a, b, on_front in zip(x, y, kept, strict=True) if on_front)
    if stairs:
        axes.step(*zip(*stairs, strict=True), where="post", color="0.6", lw=1, zorder=1)
    alphas = front.alphas.numpy()
    scale = ScalarMappable(Normalize(0, 1), "viridis")
    colours = scale.to_rgba(alphas)
    faces = [colour if full else (1, 1, 1, 1) for colour, full in zip(colours, kept, strict=True)]
    axes.scatter(x, y, facecolors=faces, edgecolors=colours, s=50, linewidths=1.5, zorder=2)
    axes.figure.colorbar(scale, ax=axes, label="α, the weight of the pixel loss")
    title = f"{sum(kept)} of {len(front)} points on the front"
    if stairs:
        knee = front.knee()
        ring = {"marker": "o", "s": 190, "facecolors": "none", "edgecolors": "crimson", "linewidths": 1.5}
        axes.scatter(x[knee], y[knee], **ring, label=f"knee, α = {alphas[knee]:g}", zorder=3)
        axes.legend(loc="upper right")
    if reference is not None:
        title += f", hypervolume {front.hypervolume(reference):.4g}"
        right, top = reference
        inside = [(a, b) for a, b in stairs if a < right and b < top]
        if inside:
            a, b = zip(*inside, (right, inside[-1][1]), strict=True)
            axes.fill_between(a, b, top, step="post", color="0.93", zorder=0)
    axes.set(xlabel="pixel loss per example", ylabel="perceptual loss per example", title=title)
