"""What causes read, and what they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_ae.diagnostics.monitors.dead_relu import DeadReLUMonitor
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.monitors.latent_sparsity import LatentSparsityMonitor
from lightning_ae.diagnostics.monitors.output import OutputMonitor
from lightning_ae.diagnostics.monitors.pairs import Pair
from lightning_ae.diagnostics.monitors.training import TrainingMonitor
from lightning_ae.diagnostics.monitors.validation import ValidationMonitor
from lightning_ae.models import Autoencoder

Severity = Literal["error", "warning", "info"]
Heals = Literal["never", "rate", "weights", "steps"]
#: Activations that are flat at both ends.
SQUASHING = {"sigmoid", "tanh", "hardsigmoid", "softsign"}


class Stage(IntEnum):
    """Where a batch meets a cause; first what makes learning impossible, whatever the numbers."""

    CERTAIN = -1
    DATA = 0
    TARGETS = 1
    PAIRING = 2
    WIRING = 3
    SCALE = 4
    TERMS = 5
    STEPS = 6
    ACTIVATIONS = 7
    LATENT = 8
    OUTPUT = 9
    GENERALISATION = 10


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
        cause: its name, as in ``lightning_ae.diagnostics.causes.CAUSES``.
        change: what the advice would turn, and which way: ``("learning_rate", -1)``; None if it is no such number.
        symptoms: what was seen as well and follows from it.
        remedies: changes that may mend it, in the order in which to try them: see
            :mod:`lightning_ae.diagnostics.remedies`.
    """

    severity: Severity
    site: str
    measure: str
    value: float
    n: int
    evidence: str
    advice: str
    cause: str = ""
    change: tuple[str, int] | None = None
    symptoms: tuple[str, ...] = ()
    remedies: tuple[Any, ...] = ()

    @property
    def remedy(self) -> Any:
        """The first change to try, an object with ``describe()`` and ``apply(model, trainer_options)``, or None."""
        return self.remedies[0] if self.remedies else None

    def __str__(self) -> str:
        text = f"[{self.severity}] {self.site}: {self.evidence} {self.advice}"
        return text + "".join(f"\n    seen as well: {symptom}" for symptom in self.symptoms)


class Look(NamedTuple):
    """What a cause says before its name is put to it: as :class:`Finding`."""

    severity: Severity
    site: str
    measure: str
    value: float
    evidence: str
    advice: str
    change: tuple[str, int] | None = None
    n: int | None = None


Rule = Callable[["Evidence"], Iterator[Look]]


@dataclass(frozen=True)
class Cause:
    """One thing that can be wrong with a training run.

    Attributes:
        name: a slug.
        stage: where a batch meets it.
        definition: what it is and from which figure on, with where thresholds come from.
        source: publication or documentation.
        rule: finds it in the evidence.
        follows: whether it is what one sees of other causes, so that it is listed under one that came before.
        heals: by what it can go away while the fit goes on: ``"never"``; if the learning ``"rate"`` changes; if the
            ``"weights"`` of the terms do; ``"steps"`` if more of them may be enough.
    """

    name: str
    stage: Stage
    definition: str
    source: str
    rule: Rule
    follows: bool = False
    heals: Heals = "steps"


#: All causes by name, in the order in which they were declared.
CAUSES: dict[str, Cause] = {}


def cause(stage: Stage, source: str, follows: bool = False, heals: Heals = "steps") -> Callable[[Rule], Rule]:
    """Declare a cause: a generator of what it says, whose name is the cause's and whose docstring its definition."""

    def declare(rule: Rule) -> Rule:
        name = getattr(rule, "__name__", "")
        CAUSES[name] = Cause(name, stage, (rule.__doc__ or "").strip(), source, rule, follows, heals)
        return rule

    return declare


def run(e: Evidence, declared: Cause) -> Iterator[Finding]:
    """What a cause finds."""
    for look in declared.rule(e):
        n = e.n if look.n is None else look.n
        yield Finding(*look[:4], n, look.evidence, look.advice, declared.name, look.change)


