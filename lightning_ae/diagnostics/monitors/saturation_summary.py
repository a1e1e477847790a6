"""Figures of saturation and of layers from their sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_ae.diagnostics.watch.counters import Key


def saturated_fraction(results: Mapping[Key, Tensor]) -> dict[str, float]:
    """Share of flat elements, by site."""
    return {
        site: int(results[site, "saturated"]) / int(count)
        for (site, field), count in results.items()
        if field == "elements" and int(count) > 0
    }


def transmission(results: Mapping[Key, Tensor]) -> dict[str, float]:
    """Norm of the gradient after over before each activation, by site."""
    return {
        # a difference of sums may fall below 0 by rounding
        site: math.sqrt(max(0.0, float(squares[0])) / float(squares[1]))
        for site, field in results
        if field == "gradients" and float((squares := results[site, field])[1]) > 0
    }


def per_layer(results: Mapping[Key, Tensor], layers: Sequence[str], above: str, below: str) -> dict[str, float]:
    """Root of the ratio of two sums, by layer; those without are left out."""
    if ("layers", above) not in results:
        return {}
    ratios = (results["layers", above] / results["layers", below]).sqrt().tolist()
    return {layer: ratio for layer, ratio in zip(layers, ratios, strict=True) if math.isfinite(ratio)}


def output_figures(results: Mapping[Key, Tensor]) -> tuple[float, float]:
    """Gradient over error at the output, and the share of wrong outputs that are starved; NaN if it is not known."""
    slopes, errors = results.get(("output", "sums"), torch.zeros(2)).tolist()
    if errors == 0:
        return math.nan, math.nan
    wrong = int(results["output", "wrong"])
    return slopes / errors, int(results["output", "starved"]) / wrong if wrong else 0.0


def summary(results: Mapping[Key, Tensor], layers: Sequence[str]) -> dict[str, float]:
    """All of it by name: in all, then by site and layer."""
    saturated, passed = saturated_fraction(results), transmission(results)
    norms = per_layer(results, layers, "grad", "grad_steps")
    updates = per_layer(results, layers, "update", "weight")
    ratio, starved = output_figures(results)
    values = {"output_ratio": ratio, "starved_fraction": starved}
    if saturated:
        elements = {site: int(results[site, "elements"]) for site in saturated}
        flat = sum(saturated[site] * elements[site] for site in saturated)
        values["saturated_fraction"] = flat / sum(elements.values())
    if passed:
        values["lowest_transmission"] = min(passed.values())
    if norms:
        values["gradient_norm"] = math.sqrt(sum(norm**2 for norm in norms.values()))
    for what, found in {
        "saturated_fraction": saturated,
        "transmission": passed,
        "gradient_norm": norms,
        "update_ratio": updates,
    }.items():
        values.update({f"{place}/{what}": value for place, value in found.items()})
    return values
