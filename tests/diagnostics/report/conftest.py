"""Reports that hold everything a report can hold."""

from __future__ import annotations

import base64
import io
import math

import pytest
from PIL import Image

import lightning_ae as ae
from lightning_ae.diagnostics.causes import CAUSES, Finding
from lightning_ae.diagnostics.monitors.output import Moment
from lightning_ae.diagnostics.remedies import ScaleLearningRate
from lightning_ae.diagnostics.report.record import Example, Examples, Line

#: Names that a module, a logger or an error may bring.
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "</style><b>",
    "\"' onload='alert(3)",
    "&lt;&amp;",
    "[red]x[/red]",
    "a|b](javascript:alert(4))",
    "\x1b[31m\x00",
    "\ud800",
    "$x_{",
)


def png() -> str:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), 128).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def everything(*names: str) -> ae.Report:
    """Every field filled, with these names wherever a name can stand, and numbers that are not finite."""
    names = names or ("encoder.layers.1", "decoder.layers.1")
    first = names[0]
    findings = [
        Finding(severity, name, name, value, 2_000, f"Evidence of {name}. And more.", f"Advice on {name}.", cause,
                ("learning_rate", -1), (f"latent: {name} ({cause})",))
        for severity, value, cause, name in zip(
            ("error", "warning", "info"), (math.nan, math.inf, 1.0), CAUSES, names * 3, strict=False)
    ]  # fmt: skip
    findings[0] = findings[0]._replace(remedies=(ScaleLearningRate(0.1),))
    steps = list(range(0, 100, 5))
    picture = png()
    rows = [Example(n, 0.5 / (n + 1), picture, picture, picture) for n in range(3)]
    return ae.Report(
        findings,
        {n: {"activation": "relu", "units": 64, "dead": 2, "frequency": 0.3, "flat": 0.7, "transmission": 0.5,
             "n": 60_000} for n in names},
        {n: {"gradient norm": 10.0**-i, "update ratio": math.nan} for i, n in enumerate(names)},
        {"l0": 8.0, "kl": math.inf, **dict.fromkeys(names, 0.5)},
        {"loss": math.nan, "fvu": 0.2},
        [Moment(step, 1.0 / (step + 1), math.nan, 0.5) for step in steps],
        {n: [0.0, 0.5, 1.0] * 50 for n in names},
        {step: dict.fromkeys(names, 0.5) for step in steps},
        {first: "(8, 3) with (8, 3)"},
        {finding.cause: 10 * i for i, finding in enumerate(findings)},
        first,
        {"loss": Line(steps, [1e4 / (s + 1) if s < 90 else math.inf for s in steps]),
         "relative": Line(steps, [1.0] * 20),
         **{f"val/{n}": Line(steps, [2.0 - s / 100 for s in steps]) for n in names}},
        {f"{n} gelu": [0.0, 1.0, 2.0] for n in names},
        {"kl": [0.1, math.nan, 3.0], "variance": [1.0, 2.0, 3.0]},
        Examples("validation", 40, [1, 4, 4], 0.0, 1.0, rows, rows[:1]),
        {"model": first, "parameters": "12", "torch": "2"},
    )  # fmt: skip


@pytest.fixture
def full() -> ae.Report:
    return everything()


@pytest.fixture
def hostile() -> ae.Report:
    return everything(*HOSTILE)
