"""What validation shows: overfitting, a model that is another one in evaluation, data that are scaled differently."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause
from lightning_ae.diagnostics.causes.data import entry_figures


@cause(Stage.DATA, "training-serving skew: one preprocessing for both")
def validation_scale(e: Evidence) -> Iterator[Look]:
    """What the first layer reads in validation is less than 0.2 or more than 5 times as large as in training."""
    if e.validation is None:
        return
    for name in e.output.entries:
        here = entry_figures(e, name)
        there = _entry_size(e, name)
        if here is None or there is None or here[0] == 0:
            continue
        ratio = there / here[0]
        if not 0.2 < ratio < 5:
            yield Look(
                "error",
                "data",
                "validation_scale",
                ratio,
                f"Inputs are {ratio:.3g} times as large in validation as in training.",
                "Scale both in the same way, with the training set's mean and standard deviation; figures of "
                "validation mean nothing until then.",
            )
            return


def _entry_size(e: Evidence, name: str) -> float | None:
    assert e.validation is not None
    results = e.validation.seen.results()
    if (f"entry/{name}", "rows") not in results:
        return None
    rows = float(results[f"entry/{name}", "rows"])
    return math.sqrt(max(0.0, float(results[f"entry/{name}", "x_square"].mean()) / max(rows, 1)))


@cause(
    Stage.GENERALISATION, "Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; Wu & Johnson 2021 on its pitfalls"
)
def train_eval_mismatch(e: Evidence) -> Iterator[Look]:
    """Batch statistics are far from the running ones, and the loss in evaluation mode is twice that in training."""
    norms = [name for name, module in e.model.named_modules() if isinstance(module, _BatchNorm)]
    theirs = e.validated()
    if not norms or e.validation is None or theirs != theirs or e.trained != e.trained:
        return
    results = e.output.late_results()
    worst, where, positions = 0.0, "", 0.0
    for site, field in results:
        if site.startswith("norm/") and field == "off":
            looks = float(results[site, "looks"])
            far = max(float(results[site, "off"]), float(results[site, "stretch"])) / max(looks, 1)
            if looks and far > worst:
                worst, where, positions = far, site.removeprefix("norm/"), float(results[site, "positions"]) / looks
    small = positions <= 16
    if small and positions <= 4 and e.relative > 0.1 and worst > 0.3 and not theirs > 1.5 * e.trained + 0.05:
        yield Look(
            "warning",
            where,
            "batch_rows",
            positions,
            f"{where} normalises over {positions:.0f} rows at a time, and {e.relative:.0%} of what a constant leaves "
            "is left.",
            "A mean of so few is noise, in training and in the running statistics: make batches larger (32 or more), "
            "or use LayerNorm or GroupNorm.",
        )
    elif theirs > 1.5 * e.trained + 0.05 and worst > 0.3:
        yield Look(
            "error" if theirs > 0.8 or theirs > 3 * e.trained else "warning",
            where,
            "running_statistics",
            worst,
            f"In evaluation mode {theirs:.0%} of what a constant leaves is left, in training {e.trained:.0%}; the "
            f"running statistics of {where} are not those of the batches"
            + (f", which have {positions:.0f} rows each." if small else "."),
            (
                "Batches are too small for batch normalisation: make them larger (32 or more), or use LayerNorm or "
                "GroupNorm."
                if small
                else "They lag behind: raise the normalisation's momentum to 0.1, or train longer."
            ),
        )


@cause(Stage.GENERALISATION, "Prechelt 1998, Early stopping — but when?", follows=True)
def overfitting(e: Evidence) -> Iterator[Look]:
    """Validation was best before 70 % of the run, is now 1.2 times that, and 1.5 times the loss in training."""
    if e.validation is None:
        return
    for name, (steps, values) in e.validation.losses.items():
        finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if len(finite) < 4:
            continue
        at, best = min(finite, key=lambda row: row[1])
        now = sum(value for _, value in finite[-2:]) / 2
        theirs = e.validated()
        gap = theirs / e.trained if e.trained > 0 and theirs == theirs else now / max(_training_loss(e), 1e-12)
        if best > 0 and at < 0.7 * finite[-1][0] and now > 1.2 * best and gap > 1.5:
            yield Look(
                "warning",
                name,
                "overfitting",
                now / best,
                f"{name} was best at step {at} ({best:.4g}) and is {now:.4g} now, {gap:.2g} times what it is on "
                "training data.",
                "The model learns the training set by heart: stop at the best step (EarlyStopping, ModelCheckpoint), "
                "use more data or augmentation, weight decay, dropout, or a smaller network.",
            )
            return
    theirs = e.validated()
    if e.trained < 0.2 and theirs > 0.05 and theirs > 4 * e.trained and e.steps >= 100:
        large = theirs > 0.25
        if not large and theirs < 10 * e.trained:
            return
        yield Look(
            "warning" if large else "info",
            "validation",
            "gap",
            theirs,
            f"On validation data {theirs:.0%} of what a constant leaves is left, on training data {e.trained:.0%}.",
            "The model learns the training set by heart: use more data or augmentation, weight decay, dropout, or a "
            "smaller network.",
        )


def _training_loss(e: Evidence) -> float:
    return e.out.get("loss", math.nan)
