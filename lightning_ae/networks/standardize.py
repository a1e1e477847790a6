"""Standardising what a layer reads, or undoing it in what a layer gives, with statistics that checkpoints keep.

Both are hooks on the layer and buffers in it: its type, its weights and their names stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

#: Rows of which the statistics of the input are taken.
ROWS = 1000
#: Spreads of features that differ by more are evened out one by one, others together: a pixel that is hardly ever on
#: is no reason to make much of it.
MOST_APART = 100.0
_CHANNELS_FIRST = {
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
    nn.ConvTranspose1d: -2,
    nn.ConvTranspose2d: -3,
    nn.ConvTranspose3d: -4,
}
_INPUT = ("input_count", "input_mean", "input_square")
_OUTPUT = ("output_mean", "output_std")
#: Where layers say how many features they read.
_SIZES = ("in_features", "in_channels", "input_size")


def standardize_input(layer: nn.Module, features: int) -> None:
    r"""Let a layer read :math:`(x - \mu) / \sigma` in place of :math:`x`, from now on.

    :math:`\mu` is the mean of each feature over the first thousand rows seen in training (whole batches), then fixed;
    :math:`\sigma` the spread of all features together, or each feature's own where the largest is more than 100 times
    the median one. A row is an example; of a sequence or an image, a position. Without any row seen the input stays as
    it is. Statistics are buffers of the layer; with several ranks they are those of the first one's rows.

    Args:
        layer: a linear, recurrent or convolutional layer; features are on the channels of convolutions, else on the
            last axis.
        features: how many there are.

    Raises:
        ValueError: if ``features`` is not positive or not what the layer reads, or its input is standardised already.

    Source: LeCun et al. 1998, Efficient BackProp, section 4.3.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> standardize_input(layer, 2)
        >>> _ = layer(torch.tensor([[100.0, 7.0], [300.0, 7.0]]))
        >>> layer.input_mean
        tensor([200.,   7.])
    """
    if features < 1:
        raise ValueError(f"features: expected a positive number, got {features}.")
    reads = next((n for name in _SIZES if isinstance(n := getattr(layer, name, None), int) and n > 0), features)
    if reads != features:
        raise ValueError(f"features: this {type(layer).__name__} reads {reads}, got {features}.")
    if hasattr(layer, "input_mean"):
        raise ValueError(f"layer: the input of this {type(layer).__name__} is standardised already.")
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.zeros(()))
    # whole numbers, as half precision could not count to a thousand
    layer.register_buffer("input_count", torch.zeros((), dtype=torch.int64, device=like.device))
    for name in _INPUT[1:]:
        layer.register_buffer(name, torch.zeros(features, device=like.device))
    layer.register_forward_pre_hook(_standardize, with_kwargs=True)


def restore_output_scale(layer: nn.Module, mean: float = 0.0, std: float = 1.0) -> None:
    r"""Let a layer give :math:`\sigma a + \mu` in place of its output :math:`a`, from now on.

    A network whose weights are made for numbers of size 1 so predicts targets of any scale, in their own units.

    Args:
        layer: the last one, whose output is a tensor.
        mean: :math:`\mu`, that of the targets.
        std: :math:`\sigma`, their standard deviation.

    Raises:
        ValueError: if ``std`` is not positive, or the layer's output is scaled already.

    Source: LeCun et al. 1998, Efficient BackProp, section 4.5.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> a = layer(torch.ones(1, 2))
        >>> restore_output_scale(layer, 1000.0, 10.0)
        >>> torch.equal(layer(torch.ones(1, 2)), 10 * a + 1000)
        True
    """
    if not std > 0:
        raise ValueError(f"std: expected a positive number, got {std}.")
    if hasattr(layer, "output_std"):
        raise ValueError(f"layer: the output of this {type(layer).__name__} is scaled already.")
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.zeros(()))
    for name, value in zip(_OUTPUT, (mean, std), strict=True):
        layer.register_buffer(name, torch.tensor(value, device=like.device))
    layer.register_forward_hook(_unstandardize)


def restore_scaling(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make a new model ready for the weights of one whose layers were standardised.

    Args:
        model: as it was built, before ``load_state_dict``.
        state: the weights to be loaded; layers of other names are passed over.

    Example:
        >>> old, new = nn.Sequential(nn.Linear(2, 1)), nn.Sequential(nn.Linear(2, 1))
        >>> standardize_input(old[0], 2)
        >>> restore_scaling(new, old.state_dict())
        >>> new.load_state_dict(old.state_dict())
        <All keys matched successfully>
    """
    modules = dict(model.named_modules())
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        layer = modules.get(owner)
        if layer is None or hasattr(layer, last):
            continue
        if last == "input_mean" and name.replace("input_mean", "input_count") in state:
            standardize_input(layer, len(value))
        elif last == "output_std":
            restore_output_scale(layer)


def _standardize(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    name = None if args else next((name for name in ("input", "x") if name in kwargs), None)
    given = args[0] if args else kwargs.get(name or "")
    x = given.data if isinstance(given, PackedSequence) else given
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return args, kwargs
    dim = next((axis for kind, axis in _CHANNELS_FIRST.items() if isinstance(layer, kind)), -1)
    x = _standardized(layer, x, dim)
    new = given._replace(data=x) if isinstance(given, PackedSequence) else x
    return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})


def _standardized(layer: nn.Module, x: Tensor, dim: int) -> Tensor:
    count, mean, square = (layer.get_buffer(name) for name in _INPUT)
    if layer.training:
        with torch.no_grad():
            rows = x.detach().to(mean.dtype).movedim(dim, -1).reshape(-1, x.shape[dim])
            new_mean = rows.mean(0)
            new_square = (rows - new_mean).square().mean(0)
            # merged about the means, which is exact for data far from 0; nothing is read from the device
            share = torch.where(count < ROWS, len(rows) / (count + len(rows)), 0.0)
            apart = new_mean - mean
            square.copy_(square + share * (new_square - square) + share * (1 - share) * apart.square())
            mean.add_(share * apart)
            count.add_(torch.where(count < ROWS, len(rows), 0))
    own = square.sqrt()
    together = square.mean().sqrt()
    varying = own > 1e-6 * mean.abs().clamp(min=1e-30)
    middle = torch.where(varying, own, torch.nan).nanmedian()
    apart_by = own.max() > MOST_APART * middle
    spread = torch.where(apart_by, torch.where(varying, own, 1.0), together)
    known = (count > 0) & varying.any()
    scale = torch.where(known, spread, 1.0).clamp(min=1e-30)
    shift = torch.where(known, mean, 0.0)
    moved = x.movedim(dim, -1)
    return ((moved - shift) / scale).movedim(-1, dim).to(x.dtype)


def _unstandardize(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    mean, std = (layer.get_buffer(name) for name in _OUTPUT)
    # under autocast the output is of half precision, in which numbers far from 0 lie far apart
    return output.to(torch.promote_types(output.dtype, std.dtype)) * std + mean
