"""Causes in the targets: out of reach, all of one kind, of a wild scale, or not those of the inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause
from lightning_ae.diagnostics.watch.comparisons import BINARY, CLASSES, REAL


@cause(Stage.TARGETS, "torch.nn.BCELoss: targets are numbers between 0 and 1", heals="never")
def bce_target_range(e: Evidence) -> Iterator[Look]:
    """A binary cross-entropy is given targets outside [0, 1], beyond rounding."""
    for name, pair in e.pairs.items():
        figures = e.figures(name)
        out = figures.get("below_zero", 0.0) + figures.get("above_one", 0.0)
        if pair.loss in BINARY and out > 1e-3:
            kind = "scale images to [0, 1]" if e.reconstructs else "for real numbers use mse_loss and no sigmoid"
            yield Look(
                "error",
                "loss",
                "outside",
                out,
                f"{out:.1%} of the {e.target} lie outside [0, 1], and {name} takes them for probabilities.",
                f"Its minimum is then at infinity: {kind}; for classes give labels of 0 and 1.",
            )


@cause(Stage.TARGETS, "DeepFD (Cao et al., ICSE 2022), faults of the output activation", heals="never")
def target_out_of_reach(e: Evidence) -> Iterator[Look]:
    """Targets lie where the activation of the output can never get: more than 1 in 1,000 outside its range."""
    pair = e.pair
    if pair is None or pair.loss in BINARY or pair.loss in CLASSES or pair.loss == "kl_div":
        return
    low, high = e.output.range
    outside, beyond = e.out.get("outside", 0.0), e.out.get("beyond", 0.0)
    if not math.isfinite(low) and not math.isfinite(high):
        return
    if outside > 0.001 and (beyond > 0.001 or outside > 0.01):
        within = f"[{low:g}, {high:g}]"
        how = " (divide images by 255)" if low == 0 and e.out["x_mean"] > 2 else ""
        free = "SquaredError() or GaussianNLL()" if e.ours else "no activation after the last layer"
        yield Look(
            "error" if beyond > 0.01 or e.unlearnt(0.3) else e.grade("warning"),
            "data" if e.reconstructs else "targets",
            "outside",
            outside,
            f"{outside:.1%} of the {e.target} lie outside {within}, where the output ({e.output.activation}) can never "
            "get.",
            f"Scale the {e.target} to {within}{how}, or use an output without bounds: {free}."
            if high < math.inf
            else f"Use an output without bounds: {free}.",
        )


@cause(Stage.CERTAIN, "the entropy of labels of one class is 0")
def one_class(e: Evidence) -> Iterator[Look]:
    """All labels looked at are of one class."""
    pair = e.pair
    if pair is None or e.reconstructs or not pair.is_data:
        return
    counts = e.output.labels()
    seen = 0 if counts is None else int(counts.sum())
    # rare ones may not come for a while
    enough = seen >= (64 if e.training is None else min(1000.0, e.output.examples))
    other = counts is not None and not pair.classes and int(counts[-1]) > 0
    if counts is not None and int((counts > 0).sum()) == 1 and not other and enough:
        yield Look(
            "error",
            "targets",
            "classes",
            1.0,
            f"All {seen:,} labels are of one class (another one is rarer than {3 / seen:.1g}).",
            "Whatever the input, the answer is the same: look at how labels are made (a division by 255, an integer "
            "division, a comparison that is never true, data sorted by class and not shuffled).",
        )
        return
    steps, values = e.curve(f"{e.main}/error")
    early = [v for step, v in zip(steps, values, strict=True) if step <= e.steps / 5]
    if pair.classes and len(values) >= 20 and early and 0 <= min(early) < 1e-3:
        yield Look(
            "info",
            "loss",
            "zero_at_once",
            min(early),
            f"The loss of the classes is {min(early):.1g} within the first fifth of the run.",
            "If the task is not as easy as that, the input tells the label: look for a leak.",
        )


@cause(Stage.TARGETS, "AutoTrainer and DeepFD: unscaled regression targets")
def target_scale(e: Evidence) -> Iterator[Look]:
    """Targets of a regression have a root mean square above 30, and more than half of their variance is left."""
    pair = e.pair
    if pair is None or e.reconstructs or pair.loss not in REAL:
        return
    size = math.hypot(e.out.get("x_std", 0.0), e.out.get("x_mean", 0.0))
    diverged = any(not math.isfinite(v) for v in e.curve("loss")[1])
    if 30 < size < math.inf and (not e.relative < 0.5 or diverged) and e.out.get("outside", 0.0) <= 0.001:
        yield Look(
            "error",
            "targets",
            "scale",
            size,
            f"The targets are of size {size:.3g} (root mean square), and {e.relative:.0%} of their variance is "
            "unexplained.",
            "Errors, and so gradients, are as large as they are: standardise the targets by mean and standard "
            "deviation of the training set, and undo it in predictions.",
        )


@cause(Stage.TARGETS, "a reconstruction of another example's data", heals="never")
def misaligned_pair(e: Evidence) -> Iterator[Look]:
    """In every batch the targets are the inputs with the rows in another order, or they have nothing to do with them.

    The latter if nothing is learnt of targets that correlate with no input by more than 1.3 times the largest
    correlation that chance gives. It is no proof: a parity or an even function leaves no linear trace.
    """
    results = e.output.late_results()
    for name in e.pairs:
        looks = float(results.get((name, "likeness"), 0))
        if looks and float(results[name, "permuted"]) >= 0.9 * looks and not e.reconstructs:
            yield Look(
                "error",
                "targets",
                "permuted",
                1.0,
                f"The targets of {name} are the batch's inputs in another order.",
                "Each prediction is compared with another example: shuffle inputs and targets together.",
            )
    worst = max((v for v in (e.trained, e.validated()) if v == v), default=0.0)
    unlearnt = all(not e.figures(name).get("relative", 1.0) < 0.85 for name in e.pairs)
    found = None if e.reconstructs or worst < 0.85 or not unlearnt else e.output.relation()
    if found is not None and found[0] < 1.3 * found[1]:
        yield Look(
            "error" if e.unlearnt(0.8) or e.validated() > 0.9 else "warning",
            "targets",
            "correlation",
            found[0],
            f"No input correlates with a target by more than {found[0]:.2g} in {found[2]:,} examples (chance gives up "
            f"to {found[1]:.2g}), and {worst:.0%} of what a constant leaves is left.",
            "The targets look as if they belonged to other examples: see that inputs and targets are shuffled, "
            "filtered and joined together. (A target that is even in its inputs, or a parity, looks like this too.)",
            n=found[2],
        )


@cause(Stage.CERTAIN, "torch broadcasts (B, 1) and (B,) to (B, B), with a warning", heals="never")
def broadcast_pair(e: Evidence) -> Iterator[Look]:
    """Prediction and target have shapes that are broadcast, so each prediction is compared with several targets."""
    for name, pair in e.pairs.items():
        if pair.broadcast:
            yield Look(
                "error",
                "loss",
                "broadcast",
                float(len(pair.target_shape)),
                f"{name} compares predictions {tuple(pair.prediction_shape)} with targets {tuple(pair.target_shape)}: "
                "each prediction with all targets of the batch.",
                "All predictions go to the mean of the targets: give both the same shape, target.view_as(prediction).",
            )
