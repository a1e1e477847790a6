"""The report as JSON: strict, and read back as it was."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest

import lightning_ae as ae
from lightning_ae.diagnostics.report.saved import VERSION


def strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawn elsewhere, and slowly."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))


@pytest.mark.parametrize("name", ["full", "hostile"])
def test_reads_back_what_was_written_and_writes_it_again_byte_by_byte(name, request, tmp_path):
    report = request.getfixturevalue(name)
    report.save(tmp_path)
    first = (tmp_path / "diagnostics.json").read_bytes()
    for path in (tmp_path, tmp_path / "diagnostics.json", str(tmp_path)):
        assert ae.Report.load(path) == report
    loaded = ae.Report.load(tmp_path)
    assert loaded.to_html() == report.to_html()
    assert str(loaded) == str(report)
    assert loaded.to_markdown() == report.to_markdown()
    loaded.save(tmp_path)
    assert (tmp_path / "diagnostics.json").read_bytes() == first


def test_is_strict_json_whose_numbers_that_are_not_finite_are_texts(full, tmp_path):
    full.save(tmp_path)
    tree = strict((tmp_path / "diagnostics.json").read_text())
    assert (tree["kind"], tree["version"], tree["verdict"]) == ("lightning_ae.diagnostics", 1, full.verdict)
    assert tree["findings"][0]["value"] == "NaN"
    assert tree["latent"]["kl"] == "Infinity"
    assert tree["findings"][0]["remedies"] == [
        {"describe": remedy.describe(), "python": remedy.python()} for remedy in full.findings[0].remedies
    ]


def test_types_come_back_too(full, tmp_path):
    full.save(tmp_path)
    loaded = ae.Report.load(tmp_path)
    assert math.isnan(loaded.findings[0].value)
    assert loaded.findings[1].value == math.inf
    assert loaded.findings[0].change == ("learning_rate", -1)
    assert loaded.findings[0].symptoms == full.findings[0].symptoms
    assert list(loaded.over_time) == list(range(0, 100, 5))
    assert loaded.history[3].step == 15
    assert loaded.curves["loss"].steps == full.curves["loss"].steps
    assert loaded.examples == full.examples
    remedy = loaded.findings[0].remedies[0]
    assert (remedy.describe(), remedy.python(), str(remedy)) == (
        "Multiply the learning rate by 0.1.",
        full.findings[0].remedies[0].python(),
        "Multiply the learning rate by 0.1.",
    )


def test_two_reports_are_equal_if_they_hold_the_same(full):
    other = ae.Report([])
    assert full != other
    assert ae.Report([]) == other
    assert other != "a report"
    assert ae.Report([], latent={"l0": math.nan}) == ae.Report([], latent={"l0": math.nan})
    assert ae.Report([], compared={}) != ae.Report([])  # nothing was heard, and nobody listened


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no report: not JSON"),
        ("{", "is no report: not JSON"),
        ("[1]", 'expected a JSON object with "kind"'),
        ('{"kind": "other"}', 'expected a JSON object with "kind"'),
        ('{"kind": "lightning_ae.diagnostics", "version": 99}', "of version 99.*up to 1: install a later one"),
        ('{"kind": "lightning_ae.diagnostics", "version": "x"}', "of version x"),
        ('{"kind": "lightning_ae.diagnostics", "version": 1}', "is no whole report: KeyError"),
        ('{"kind": "lightning_ae.diagnostics", "version": 1, "findings": [{}]}', "is no whole report: KeyError"),
        ('{"kind": "lightning_ae.diagnostics", "version": 1, "findings": [], "curves": 3}', "is no whole report"),
    ],
)
def test_what_is_no_report_is_said_to_be_none(text, message, tmp_path):
    assert VERSION == 1
    (tmp_path / "diagnostics.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ae.Report.load(tmp_path)


def test_a_path_without_a_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: expected diagnostics.json or the folder it is in"):
        ae.Report.load(tmp_path)


def test_fields_of_a_later_minor_release_are_passed_over(full, tmp_path):
    full.save(tmp_path)
    tree = json.loads((tmp_path / "diagnostics.json").read_text())
    tree["new"] = tree["findings"][0]["new"] = 1
    (tmp_path / "diagnostics.json").write_text(json.dumps(tree))
    assert ae.Report.load(tmp_path) == full
