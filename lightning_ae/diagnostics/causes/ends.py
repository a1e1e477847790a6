"""Findings on the data, the loss and the output."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.evidence import Evidence, Finding
from lightning_ae.diagnostics.monitors.output import Moment


def data(e: Evidence) -> Iterator[Finding]:
    """Data that no output can reach, or that fill a corner of its range."""
    bad = e.out.get("nonfinite_data", 0.0)
    if bad > 0:
        yield Finding(
            "error",
            "data",
            "nonfinite",
            bad,
            e.n,
            f"{bad:.2g} of the numbers in the data are NaN or infinite.",
            "Nothing can be learnt from them: remove or replace them before training.",
        )
    low, high = e.output.range
    outside = e.out.get("outside", 0.0)
    if outside > 0.001:
        within = f"[{low:g}, {high:g}]"
        how = " (divide images by 255)" if low == 0 else " (for images, x / 127.5 - 1)" if low == -1 else ""
        yield Finding(
            "error",
            "data",
            "outside",
            outside,
            e.n,
            f"{outside:.1%} of the data lie outside {within}, where the output ({e.output.activation}) can never get.",
            f"Scale the data to {within}{how}, or use an output without bounds: SquaredError() or GaussianNLL().",
        )
    spread, reach = e.out.get("x_std", 0.0), high - low
    if math.isfinite(reach) and outside <= 0.001 and 0 < 6 * spread < 0.1 * reach and e.out["far"] < 1e-5:
        yield Finding(
            "warning",
            "data",
            "range",
            6 * spread / reach,
            e.n,
            f"The data fill about {6 * spread / reach:.1%} of [{low:g}, {high:g}], around {e.out['x_mean']:.3g}.",
            "In such a corner differences are small and so are gradients: scale the data so that they fill "
            "the range, e.g. by their minimum and maximum.",
        )
    size = math.hypot(spread, e.out.get("x_mean", 0.0))
    if not math.isfinite(reach) and outside <= 0.001 and (0 < size < 1e-2 or size > 1e2):
        yield Finding(
            "warning",
            "data",
            "scale",
            size,
            e.n,
            f"The data are of size {size:.2g} (root mean square).",
            "Weights and learning rates are made for data of size 1: subtract the mean and divide by the standard "
            "deviation.",
        )


def loss(e: Evidence) -> Iterator[Finding]:
    """A loss that explodes or does not move."""
    history = [moment for moment in e.output.history if math.isfinite(moment.loss)]
    bad = e.out.get("nonfinite_losses", 0.0)
    best = min((moment.loss for moment in history), default=math.nan)
    last = history[-1].loss if history else math.nan
    exploded = len(history) > 1 and last > 10 * abs(best) + 1e-12 and last > history[0].loss
    if e.out.get("nonfinite_data", 0.0) > 0:
        return  # they are why
    if bad or exploded:
        what = f"not finite in {bad:.0f} of the batches looked at" if bad else f"grew from {best:.4g} to {last:.4g}"
        yield Finding(
            "error",
            "loss",
            "exploded",
            bad or last / max(abs(best), 1e-12),
            e.n,
            f"The loss is {what}." if bad else f"The loss {what}.",
            "Steps are too large: divide the learning rate by 10, and set gradient_clip_val=1.0 in the "
            "Trainer if it comes back.",
        )
    elif _wild(e):
        yield Finding(
            "error",
            "loss",
            "exploded",
            e.out["fvu"],
            e.n,
            f"The output was thrown far outside the data: the error is {e.out['fvu']:.2g} times their variance now.",
            "Steps were so large that the weights have run away: divide the learning rate by 10, and set "
            "gradient_clip_val=1.0 in the Trainer if it comes back.",
        )
    elif len(history) > 3 and history[-1].step - history[0].step >= 100:
        quarter = len(history) // 4
        early, late = _mean(history[quarter : 2 * quarter]), _mean(history[-quarter:])
        gain = (early - late) / max(abs(early), 1e-12)
        if gain < 0.01 and e.out.get("fvu", 0.0) > 0.5 and not e.says_nothing:
            yield Finding(
                "warning",
                "loss",
                "stuck",
                gain,
                e.n,
                f"The loss has hardly moved since step {history[quarter].step} ({early:.4g} to {late:.4g}), with "
                f"{e.out['fvu']:.0%} of the variance unexplained.",
                "Look at the errors above first; if there are none, raise the learning rate by 10.",
            )


def _mean(history: list[Moment]) -> float:
    return sum(moment.loss for moment in history) / len(history)


def _wild(e: Evidence) -> bool:
    """Whether the error is far above that of a constant, and not because training has only begun."""
    fvu, history = e.out.get("fvu", 0.0), e.output.history
    if e.out.get("outside", 0.0) > 0.001:
        return False
    # an output that varies a thousand times more than the data was thrown there by a step; an untrained one may vary
    # ten times more, and comes down
    thrown = any(moment.spread > 1e3 for moment in history)
    return thrown or (len(history) > 1 and fvu > 10 and fvu > 0.5 * history[0].fvu)


def output(e: Evidence) -> Iterator[Finding]:
    """Outputs that get no gradient, are stuck, or are always the same."""
    starved, ratio = e.saturation.starved_fraction(), e.saturation.output_ratio()
    if starved > 0.05 and e.squashes:
        yield Finding(
            "error" if starved > 0.2 else "warning",
            "output",
            "starved_fraction",
            starved,
            e.n,
            f"{starved:.0%} of the outputs that are wrong get less than 1 % of their error as gradient (on "
            f"average {ratio:.2g} of it).",
            f"Squared error through a {e.output.activation} is flat where it is confidently wrong. Use "
            "BernoulliNLL(), whose gradient at the pre-activation is x̂ − x.",
        )
    stuck = e.output.stuck_outputs()
    if len(stuck):
        yield Finding(
            "warning",
            "output",
            "stuck_outputs",
            len(stuck),
            e.n,
            f"{len(stuck)} outputs were at the low end ({e.output.range[0]:g}) in every example, though the "
            "data vary there.",
            "A ReLU at the output has no gradient below 0, so they stay black for ever. Use SquaredError() "
            "with no activation, or BernoulliNLL() for data in [0, 1].",
        )
    fvu, spread = e.out.get("fvu", 0.0), e.out.get("spread", 1.0)
    if fvu > 0.9 and spread < 0.05:
        level, flat = e.out["x_hat_mean"], e.out["contrast"] < 0.1
        yield Finding(
            "error",
            "output",
            "spread",
            spread,
            e.n,
            f"Every input gives the same output: {fvu:.1%} of the variance is unexplained, and x̂ varies over "
            f"the examples by {spread:.1%} of what x does.{_shade(e, level) if flat else ''}",
            _why_constant(e),
        )


def _shade(e: Evidence, level: float) -> str:
    low, high = e.output.range
    if not math.isfinite(low):
        low = e.out["x_mean"] - 2 * e.out["x_std"]
    if not math.isfinite(high):
        high = e.out["x_mean"] + 2 * e.out["x_std"]
    place = (level - low) / max(high - low, 1e-12)
    return f" It is all {'black' if place < 0.1 else 'white' if place > 0.9 else 'grey'} ({level:.3g})."


def _why_constant(e: Evidence) -> str:
    dead = [s for s, u in e.dead.dead_units().items() if len(u) == e.dead.sites[s].units and not e.is_output(s)]
    if e.out.get("outside", 0.0) > 0.001:
        return "The data do not fit the output's range: mend that first."
    if e.out.get("nonfinite_data", 0.0) > 0:
        return "The data are not finite: mend that first."
    if e.output.twice:
        return "The output passes two activations: mend that first."
    if e.output.shrinkage > 3e-3:
        return (
            f"The optimizer's weight decay ({e.output.weight_decay:g}) pulls the weights to zero faster than the loss "
            "holds them: divide it by 100 first (AdamW's default is 0.01)."
        )
    if dead:
        return f"All units of {dead[0]} are dead: mend that first."
    if e.saturation.starved_fraction() > 0.2:
        return "The output is saturated: mend that first."
    norms = [norm for norm in e.saturation.gradient_norm().values() if norm > 0]
    if norms and min(norms) < 1e-4 * max(norms):
        return "Gradients vanish on the way to the first layers: mend that first."
    if e.code and e.code.get("dead_fraction") == 1.0:
        return "The code is zero: mend that first."
    if e.code and e.latent is not None and len(e.latent.constant_latents()) == len(e.latent.variance()):
        return "The code does not vary: look at the encoder's gradient, and at the penalties on the code."
    if e.says_nothing:
        return "The posterior has collapsed to the prior: mend that first."
    if e.out["fvu"] > 1.2:
        return (
            "It has not even reached the mean of the data: the learning rate is too low or the run too short (or some "
            "penalty is far stronger than the reconstruction). Raise the learning rate by 10 first."
        )
    return (
        "The decoder has learnt the mean and no more: train longer first, then with a learning rate 3 times as high, "
        "or a wider code."
    )
