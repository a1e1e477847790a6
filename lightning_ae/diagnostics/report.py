"""What the monitors found, as data, as a table and as a page with pictures."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from lightning_ae.diagnostics.causes import Evidence, Finding, find
from lightning_ae.diagnostics.monitors.output import Moment


@dataclass
class Report:
    """Findings, and the figures behind them; it prints as a table.

    Attributes:
        findings: what is wrong, the worst first.
        sites: figures of each activation, by name: number of units and of dead ones, median firing ``frequency``, share
            of elements that are ``flat``, ``transmission``, and ``n``, the examples looked at (again in each epoch).
        layers: gradient norm and update-to-weight ratio for each layer, by name.
        latent: the summary of :class:`LatentSparsityMonitor`.
        output: ``loss``; ``fvu`` and ``spread``, see there; ``contrast``, how much the mean output varies over an event
            relative to the data's mean; ``outside``, share of the data that the output cannot reach; and the like.
        history: loss and fraction of variance unexplained over the fit.
        frequencies: firing frequency of each unit, by site.
        over_time: transmission of each site, by step.
        compared: what the losses were heard to compare, by the name of the loss; None if nobody listened.

    Example:
        >>> print(Report(findings=[], latent={"l0": 4.0}))
        Nothing was found to be wrong.
        <BLANKLINE>
        Latent
          measure  value
          l0       4
    """

    findings: list[Finding]
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    latent: dict[str, float] = field(default_factory=dict)
    output: dict[str, float] = field(default_factory=dict)
    history: list[Moment] = field(default_factory=list)
    frequencies: dict[str, list[float]] = field(default_factory=dict)
    over_time: dict[int, dict[str, float]] = field(default_factory=dict)
    compared: dict[str, str] | None = None

    @property
    def verdict(self) -> str:
        """What to say if there are no findings."""
        if self.compared == {}:
            return (
                "Nothing was found to be wrong, but no loss was heard to compare a prediction with a target, so "
                "whether the model learns is not known. Use a loss of torch.nn.functional, or name the output."
            )
        return "Nothing was found to be wrong."

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each table."""
        found = [
            [
                f.severity,
                f.site,
                " ".join([f.evidence, f.advice, *(f"Seen as well: {s}" for s in f.symptoms)]),
                f"{f.n:,}",
            ]
            for f in self.findings
        ]
        tables = [("Findings", ["severity", "site", "evidence and advice", "n"], found)] if found else []
        for title, rows in (("Activations", self.sites), ("Layers", self.layers)):
            if rows:
                header = list(dict.fromkeys(name for row in rows.values() for name in row))
                cells = [[name, *(_number(row.get(column, "")) for column in header)] for name, row in rows.items()]
                tables.append((title, ["site" if title == "Activations" else "layer", *header], cells))
        for title, figures in (("Latent", self.latent), ("Output", self.output)):
            if figures:
                tables.append((title, ["measure", "value"], [[k, _number(v)] for k, v in figures.items()]))
        return tables

    def to_markdown(self) -> str:
        """The tables as a page."""
        lines = ["# Diagnostics", ""]
        if not self.findings:
            lines += [self.verdict, ""]
        for title, header, rows in self.tables():
            lines += [f"## {title}", "", f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
            lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows] + [""]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [] if self.findings else [self.verdict]
        lines += [str(finding) for finding in self.findings]
        if self.findings and self.sites:
            lines += ["", "Findings are on the later part of what was looked at; the tables on its last samples."]
        for title, header, rows in self.tables():
            if title == "Findings":
                continue
            widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
            lines += ["", title]
            lines += [
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in [header, *rows]
            ]
        return "\n".join(lines)


#: Figures of the output that causes read and that tell a person nothing.
_INNER = {
    "beyond",
    "far",
    "binary",
    "below_zero",
    "above_one",
    "one_in_a_row",
    "several_in_a_row",
    "columns",
    "x_variance",
}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def make_report(evidence: Evidence) -> Report:
    """Read the monitors."""
    dead, saturation = evidence.whole_dead, evidence.whole_saturation
    samples, frequencies, units = dead.num_samples(), dead.firing_frequency(), dead.dead_units()
    saturated, transmission = saturation.saturated_fraction(), saturation.transmission()
    sites: dict[str, dict[str, Any]] = {}
    for name, info in dead.sites.items():
        if name in samples:
            row: dict[str, Any] = {"activation": info.activation, "units": info.units}
            if name in units:
                row |= {"dead": len(units[name]), "frequency": float(frequencies[name].median())}
            if name in saturated:
                row["flat"] = saturated[name]
            if name in transmission:
                row["transmission"] = transmission[name]
            sites[name] = row | {"n": samples[name]}
    norms, updates = saturation.gradient_norm(), saturation.update_ratio()
    layers = {name: {"gradient norm": norms[name], "update ratio": updates.get(name, float("nan"))} for name in norms}
    output = {name: value for name, value in evidence.output.figures().items() if name not in _INNER}
    if saturation.output_ratio() == saturation.output_ratio():
        output |= {"output_ratio": saturation.output_ratio(), "starved_fraction": saturation.starved_fraction()}
    return Report(
        find(evidence),
        sites,
        layers,
        {} if evidence.whole_latent is None else evidence.whole_latent.summary(),
        output,
        list(evidence.output.history),
        {site: values.tolist() for site, values in frequencies.items()},
        compared={
            name: f"{tuple(pair.prediction_shape)} with {tuple(pair.target_shape)}"
            for name, pair in evidence.pairs.items()
        },
    )


def print_report(report: Report) -> None:
    """Print with rich if it is installed, else as plain text."""
    if importlib.util.find_spec("rich") is None:
        print(report)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not report.findings:
        console.print(f"Diagnostics: {report.verdict}")
    colours = {"error": "bold red", "warning": "yellow", "info": "cyan"}
    for title, header, rows in report.tables():
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row, style=colours.get(row[0]) if title == "Findings" else None)
        console.print(table)
