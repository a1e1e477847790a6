"""How figures are written, and what their names mean."""

from __future__ import annotations

import inspect
import math
from typing import Any

from lightning_ae.diagnostics.causes import CAUSES

#: What the columns of the tables say; also their order.
COLUMNS = {
    "activation": ("kind", "which activation"),
    "units": ("units", "channels or features"),
    "dead": ("dead", "units that never fired"),
    "frequency": ("fires", "share of outputs above 0, of the median unit"),
    "flat": ("flat", "share of elements with (nearly) no slope"),
    "transmission": ("passes", "gradient norm before the activation over that after it"),
    "gradient norm": ("gradient", "root mean square of the norm of the gradient"),
    "update ratio": ("update", "norm of a step over that of the weights; about 0.001 is healthy"),
    "n": ("n", "examples looked at"),
}
SHARES = {"frequency", "flat"}
#: What the figures of latent and output mean.
MEANINGS = {
    "l0": "latents that are on in an example, on average",
    "l1": "sum of the sizes of the latents, on average",
    "kl": "KL divergence from the prior, in nats, summed over the latents",
    "dead_fraction": "share of latents that were never on",
    "always_on_fraction": "share of latents that were on in every example",
    "unread_fraction": "share of latents that vary and get no gradient",
    "active_units": "latents whose variance over the data is above 0.01",
    "effective_rank": "how many directions the latents use",
    "hoyer": "sparsity of a code, 0 dense to 1 one-hot",
    "gini": "inequality of the sizes in a code, 0 to 1",
    "population_sparsity": "Treves-Rolls sparsity over the latents of an example",
    "lifetime_sparsity": "Treves-Rolls sparsity of a latent over the examples",
    "codebook_usage": "share of codes in use",
    "perplexity": "how many codes are used, as if equally often",
    "nonfinite_rows": "examples whose code is not finite",
    "samples": "examples looked at",
    "loss": "mean over the last batches looked at",
    "nonfinite_losses": "losses that were NaN or infinite",
    "value": "of the main comparison",
    "relative": "loss over that of the best constant: 1 knows nothing, 0 is perfect",
    "fvu": "fraction of variance unexplained: 1 for the mean, 0 for a perfect prediction",
    "spread": "variance of the output over that of the targets; 0 for a constant",
    "contrast": "how much the mean output varies over an event, relative to the targets' mean",
    "outside": "share of the targets that the output cannot reach",
    "nonfinite_data": "share of the targets that are NaN or infinite",
    "x_mean": "mean of the targets",
    "x_std": "standard deviation of the targets",
    "x_hat_mean": "mean of the output",
    "classes": "classes that were seen",
    "largest_class": "share of the most frequent class: what always saying it would get right",
    "label_entropy": "cross-entropy of the best constant, in nats",
    "accuracy": "share of examples whose class is right",
    "output_ratio": "gradient at the output over the error there; 1 is healthy",
    "starved": "share of wrong outputs that get less than 1 % of their error as gradient",
    "starved_fraction": "share of wrong outputs that get less than 1 % of their error as gradient",
}
#: Figures of the output that causes read and that tell a person nothing.
INNER = {
    "beyond",
    "far",
    "binary",
    "below_zero",
    "above_one",
    "one_in_a_row",
    "several_in_a_row",
    "columns",
    "x_variance",
}


def number(value: Any) -> str:
    """Four significant digits, thousands apart.

    Example:
        >>> number(0.000123456), number(60000), number(float("nan"))
        ('0.0001235', '60,000', 'nan')
    """
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def cell(column: str, value: Any) -> str:
    """A figure of a table in few characters.

    Example:
        >>> cell("frequency", 0.1234), cell("transmission", 0.000123456), cell("dead", 12), cell("flat", None)
        ('12%', '0.000123', '12', '')
    """
    if value is None:
        return ""
    if column in SHARES and isinstance(value, float) and math.isfinite(value):
        percent = 100 * value
        return f"{percent:.0f}%" if percent >= 10 or percent == 0 else f"{percent:.2g}%"
    return f"{value:.3g}" if isinstance(value, float) else number(value)


def columns(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the figures in any of the rows, in the order of :data:`COLUMNS`."""
    there = list(dict.fromkeys(name for row in rows.values() for name in row))
    return [name for name in COLUMNS if name in there] + [name for name in there if name not in COLUMNS]


def title(cause: str) -> str:
    """The name of a cause as words.

    Example:
        >>> title("learning_rate_high"), title("bce_target_range")
        ('Learning rate high', 'BCE target range')
    """
    words = cause.replace("_", " ").strip() or "finding"
    words = words[:1].upper() + words[1:]
    return "BCE" + words[3:] if words.startswith("Bce ") else words


def definition(cause: str) -> tuple[str, str]:
    """What a cause is, in full, and its source; empty for one that is not known here."""
    declared = CAUSES.get(cause)
    return ("", "") if declared is None else (inspect.cleandoc(declared.definition), declared.source)
