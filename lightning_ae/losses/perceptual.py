"""Losses in a feature space: what a frozen network, or an edge filter, sees."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.checks import check_floating, check_one_of, check_seed, check_sequence, check_type
from lightning_ae.losses.base import ActivatedLoss, Activation
from lightning_ae.rebuildable import Rebuildable

Features: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class FrozenModule(nn.Module):
    """Holds a module that is used but not trained: no parameters, nothing in checkpoints, always in eval mode.

    It still follows ``.to(device)``. Its weights are constants to the optimizer, to DDP and to ``state_dict``.

    Args:
        module: the module; its parameters stop requiring gradients.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # in a tuple, so that it is no submodule
        self._held = (module.eval().requires_grad_(False),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModule:
        # to the device, and to float64, but never to half precision: losses are computed in full
        held = self._held[0]
        tensors = sorted(itertools.chain(held.parameters(), held.buffers()), key=torch.is_floating_point, reverse=True)
        for tensor in tensors[:1]:
            there = fn(tensor.new_empty(0))
            held.to(there.device, there.dtype if there.dtype in (torch.float32, torch.float64) else None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def module(self) -> nn.Module:
        """The module held."""
        return self._held[0]

    def forward(self, *args: Any) -> Any:
        """Call it."""
        return self._held[0](*args)


class FeatureLoss(ActivatedLoss):
    r"""Squared distance of features :math:`\|\Phi x - \Phi\hat x\|^2`, for any frozen module :math:`\Phi`.

    Summed over all features, of every layer if :math:`\Phi` gives several. For a linear :math:`\Phi` it is squared
    error in another metric; for a trained network it counts what that network sees.

    Args:
        features: :math:`\Phi`, from ``(B, *event)`` to a tensor or a list or dict of tensors ``(B, ...)``. It is
            frozen, stays in eval mode and is not saved in checkpoints.
        activation: output activation: ``"identity"``, ``"sigmoid"``, ``"tanh"`` or ``"relu"``.

    Shapes:
        ``params`` and ``x``: ``(B, *event)``; the loss ``(B,)``.

    Raises:
        TypeError: if ``features`` is no module.
        ValueError: if the activation has another name.

    Source: Johnson, Alahi & Fei-Fei 2016, https://arxiv.org/abs/1603.08155.

    Example:
        >>> FeatureLoss(ImageGradients())(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))  # no edges in either
        tensor([0.])
    """

    def __init__(self, features: nn.Module, activation: Activation = "identity") -> None:
        super().__init__(activation)
        check_type("features", features, nn.Module)
        self.features = FrozenModule(features)

    def check(self, x: Tensor) -> None:
        """Let the features check the targets, if they have a ``check`` of their own."""
        check = getattr(self.features.module, "check", None)
        if callable(check):
            check(x)

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """Squared distance in the feature space, ``(B,)``."""
        params, x = self._prepare(params, x)
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                target = _tensors(self.features(x))
            distances = [
                (ours - theirs).flatten(1).square().sum(1)
                for ours, theirs in zip(_tensors(self.features(self.mean(params))), target, strict=True)
            ]
        return torch.stack(distances).sum(0)


def load_weights(path: str | Path, take: Callable[[dict[str, Tensor]], Any]) -> None:
    """Read a ``state_dict`` from a file, without running anything in it.

    Args:
        path: the file.
        take: what is called with it.

    Raises:
        ValueError: if it cannot be read, or does not fit.
    """
    try:
        take(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged zip or pickle fails in every possible way
        raise ValueError(f"weights: {path} does not hold the network's state_dict: {error}") from error


def _tensors(features: Features) -> Iterable[Tensor]:
    if isinstance(features, Tensor):
        return [features]
    return list(features.values()) if isinstance(features, Mapping) else features


class ImageGradients(Rebuildable, nn.Module):
    r"""Edges of an image: first differences, or Sobel's filter, of each channel along each side.

    Args:
        kernel: ``"difference"`` for :math:`x_{i+1} - x_i`, or ``"sobel"`` for Sobel's 3×3 filter divided by 8, which
            estimates the same slope with less noise. Only inner points, so borders are no edges.

    Shapes:
        ``(B, C, H, W)`` to two tensors, along H and along W: ``(B, C, H - 1, W)`` and ``(B, C, H, W - 1)``, for Sobel
        ``(B, C, H - 2, W - 2)`` twice. In units of ``x`` per pixel.

    Raises:
        ValueError: if the kernel has another name, or the input is no image.

    Source: Sobel & Feldman 1968; Gonzalez & Woods, Digital Image Processing, section 10.2.

    Example:
        >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> [edges.mean().item() for edges in ImageGradients("sobel")(ramp)]
        [0.0, 1.0]
    """

    sobel: Tensor

    def __init__(self, kernel: Literal["difference", "sobel"] = "difference") -> None:
        super().__init__()
        self.kernel = check_one_of("kernel", kernel, ("difference", "sobel"))
        down = torch.tensor([[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]]) / 8
        self.register_buffer("sobel", torch.stack([down, down.t()])[:, None], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes along H and along W."""
        check_floating("x", x)
        if x.ndim != 4:
            raise ValueError(f"x: ImageGradients: expected images (B, C, H, W), got {tuple(x.shape)}.")
        if self.kernel == "difference":
            return x.diff(dim=2), x.diff(dim=3)
        slopes = functional.conv2d(x.flatten(0, 1)[:, None], self.sobel.to(x.dtype))
        slopes = slopes.reshape(*x.shape[:2], *slopes.shape[1:])
        return slopes[:, :, 0], slopes[:, :, 1]


class TorchvisionFeatures(Rebuildable, nn.Module):
    r"""Activations inside a torchvision network, for images in [0, 1].

    Images are repeated to three channels if they have one, and normalised as ImageNet's were.

    Args:
        model: name of a torchvision classification model, e.g. ``"vgg16"``.
        layers: names of its nodes whose activations are wanted, e.g. ``("features.3", "features.8")``;
            ``torchvision.models.feature_extraction.get_graph_node_names`` lists them.
        weights: a local file with the model's ``state_dict``; the name of torchvision weights, which are downloaded,
            e.g. ``"DEFAULT"``; or None for random ones, which still compare textures.
        seed: draws the random weights, the same ones each time.

    Shapes:
        ``(B, 1 or 3, H, W)`` to one tensor ``(B, ...)`` for each layer.

    Raises:
        ValueError: if the model or a layer is unknown, ``layers`` is no sequence of names or empty, or the input has
            other than 1 or 3 channels.

    Source: Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556; Gatys, Ecker & Bethge 2015,
    https://arxiv.org/abs/1508.06576.

    Example:
        >>> features = TorchvisionFeatures("squeezenet1_1", layers=("features.1", "features.4"))
        >>> [tuple(f.shape) for f in features(torch.rand(2, 1, 32, 32))]
        [(2, 64, 15, 15), (2, 128, 7, 7)]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, layers: Sequence[str], weights: str | Path | None = None, seed: int = 0) -> None:
        super().__init__()
        from torchvision import models
        from torchvision.models.feature_extraction import create_feature_extractor

        check_type("model", model, str)
        seed = check_seed("seed", seed)
        self.layers = tuple(check_sequence("layers", layers, "names"))
        if not self.layers or not all(isinstance(name, str) for name in self.layers):
            raise ValueError(f"layers: expected a sequence of names, at least one, got {layers!r}.")
        check_type("weights", weights, str, Path, None)
        is_file = weights is not None and Path(weights).is_file()
        if isinstance(weights, Path) and not is_file:
            raise ValueError(f"weights: no file at {weights}.")
        try:
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
                network = models.get_model(model, weights=None if is_file else weights)
        except ValueError as error:
            raise ValueError(f"model: expected the name of one of torchvision's, got {model!r}.") from error
        except KeyError as error:
            raise ValueError(f"weights: neither a file nor weights of {model}: {weights}.") from error
        if is_file:
            load_weights(cast("str", weights), network.load_state_dict)
        for module in network.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # would overwrite the activations of the layer before
        self.network = create_feature_extractor(network.eval(), {name: name for name in self.layers})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def check(self, x: Tensor) -> None:
        """Warn unless images lie in [0, 1]."""
        low, high = float(x.amin()), float(x.amax())
        if low < -0.01 or high > 1.01:
            warnings.warn(
                f"TorchvisionFeatures: expected images in [0, 1], which are normalised as ImageNet's were, got values "
                f"from {low:.4g} to {high:.4g}: the network sees other contrasts than it was trained on.",
                stacklevel=3,
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Activations of the layers, in their order."""
        check_floating("x", x)
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x: TorchvisionFeatures: expected images (B, 1 or 3, H, W), got {tuple(x.shape)}.")
        activations = self.network((x.expand(-1, 3, -1, -1) - self.mean) / self.std)
        return [activations[name] for name in self.layers]
