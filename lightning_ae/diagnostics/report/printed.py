"""The report as text in any width, in colour where rich is installed, and as Markdown."""

from __future__ import annotations

import importlib.util
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.report.record import Record
from lightning_ae.diagnostics.report.words import COLUMNS, cell, columns, number

#: Columns of a terminal that says nothing, and what is the most that reads well.
WIDTH, WIDEST = 80, 110
_SMALLEST = 8
#: Columns below which rich's tables have no room for their own spaces.
_NARROW = 72
_LATER = "Findings rest on the later part of what was looked at, the tables on its last samples."
_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    legend: str = ""


def tables(record: Record) -> list[Table]:
    """All figures, as far as there are any."""
    found = []
    for title, what, rows in (("Activations", "site", record.sites), ("Layers", "layer", record.layers)):
        if rows:
            names = columns(rows)
            cells = [[site, *(cell(name, row.get(name)) for name in names)] for site, row in rows.items()]
            known = [COLUMNS[name] for name in names if name in COLUMNS and name not in ("units", "activation", "n")]
            header = [what, *(COLUMNS.get(name, (name, ""))[0] for name in names)]
            found.append(Table(title, header, cells, "; ".join(f"{short}: {long}" for short, long in known)))
    for title, figures in (("Latent", record.latent), ("Output", record.output)):
        if figures:
            found.append(Table(title, ["measure", "value"], [[name, number(v)] for name, v in figures.items()]))
    return found


def printable(text: str) -> str:
    r"""Without characters that move a terminal's cursor or change its colours.

    Example:
        >>> printable("a\x1b[31mb")
        'a�[31mb'
    """
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def as_text(record: Record, width: int = WIDTH) -> str:
    """Verdict, findings and tables, in lines of at most ``width`` characters."""
    lines = [*_wrapped(record.verdict, width)]
    lines += _wrapped(f"Ended early: {record.stopped}", width) if record.stopped else []
    for finding in record.findings:
        lines += ["", *_finding(finding, width)]
    if record.findings and record.sites:
        lines += ["", *_wrapped(_LATER, width)]
    for table in tables(record):
        lines += ["", table.title, *("  " + line for line in _grid(table, width - 2))]
        lines += _wrapped(table.legend, width, "  ")
    return printable("\n".join(lines))


def _wrapped(text: str, width: int, indent: str = "", first: str | None = None) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent if first is None else first, subsequent_indent=indent, break_on_hyphens=False
    )


def _finding(finding: Finding, width: int) -> list[str]:
    named = f" ({finding.cause})" if finding.cause else ""
    lines = _wrapped(f"[{finding.severity}] {finding.site}: {finding.evidence}{named}", width, "  ", "")
    lines += _wrapped(finding.advice, width, "    ", "  → ")
    for remedy in getattr(finding, "remedies", ()):
        lines += _wrapped(remedy.describe(), width, "    ", "  + ")
    for symptom in finding.symptoms:
        lines += _wrapped(f"seen as well: {symptom}", width, "      ", "    ")
    return lines


def _widths(table: Table, width: int) -> list[int]:
    """Of the columns; the first one gives way."""
    widths = [max(len(row[i]) for row in [table.header, *table.rows]) for i in range(len(table.header))]
    rest = width - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(_SMALLEST, rest))
    return widths


def _folded(name: str, width: int) -> list[str]:
    """A dotted name in parts of at most ``width`` characters, broken after a dot where there is one."""
    parts = [""]
    for piece in re.findall(r"[^.]*\.?", name):
        if len(parts[-1]) + len(piece) <= width:
            parts[-1] += piece
        elif len(piece) <= width:
            parts.append(piece)
        else:
            whole = parts.pop() + piece
            parts += [whole[start : start + width] for start in range(0, len(whole), width)]
    return parts


def _grid(table: Table, width: int) -> Iterator[str]:
    widths = _widths(table, width)
    numeric = [i > 0 and all(re.match(r"[-\d]|nan|inf|$", row[i]) for row in table.rows) for i in range(len(widths))]
    for row in [table.header, *table.rows]:
        name, *more = _folded(row[0], widths[0])
        cells = [name, *row[1:]]
        yield "  ".join(
            text.rjust(size) if right and len(widths) > 2 else text.ljust(size)
            for text, size, right in zip(cells, widths, numeric, strict=True)
        ).rstrip()
        yield from (part.rstrip() for part in more)


def print_report(record: Record) -> None:
    """Print in the width of the terminal, with rich if it is installed and there is room, else as plain text."""
    width = min(WIDEST, shutil.get_terminal_size((WIDTH, 24)).columns)
    if importlib.util.find_spec("rich") is None or width < _NARROW:
        print(as_text(record, width))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width, highlight=False)
    # names are text, never rich's markup
    console.print(Text(printable(record.verdict), style=_COLOURS.get(record.worst or "", "bold green")))
    if record.stopped:
        console.print(Text(printable(f"Ended early: {record.stopped}")))
    for finding in record.findings:
        said = Text("\n".join(["", *_finding(finding, width)]))
        said.highlight_regex(rf"^\[{finding.severity}\]", _COLOURS[finding.severity])
        said.highlight_regex(r"(?m)^ {4}seen as well:", "dim")
        console.print(Text(printable(said.plain), spans=said.spans))
    if record.findings and record.sites:
        console.print(Text("\n".join(["", *_wrapped(_LATER, width)]), style="dim"))
    for table in tables(record):
        console.print()
        console.print(_rich(table, width))
        if table.legend:
            console.print(Text(table.legend, style="dim"))


def _rich(table: Table, width: int) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    # a column costs two characters of padding and one beside it
    widths = _widths(table, width - len(table.header) - 3)
    for i, name in enumerate(table.header):
        right = i > 0 and name != "kind"
        drawn.add_column(Text(name), no_wrap=i > 0, justify="right" if right else "left", width=widths[i])
    for name, *rest in table.rows:
        drawn.add_row(Text(printable("\n".join(_folded(name, widths[0])))), *(Text(printable(text)) for text in rest))
    return drawn


def as_markdown(record: Record) -> str:
    """Verdict, findings and tables; names are text, never Markdown's links or HTML."""
    lines = ["# Diagnostics", "", _quoted(record.verdict), ""]
    lines += [_quoted(f"Ended early: {record.stopped}"), ""] if record.stopped else []
    if record.findings:
        lines += ["## Findings", "", "| severity | site | evidence and advice | n |", "|" + " --- |" * 4]
        for f in record.findings:
            said = [f.evidence, f.advice, *(f"Seen as well: {symptom}" for symptom in f.symptoms)]
            lines.append(_row([f.severity, f.site, " ".join(said), f"{f.n:,}"]))
        lines.append("")
    for table in tables(record):
        lines += [f"## {table.title}", "", _row(table.header), "|" + " --- |" * len(table.header)]
        lines += [_row(row) for row in table.rows] + [""]
        lines += [table.legend, ""] if table.legend else []
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_quoted(text) for text in cells)} |"


def _quoted(text: str) -> str:
    text = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return text.replace("](", "]\\(")