@dataclass
class Evidence:
    """The monitors to read, and the model they have watched.

    Figures are those of the later part of the run: a verdict is on what is, not on what was at the start.
    """

    model: nn.Module
    dead: DeadReLUMonitor
    saturation: GradientSaturationMonitor
    latent: LatentSparsityMonitor | None
    output: OutputMonitor
    training: TrainingMonitor | None = None
    validation: ValidationMonitor | None = None
    out: dict[str, float] = field(init=False)
    code: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        #: the monitors over their whole horizon
        self.whole_dead, self.whole_saturation, self.whole_latent = self.dead, self.saturation, self.latent
        self.dead, self.saturation = self.dead.late(), self.saturation.late()
        self._sums = self.output.late_results()
        self.main = self.output.main(self._sums)
        self.out = self.output.figures(self._sums)
        self.code = {}
        if self.latent is not None:
            self.latent = self.latent.late()
            self.code = self.latent.summary()

    # -- the model --------------------------------------------------------------------------------------------

    @property
    def ours(self) -> bool:
        """Whether it is one of this package, so that advice may speak of its parts."""
        return isinstance(self.model, Autoencoder)

    @property
    def n(self) -> int:
        """Samples behind the figures of the output."""
        return int(self.out.get("samples", max(self.dead.num_samples().values(), default=0)))

    # -- what is compared -------------------------------------------------------------------------------------

    @property
    def pairs(self) -> dict[str, Pair]:
        """All that was heard to be compared."""
        return self.output.pairs

    @property
    def pair(self) -> Pair | None:
        """The main comparison."""
        return None if self.main is None else self.pairs[self.main]

    def figures(self, pair: str) -> dict[str, float]:
        """Of one comparison, in the later part of the run."""
        return self.output.pair_figures(pair, self._sums)

    @property
    def reconstructs(self) -> bool:
        """Whether the main comparison is one with the input."""
        return self.main is not None and self.output.reconstruction(self._sums) == self.main

    @property
    def target(self) -> str:
        """What the target is called."""
        return "data" if self.reconstructs else "targets"

    @cached_property
    def trained(self) -> float:
        """Loss over that of the best constant, in training, later in the run; NaN if nothing was heard."""
        # labels that are made up in the step, as for a discriminator, say nothing of what was learnt
        made_up = self.pair is not None and not self.pair.is_data and self.out.get("binary", 0.0) > 0.999
        return math.nan if made_up else self.out.get("relative", math.nan)

    @cached_property
    def relative(self) -> float:
        """The lesser of :attr:`trained` and :meth:`validated`: what dropout hides is learnt all the same."""
        return min((v for v in (self.trained, self.validated()) if v == v), default=math.nan)

    def unlearnt(self, above: float = 0.9) -> bool:
        """Whether more than this share of what a constant leaves is left; False if it is not known."""
        return self.relative > above

    def grade(self, worst: Severity = "error", fine: float = 0.15, costs: float = 0.5) -> Severity:
        """As bad as what was not learnt: information if all was, a warning if most was, else the worst."""
        if self.relative < fine:
            return "info"
        return "warning" if self.relative < costs and worst == "error" else worst

    def validated(self) -> float:
        """:attr:`relative` on validation data in evaluation mode; NaN if it is not known."""
        return self._validated

    @cached_property
    def _validated(self) -> float:
        if self.validation is None or self.main is None:
            return math.nan
        seen = self.validation.seen
        name = self.main if self.main in seen.pairs else seen.main()
        return math.nan if name is None else seen.pair_figures(name).get("relative", math.nan)

    # -- time -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps of the fit; 0 without a Trainer."""
        return 0 if self.training is None else self.training.total_steps

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Figures of each look, by step."""
        return self.output.curve.read(name)

    @cached_property
    def progress(self) -> tuple[list[int], list[float]]:
        """The error of the main comparison over the variance (or label entropy) of its targets, look by look."""
        steps, errors = self.curve(f"{self.main}/error")
        level = self.out.get("label_entropy", self.out.get("x_variance", 0.0))
        return (steps, [error / level for error in errors]) if errors and level > 0 else ([], [])

    @cached_property
    def update(self) -> float:
        """Median over the layers of the share of a layer's weights that a step changes; NaN if there was none."""
        found = sorted(v for v in self.saturation.update_ratio().values() if v > 0)
        return found[len(found) // 2] if found else math.nan

    # -- the output -------------------------------------------------------------------------------------------

    @property
    def squashes(self) -> bool:
        """Whether the output comes from an activation that can be flat."""
        return self.pair is not None and self.output.activation in SQUASHING

    def is_code(self, site: str) -> bool:
        """Whether a site gives the latent of a model of ours, so that findings on the latent speak of it."""
        return bool(self.code) and self.ours and site.startswith("code.")

    def is_output(self, site: str) -> bool:
        """Whether a site gives the prediction, so that findings on the output speak of it."""
        return self.main is not None and (site in (self.output.output, self.output.site) or site.startswith("loss."))

    def is_gate(self, site: str) -> bool:
        """Whether a squashing site stands beside another kind in one module, as the gates of a recurrent cell do."""
        owner, _, what = site.rpartition(".")
        kinds = {
            info.activation
            for name, info in self.dead.sites.items()
            if name.rpartition(".")[0] == owner
            and info.activation in SQUASHING
            and name.rpartition(".")[2][:1].isalpha()
        }
        return len(kinds) > 1 and what[:1].isalpha()
