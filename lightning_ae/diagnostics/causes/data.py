"""Causes in the data: not finite, all the same, of a scale that weights and steps are not made for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause
from lightning_ae.diagnostics.watch.comparisons import REAL

_LECUN = "LeCun et al. 1998, Efficient BackProp, section 4.3"


@cause(Stage.DATA, "IEEE 754: whatever meets a NaN becomes one", heals="never")
def nonfinite_data(e: Evidence) -> Iterator[Look]:
    """The data hold NaN or infinite numbers, in any batch looked at."""
    for site, name in (("data", "nonfinite"), ("targets", "nonfinite_target")):
        counts = e.curve(name)[1]
        bad = sum(counts)
        if bad == 0 or (site == "targets" and not (e.pair is not None and e.pair.is_data)):
            continue
        share = e.out.get("nonfinite_data", 0.0)
        batches = sum(count > 0 for count in counts)
        yield Look(
            "error",
            site,
            "nonfinite",
            share or bad,
            f"{bad:.0f} numbers of the {site} are NaN or infinite, in {batches} of {len(counts)} batches looked at.",
            "Nothing can be learnt from them: remove or replace them before training.",
        )
        return


@cause(Stage.DATA, "the variance of a constant is 0", heals="never")
def constant_data(e: Evidence) -> Iterator[Look]:
    """The examples of a batch are all the same in every batch looked at, or the targets of a regression are."""
    varies = e.curve("varies")[1]
    same = bool(varies) and not any(varies)
    if same or (e.reconstructs and e.out.get("samples", 0) > 1 and e.out.get("x_variance", 1.0) == 0):
        yield Look(
            "error",
            "data",
            "variance",
            0.0,
            f"The data do not vary: all {e.n:,} examples are the same.",
            "There is nothing to learn: look at what the loader gives.",
        )
        return
    pair, labels = e.pair, e.out.get("binary", 0.0) > 0.999
    if pair is None or not pair.is_data or pair.loss not in REAL or labels:
        return
    if e.out.get("x_variance", 1.0) == 0 and e.n > 1:
        yield Look(
            "error",
            "targets",
            "variance",
            0.0,
            f"The targets do not vary: all {e.n:,} are the same.",
            "There is nothing to learn: look at how targets are made, and at what the loader gives.",
        )


@cause(Stage.DATA, _LECUN)
def input_scale(e: Evidence) -> Iterator[Look]:
    """Inputs, or single features of them, are of a size that weights and learning rates are not made for.

    What the first layer with weights reads, unless that is a normalisation: root mean square above 30 or below 0.01;
    above 3 with a mean of 10 standard deviations; or a feature 100 times as spread as the median one. Thresholds of
    the published faulty programs of DeepFD.
    """
    low, high = e.output.range
    bounded = e.reconstructs and math.isfinite(high - low)
    if bounded and e.out.get("outside", 0.0) > 0.001:
        return  # to bring the data into the output's range mends this too
    for name, norm in e.output.entries.items():
        figures = None if norm else entry_figures(e, name)
        if figures is None:
            continue
        rms, ratio, largest = figures
        what = ""
        if rms > 30:
            what = f"The inputs are of size {rms:.3g} (root mean square)."
        elif rms > 3 and ratio > 10:
            what = f"The inputs lie around a mean that is {ratio:.3g} times their spread (size {rms:.3g})."
        elif largest > 100:
            what = f"One feature of the inputs varies {largest:.3g} times as much as the median one."
        elif 0 < rms < 1e-2:
            what = f"The inputs are of size {rms:.2g} (root mean square)."
        if what:
            how = " (divide images by 255)" if 30 < rms < 255 else ""
            yield Look(
                e.grade(),
                "data",
                "scale",
                rms,
                what,
                f"Weights and learning rates are made for inputs of size 1: scale the data to fill [{low:g}, {high:g}]."
                if bounded
                else "Weights and learning rates are made for inputs of size 1: subtract each feature's mean and "
                f"divide by its standard deviation{how}, both of the training set, or begin with a normalisation.",
            )
            return


def entry_figures(e: Evidence, name: str) -> tuple[float, float, float] | None:
    """Of what a module reads: root mean square, mean over spread, largest spread of a feature over the median one."""
    results = e.output.results()
    if (f"entry/{name}", "rows") not in results:
        return None
    rows = results[f"entry/{name}", "rows"].double()
    mean, square = results[f"entry/{name}", "x"] / rows, results[f"entry/{name}", "x_square"] / rows
    spread = (square - mean.square()).clamp(min=0).sqrt()
    rms = float(square.mean().sqrt())
    varying = spread[spread > 1e-6 * max(rms, 1e-30)]
    if len(varying) == 0 or not math.isfinite(rms):
        return None
    ratio = float(mean.square().mean().sqrt() / varying.square().mean().sqrt())
    return rms, ratio, float(varying.max() / varying.median())


@cause(Stage.DATA, _LECUN)
def narrow_range(e: Evidence) -> Iterator[Look]:
    """The data of a reconstruction fill less than a tenth of the bounded range of the output."""
    low, high = e.output.range
    spread, reach = e.out.get("x_std", 0.0), high - low
    if not e.reconstructs or not math.isfinite(reach) or e.out.get("outside", 0.0) > 0.001:
        return
    if 0 < 6 * spread < 0.1 * reach and e.out["far"] < 1e-5:
        yield Look(
            "error" if e.unlearnt(0.7) else e.grade("warning"),
            "data",
            "range",
            6 * spread / reach,
            f"The data fill about {6 * spread / reach:.1%} of [{low:g}, {high:g}], around {e.out['x_mean']:.3g}.",
            "In such a corner differences are small and so are gradients: scale the data so that they fill the range, "
            "e.g. by their minimum and maximum.",
        )
