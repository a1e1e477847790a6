"""The parts of the page that are drawn."""

from __future__ import annotations

import math

from lightning_ae.diagnostics.report import charts
from lightning_ae.diagnostics.report.markup import Markup, tag
from lightning_ae.diagnostics.report.record import Example, Line, Record
from lightning_ae.diagnostics.report.words import MEANINGS, number

_NAMED = 12
#: Lines of one chart that can be told apart.
_LINES = 6


def _card(title: str, lead: str, *content: Markup | None) -> Markup:
    return tag("div", tag("h3", title), tag("p", lead, class_="lead"), content, class_="card")


def loss_part(record: Record) -> Markup | None:
    """Loss in training and validation, and what is left of the best constant's; moments of findings marked."""
    curves = dict(record.curves)
    if not curves and len(record.history) > 1:
        curves["loss"] = Line([m.step for m in record.history], [m.loss for m in record.history])
    relative = curves.pop("relative", None)
    shown = {("training" if name == "loss" else name): line for name, line in curves.items()}
    marks = [(n, step, finding.severity) for n, step, finding in record.moments()]
    last = {name: line.values[-1] for name, line in shown.items() if line.values}
    said = "; ".join(f"{name} ends at {number(float(value))}" for name, value in last.items())
    broken = [
        (name, line.steps[i]) for name, line in shown.items() for i, v in enumerate(line.values) if not math.isfinite(v)
    ]
    main = charts.curves(shown, f"Loss over the optimizer steps: {said}.", marks)
    note = tag("p", f"Not finite from step {broken[0][1]:,} on ({broken[0][0]}).", class_="lead") if broken else None
    if main is None:
        return note and tag("div", note, class_="card")
    lead = "Each step in training that was looked at, and what validation has logged."
    lead += " Numbered lines: where a finding was first found." if marks else ""
    parts = [_card("Loss", lead, main, note)]
    if relative is not None and len(relative.steps) > 1:
        left = charts.curves(
            {"error, relative": relative},
            f"Error over that of the best constant, {number(float(relative.values[-1]))} at the end.",
            marks,
            (1.0, "the best constant"),
        )
        if left is not None:
            parts.append(
                _card(
                    "What is left to learn",
                    "Error over that of the best constant: at 1 nothing is learnt of the input, at 0 all is.",
                    left,
                )
            )
    return tag("div", parts, class_="two" if len(parts) > 1 else None)


def gradients_part(record: Record) -> Markup | None:
    """Gradient norm by layer and transmission by activation, from output to input; transmission over time."""
    norms = {name: row["gradient norm"] for name, row in reversed(record.layers.items()) if "gradient norm" in row}
    passed = {name: row["transmission"] for name, row in reversed(record.sites.items()) if "transmission" in row}
    if not norms and not passed:
        return None
    marked: dict[str, int] = {}
    for n, finding in enumerate(record.findings, 1):
        marked.setdefault(finding.site, n)
    cards = []
    if norms:
        table = charts.dots("From the output, at the top, to the input; logarithmic scale.", "layer", norms, marked)
        cards.append(_card("Gradient norm of each layer", "Where dots move left from one layer to the next, the "
                           "gradient vanishes on its way; where they move right, it explodes.", table))  # fmt: skip
    if passed:
        table = charts.dots(
            "From the output, at the top, to the input; logarithmic scale.", "activation", passed, marked
        )
        cards.append(_card("What each activation lets through", "Norm of the gradient before the activation over that "
                           "after it. A ReLU with half of its units on passes about 0.7.", table))  # fmt: skip
    names = sorted(passed, key=lambda name: passed[name])[:_LINES]
    over_time = {
        name: Line([step for step, row in record.over_time.items() if name in row],
                   [row[name] for row in record.over_time.values() if name in row])
        for name in names
    }  # fmt: skip
    over_time = {name: line for name, line in over_time.items() if len(line.steps) > 1}
    chart = charts.curves(over_time, "Transmission of activations over the optimizer steps.") if over_time else None
    few = f" The {len(over_time)} lowest." if len(passed) > len(over_time) else ""
    later = _card("Over the steps", f"What activations let through.{few}", chart) if chart is not None else None
    return Markup(
        tag("div", cards, class_="two" if len(cards) > 1 else None)
        + (tag("div", later, style="margin-top:1.1rem") if later else "")
    )


