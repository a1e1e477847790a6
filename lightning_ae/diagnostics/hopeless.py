"""When a run cannot succeed: what does not go away by going on, how long it has to stand, and what may yet help."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_ae.diagnostics.causes import CAUSES, Evidence, Finding
from lightning_ae.diagnostics.causes.base import Heals

#: Less than this share of what a constant leaves is left: something was learnt, and the run is not hopeless.
LEARNT = 0.9
#: Share of the planned steps for which a cause has to stand, by what would heal it, and steps at least.
STANDS: dict[Heals, tuple[float, int]] = {
    "rate": (0.04, 32),
    "never": (0.1, 64),
    "weights": (0.1, 64),
    "steps": (0.25, 100),
}
#: Planned steps where no end is planned.
_NO_END = 3000.0
#: Share of their size by which weights have to move to leave a plateau.
_MOVES = 0.1
#: Errors with which nothing at all can be learnt; with others that do not go away some runs learn something.
_CERTAIN = {"constant_softmax", "broadcast_pair", "constant_data", "no_gradient"}
_NOT_FINITE = {"nonfinite_data", "nonfinite_loss", "learning_rate_high"}
#: What says no more than that little was learnt.
_NO_CAUSE = {"too_short", "constant_output", "constant_latents", "overfitting"}
#: Measures of causes that do not heal by themselves, and that yet may: frozen parts are thawed, a parity has no trace.
_MAY_HEAL = {"frozen", "correlation"}


class Stood(NamedTuple):
    """A look, one of several in a row, that has found a cause.

    Attributes:
        step: of the optimizer.
        level: what was left to learn, see :func:`level`.
        update: how much a step changed the weights, as a share; NaN if there was none.
    """

    step: int
    level: float
    update: float


def level(relative: float) -> float:
    """What is left to learn; errors beyond that of a constant by their logarithm, since they fall by factors.

    Example:
        >>> level(0.5), level(1.0), round(level(20.0), 2)
        (0.5, 1.0, 4.0)
    """
    return relative if not relative > 1 else 1 + math.log(relative)


def lasts(finding: Finding, e: Evidence, scheduled: bool, revived: bool) -> bool:
    """Whether a finding does not go away by going on as it is, or does so late if at all.

    Args:
        finding: of these evidence.
        e: the evidence.
        scheduled: whether the learning rate has a schedule.
        revived: whether dead units are revived.
    """
    cause, losses = CAUSES[finding.cause], e.curve("loss")[1]
    if cause.name == "nonfinite_data" or (cause.name in _NOT_FINITE and not all(map(math.isfinite, losses))):
        return not any(math.isfinite(loss) for loss in losses[-2:])
    unknown = e.relative != e.relative and all(math.isfinite(loss) for loss in losses[-2:])
    if (unknown and cause.name not in _CERTAIN) or cause.name in _NO_CAUSE or finding.measure in _MAY_HEAL:
        return False
    if (revived and cause.name in ("dead_units", "no_gradient")) or (scheduled and cause.heals == "rate"):
        return False
    # weights that a module turns by itself are not seen
    known = e.ours and bool(e.output.weights)
    return known if cause.heals == "weights" or cause.name == "posterior_collapse" else True


def is_hopeless(finding: Finding, looks: list[Stood], patience: int, planned: float) -> bool:
    """Whether a finding that lasts has stood long enough, and nothing moves.

    Args:
        finding: it.
        looks: those in a row that have found it.
        patience: how many there have to be.
        planned: optimizer steps of the whole fit; infinite if no end is planned.
    """
    if len(looks) < patience or looks[-1].step > 0.9 * planned:  # there is nothing left to save
        return False
    if finding.cause not in _CERTAIN and not math.isnan(looks[-1].level):
        heals = _heals(finding)
        share, least = STANDS[heals]
        whole = planned if heals == "steps" or math.isfinite(planned) else _NO_END
        if looks[-1].step - looks[0].step < max(least, share * whole):
            return False
    return not falls(looks, patience, planned) and not (_heals(finding) == "steps" and may_leave(looks, planned))


def _heals(finding: Finding) -> Heals:
    """By what it can go away, which its measure may tell better than its cause."""
    if finding.cause == "dead_units" and finding.value == 1:
        return "never"  # nothing passes, forward or backward
    if finding.cause == "learning_rate_high" and finding.measure == "gradient_norm":
        return "steps"  # gradients fall on a plateau, too
    return CAUSES[finding.cause].heals


def falls(looks: list[Stood], patience: int, planned: float) -> bool:
    """Whether the error falls so fast that by the planned end of the fit something will have been learnt.

    As fast as in the last two fifths of the steps, or in the looks for which one has patience.

    Example:
        >>> falls([Stood(60, 1.02, 1e-3), Stood(100, 1.0, 1e-3)], 2, planned=1000), falls(
        ...     [Stood(60, 1.02, 1e-3), Stood(100, 1.0, 1e-3)], 2, planned=200
        ... )
        (True, False)
    """
    last, now, _ = looks[-1]
    recent = [look for look in looks if look.step >= 0.6 * last]
    first, before, _ = min(recent[0], looks[-min(len(looks), patience)])
    if math.isnan(now) or math.isnan(before):
        return False
    left = planned - last if math.isfinite(planned) else 10.0 * (last - first)
    fall = before - now - 0.005  # less than that is chance
    return fall > 0 and now - fall * left / max(1, last - first) < LEARNT


def may_leave(looks: list[Stood], planned: float) -> bool:
    """Whether a plateau may yet be left.

    That comes suddenly (Saxe et al. 2014, https://arxiv.org/abs/1312.6120), and it may as long as the weights can still
    move by a tenth of their size if steps stay as they are, or steps grow.

    Example:
        >>> looks = [Stood(60, 1.0, 1e-4), Stood(100, 1.0, 1e-4)]
        >>> may_leave(looks, planned=1000), may_leave(looks, planned=10_000)
        (False, True)
    """
    updates = [look.update for look in looks if look.step >= looks[-1].step / 3]
    return updates[-1] * (planned - looks[-1].step) > _MOVES or updates[-1] > 1.1 * min(updates)
