"""What a network loses when one of its layers hears a reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_type, check_whole, describe_type
from lightning_ae.hooks import (
    Forward,
    call,
    check_batches,
    find_layer,
    first_tensor,
    from_rows,
    to_device_of,
    to_rows,
    undisturbed,
    with_first_tensor,
)


class LossRecovered(NamedTuple):
    r"""Downstream losses, and the share :math:`(L_\text{ablate} - L_\text{splice})/(L_\text{ablate} - L_\text{clean})`.

    Attributes:
        recovered: 1 if splicing costs nothing, 0 if it is as bad as ablation; NaN if ablation costs nothing.
        clean: mean loss of the network as it is.
        splice: with the layer's output replaced.
        ablate: with the layer's output put out of action.
    """

    recovered: float
    clean: float
    splice: float
    ablate: float


def loss_recovered(
    model: nn.Module,
    layer: str,
    splice: Callable[[Tensor], Tensor],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    ablate: Literal["zero", "mean"] | Tensor = "zero",
    feature_dim: int = -1,
    mask_fn: Callable[[Any], Tensor] | None = None,
    forward: Forward = call,
) -> LossRecovered:
    r"""Downstream loss recovered: :math:`\frac{L_\text{ablate} - L_\text{splice}}{L_\text{ablate} - L_\text{clean}}`.

    Each batch is run three times: as it is, with the layer's output replaced by ``splice`` of it, and with it replaced
    by a constant.

    Args:
        model: the network from which the activations are.
        layer: dotted name of the module whose output is replaced; of a tuple, the first tensor.
        splice: from rows ``(N, D)`` to rows, ``dictionary.reconstruct`` say.
        batches: as for ``collect_activations``.
        loss: from what the model returns and the batch to its loss: of each example or token, any shape, or the
            mean over the batch's examples, ``()``.
        ablate: ``"zero"``; a vector ``(D,)``, such as ``ActivationShards(folder).mean``; or ``"mean"``, the mean over
            the rows of each batch.
        feature_dim: as for ``collect_activations``.
        mask_fn: from a batch to which rows are replaced, of the shape of the layer's output without its features. The
            others, padding say, stay as they are.
        forward: runs the model on a batch, if not as its kind suggests.

    Returns:
        The share, and the three losses in units of ``loss``.

    Raises:
        ValueError: if there is no such layer or it is never called, ``splice`` gives rows of another shape, ``ablate``
            is something else, or there are no batches.

    Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features; Gao et al. 2024,
    https://arxiv.org/abs/2406.04093, section 4.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(20, 4), torch.randint(3, (20,)))]
        >>> loss_recovered(
        ...     model, "1", lambda rows: rows, batches,
        ...     lambda logits, batch: nn.functional.cross_entropy(logits, batch[1], reduction="none"),
        ... ).recovered
        1.0
    """
    check_type("model", model, nn.Module)
    feature_dim = check_whole("feature_dim", feature_dim, least=-64, most=64)
    check_batches(batches)
    for name, function in (("splice", splice), ("loss", loss), ("forward", forward), ("mask_fn", mask_fn)):
        if not callable(function) and (function is not None or name != "mask_fn"):
            raise TypeError(f"{name}: expected a function, got {describe_type(function)}.")
    if not isinstance(ablate, (Tensor, str)):
        raise TypeError(f"ablate: expected 'zero', 'mean' or a vector, got {describe_type(ablate)}.")
    if isinstance(ablate, str) and ablate not in ("zero", "mean"):
        raise ValueError(f"ablate: expected 'zero', 'mean' or a vector, got {ablate!r}")
    module = find_layer(model, layer)

    def spliced(rows: Tensor) -> Tensor:
        if (out := splice(rows)).shape != rows.shape:
            raise ValueError(f"splice: expected rows {tuple(rows.shape)}, got {tuple(out.shape)}")
        return out

    def ablated(rows: Tensor) -> Tensor:
        if isinstance(ablate, Tensor):
            if ablate.shape not in ((), rows.shape[1:]):
                raise ValueError(f"ablate: expected a vector ({rows.shape[1]},), got {tuple(ablate.shape)}.")
            return ablate.to(rows).expand_as(rows)
        return rows.mean(0, keepdim=True).expand_as(rows) if ablate == "mean" else torch.zeros_like(rows)

    sums = torch.zeros(4, dtype=torch.float64)  # clean, splice, ablate, and how many
    with undisturbed(model):
        for batch in batches:
            here = to_device_of(model, batch)
            keep = None if mask_fn is None else mask_fn(here)
            for place, edit in enumerate((None, spliced, ablated)):
                values = loss(_run(model, module, here, edit, keep, feature_dim, forward), here).detach()
                number = values.numel() if values.ndim else _examples(batch)
                sums[place] += values.double().mean().item() * number
            sums[3] += number
    if not sums[3]:
        raise ValueError("batches: expected some, got none")
    clean, splice_loss, ablate_loss = (sums[:3] / sums[3]).tolist()
    gap = ablate_loss - clean
    return LossRecovered((ablate_loss - splice_loss) / gap if gap else float("nan"), clean, splice_loss, ablate_loss)


def _run(
    model: nn.Module,
    module: nn.Module,
    batch: Any,
    edit: Callable[[Tensor], Tensor] | None,
    keep: Tensor | None,
    feature_dim: int,
    forward: Forward,
) -> Any:
    """The model's output with each output of a module edited."""
    if edit is None:
        return forward(model, batch)
    calls = 0

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        old = first_tensor(output)
        rows = to_rows(old, feature_dim)
        if keep is None:
            new = edit(rows)
        else:
            where = keep.bool().flatten().to(rows.device)
            new = rows.clone()
            new[where] = edit(rows[where]).to(rows.dtype)
        return with_first_tensor(output, from_rows(new, old, feature_dim))

    handle = module.register_forward_hook(replace)
    try:
        out = forward(model, batch)
    finally:
        handle.remove()
    if not calls:
        raise ValueError("layer: the model's forward pass never called it")
    return out


def _examples(batch: Any) -> int:
    """Examples in a batch: the first dimension of the first tensor in it."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if hasattr(batch, "values") else batch))
    return len(batch)
