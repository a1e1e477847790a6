"""Reading and replacing what a layer of any module puts out; shared by the rooms that collect and that splice."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name, as :meth:`torch.nn.Module.named_modules` gives it; ``""`` is the model itself.

    Args:
        model: any module.
        name: dotted path.

    Returns:
        The submodule.

    Raises:
        TypeError: if ``name`` is no string.
        ValueError: if there is none; the message has the names that are nearest.

    Example:
        >>> find_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "1")
        ReLU()
    """
    if not isinstance(name, str):
        raise TypeError(f"layer: expected the name of a module, got a {type(name).__name__}.")
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        return modules[name]
    names = [known for known in modules if known]
    ending = [known for known in names if known.endswith(f".{name}")]
    near = list(dict.fromkeys([*ending, *difflib.get_close_matches(name, names, n=5, cutoff=0.5)]))[:5] or names[:10]
    found = f"near it are {', '.join(map(repr, near))}" if near else "it has no submodules"
    raise ValueError(f"layer: {type(model).__name__} has no {name!r}; {found}")


def first_tensor(output: Any) -> Tensor:
    """The tensor itself, or the first one in a tuple, a list or a mapping (of Hugging Face, say).

    Args:
        output: what a module returned.

    Returns:
        The tensor.

    Raises:
        TypeError: if there is none at the top.
    """
    if isinstance(output, Tensor):
        return output
    for item in output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ():
        if isinstance(item, Tensor):
            return item
    raise TypeError(f"layer: expected it to return a tensor or a tuple with one, got a {type(output).__name__}")


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """What a module returned, with :func:`first_tensor` of it replaced.

    Args:
        output: what a module returned: a tensor, a tuple, a list or a mapping.
        tensor: to put in.

    Returns:
        The same kind of thing; a mapping is changed in place.
    """
    old = first_tensor(output)
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        output[next(key for key, item in output.items() if item is old)] = tensor  # type: ignore[index]
        return output
    items = [tensor if item is old else item for item in output]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def check_batches(batches: Any) -> None:
    """A ``TypeError`` for what gives no batches: a string, one tensor without dimensions, a mapping.

    Args:
        batches: a loader, a list or any other iterable.

    Example:
        >>> check_batches([torch.zeros(2, 3)])
    """
    scalar = isinstance(batches, (Tensor, np.ndarray)) and batches.ndim == 0
    if scalar or isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable, such as a loader, got a {type(batches).__name__}.")


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model as its kind of batch suggests: ``model(**batch)`` for a mapping, the first item of a tuple or list.

    Args:
        model: any module.
        batch: a tensor, a mapping (as Hugging Face's tokenizers give), or a tuple or list whose first item is x.

    Returns:
        What the model returns.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """The batch where the model's first parameter is.

    Args:
        model: any module.
        batch: tensors in tuples, lists and mappings; whatever else is in them is left alone.

    Returns:
        The same kind of thing.
    """
    first = next(model.parameters(), None)
    if first is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(first.device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device_of(model, item) for key, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device_of(model, item) for item in batch]
    return batch


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; at the end each module is in the mode in which it was.

    Args:
        model: any module.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Reached(BaseException):
    """Ends a forward pass; not an ``Exception``, which a model's own code might catch."""


def activation(model: nn.Module, layer: nn.Module, batch: Any, forward: Forward = call) -> Tensor:
    """What a layer puts out for a batch, at its first call; the forward pass ends there.

    Args:
        model: the model that contains it.
        layer: one of its modules.
        batch: given to ``forward``.
        forward: runs the model.

    Returns:
        The layer's output, or the first tensor of it.

    Raises:
        ValueError: if the forward pass never calls the layer.
        TypeError: if it returns no tensor.
    """
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(first_tensor(output))
        raise _Reached

    handle = layer.register_forward_hook(stop)
    try:
        forward(model, batch)
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError("layer: the model's forward pass never called it")


def to_rows(output: Tensor, feature_dim: int = -1) -> Tensor:
    """One row for each example and position: ``(B, T, D)`` to ``(B T, D)``, and with ``feature_dim=1`` maps, too.

    Args:
        output: what a layer put out.
        feature_dim: the dimension that makes a row; -1 for tokens, 1 for the channels of maps ``(B, C, H, W)``.

    Returns:
        ``(N, D)``.

    Raises:
        ValueError: if there is no such dimension beside the batch's.

    Example:
        >>> to_rows(torch.zeros(2, 3, 8, 8), feature_dim=1).shape
        torch.Size([128, 3])
    """
    if output.ndim < 2 or not -output.ndim < feature_dim < output.ndim or feature_dim == 0:
        raise ValueError(f"feature_dim: expected a dimension of {tuple(output.shape)} but the first, got {feature_dim}")
    return output.movedim(feature_dim, -1).flatten(0, -2)


def from_rows(rows: Tensor, like: Tensor, feature_dim: int = -1) -> Tensor:
    """The inverse of :func:`to_rows`, in the dtype of ``like``.

    Args:
        rows: ``(N, D)``.
        like: what the rows were made from.
        feature_dim: as in :func:`to_rows`.

    Returns:
        A tensor of the shape of ``like``.
    """
    moved = like.movedim(feature_dim, -1).shape
    return rows.reshape(moved).movedim(-1, feature_dim).to(like.dtype)
