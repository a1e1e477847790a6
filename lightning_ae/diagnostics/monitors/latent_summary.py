"""Figures of the latent from its sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ae.diagnostics.watch.counters import Key
from lightning_ae.metrics.latents import active_units, codebook_usage, effective_rank, perplexity
from lightning_ae.metrics.sparsity import lifetime_sparsity

#: Sums of which only the latest span says something.
FAST: tuple[Key, ...] = (("latent", "kl"), ("latent", "kl_rows"), ("mean", "within"), ("mean", "freedom"))


def has_kl(sums: Mapping[Key, Tensor]) -> bool:
    """Whether there were Gaussian codes."""
    return int(sums.get(("latent", "kl_rows"), torch.tensor(0))) > 0


def covariance(results: Mapping[Key, Tensor]) -> tuple[Tensor | None, Tensor]:
    """Of the latents, None for wide ones; and the variances."""
    rows = results["latent", "rows"].double()
    mean = results["z", "sum"] / rows
    variance = _variance(square(results) / rows, mean)
    if ("z", "cross") not in results:
        return None, variance
    matrix = results["z", "cross"] / rows - mean[:, None] * mean
    varies = variance > 0
    matrix = torch.where(varies[:, None] & varies, matrix, torch.zeros_like(matrix))
    return matrix, variance


def square(results: Mapping[Key, Tensor]) -> Tensor:
    """Sum of the squares of each latent."""
    return results["z", "cross"].diagonal() if ("z", "cross") in results else results["z", "square"]


def unread(results: Mapping[Key, Tensor]) -> Tensor:
    """Which latents vary and get no gradient, ``(D,)`` bool."""
    _, variance = covariance(results)
    if int(results.get(("latent", "read_steps"), torch.tensor(0))) == 0:
        return torch.zeros_like(variance, dtype=torch.bool)
    # gradients by a latent's own spread: a rescaled latent is read as much
    weighted = results["latent", "read"] * variance
    return (variance > 0) & (weighted <= 1e-12 * weighted.max())


def summary(results: Mapping[Key, Tensor], recent: Mapping[Key, Tensor]) -> dict[str, float]:
    """All figures that apply, by name.

    Args:
        results: sums over the horizon.
        recent: those of the latest steps alone, for what changes fast.
    """
    values: dict[str, float] = {}
    if ("latent", "codes") in results:
        counts = results["latent", "codes"].double()
        values["codebook_usage"] = float(codebook_usage(counts))
        values["perplexity"] = float(perplexity(counts))
        outside = int(results["latent", "codes_outside"])
        if outside:
            rank_zero_warn(f"latent: {outside} indices are not below num_codes = {len(counts)}, and were left out.")
    if has_kl(recent):
        values["kl"] = float((recent["latent", "kl"] / recent["latent", "kl_rows"].double()).sum())
    if int(results.get(("latent", "nonfinite"), torch.tensor(0))):
        values["nonfinite_rows"] = float(results["latent", "nonfinite"])
    rows = int(results.get(("latent", "rows"), torch.tensor(0)))
    if rows == 0:
        return values
    fired = results["latent", "fired"]
    values |= {
        "l0": float(fired.sum()) / rows,
        "l1": float(results["z", "abs"].sum()) / rows,
        "dead_fraction": float((fired == 0).double().mean()),
        "always_on_fraction": float((fired == rows).double().mean()),
        "samples": float(rows),
    }
    shaped = int(results.get(("latent", "shaped"), torch.tensor(0)))
    for name in ("hoyer", "gini", "population_sparsity"):
        if shaped:
            values[name] = float(results["latent", name]) / shaped
    if rows > 1 and int(fired.sum()) > 0:
        lifetimes = lifetime_sparsity(results["z", "abs"] / rows, square(results) / rows, rows)
        values["lifetime_sparsity"] = float(lifetimes.nanmean())
    matrix, variance = covariance(results)
    freedom = int(recent.get(("mean", "freedom"), torch.tensor(0)))
    if freedom:
        variance = recent["mean", "within"] / freedom
    values["active_units"] = float(active_units(variance))
    if matrix is not None:
        values["effective_rank"] = float(effective_rank(matrix))
    if int(results.get(("latent", "read_steps"), torch.tensor(0))):
        values["unread_fraction"] = float(unread(results).double().mean())
    return values


def _variance(mean_square: Tensor, mean: Tensor) -> Tensor:
    """Mean of the squares less the square of the mean; 0 where that is rounding, of numbers in single precision."""
    variance = mean_square - mean.square()
    return torch.where(variance > 1e-12 * mean_square, variance, torch.zeros_like(variance))
