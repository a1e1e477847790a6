"""What a layer of any model puts out, collected into shards on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ae.checks import check_one_of, check_type, check_whole, describe_type
from lightning_ae.data.shard_writer import ShardWriter
from lightning_ae.data.shards import ActivationShards
from lightning_ae.hooks import Forward, activation, call, check_batches, find_layer, to_device_of, to_rows, undisturbed

#: Dimensions that a tensor can have.
_MOST_DIMS = 64
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def collect_activations(
    model: nn.Module,
    layer: str,
    batches: Iterable[Any],
    out_dir: str | Path,
    *,
    dtype: Literal["float16", "bfloat16", "float32"] = "float32",
    mask_fn: Callable[[Any], Tensor] | None = None,
    feature_dim: int = -1,
    shard_rows: int = 65_536,
    forward: Forward = call,
) -> ActivationShards:
    r"""Run a model up to a layer and write what the layer puts out, a row for each example and position.

    Each forward pass ends at the layer's first call. Modules are in evaluation mode, without gradients, and afterwards
    in the mode they were in. Memory holds one shard (two while it is written) and one batch.

    **Interrupted runs go on**: call it again with the same arguments. A shard gets its name only when it is whole and
    on the disk, and counts from when the manifest lists it; batches whose rows are in such shards are drawn from
    ``batches`` and skipped. So even ``kill -9`` loses at most the shard in flight, and the result is that of an
    uninterrupted run, **provided that** ``batches`` **come in the same order again**. This is checked on the first
    batch of each shard, and the model on a sample of its weights. A finished folder is returned as it is.

    Args:
        model: any module, also of Hugging Face; batches go to the device of its first parameter.
        layer: dotted name of a module in it, as ``model.named_modules()`` gives it; of a tuple that it returns, the
            first tensor is taken. ``""`` is the model itself.
        batches: a loader, a list or any other iterable. A mapping is called as ``model(**batch)``, of a tuple or list
            the first item is given to the model.
        out_dir: folder for the shards; made if need be.
        dtype: in which rows are stored.
        mask_fn: from a batch to what to keep, of the shape of the layer's output without its features. For
            padded tokens ``lambda batch: batch["attention_mask"]``.
        feature_dim: the dimension of the layer's output that makes a row; -1 for ``(B, D)`` and tokens ``(B, T, D)``,
            1 for the channels of maps ``(B, C, H, W)``.
        shard_rows: rows in a shard, at least; a batch is not split.
        forward: runs the model on a batch, if not as above.

    Returns:
        The shards, mapped into memory. ``rows`` gives ``(N, D)``, and ``index`` example and position of each row.

    Raises:
        ValueError: if there is no such layer (the message has near names) or it is never called; if a mask has another
            shape; if activations are not finite or exceed ``float16``; if the folder was collected with other settings
            or batches, or no row is left.
        TypeError: if the layer returns no tensor.
        ModuleNotFoundError: if safetensors is not installed (``pip install "lightning-ae[activations]"``).

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10))
        >>> tokens = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])  # 0 is padding
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = collect_activations(model, "1", [tokens], folder, mask_fn=lambda batch: batch != 0)
        ...     len(shards), shards.num_features, shards.index(torch.tensor([3, 4])).tolist()
        (5, 4, [[1, 0], [1, 1]])
    """
    check_type("model", model, nn.Module)
    check_type("layer", layer, str)
    check_type("out_dir", out_dir, str, Path)
    check_batches(batches)
    for name, function in (("mask_fn", mask_fn), ("forward", forward)):
        if not callable(function) and (function is not None or name == "forward"):
            raise TypeError(f"{name}: expected a function, got {describe_type(function)}.")
    check_one_of("dtype", dtype, DTYPES)
    shard_rows = check_whole("shard_rows", shard_rows)
    feature_dim = check_whole("feature_dim", feature_dim, least=-_MOST_DIMS, most=_MOST_DIMS)
    module = find_layer(model, layer)
    settings = {"layer": layer, "dtype": dtype, "feature_dim": feature_dim, "shard_rows": shard_rows}
    settings |= {"masked": mask_fn is not None, "model": _fingerprint_of_model(model)}
    writer = ShardWriter(Path(out_dir), settings, shard_rows)
    if writer.manifest["complete"]:
        return ActivationShards(out_dir)
    done = writer.manifest["batches"]
    known = {shard["first_batch"]: shard["fingerprint"] for shard in writer.manifest["shards"]}
    number = -1
    with undisturbed(model):
        for number, batch in enumerate(batches):
            if number in known and fingerprint(batch) != known[number]:
                raise ValueError(
                    f"batches: number {number} is not what it was when {out_dir} was begun; give the same batches in "
                    "the same order (a fixed seed, no shuffling), or choose another folder"
                )
            if number < done:
                continue
            here = to_device_of(model, batch)
            output = activation(model, module, here, forward)
            rows, index = _kept(output, None if mask_fn is None else mask_fn(here), feature_dim)
            index[:, 0] += writer.examples
            writer.add(_stored(rows, dtype, number), index, len(output), partial(fingerprint, batch))
    if number + 1 < done:
        raise ValueError(f"batches: {done} of them are in {out_dir} already, but only {number + 1} were given")
    writer.finish()
    if not writer.manifest["rows"]:
        raise ValueError(f"batches: expected some to leave rows, got {number + 1} batches and none")
    return ActivationShards(out_dir)


def _kept(output: Tensor, mask: Tensor | None, feature_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of an output, and example and position of each."""
    rows = to_rows(output, feature_dim)
    lead = output.movedim(feature_dim, -1).shape[:-1]
    if mask is None:
        return rows, torch.ones(lead, dtype=torch.bool).nonzero()
    if mask.shape != lead:
        raise ValueError(
            f"mask_fn: expected {tuple(lead)} for an output {tuple(output.shape)}, got {tuple(mask.shape)}"
        )
    mask = mask.bool()
    return rows[mask.flatten().to(rows.device)], mask.nonzero().cpu()


def _stored(rows: Tensor, dtype: str, number: int) -> Tensor:
    """A copy in the stored dtype on the host; an error if something in it is not finite."""
    stored = rows.to("cpu", DTYPES[dtype], copy=True)
    # a sum hides neither NaN nor infinity; it may overflow by itself, so that a closer look follows
    if not stored.sum(dtype=torch.float32).isfinite() and not stored.isfinite().all():
        if rows.isfinite().all():
            raise ValueError(
                f"dtype: batch {number} has activations up to {rows.abs().max():.3g}, too much for {dtype}"
            )
        raise ValueError(f"model: the layer puts out NaN or infinity for batch {number}; a mask_fn leaves padding out")
    return stored


def fingerprint(batch: Any) -> str:
    """A hash that tells one batch from another: of the tensors, strings and numbers in it.

    Args:
        batch: tensors, strings and numbers in tuples, lists and mappings; whatever else is in them is left out.

    Returns:
        Hexadecimal digits.

    Example:
        >>> fingerprint([torch.zeros(2), "a"]) == fingerprint([torch.zeros(2), "b"])
        False
    """
    digest = hashlib.sha256()
    leaves = pytree.tree_leaves(dict(batch) if hasattr(batch, "keys") else batch)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode() + _bytes(leaf))
        elif isinstance(leaf, (str, int, float)):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:32]


def _fingerprint_of_model(model: nn.Module) -> str:
    """The first numbers of each parameter: cheap for any size, and no two trained models share them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(_bytes(parameter.flatten()[:64].float()))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> bytes:
    out: bytes = tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
    return out
