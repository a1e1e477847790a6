"""The page: well-formed, self-contained, and names on it are text."""

from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

import lightning_ae as ae
from lightning_ae.diagnostics.report.markup import Markup, tag, text
from lightning_ae.diagnostics.report.record import Example, Examples, Line

VOID = {"meta", "img", "br", "hr", "col"}
#: All that the page is made of.
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "a", "header", "div", "p", "span", "h1", "h2", "h3", "dl",
    "dt", "dd", "nav", "ul", "li", "main", "section", "article", "details", "summary", "b", "code", "pre", "svg",
    "path", "rect", "table", "caption", "thead", "tbody", "tr", "th", "td", "i", "img", "small", "footer",
}  # fmt: skip


class Page(HTMLParser):
    """A strict reader: every tag closed in its order, and everything kept that could load or run."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.by_tag: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        assert len({key for key, _ in attributes}) == len(attributes), f"an attribute given twice in <{name}>"
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        raise AssertionError(f"<{name}/> is not HTML")

    def handle_endtag(self, name):
        assert self.open, f"stray </{name}>"
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)
        for name in self.open:
            self.by_tag.setdefault(name, []).append(data)

    def of(self, name):
        return [attributes for tag_name, attributes in self.tags if tag_name == name]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def check(page: Page) -> None:
    """What holds for every page."""
    assert {name for name, _ in page.tags} <= ALLOWED
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], f"a handler in <{name}>"
        assert "srcset" not in attributes
        for value in (attributes.get("src"), attributes.get("href") if name != "a" else None):
            assert value is None or value.startswith("data:image/png;base64,")
        if name == "a":
            target = attributes["href"]
            assert target.startswith("https://") or target.removeprefix("#") in ids
        if name == "img":
            assert attributes["alt"]
        if name == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes["aria-label"]
        if name == "th":
            assert attributes["scope"] in ("row", "col")
    style = "".join(page.by_tag["style"])
    assert "url(" not in style
    assert "@import" not in style
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_everything_a_report_can_hold_is_on_a_page_that_a_strict_parser_reads(full):
    page = Page(full.to_html())
    check(page)
    assert "".join(page.by_tag["h1"]) == full.verdict
    for finding in full.findings:
        for said in (finding.evidence, finding.advice, *finding.symptoms):
            assert said in page.text
    definition = " ".join(ae.diagnostics.causes.CAUSES[full.findings[0].cause].definition.split())
    assert definition in page.text
    assert "Multiply the learning rate by 0.1." in page.text
    assert full.findings[0].remedies[0].python() in page.text
    # the page says when findings were first seen, and marks it above the curve
    assert "first found at step 10" in page.text
    assert {a["href"] for a in page.of("a") if "bubble" in a.get("class", "")} >= {f"#finding-{n}" for n in (1, 2, 3)}


def test_names_and_errors_are_text_wherever_they_stand(hostile):
    html = hostile.to_html()
    page = Page(html)
    check(page)  # no tag, no attribute, and no address came from a name
    for name in ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "&lt;&amp;", "</style><b>"):
        assert name in page.text
        assert name in "".join(page.by_tag["th"])
    assert "\x1b" not in html
    assert "\x00" not in html
    html.encode("utf-8")  # no half of a surrogate pair


def test_a_browser_that_obeys_the_page_loads_and_runs_nothing(full):
    (policy,) = [m["content"] for m in Page(full.to_html()).of("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_an_empty_report_and_one_without_numbers_have_pages():
    empty = Page(ae.Report([]).to_html())
    check(empty)
    assert "Nothing was found to be wrong." in "".join(empty.by_tag["h1"])
    nothing = ae.Report([], {"a": {"n": 0}}, {"b": {"gradient norm": float("nan")}}, frequencies={"a": []})
    nothing.curves = {"loss": Line([0], [float("nan")]), "relative": Line([], [])}
    nothing.latent, nothing.latents = {"l0": float("nan")}, {"kl": []}
    check(Page(nothing.to_html()))


@pytest.mark.parametrize(
    "values", [[5.0], [0.0, 0.0], [-3.0, -3.0], [1e-300, 1e300], [float("-inf"), 1.0], [1e-9, 1.0]]
)
def test_curves_of_all_sizes_stay_inside_their_frame(values):
    report = ae.Report([], curves={"loss": Line(list(range(len(values))), values)})
    page = Page(report.to_html())
    check(page)
    drawn = [p["d"] for p in page.of("path") if p.get("class", "").startswith(("line c", "dot c"))]
    assert drawn
    for path in drawn:
        numbers = [float(v) for v in re.findall(r"-?\d+\.?\d*", path.replace("h.01", ""))]
        assert all(0 <= v <= 1000 for v in numbers)


def test_long_curves_are_thinned_out_and_their_range_is_kept():
    values = [1.0] * 5_000
    values[2_500] = 90.0
    report = ae.Report([], curves={"loss": Line(list(range(5_000)), values)})
    page = Page(report.to_html())
    (band,) = [p["d"] for p in page.of("path") if p.get("class", "").startswith("band")]
    assert len(report.to_html()) < 60_000
    heights = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", band)]
    assert max(heights) - min(heights) > 800  # the one step that stands out


def test_without_matplotlib_the_page_is_the_same(full, tmp_path, monkeypatch):
    full.save(tmp_path / "with")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    paths = full.save(tmp_path / "without")
    assert [path.name for path in paths] == ["diagnostics.json", "diagnostics.html", "diagnostics.md"]
    assert (tmp_path / "with/diagnostics.html").read_text() == (tmp_path / "without/diagnostics.html").read_text()
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        full.plot()


def test_curves_of_vectors_are_drawn_as_lines(full):
    rows = [Example(0, 0.1, [0.0, 0.5, 1.0], [0.0, float("nan"), 1.0], [0.0, 0.5, 0.0])]
    full.examples = Examples("training", 4, [3], 0.0, 1.0, rows, [])
    page = Page(full.to_html())
    check(page)
    assert "Solid: the input; dashed: the reconstruction." in page.text


def test_a_module_with_a_hostile_name_trains_and_is_reported(make_trainer, tmp_path):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential()
            self.net.add_module("flat", nn.Flatten())
            self.net.add_module("<img src=x onerror=alert(1)>", nn.Linear(64, 16))
            self.net.add_module("</script>", nn.ReLU())
            self.net.add_module("out", nn.Linear(16, 10))

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    model = Module()
    with torch.no_grad():
        model.net[1].bias[:12] = -100.0
    report = ae.DiagnosticsReport(every_n_steps=2, folder=tmp_path / "run", quiet=True)
    make_trainer(max_epochs=2, callbacks=report, limit_val_batches=1).fit(model, ae.DigitsDataModule())
    page = Page((tmp_path / "run/diagnostics.html").read_text())
    check(page)
    assert "net.</script>" in [f.site for f in report.findings]
    assert "net.<img src=x onerror=alert(1)>" in page.text
    assert ae.Report.load(tmp_path / "run") == report.report
    assert "<img" not in (tmp_path / "run/diagnostics.md").read_text()


def test_strings_are_escaped_once_and_markup_never():
    assert tag("p", "<&\"'", Markup("<br>"), title='"') == '<p title="&quot;">&lt;&amp;&quot;&#x27;<br></p>'
    assert text(text("<")) == "&lt;"
