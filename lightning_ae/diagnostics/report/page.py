"""The report as one HTML file: it loads nothing and runs nothing, and shows all names and texts as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources

from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.report.figures import examples_part, gradients_part, latent_part, loss_part, units_part
from lightning_ae.diagnostics.report.markup import Markup, tag
from lightning_ae.diagnostics.report.printed import tables
from lightning_ae.diagnostics.report.record import Record
from lightning_ae.diagnostics.report.words import MEANINGS, definition, number, title

#: A browser that obeys it loads nothing from anywhere and runs no script, whatever stood in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WORDS = {"error": "error", "warning": "warning", "info": "note", "good": "no finding"}
#: Shapes that differ, for those who do not see colours.
_ICONS = {
    "error": ("M7.5 1.5h9l6 6v9l-6 6h-9l-6-6v-9z", "M8.2 8.2l7.6 7.6M15.8 8.2l-7.6 7.6"),
    "warning": ("M12 2L23 21.5H1z", "M12 9v6M12 18v.4"),
    "info": ("M12 1.5a10.5 10.5 0 1 0 .01 0z", "M12 11v6M12 7v.4"),
    "good": ("M12 1.5a10.5 10.5 0 1 0 .01 0z", "M7.2 12.4l3.3 3.3 6.4-7"),
}


def _style() -> str:
    return resources.files(__package__ or "").joinpath("page.css").read_text(encoding="utf-8")


def as_html(record: Record) -> str:
    """The page of a report.

    Example:
        >>> as_html(Record([]))[:15]
        '<!doctype html>'
    """
    model = record.about.get("model", "a model")
    sections = [
        (key, name, made)
        for key, name, make in _PARTS
        if (made := make(record)) is not None
    ]  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Diagnostics of {model}"),
        tag("style", Markup(_style())),
    )
    links = tag("ul", [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in sections])
    body = tag(
        "body",
        tag("a", "To the findings", href="#findings", class_="skip"),
        _top(record, model),
        tag("nav", links, aria_label="Contents") if len(sections) > 1 else None,
        tag("main", [tag("section", tag("h2", name), made, id=key) for key, name, made in sections]),
        _footer(record),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _top(record: Record, model: str) -> Markup:
    worst = record.worst if record.worst in ("error", "warning") else "good"
    eyebrow = tag("p", "Diagnostics of ", tag("span", model, class_="site"), class_="eyebrow")
    facts = [(k, v) for k, v in record.about.items() if k not in ("model", "torch", "lightning")]
    facts_list = (
        tag("dl", [tag("div", tag("dt", k), tag("dd", v)) for k, v in facts], class_="facts") if facts else None
    )
    verdict = tag("div", _icon(worst), tag("h1", record.verdict), class_="verdict")
    ended = tag("p", tag("b", "The run was ended early. "), record.stopped, class_="ended") if record.stopped else None
    return tag("header", tag("div", eyebrow, verdict, ended, facts_list), class_=f"top {worst}")


def _icon(severity: str) -> Markup:
    outline, sign = _ICONS[severity]
    shape = tag("path", d=outline, style="fill:var(--tone)")
    inner = tag("path", d=sign, style="stroke:var(--card);stroke-width:2.4;stroke-linecap:round;vector-effect:none")
    return tag("svg", shape, inner, viewBox="0 0 24 24", aria_hidden="true")


def _findings(record: Record) -> Markup:
    if not record.findings:
        return tag("p", "What is measured is below, for you to look at.", class_="lead")
    lead = (
        "The worst first, and of those equally bad in the order in which a batch meets them, from data to validation. "
    )
    return Markup(
        tag("p", lead, "What follows from a cause is listed under it.", class_="lead")
        + "".join(_finding(n, finding, record) for n, finding in enumerate(record.findings, 1))
    )


def _finding(n: int, finding: Finding, record: Record) -> Markup:
    badge = tag("span", _icon(finding.severity), _WORDS[finding.severity], class_="badge")
    where = ["in ", tag("span", finding.site, class_="site")]
    if finding.cause in record.first_seen:
        where.append(f", first found at step {record.first_seen[finding.cause]:,}")
    header = tag(
        "header",
        badge,
        tag("h3", f"{n}. {title(finding.cause or finding.measure)}"),
        tag("span", where, class_="where"),
    )
    on = f" ({finding.n:,} examples)" if finding.n else ""
    parts = [
        header,
        tag("p", finding.evidence, tag("span", on, class_="where") if on else None, class_="evidence"),
        tag("p", tag("b", "What to do first"), finding.advice, class_="do"),
    ]
    remedies = getattr(finding, "remedies", ())
    # what cannot be applied is a comment as code
    code = [(remedy.describe(), remedy.python()) for remedy in remedies]
    made = [tag("li", said, tag("pre", tag("code", how))) for said, how in code if not how.startswith("#")]
    if made:
        parts += [tag("p", "Changes that can be applied for you", class_="part"), tag("ul", made, class_="seen")]
    parts += [tag("p", said, class_="hand") for said, how in code if how.startswith("#")]
    if finding.symptoms:
        parts.append(tag("p", "What follows from it, and was seen as well", class_="part"))
        parts.append(tag("ul", [tag("li", symptom) for symptom in finding.symptoms], class_="seen"))
    parts.append(_about_cause(finding))
    return tag("article", parts, class_=f"card finding {finding.severity}", id=f"finding-{n}")


def _about_cause(finding: Finding) -> Markup:
    said, source = definition(finding.cause)
    inner = [tag("p", " ".join(paragraph.split())) for paragraph in said.split("\n\n") if paragraph]
    inner.append(
        tag("p", "Measured: ", tag("code", finding.measure), f" = {number(float(finding.value))}",
            f" in {finding.n:,} examples." if finding.n else ".")
    )  # fmt: skip
    inner += [tag("p", "Source: ", _linked(source))] if source else []
    named = [tag("code", finding.cause)] if finding.cause else []
    return tag(
        "details",
        tag("summary", "The cause, and from which figure on: " if named else "The figure", named),
        tag("div", inner, class_="inner"),
    )


def _linked(source: str) -> list[str]:
    """Addresses as links; they are followed by a reader alone."""
    parts = re.split(r"(https://[\w./:%#?=&+~-]*[\w/])", source)
    return [tag("a", part, href=part, rel="noreferrer") if i % 2 else part for i, part in enumerate(parts)]


def _tables(record: Record) -> Markup | None:
    found = tables(record)
    if not found:
        return None
    folded = []
    for i, table in enumerate(found):
        meaning = [MEANINGS.get(row[0]) for row in table.rows] if table.header == ["measure", "value"] else []
        header = [*table.header, *(["meaning"] if any(meaning) else [])]
        numeric = [k > 0 and name not in ("kind", "meaning") for k, name in enumerate(header)]
        head = [
            tag("th", name, scope="col", class_="number" if right else None)
            for name, right in zip(header, numeric, strict=True)
        ]
        rows = []
        for j, row in enumerate(table.rows):
            cells = [*row[1:], *([meaning[j] or ""] if any(meaning) else [])]
            rows.append(
                tag("tr", tag("th", row[0], scope="row"), [
                    tag("td", cell, class_="number" if right else None)
                    for cell, right in zip(cells, numeric[1:], strict=True)
                ])
            )  # fmt: skip
        drawn = tag(
            "table",
            tag("caption", table.legend) if table.legend else None,
            tag("thead", tag("tr", head)),
            tag("tbody", rows),
        )
        summary = tag("summary", f"{table.title} ", tag("span", f"{len(table.rows)} rows", class_="where"))
        folded.append(tag("details", summary, tag("div", drawn, class_="scroll"), id=f"table-{i}"))
    return tag("div", folded, class_="card")


def _footer(record: Record) -> Markup:
    made = [f"{name} {record.about[name]}" for name in ("torch", "lightning") if name in record.about]
    return tag(
        "footer",
        tag("p", "Written by lightning_ae", f" with {', '.join(made)}" if made else "", ". The same as data: ",
            tag("code", 'lightning_ae.Report.load("diagnostics.json")'), "."),
    )  # fmt: skip


_PARTS: tuple[tuple[str, str, Callable[[Record], Markup | None]], ...] = (
    ("findings", "Findings", _findings),
    ("loss", "Loss over the steps", loss_part),
    ("gradients", "The gradient on its way from output to input", gradients_part),
    ("units", "Units", units_part),
    ("latent", "Latent", latent_part),
    ("examples", "Inputs and reconstructions", examples_part),
    ("tables", "All figures", _tables),
)
