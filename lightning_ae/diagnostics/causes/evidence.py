"""What rules read, and what they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from lightning_ae.diagnostics.monitors.dead_relu import DeadReLUMonitor
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.monitors.latent_sparsity import LatentSparsityMonitor
from lightning_ae.diagnostics.monitors.output import OutputMonitor
from lightning_ae.models import Autoencoder

Severity = Literal["error", "warning", "info"]
#: Activations that are flat at both ends.
SQUASHING = {"sigmoid", "tanh", "hardsigmoid", "softsign"}


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        severity: ``"error"`` if nothing is learnt because of it, ``"warning"`` if it costs, ``"info"`` otherwise.
        site: where: an activation, a layer, ``"output"``, ``"latent"``, ``"loss"`` or ``"data"``.
        measure: what was measured, as ``"dead_fraction"``.
        value: the figure.
        n: samples on which it rests.
        evidence: the figure in words.
        advice: the cause, and the one change to make first.
    """

    severity: Severity
    site: str
    measure: str
    value: float
    n: int
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"[{self.severity}] {self.site}: {self.evidence} {self.advice}"


@dataclass
class Evidence:
    """The monitors to read, and the model they have watched."""

    model: nn.Module
    dead: DeadReLUMonitor
    saturation: GradientSaturationMonitor
    latent: LatentSparsityMonitor | None
    output: OutputMonitor

    def __post_init__(self) -> None:
        #: figures of the output and the latent, read once
        self.out = self.output.figures()
        self.code = self.latent.summary() if self.latent is not None else {}

    @property
    def n(self) -> int:
        """Samples behind the figures of the output."""
        return int(self.out.get("samples", max(self.dead.num_samples().values(), default=0)))

    @property
    def squashes(self) -> bool:
        """Whether the output comes from an activation that can be flat."""
        return self.output.activation in SQUASHING

    @property
    def says_nothing(self) -> bool:
        """Whether a Gaussian posterior is the prior, whatever the example: it carries a tenth of a nat at most."""
        return self.code.get("kl", 1.0) < 0.1

    def is_code(self, site: str) -> bool:
        """Whether a site gives the latent of a model of ours, so that findings on the latent speak of it."""
        return bool(self.code) and isinstance(self.model, Autoencoder) and site.startswith("code.")

    def is_output(self, site: str) -> bool:
        """Whether a site gives the reconstruction, so that findings on the output speak of it."""
        return "fvu" in self.out and (site in (self.output.output, self.output.site) or site.startswith("loss."))
