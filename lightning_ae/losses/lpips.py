"""LPIPS as a loss: the learned perceptual distance of torchmetrics, safe to train with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_one_of, check_seed, check_type
from lightning_ae.losses.base import ActivatedLoss, Activation, value_range
from lightning_ae.losses.perceptual import FrozenModule, load_weights

Net = Literal["alex", "squeeze", "vgg"]
#: Shortest side that is left with a pixel in the last layer.
SMALLEST = {"alex": 31, "squeeze": 17, "vgg": 16}


class LPIPSLoss(ActivatedLoss):
    r"""Learned perceptual image patch similarity :math:`\sum_l \langle w_l, (\phi_l x - \phi_l\hat x)^2\rangle`.

    The features :math:`\phi_l` of a classifier, normalised in each pixel and averaged over space, with the weights
    :math:`w_l` that people's judgements gave and torchmetrics ships. It is computed in float32 whatever the Trainer's
    precision: in float16 the guard of the normalisation rounds to zero, and its gradient is NaN where nothing fires.

    Args:
        net: the classifier: ``"alex"``, ``"squeeze"`` or ``"vgg"``.
        weights: a local file with torchvision's ``state_dict`` of AlexNet, SqueezeNet 1.1 or VGG-16; ``"DEFAULT"`` to
            download it; or None for random features.
        activation: output activation; the images must lie in [0, 1], so ``"sigmoid"`` unless another loss comes first.
        seed: draws the random features, the same ones each time.

    Shapes:
        ``params`` and ``x``: ``(B, 1 or 3, H, W)``; the loss ``(B,)``.

    Raises:
        ValueError: if the network has another name, the file is missing, or the input has other channels or is too
            small (sides from 31 pixels for ``"alex"``, 17 for ``"squeeze"``, 16 for ``"vgg"``); from :meth:`check`, if
            targets lie outside [0, 1].

    Source: Zhang et al. 2018, https://arxiv.org/abs/1801.03924.

    Example:
        >>> x = torch.rand(2, 1, 64, 64)
        >>> LPIPSLoss("squeeze", activation="identity")(x, x)
        tensor([0., 0.])
    """

    def __init__(
        self,
        net: Net = "alex",
        weights: str | Path | None = None,
        activation: Activation = "sigmoid",
        seed: int = 0,
    ) -> None:
        super().__init__(activation)
        from torchmetrics.functional.image.lpips import _LPIPS

        check_one_of("net", net, SMALLEST)
        check_type("weights", weights, str, Path, None)
        seed = check_seed("seed", seed)
        if weights not in (None, "DEFAULT") and not Path(weights).is_file():
            raise ValueError(f"weights: expected a file, 'DEFAULT' or None, got {weights!r}.")
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            # the class behind torchmetrics' metric, which checks the range on the host in every call
            network = _LPIPS(net=net, pnet_rand=weights != "DEFAULT", use_dropout=True)
        if weights not in (None, "DEFAULT"):
            load_weights(weights, lambda state: _load_backbone(network.net, state))
        self.network = FrozenModule(network)
        self.smallest = SMALLEST[net]

    @property
    def data_interval(self) -> tuple[float, float]:
        """[0, 1]."""
        return 0.0, 1.0

    def check(self, x: Tensor) -> None:
        """Targets must lie in [0, 1]."""
        low, high = (end.float() for end in value_range(x))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"x: LPIPSLoss: targets must lie in [0, 1], got values from {low:.4g} to {high:.4g}.")

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """Perceptual distance of each example, ``(B,)``."""
        params, x = self._prepare(params, x)
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x: LPIPSLoss: expected images (B, 1 or 3, H, W), got {tuple(x.shape)}.")
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"x: LPIPSLoss: expected sides of {self.smallest} pixels or more for this net, got "
                f"{tuple(x.shape[2:])}."
            )
        with torch.autocast(x.device.type, enabled=False):
            images = [image.expand(-1, 3, -1, -1) for image in (self.mean(params), x)]
            distance: Tensor = self.network(*images, False, True)
        return distance.flatten(1).sum(1)


def _load_backbone(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy torchvision's ``features.<i>.*`` into the slices, whose layers are named by the same numbers."""
    names = {key: re.sub(r"^slices?\.?\d+", "features", key) for key in network.state_dict()}
    network.load_state_dict({key: state[name] for key, name in names.items()})
