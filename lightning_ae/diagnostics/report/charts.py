"""Charts of the page: curves, dots on a logarithmic scale, bars, maps of units, each with its words.

A chart is an SVG that is stretched to the width there is, with labels in HTML around it, so that letters have one size
on a telephone and on a wall.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from lightning_ae.diagnostics.report.markup import Markup, tag
from lightning_ae.diagnostics.report.record import Line
from lightning_ae.diagnostics.report.words import number

#: Points of a curve that are drawn one by one; of more the mean and the range of each stretch.
_POINTS = 240
_COLUMNS = 64
#: Marks nearer than this share of the axis stand beside each other.
_NEAR = 0.07


class Scale(NamedTuple):
    """From numbers to shares of the axis.

    Attributes:
        low: at 0.
        high: at 1.
        log: whether in between lies the geometric mean.
    """

    low: float
    high: float
    log: bool

    def __call__(self, value: float) -> float:
        """The share of the axis at which a number lies, in [0, 1]."""
        if self.log:
            a, b, v = math.log(self.low), math.log(self.high), math.log(max(value, self.low * 1e-9))
        else:
            a, b, v = self.low, self.high, value
        return min(1.0, max(0.0, (v - a) / (b - a)))

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers in it."""
        if not self.log:
            step = _round_step((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        low, high = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(1, math.ceil((high - low + 1) / most))
        found = [10.0**i for i in range(low, high + 1) if (i - low) % every == 0]
        if len(found) < 3:
            found = sorted(
                {v for i in range(low - 1, high + 1) for m in (1, 2, 5) if self.low <= (v := m * 10.0**i) <= self.high}
            )
        return found


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def scale_of(values: Iterable[float], from_zero: bool = False) -> Scale | None:
    """Logarithmic where numbers span more than two orders of magnitude; None if none is finite."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if low > 0 and high > 100 * low:
        return Scale(low / 1.3, high * 1.3, True)
    low = min(0.0, low) if from_zero or 0 <= low < 0.5 * high else low
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return Scale(low if low == 0 else low - margin, high + margin, False)


def tick(value: float) -> str:
    """A number beside an axis.

    Example:
        >>> tick(0.0001), tick(25000.0), tick(0.30000000000000004)
        ('1e-4', '25k', '0.3')
    """
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value / 1000:.4g}k" if size >= 10_000 else f"{value:.3g}" if size < 100 else f"{value:.4g}"


def curves(
    lines: Mapping[str, Line],
    alt: str,
    marks: Sequence[tuple[int, int, str]] = (),
    level: tuple[float, str] | None = None,
) -> Markup | None:
    """Lines over the steps.

    Args:
        lines: by the words of the legend.
        alt: what the chart shows, for those who do not see it.
        marks: number, step and severity of moments.
        level: a value with its words, drawn as a line across.
    """
    lines = {name: line for name, line in lines.items() if any(math.isfinite(v) for v in line.values)}
    y = scale_of([v for line in lines.values() for v in line.values] + ([level[0]] if level else []), level is not None)
    if y is None:
        return None
    steps = [step for line in lines.values() for step in line.steps] + [step for _, step, _ in marks]
    x = Scale(min(steps), max(max(steps), min(steps) + 1), False)
    drawn = [_rule(0, 1000 * 0 + 1000 * (1 - y(v)), 1000, 1000 * (1 - y(v)), "grid") for v in y.ticks()]
    drawn += [
        _rule(1000 * x(step), 0, 1000 * x(step), 1000, f"mark {severity}") for _, step, severity in reversed(marks)
    ]
    if level is not None:
        drawn.append(_rule(0, 1000 * (1 - y(level[0])), 1000, 1000 * (1 - y(level[0])), "level"))
    for i, line in enumerate(lines.values()):
        drawn += _curve(line, x, y, i)
    plot = tag("svg", *drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none", role="img", aria_label=alt)
    labels = [tag("span", tick(v), class_="y", style=f"top:{100 * (1 - y(v)):.2f}%") for v in y.ticks()]
    whole = [v for v in x.ticks(4) if v == int(v)]
    labels += [tag("span", tick(v), class_="x", style=f"left:{100 * x(v):.2f}%") for v in whole]
    bubbles = [_bubbles(group) for group in _grouped([(x(step), n, step, severity) for n, step, severity in marks])]
    return tag("div", _legend(lines, level), tag("div", plot, labels, bubbles, class_="plot"), class_="chart")


def _grouped(marks: list[tuple[float, int, int, str]]) -> list[list[tuple[float, int, int, str]]]:
    groups: list[list[tuple[float, int, int, str]]] = []
    for mark in sorted(marks):
        if groups and mark[0] - groups[-1][0][0] < _NEAR:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups


def _bubbles(group: list[tuple[float, int, int, str]]) -> Markup:
    """Numbers above the lines, as links to the findings; of a group near the right edge they end there."""
    links = [
        tag("a", str(n), href=f"#finding-{n}", class_=f"bubble {severity}", aria_label=f"finding {n}, step {step}")
        for _, n, step, severity in group
    ]
    share = group[0][0]
    return tag("span", links, class_="bubbles end" if share > 0.85 else "bubbles", style=f"left:{100 * share:.2f}%")


def _legend(lines: Mapping[str, Line], level: tuple[float, str] | None) -> Markup:
    def sample(kind: str) -> Markup:
        return tag("svg", _rule(0, 5, 28, 5, kind), viewBox="0 0 28 10", class_="sample", aria_hidden="true")

    items = [tag("li", sample(f"line c{i % 6}"), name) for i, name in enumerate(lines)]
    items += [tag("li", sample("level"), level[1])] if level else []
    return tag("ul", items, tag("li", "over optimizer steps", class_="axis"), class_="legend")


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=kind)


def _curve(line: Line, x: Scale, y: Scale, number: int) -> list[Markup]:
    points = [(1000 * x(s), v) for s, v in zip(line.steps, line.values, strict=True)]
    size = math.ceil(len(points) / _POINTS)
    kind, drawn = f"c{number % 6}", []
    if size > 1:
        stretches = [points[i : i + size] for i in range(0, len(points), size)]
        ranges = [(p[0][0], [v for _, v in p if math.isfinite(v)]) for p in stretches]
        edge = [(at, 1000 * (1 - y(max(v)))) for at, v in ranges if v]
        edge += [(at, 1000 * (1 - y(min(v)))) for at, v in reversed(ranges) if v]
        drawn.append(tag("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in edge) + "Z", class_=f"band {kind}"))
        points = [(at, sum(v) / len(v) if v else math.nan) for at, v in ranges]
    parts, begun = [], False
    for at, value in points:
        begun = begun and math.isfinite(value)
        if math.isfinite(value):
            parts.append(f"{'L' if begun else 'M'}{at:.1f} {1000 * (1 - y(value)):.1f}")
            begun = True
    drawn.append(tag("path", d="".join(parts), class_=f"line {kind}"))
    if len(points) <= 40:
        dots = "".join(f"M{at:.1f} {1000 * (1 - y(v)):.1f}h.01" for at, v in points if math.isfinite(v))
        drawn.append(tag("path", d=dots, class_=f"dot {kind}"))
    return drawn


def dots(caption: str, what: str, values: Mapping[str, float], marked: Mapping[str, int]) -> Markup:
    """A table of numbers, each with a dot on a common logarithmic scale.

    Args:
        caption: what the table is.
        what: what a row is.
        values: by row, in order.
        marked: number of the finding that names a row.
    """
    positive = [v for v in values.values() if v > 0 and math.isfinite(v)] or [1.0]
    scale = Scale(min(positive) / 1.5, max(positive) * 1.5, True)
    rows = []
    for name, value in values.items():
        shown = math.isfinite(value) and value > 0
        place = f"--at:{100 * scale(value):.2f}%" if shown else None
        dot = tag("i", class_="dot" if shown else "none", style=place)
        badge = (
            tag("a", str(marked[name]), href=f"#finding-{marked[name]}", class_="bubble") if name in marked else None
        )
        cells = tag("td", tag("span", dot, class_="track"), class_="draw", aria_hidden="true")
        rows.append(tag("tr", tag("th", name, badge, scope="row"), cells, tag("td", f"{value:.3g}", class_="number")))
    ends = tag("span", tag("span", tick(scale.low)), tag("span", tick(scale.high)), class_="ends")
    head = tag(
        "tr",
        tag("th", what, scope="col"),
        tag("td", ends, class_="draw", aria_hidden="true"),
        tag("th", "value", scope="col", class_="number"),
    )
    return tag("table", tag("caption", caption), tag("thead", head), tag("tbody", rows), class_="dots")


def bars(values: Sequence[float], alt: str, most: int = 256) -> Markup | None:
    """A bar for each latent; of more than ``most`` those in order of size, thinned out."""
    finite = [v if math.isfinite(v) else 0.0 for v in values]
    if not finite:
        return None
    if len(finite) > most:
        finite = sorted(finite, reverse=True)
        finite = [finite[i * len(finite) // most] for i in range(most)]
    high = max(finite) or 1.0
    width = 1000 / len(finite)
    gap = min(0.25 * width, 4)
    shapes = [
        tag("rect", x=f"{i * width + gap / 2:.2f}", y=f"{100 - 100 * v / high:.2f}", width=f"{width - gap:.2f}",
            height=f"{max(100 * v / high, 0.8):.2f}")
        for i, v in enumerate(finite)
    ]  # fmt: skip
    plot = tag("svg", shapes, viewBox="0 0 1000 100", preserveAspectRatio="none", role="img", aria_label=alt)
    labels = tag("span", tick(high), class_="y", style="top:0%"), tag("span", "0", class_="y", style="top:100%")
    return tag("div", plot, labels, class_="plot bars")


def units(values: Sequence[float], zero: bool, columns: int, alt: str) -> Markup:
    """A square for each unit, the darker the more it does; with ``zero`` units at exactly 0 are red.

    Args:
        values: one for each unit, 1 being full.
        zero: whether 0 is a dead unit.
        columns: squares of a row.
        alt: in words.
    """
    columns = max(1, min(columns, _COLUMNS))
    rows = math.ceil(len(values) / columns)
    dead, pixels = bytes((205, 45, 45, 255)), bytearray()
    for value in values:
        full = 0.0 if not math.isfinite(value) else min(1.0, max(0.0, value)) ** 0.5
        pixels += dead if zero and value == 0 else bytes((58, 110, 185, round(25 + 230 * full)))
    picture = Image.frombytes("RGBA", (columns, rows), bytes(pixels.ljust(4 * columns * rows, b"\0")))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return image(data, alt, class_="units", style=f"--columns:{columns};--rows:{rows}")


def image(data: str, alt: str, **attributes: str) -> Markup:
    """A PNG in base64."""
    return tag("img", src=f"data:image/png;base64,{data}", alt=alt, **attributes)


def columns_of(counts: Iterable[int]) -> int:
    """Squares of a row in all maps of a page: as many as the widest site has units, within reason."""
    return max(16, min(_COLUMNS, max(counts, default=16)))


def small_curves(x: Sequence[float], x_hat: Sequence[float], low: float, high: float, alt: str) -> Markup:
    """An input as a line and its reconstruction as a dashed one."""
    scale = Scale(low, high, False)

    def path(values: Sequence[float], kind: str) -> Markup:
        last = max(1, len(values) - 1)
        points = [f"{1000 * i / last:.0f} {100 * (1 - scale(v)):.1f}" for i, v in enumerate(values) if math.isfinite(v)]
        return tag("path", d="M" + "L".join(points) if points else "M0 0", class_=f"line {kind}")

    return tag("svg", path(x, "c0"), path(x_hat, "c1"), viewBox="0 0 1000 100", preserveAspectRatio="none", role="img",
               aria_label=alt, class_="small")  # fmt: skip


def figure_tile(value: float, name: str, meaning: str) -> Markup:
    """A number with its name."""
    return tag("div", tag("dt", name, tag("small", meaning)), tag("dd", number(value)))
