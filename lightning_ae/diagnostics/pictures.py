"""The pictures of a report."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from lightning_ae.diagnostics.report import Report


def draw(report: Report, folder: Path) -> list[Path]:
    """Write those pictures for which there are figures; returns their paths."""
    pictures = {
        "firing_frequencies": _frequencies(report),
        "units": _units(report),
        "transmission": _transmission(report),
        "progress": _progress(report),
    }
    paths = []
    for name, figure in pictures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
    return paths


def _log(frequency: float) -> float:
    return math.log10(max(frequency, 1e-6))


def _frequencies(report: Report) -> Figure | None:
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
        axes.set_title(f"{site}: {dead} of {len(values)} dead", fontsize=9, color="tab:red" if dead else "black")
        axes.set_xlabel("log₁₀ firing frequency (−6: never)", fontsize=8)
        axes.set_ylabel("units", fontsize=8)
    return figure


def _units(report: Report) -> Figure | None:
    """A line of units for each site, dark where they fire often, red where they never do."""
    if not report.frequencies:
        return None
    widest = max(len(values) for values in report.frequencies.values())
    grid = [
        [(0.85, 0.1, 0.1) if v == 0 else (1 - v**0.5 * 0.9,) * 3 for v in values]
        + [(1.0, 1.0, 1.0)] * (widest - len(values))
        for values in report.frequencies.values()
    ]
    figure = Figure(figsize=(9, 1.0 + 0.35 * len(grid)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(grid)), list(report.frequencies), fontsize=8)
    axes.set_xlabel("unit", fontsize=8)
    axes.set_title("Firing frequency: white rarely, black always, red never", fontsize=9)
    return figure


def _transmission(report: Report) -> Figure | None:
    """Transmission of each site over the steps, by depth."""
    seen = [site for row in report.over_time.values() for site, value in row.items() if value > 0]
    if len(seen) == len(set(seen)):
        return None  # no line of two points
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for site in dict.fromkeys(site for row in report.over_time.values() for site in row):
        points = [(step, row[site]) for step, row in report.over_time.items() if site in row and row[site] > 0]
        axes.plot(*zip(*points, strict=True), marker=".", label=site) if points else None
    axes.set(xlabel="step", ylabel="transmission ‖∂L/∂z‖ / ‖∂L/∂y‖", yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _progress(report: Report) -> Figure | None:
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
