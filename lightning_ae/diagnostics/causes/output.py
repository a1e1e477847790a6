"""What the output shows: the same for every input, or stuck at an end of its range."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause


@cause(Stage.PAIRING, "Lu et al. 2019, https://arxiv.org/abs/1903.06733", follows=True)
def stuck_outputs(e: Evidence) -> Iterator[Look]:
    """Numbers of the output are at the low end of its range in every example, though the targets vary there."""
    stuck = e.output.stuck_outputs()
    if len(stuck) and not e.relative < 0.02:
        low = e.output.range[0]
        free = (
            "SquaredError() with no activation, or BernoulliNLL() for data in [0, 1]"
            if e.ours
            else ("no activation after the last layer")
        )
        yield Look(
            "error" if len(stuck) > 0.5 * e.out.get("columns", 1) and e.unlearnt(0.5) else "warning",
            "output",
            "stuck_outputs",
            len(stuck),
            f"{len(stuck)} outputs were at the low end ({low:g}) in every example, though the {e.target} vary there.",
            f"A ReLU at the output has no gradient below 0, so they stay there for ever. Use {free}.",
        )


@cause(Stage.OUTPUT, "the mean is the best constant under squared error", follows=True)
def constant_output(e: Evidence) -> Iterator[Look]:
    """More than 90 % of the variance is unexplained, and the output varies by less than 5 % of what the target does."""
    fvu, spread = e.out.get("fvu", 0.0), e.out.get("spread", 1.0)
    if not (fvu > 0.9 and spread < 0.05 and e.unlearnt()):
        return
    flat = e.reconstructs and e.out["contrast"] < 0.1
    shade = _shade(e, e.out["x_hat_mean"]) if flat else ""
    subject = "x̂" if e.reconstructs else "the prediction"
    yield Look(
        "error",
        "output",
        "spread",
        spread,
        f"Every input gives the same output: {fvu:.1%} of the variance is unexplained, and {subject} varies over the "
        f"examples by {spread:.1%} of what the {e.target} do.{shade}",
        ("The model has learnt the mean and no more" if fvu < 1.1 else "The model has not even reached the mean")
        + ", and none of the causes looked for was found: see whether it can learn a single batch by heart, with a "
        "wider network.",
    )


def _shade(e: Evidence, level: float) -> str:
    low, high = e.output.range
    if not math.isfinite(low):
        low = e.out["x_mean"] - 2 * e.out["x_std"]
    if not math.isfinite(high):
        high = e.out["x_mean"] + 2 * e.out["x_std"]
    place = (level - low) / max(high - low, 1e-12)
    return f" It is all {'black' if place < 0.1 else 'white' if place > 0.9 else 'grey'} ({level:.3g})."
