"""Causes in the steps: too large, too small, too few, or weights that are pulled to zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause
from lightning_ae.diagnostics.monitors.saturation_summary import per_layer

_RATE = "Bengio 2012, Practical recommendations for gradient-based training, https://arxiv.org/abs/1206.5533"
_SCHOOP = "Schoop et al. 2021, UMLAUT; DeepFD (Cao et al., ICSE 2022)"


def mean(values: Sequence[float]) -> float:
    """Of the finite ones; NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _deviation(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(mean([(v - centre) ** 2 for v in values]))


def not_finite_at_once(e: Evidence) -> bool:
    """Whether the loss, or the gradient, was not finite in the very first step."""
    steps, losses = e.curve("loss")
    norms = e.whole_saturation.curve.read("gradient_norm")[1]
    if not losses or steps[0] > 1 or len(losses) < 2:
        return False
    first_gradient = bool(norms) and not math.isfinite(norms[0]) and not math.isfinite(losses[1])
    return not math.isfinite(losses[0]) or first_gradient


@cause(Stage.PAIRING, "IEEE 754: log(0), 0/0, and the derivative of a square root at 0 are not finite", heals="never")
def nonfinite_loss(e: Evidence) -> Iterator[Look]:
    """The loss or its gradient is not finite in the first step, from finite data: no step can be why."""
    if any(e.curve("nonfinite")[1]) or any(e.curve("nonfinite_target")[1]) or not not_finite_at_once(e):
        return
    what = "gradient of the loss" if math.isfinite(e.curve("loss")[1][0]) else "loss"
    yield Look(
        "error",
        "loss",
        "nonfinite",
        1.0,
        f"The {what} is not finite in the first step, before any weight has changed.",
        "Look for a logarithm or a square root of 0, a division by 0, or a mean over nothing (all targets ignored or "
        "masked) in the loss: add a small number inside, or use torch's own loss on what the last layer puts out.",
    )


@cause(Stage.STEPS, _RATE, heals="rate")
def learning_rate_high(e: Evidence) -> Iterator[Look]:
    """Steps are too large, said by what they did.

    The loss is not finite; or it rose to 10 times its first value and little is learnt; or hidden gradients fell to
    less than a thousandth of their start with nothing learnt; or steps change more than 1 % of the weights with nothing
    learnt after 100 of them; or more than 10 %.
    """
    if any(e.curve("nonfinite")[1]) or any(e.curve("nonfinite_target")[1]):
        return  # the data are why
    steps, losses = e.curve("loss")
    if not_finite_at_once(e):
        return  # before a step was made
    bad = sum(not math.isfinite(loss) for loss in losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    cut = ("learning_rate", -1)
    lower = "divide the learning rate by 10, and set gradient_clip_val=1.0 in the Trainer if it comes back."
    if bad:
        yield Look(
            "error",
            "loss",
            "exploded",
            float(bad),
            f"The loss is not finite in {bad} of the {len(losses)} batches looked at.",
            f"Steps are too large: {lower}",
            cut,
        )
        return
    if e.training is None:
        return  # losses of batches, between which no step was made
    if len(finite) > 2:
        first, worst = finite[0], max(finite)
        at = steps[losses.index(worst)]
        last = mean(finite[-max(1, len(finite) // 4) :])
        best = min(finite)
        jumped = worst > 10 * abs(first) + 1e-9 and (not e.relative < 0.5 or last > first)
        _, course = e.progress
        apart = [v for v in course if math.isfinite(v)]
        # not one look alone: an outlier of a batch is no explosion
        above = sum(v > max(3.0, 2 * apart[0]) for v in apart)
        thrown_early = len(apart) > 2 and above >= 2 and not e.relative < 0.3
        grew = last > 10 * abs(best) + 1e-6 and last > first and not e.relative < 0.5
        wild = e.out.get("fvu", 0.0) > 20 and "loss" in e.out and not e.relative < 20 and last > 0.5 * first
        thrown = e.out.get("fvu", 0.0) > 100 and e.update > 1e-2
        if jumped or grew or thrown or thrown_early or (wild and e.update > 3e-2):
            yield Look(
                "error",
                "loss",
                "exploded",
                worst / max(abs(first), 1e-12),
                f"The loss grew from {first:.4g} to {worst:.4g} at step {at}"
                + (f", and is {last:.4g} at the end." if last < 0.9 * worst else ".")
                if jumped or grew
                else f"The output was thrown far outside the {e.target}: the error was up to "
                f"{max([*apart, e.out.get('fvu', 0.0)]):.2g} times their variance.",
                f"Steps were so large that the weights ran away: {lower}",
                cut,
            )
            return
    update = e.update
    if e.training is not None and e.training.shrinkage[0] > max(3e-3, 0.3 * update):
        return  # it is the decay that moves them
    fell = _fallen_gradients(e)
    if fell is not None and e.unlearnt() and update == update:
        yield Look(
            "error",
            fell[0],
            "gradient_norm",
            fell[1],
            f"The gradient of {fell[0]} fell to {fell[1]:.1g} of what it was in the first step, with nothing learnt "
            f"({e.relative:.0%} of what a constant leaves is left).",
            "Large steps have thrown the network where it is flat: divide the learning rate by 10.",
            cut,
        )
    elif update > 1e-2 and e.unlearnt() and e.steps >= 100:
        yield Look(
            "error" if update > 0.03 else "warning",
            "optimizer",
            "update_ratio",
            update,
            f"A step changes the weights by {update:.1%} of their size (median of the layers), and after {e.steps} "
            f"steps {e.relative:.0%} of what a constant leaves is left.",
            "About 0.1 % is healthy: divide the learning rate by 10.",
            cut,
        )
    elif update > 0.1 and e.steps >= 50 and not e.relative < 0.3:
        yield Look(
            "warning",
            "optimizer",
            "update_ratio",
            update,
            f"A step changes the weights by {update:.0%} of their size (median of the layers).",
            "About 0.1 % is healthy: divide the learning rate by 10.",
            cut,
        )


def _fallen_gradients(e: Evidence) -> tuple[str, float] | None:
    """A hidden layer whose gradient fell to less than a thousandth of the first step's."""
    whole = e.whole_saturation
    first = per_layer(whole.first_results(), whole.layers, "grad", "grad_steps")
    now = e.saturation.gradient_norm()
    hidden = list(now)[:-1]
    ratios = {n: now[n] / first[n] for n in hidden if first.get(n, 0.0) > 0}
    if not ratios:
        return None
    name = min(ratios, key=lambda n: ratios[n])
    return (name, ratios[name]) if ratios[name] < 1e-3 else None


@cause(Stage.STEPS, "Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101", heals="rate")
def weight_decay(e: Evidence) -> Iterator[Look]:
    """The decay takes more than 0.3 % of a weight in a step, and most of what a constant leaves is left."""
    if e.training is None:
        return
    shrinkage, decay = e.training.shrinkage
    if shrinkage > 3e-3 and e.unlearnt(0.6):
        yield Look(
            "error",
            "optimizer",
            "shrinkage",
            shrinkage,
            f"The optimizer's weight decay ({decay:g}) takes {shrinkage:.1%} of the weights away in each step.",
            "It pulls them to zero faster than the loss holds them: divide weight_decay by 100 first (AdamW's default "
            "is 0.01).",
            ("weight_decay", -1),
        )


@cause(Stage.STEPS, _RATE, follows=True)
def oscillation(e: Evidence) -> Iterator[Look]:
    """In the later half the loss swings by more than 30 % of its mean from look to look, and does not fall."""
    _, values = e.progress
    late = [v for v in values[len(values) // 2 :] if math.isfinite(v)]
    if len(late) < 8 or not e.unlearnt(0.5) or not e.update > 5e-3:
        return
    third = len(late) // 3
    gain = mean(late[:third]) - mean(late[-third:])
    swings = _deviation([b - a for a, b in pairwise(late)]) / max(abs(mean(late)), 1e-12)
    if swings > 0.3 and gain < 0.1 * abs(mean(late)):
        yield Look(
            "warning",
            "loss",
            "swing",
            swings,
            f"The loss swings by {swings:.0%} of its mean from one look to the next and no longer falls.",
            "Divide the learning rate by 3 to 10, or make batches larger.",
            ("learning_rate", -1),
        )


@cause(Stage.STEPS, _SCHOOP, heals="rate")
def learning_rate_low(e: Evidence) -> Iterator[Look]:
    """A step changes less than 0.03 % of the weights, nearly nothing is learnt, and nothing else is wrong."""
    update = e.update
    if 0 < update < 3e-4 and e.unlearnt(0.85) and e.steps >= 30:
        far = e.relative > 3 and update > 1e-6
        yield Look(
            "error" if e.unlearnt() else "warning",
            "optimizer",
            "update_ratio",
            update,
            f"A step changes the weights by {update:.1g} of their size (median of the layers), and after {e.steps} "
            f"steps {e.relative:.0%} of what a constant leaves is left.",
            "About 0.1 % is healthy: raise the learning rate by 10"
            + (", or use Adam in place of plain SGD." if _plain(e) and not far else "."),
            ("learning_rate", +1),
        )


def _plain(e: Evidence) -> bool:
    return e.training is not None and any(h.kind == "SGD" and h.momentum == 0 for h in e.training.settings)


@cause(Stage.STEPS, _SCHOOP)
def too_short(e: Evidence) -> Iterator[Look]:
    """The loss was still falling when the run ended, or there were less than 200 steps, and much is left.

    The last quarter lies below the one before by more than 3 standard errors and by more than 5 % of the whole gain,
    with more than 30 % of what a constant leaves left.
    """
    if e.training is None or not e.relative > 0.3:
        return
    _, values = e.progress
    finite = [v for v in values if math.isfinite(v)]
    quarter = len(finite) // 4
    falling = False
    if quarter >= 3:
        before, last = finite[-2 * quarter : -quarter], finite[-quarter:]
        error = math.hypot(_deviation(before), _deviation(last)) / math.sqrt(quarter)
        drop = mean(before) - mean(last)
        gain = mean(finite[: max(1, quarter // 2)]) - mean(last)
        falling = drop > 3 * error and gain > 0 and drop > 0.05 * gain
    if falling or e.steps < 200:
        yield Look(
            # a run that has learnt much may be as short as it is
            "warning" if e.unlearnt(0.75) else "info",
            "loss",
            "falling",
            e.relative,
            f"After {e.steps} steps {e.relative:.0%} of what a constant leaves is left"
            + (", and the loss was still falling." if falling else "."),
            "Train longer first (10 times as many steps)"
            + ("; then with Adam, or a larger learning rate." if _plain(e) else "; then with a larger learning rate."),
            ("learning_rate", +1),
        )