def units_part(record: Record) -> Markup | None:
    """A map of the units of each activation."""
    sites = {name: values for name, values in {**record.frequencies, **record.dormancy}.items() if values}
    if not sites:
        return None
    columns = charts.columns_of(len(values) for values in sites.values())
    rows = []
    for site in [name for name in record.sites if name in sites] or list(sites):
        values, zero = sites[site], site in record.frequencies
        said = _said_of_units(values, zero)
        picture = charts.units(
            values, zero, min(columns, len(values)), f"Map of {len(values)} units of {site}: {said}."
        )
        rows.append(tag("tr", tag("th", site, scope="row"), tag("td", picture), tag("td", said)))
    head = tag("tr", [tag("th", name, scope="col") for name in ("activation", "units", "in words")])
    keys = [tag("span", tag("i", style=f"background:{colour}"), words, class_="key") for colour, words in (
        ("rgb(58,110,185)", "always on, or the most active"), ("rgba(58,110,185,.2)", "hardly ever"),
        ("rgb(205,45,45)", "never fired"))]  # fmt: skip
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="maps", style=f"--of:{columns}")
    lead = "A square for each unit (channel), line by line: how often it fires, or for activations without a hard zero "
    lead += "its mean size relative to the others'."
    return tag("div", tag("p", lead, class_="lead"), tag("p", keys, class_="lead"), table, class_="card")


def _said_of_units(values: list[float], zero: bool) -> str:
    if not zero:
        return f"{sum(v <= 0.025 for v in values)} of {len(values)} dormant"
    dead = [i for i, v in enumerate(values) if v == 0]
    if not dead or len(dead) == len(values):
        return f"{'all' if dead else 'none'} of {len(values)} dead"
    which = ", ".join(str(i) for i in dead[:_NAMED]) + (" …" if len(dead) > _NAMED else "")
    return f"{len(dead)} of {len(values)} dead: {which}"


def latent_part(record: Record) -> Markup | None:
    """The figures of the latent, and a bar for each."""
    if not record.latent:
        return None
    tiles = [
        charts.figure_tile(value, name.replace("_", " "), MEANINGS.get(name, ""))
        for name, value in record.latent.items()
        if name != "samples"
    ]
    name = next((name for name in ("kl", "variance", "frequency") if name in record.latents), None)
    bars = None
    if name is not None:
        what = {"kl": "KL divergence of each latent, in nats", "variance": "Variance of each latent over the data",
                "frequency": "How often each latent is on"}[name]  # fmt: skip
        values = record.latents[name]
        drawn = charts.bars(values, f"{what}: {len(values)} latents, at most {number(max(values, default=0.0))}.")
        order = ", the largest first" if len(values) > 256 else ", in their order"
        bars = Markup(tag("h3", f"{what}{order}", class_="sub") + (drawn or ""))
    return tag("div", tag("dl", tiles, class_="tiles"), bars, class_="card")


def examples_part(record: Record) -> Markup | None:
    """Inputs beside reconstructions: some, and the worst."""
    found = record.examples
    if found is None:
        return None
    pictures = bool(found.first) and isinstance(found.first[0].x, str)
    kind = "examples" if pictures else "examples wide"
    lists = [
        Markup(
            tag("h3", title, class_="sub") + tag("ul", [_example(e, found.low, found.high) for e in rows], class_=kind)
        )
        for title, rows in (("As they come", found.first), (f"The worst of {found.of}", found.worst))
        if rows
    ]
    how = "black" if pictures else "the lower edge"
    said = f"Of the last {found.stage} batch that was looked at; an event has shape {tuple(found.shape)}, {how} is "
    said += f"{number(found.low)} and {'white' if pictures else 'the upper edge'} {number(found.high)}."
    said += (
        " Differences are brighter where they are larger."
        if pictures
        else " Solid: the input; dashed: the reconstruction."
    )
    return tag("div", tag("p", said, class_="lead"), lists, class_="card")


def _example(example: Example, low: float, high: float) -> Markup:
    error = f"mean squared error {number(example.error)}"
    if isinstance(example.x, str) and isinstance(example.x_hat, str) and isinstance(example.difference, str):
        parts = [
            tag("div", charts.image(data, f"{what} of example {example.number}"), tag("span", what, aria_hidden="true"))
            for what, data in (
                ("input", example.x),
                ("reconstruction", example.x_hat),
                ("difference", example.difference),
            )
        ]
        drawn = tag("div", parts, class_="three")
    else:
        x, x_hat = [list(part) if not isinstance(part, str) else [] for part in (example.x, example.x_hat)]
        drawn = charts.small_curves(
            x, x_hat, low, high, f"Input and reconstruction of example {example.number}: {error}"
        )
    return tag("li", drawn, tag("p", f"No. {example.number}: {error}"))
