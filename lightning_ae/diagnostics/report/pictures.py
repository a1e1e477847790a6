"""The pictures of a report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_ae.diagnostics.report.printed import printable
from lightning_ae.diagnostics.report.record import Line, Record

_COLOURS = {"error": "tab:red", "warning": "tab:orange", "info": "tab:blue"}


def draw(report: Record, folder: Path) -> list[Path]:
    """Write those pictures for which there are figures; returns their paths."""
    paths = []
    for name, figure in figures(report).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def figures(report: Record) -> dict[str, Figure]:
    """Those pictures for which there are figures, by name."""
    found = {name: make(report) for name, make in _PICTURES.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def plot(report: Record, ax: Any = None) -> tuple[Any, Any]:
    """The loss on given axes; without any an overview on a figure of pyplot, as torchmetrics makes it."""
    if ax is not None:
        loss(report, ax)
        return ax.get_figure(), ax
    from matplotlib import pyplot

    parts: list[Callable[[Record, Any], None]] = [loss]
    parts += [_norms] if report.layers else []
    parts += [_map] if report.frequencies else []
    parts += [_latents] if report.latents else []
    rows = math.ceil(len(parts) / 2)
    figure, grid = pyplot.subplots(
        rows, min(2, len(parts)), figsize=(5.2 * min(2, len(parts)), 3.4 * rows), layout="constrained", squeeze=False
    )
    axes = list(grid.flat)
    for part, one in zip(parts, axes, strict=False):
        part(report, one)
    for one in axes[len(parts) :]:
        one.remove()
    figure.suptitle(
        "\n".join(textwrap.wrap(printable(report.verdict), 50 * len(grid[0]))), fontsize=10, parse_math=False
    )
    return figure, grid


def loss(report: Record, axes: Any) -> None:
    """The loss over the steps, with the moments of findings."""
    curves = {name: line for name, line in report.curves.items() if name != "relative"}
    if not curves and report.history:
        curves = {"loss": Line([m.step for m in report.history], [m.loss for m in report.history])}
    for style, (name, line) in zip(("-", "--", "-.", ":") * len(curves), curves.items(), strict=False):
        axes.plot(line.steps, line.values, style, label=_plain("training" if name == "loss" else name))
    for number, step, finding in report.moments():
        axes.axvline(step, color=_COLOURS[finding.severity], linestyle=":", linewidth=1.5)
        axes.annotate(f" {number}", (step, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
    axes.set(
        xlabel="optimizer step", ylabel="loss", yscale=_scale([v for line in curves.values() for v in line.values])
    )
    if curves:
        axes.legend(fontsize=8)


def _norms(report: Record, axes: Any) -> None:
    rows = [(name, row.get("gradient norm", 0.0)) for name, row in report.layers.items()]
    rows = [(name, value) for name, value in rows if value > 0 and math.isfinite(value)]
    axes.plot([value for _, value in rows], range(len(rows)), "o")
    axes.set_yticks(range(len(rows)), [_plain(name) for name, _ in rows], fontsize=8)
    axes.set(xlabel="gradient norm, the output at the top", xscale="log" if rows else "linear")


def _map(report: Record, axes: Any) -> None:
    _draw_units(report.frequencies, axes)


def _latents(report: Record, axes: Any) -> None:
    name = "kl" if "kl" in report.latents else "variance"
    values = report.latents[name]
    axes.bar(range(len(values)), values)
    axes.set(xlabel="latent", ylabel="KL divergence, nats" if name == "kl" else name)


def _plain(name: str) -> str:
    """Without what matplotlib would take for mathematics, or for a label to leave out."""
    return printable(name).replace("$", "\\$").lstrip("_") or name


def _log(frequency: float) -> float:
    return math.log10(max(frequency, 1e-6))


def _frequencies(report: Record) -> Figure | None:
    """A histogram for each site."""
    if not report.frequencies:
        return None
    columns = min(3, len(report.frequencies))
    lines = math.ceil(len(report.frequencies) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * lines), layout="constrained")
    for index, (site, values) in enumerate(report.frequencies.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.hist([_log(value) for value in values], bins=[-6 + i / 4 for i in range(25)], color="tab:blue")
        dead = sum(value == 0 for value in values)
        axes.set_title(
            f"{_plain(site)}: {dead} of {len(values)} dead", fontsize=9, color="tab:red" if dead else "black"
        )
        axes.set_xlabel("log₁₀ firing frequency (−6: never)", fontsize=8)
        axes.set_ylabel("units", fontsize=8)
    return figure


def _units(report: Record) -> Figure | None:
    """A line of units for each site, dark where they fire often, red where they never do."""
    if not report.frequencies:
        return None
    figure = Figure(figsize=(9, 1.0 + 0.35 * len(report.frequencies)), layout="constrained")
    _draw_units(report.frequencies, figure.add_subplot())
    return figure


def _draw_units(frequencies: dict[str, list[float]], axes: Any) -> None:
    widest = max(len(values) for values in frequencies.values())
    grid = [
        [(0.85, 0.1, 0.1) if v == 0 else (1 - v**0.5 * 0.9,) * 3 for v in values]
        + [(1.0, 1.0, 1.0)] * (widest - len(values))
        for values in frequencies.values()
    ]
    axes.imshow(grid, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(grid)), [_plain(name) for name in frequencies], fontsize=8)
    axes.set_xlabel("unit", fontsize=8)
    axes.set_title("Firing frequency: white rarely, black always, red never", fontsize=9)


def _transmission(report: Record) -> Figure | None:
    """Transmission of each site over the steps, by depth."""
    seen = [site for row in report.over_time.values() for site, value in row.items() if value > 0]
    if len(seen) == len(set(seen)):
        return None  # no line of two points
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for site in dict.fromkeys(site for row in report.over_time.values() for site in row):
        points = [(step, row[site]) for step, row in report.over_time.items() if site in row and row[site] > 0]
        axes.plot(*zip(*points, strict=True), marker=".", label=_plain(site)) if points else None
    axes.set(xlabel="step", ylabel="transmission ‖∂L/∂z‖ / ‖∂L/∂y‖", yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _progress(report: Record) -> Figure | None:
    """Loss and fraction of variance unexplained."""
    if len(report.history) < 2:
        return None
    figure = Figure(figsize=(8, 3), layout="constrained")
    steps = [moment.step for moment in report.history]
    left, right = figure.subplots(1, 2)
    losses, unexplained = ([getattr(moment, name) for moment in report.history] for name in ("loss", "fvu"))
    left.plot(steps, losses, color="tab:blue")
    left.set(xlabel="step", ylabel="loss", yscale=_scale(losses))
    right.plot(steps, unexplained, color="tab:orange")
    right.set(xlabel="step", ylabel="fraction of variance unexplained", yscale=_scale(unexplained))
    if _scale(unexplained) == "linear":
        right.set_ylim(0, None)
    return figure


def _scale(values: list[float]) -> str:
    """Logarithmic where they span more than two orders of magnitude."""
    finite = [value for value in values if math.isfinite(value)]
    return "log" if finite and min(finite) > 0 and max(finite) > 100 * min(finite) else "linear"


_PICTURES: dict[str, Callable[[Record], Figure | None]] = {
    "firing_frequencies": _frequencies,
    "units": _units,
    "transmission": _transmission,
    "progress": _progress,
}
