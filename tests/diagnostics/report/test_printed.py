"""The report in a terminal."""

from __future__ import annotations

import importlib.util

import pytest

import lightning_ae as ae
from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.report import print_report
from lightning_ae.diagnostics.report.printed import as_text

from .conftest import everything

LONG = "backbone.stages.3.blocks.11." + "a_name_that_a_program_has_generated" * 3 + ".activation"


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("width", [60, 80, 100])
def test_fits_the_terminal_whatever_the_names_and_loses_no_letter_of_them(rich, width, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" and not rich else found(name))
    monkeypatch.setenv("COLUMNS", str(width))
    print_report(everything(LONG, "encoder.1"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out  # no heading and no figure is cut
    for heading in ("site", "kind", "units", "dead", "fires", "flat", "passes"):
        assert f" {heading} " in out
    assert LONG in "".join(out.split())  # in pieces, and whole
    assert "60,000" in out


@pytest.mark.parametrize("rich", [True, False])
def test_leads_with_the_verdict(rich, full, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" and not rich else found(name))
    print_report(full)
    assert " ".join(capsys.readouterr().out.split()).startswith(full.verdict)
    print_report(ae.Report([]))
    assert capsys.readouterr().out.strip() == "Nothing was found to be wrong."


@pytest.mark.parametrize("rich", [True, False])
def test_names_are_no_markup_and_move_no_cursor(rich, hostile, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" and not rich else found(name))
    print_report(hostile)
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "\x1b" not in out
    assert "\x00" not in out
    out.encode("utf-8")


def finding(severity, evidence, cause="dead_units"):
    return Finding(severity, "a", "m", 1.0, 5, evidence, "", cause)


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([finding("error", "The loss grew from 1.5 to 3.2e+07 at step 9. It is lost.")],
         "1 error: the loss grew from 1.5 to 3.2e+07 at step 9 (dead_units)."),
        ([finding("error", "KL < 0.01 nats."), finding("error", "b"), finding("warning", "c"), finding("info", "d")],
         "2 errors, 1 warning, 1 note: KL < 0.01 nats (dead_units)."),
        ([finding("info", "All 3 units."), finding("info", "b")],
         "No error and no warning, 2 notes: all 3 units (dead_units)."),
        ([finding("warning", "word " * 100, "")], "1 warning: " + "word " * 31 + "…."),
    ],
)  # fmt: skip
def test_the_verdict_is_one_sentence(findings, verdict):
    assert ae.Report(findings).verdict == verdict


def test_what_was_stopped_says_why():
    assert "Ended early: it cannot heal" in as_text(ae.Report([], stopped="it cannot heal"))
    assert "it cannot heal" in ae.Report([], stopped="it cannot heal").to_html()


def test_markdown_takes_names_as_text(hostile):
    text = hostile.to_markdown()
    assert "<" not in text.replace("&lt;", "")
    assert "](" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == rows[0].count("|") for line in rows[:3])
    text.encode("utf-8")
