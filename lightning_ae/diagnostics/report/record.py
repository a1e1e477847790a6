"""What a report holds, and its verdict in one sentence; how it looks is said elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.monitors.output import Moment

#: Worst first, with the plural.
SEVERITIES = {"error": "errors", "warning": "warnings", "info": "notes"}
_LONGEST = 160


class Line(NamedTuple):
    """Numbers by the optimizer step at which they were seen.

    Attributes:
        steps: optimizer steps, ascending.
        values: one for each.
    """

    steps: list[int]
    values: list[float]


class Example(NamedTuple):
    """An input beside its reconstruction.

    Attributes:
        number: which one of the batch.
        error: mean squared error over the numbers of the event.
        x: an image as a PNG in base64, or up to 256 numbers.
        x_hat: the reconstruction, in the same range.
        difference: absolute difference, bright where it is large; a PNG, or numbers.
    """

    number: int
    error: float
    x: str | list[float]
    x_hat: str | list[float]
    difference: str | list[float]


@dataclass
class Examples:
    """Some examples of the last batch looked at, and the worst of it.

    Attributes:
        stage: ``"validation"`` or ``"training"``.
        of: how many examples these were chosen from.
        shape: of an event.
        low: what black is, the smallest number that is drawn.
        high: what white is.
        first: examples as they come.
        worst: those of the largest error, the worst first.
    """

    stage: str
    of: int
    shape: list[int]
    low: float
    high: float
    first: list[Example]
    worst: list[Example]


@dataclass(eq=False)
class Record:
    """The attributes of :class:`lightning_ae.Report`."""

    findings: list[Finding]
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    latent: dict[str, float] = field(default_factory=dict)
    output: dict[str, float] = field(default_factory=dict)
    history: list[Moment] = field(default_factory=list)
    frequencies: dict[str, list[float]] = field(default_factory=dict)
    over_time: dict[int, dict[str, float]] = field(default_factory=dict)
    compared: dict[str, str] | None = None
    first_seen: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None
    curves: dict[str, Line] = field(default_factory=dict)
    dormancy: dict[str, list[float]] = field(default_factory=dict)
    latents: dict[str, list[float]] = field(default_factory=dict)
    examples: Examples | None = None
    about: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One sentence: how much was found, and the first of it.

        Example:
            >>> finding = Finding("error", "data", "rms", 51.0, 64, "The rms is 51. It hides much.", "", "input_scale")
            >>> Record([finding]).verdict
            '1 error: the rms is 51 (input_scale).'
        """
        if self.findings:
            said = self.counted
            serious = [f for f in self.findings if f.severity != "info"]
            if not serious:
                said = f"No error and no warning, {said}"
            first = self.findings[0]
            cause = f" ({first.cause})" if first.cause else ""
            return f"{said}: {_clause(first.evidence)}{cause}."
        if self.compared == {}:
            return (
                "Nothing was found to be wrong, but no loss was heard to compare a prediction with a target, so "
                "whether the model learns is not known. Use a loss of torch.nn.functional, or name the output."
            )
        return "Nothing was found to be wrong."

    @property
    def worst(self) -> str | None:
        """The severity of the first finding; None if there is none."""
        return self.findings[0].severity if self.findings else None

    @property
    def counted(self) -> str:
        """How many findings there are of each severity: ``"1 error, 2 warnings"``."""
        count: Counter[str] = Counter(finding.severity for finding in self.findings)
        return ", ".join(
            f"{count[one]} {one if count[one] == 1 and one != 'info' else 'note' if count[one] == 1 else many}"
            for one, many in SEVERITIES.items()
            if count[one]
        )

    def moments(self) -> list[tuple[int, int, Finding]]:
        """Number from 1, step and finding, of findings of which it is known when they were first seen."""
        return [
            (number, self.first_seen[finding.cause], finding)
            for number, finding in enumerate(self.findings, 1)
            if finding.cause in self.first_seen
        ]


def _clause(evidence: str) -> str:
    """The first sentence of evidence as part of another: no full stop, and a small letter where a word begins it."""
    sentence = re.split(r"(?<!\b[a-z]\.[a-z])\.(?=\s+[A-Z(]|\s*$)", evidence.strip(), maxsplit=1)[0]
    if len(sentence) > _LONGEST:
        sentence = sentence[: _LONGEST - 1].rsplit(" ", 1)[0] + " …"
    common = re.match(r"(A|An|The|All|In|Of|Half|No|One|Both|Each|Every)\b", sentence) is not None
    return sentence[:1].lower() + sentence[1:] if common else sentence
