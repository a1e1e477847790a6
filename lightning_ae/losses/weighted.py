"""Sums of losses, and the mix of a pixel loss with a perceptual one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from lightning_ae.checks import check_finite, check_floating, check_share, check_tensor, check_type, describe_type
from lightning_ae.losses.base import ReconstructionLoss
from lightning_ae.rebuildable import KeepsAttributes


class WeightedLoss(KeepsAttributes, ReconstructionLoss):
    r"""A weighted sum of losses :math:`\sum_j w_j L_j`, each of them logged raw as ``reconstruction/<name>``.

    The first loss owns the output activation: :math:`\hat x` is its prediction, computed once. A loss without an
    activation of its own (SSIM, features, squared error) is scored on that :math:`\hat x`; one with the same activation
    on the decoder's output, so ``BernoulliNLL`` keeps its logits beside an ``SSIMLoss``.

    Args:
        losses: the losses by name.
        weights: a weight for each name; a schedule may change ``loss.weights["name"]``. None for ones.

    Shapes:
        as the losses themselves; the sum is ``(B,)``.

    Raises:
        TypeError: if ``losses`` is no mapping of losses.
        ValueError: if there is no loss, if the names of the weights are others, or if the activations disagree.

    Source: Zhao et al. 2017, https://arxiv.org/abs/1511.08861.

    Example:
        >>> import torch
        >>> from lightning_ae import LaplaceNLL, SquaredError
        >>> loss = WeightedLoss({"squared": SquaredError(), "laplace": LaplaceNLL()}, {"squared": 2.0, "laplace": 0.0})
        >>> loss(torch.ones(1, 2), torch.zeros(1, 2))
        tensor([4.])
    """

    kept: tuple[str, ...] = ("weights",)

    def __init__(self, losses: Mapping[str, ReconstructionLoss], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not isinstance(losses, Mapping):
            raise TypeError(f"losses: expected a mapping from names to losses, got {describe_type(losses)}.")
        check_type("weights", weights, Mapping, None)
        for name, loss in losses.items():
            if not isinstance(loss, ReconstructionLoss):
                raise TypeError(f"losses: expected {name!r} to be a ReconstructionLoss, got {describe_type(loss)}.")
        if not losses:
            raise ValueError("losses: expected at least one, got none.")
        if weights is not None and set(weights) != set(losses):
            raise ValueError(f"weights: expected the names {sorted(losses)}, got {sorted(weights)}.")
        self.losses = nn.ModuleDict(dict(losses))
        given = dict.fromkeys(losses, 1.0) if weights is None else weights
        self.weights = {name: check_finite(f"weights[{name!r}]", weight) for name, weight in given.items()}
        first = next(iter(losses.values()))
        self.output_activation = first.output_activation
        self.output_range = first.output_range
        self.params_per_feature = first.params_per_feature
        for name, loss in losses.items():
            if loss.output_activation not in ("identity", first.output_activation):
                raise ValueError(
                    f"losses: the first applies {first.output_activation}, but {name!r} {loss.output_activation}. "
                    "Put the one first that owns the activation, the others with the identity."
                )
            if loss.output_activation != "identity" and loss.params_per_feature != first.params_per_feature:
                raise ValueError(
                    f"losses: the first wants {first.params_per_feature} numbers of the decoder for each of x, but "
                    f"{name!r} {loss.params_per_feature}."
                )

        self.within(first.output_range)

    def within(self, interval: tuple[float, float]) -> None:
        """Tell all losses."""
        for loss in self._named().values():
            loss.within(interval)

    @property
    def data_interval(self) -> tuple[float, float] | None:
        """That of the first loss that knows one."""
        intervals = (loss.data_interval for loss in self._named().values())
        return next((interval for interval in intervals if interval is not None), None)

    def mean(self, params: Tensor) -> Tensor:
        """The mean of the first loss."""
        return self._first.mean(params)

    def prediction(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prediction of the first loss."""
        masked = () if mask is None else (mask,)
        return self._first.prediction(params, x, *masked)

    def check(self, x: Tensor) -> None:
        """The checks of all losses."""
        for loss in self._named().values():
            loss.check(x)

    @property
    def lower_bound(self) -> float:  # type: ignore[override]
        """0 if no part can be negative."""
        positive = all(weight >= 0 for weight in self.current_weights().values())
        return 0.0 if positive and all(loss.lower_bound >= 0 for loss in self._named().values()) else -math.inf

    @property
    def takes_mask(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(loss.takes_mask for loss in self._named().values())

    def terms(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted sum as ``"reconstruction"``, and the raw losses as ``"reconstruction/<name>"``."""
        check_floating("params", params)
        check_tensor("x", x)
        masked = () if mask is None else (mask,)
        raw = {name: loss(given, x, *masked) for name, (loss, given) in self._given(params, x, mask).items()}
        return {
            "reconstruction": self._weighted(raw),
            **{f"reconstruction/{name}": value for name, value in raw.items()},
        }

    def excess(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        r""":math:`\sum_j w_j` times the excess of each, ``(B,)``: one reconstruction is perfect for all of them."""
        check_floating("params", params)
        check_tensor("x", x)
        masked = () if mask is None else (mask,)
        return self._weighted(
            {name: loss.excess(given, x, *masked) for name, (loss, given) in self._given(params, x, mask).items()}
        )

    def _given(self, params: Tensor, x: Tensor, mask: Tensor | None) -> dict[str, tuple[ReconstructionLoss, Tensor]]:
        """The losses, and what each is called with: the decoder's output, or the reconstruction."""
        first, x_hat = self._first, self.prediction(params, x, mask)
        return {
            name: (loss, params if loss is first or loss.output_activation != "identity" else x_hat)
            for name, loss in self._named().items()
        }

    def _weighted(self, values: Mapping[str, Tensor]) -> Tensor:
        weights = self.current_weights()
        first, *others = (weights[name] * value for name, value in values.items())
        return sum(others, start=first)

    def current_weights(self) -> dict[str, float]:
        """The weight of each loss now."""
        return self.weights

    def forward(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weighted sum, ``(B,)``."""
        return self.terms(params, x, mask)["reconstruction"]

    def _named(self) -> dict[str, ReconstructionLoss]:
        return cast("dict[str, ReconstructionLoss]", dict(self.losses.items()))

    @property
    def _first(self) -> ReconstructionLoss:
        return next(iter(self._named().values()))


class AlphaMix(WeightedLoss):
    r"""Pixels against perception: :math:`\alpha L_{pixel} + (1 - \alpha) L_{perceptual}`.

    With squared error and features it is :math:`\alpha\|x - \hat x\|^2 + (1 - \alpha)\|\Phi x - \Phi\hat x\|^2`:
    :math:`\alpha = 1` is the pixel loss, 0 the perceptual one, and between them lies the front that
    :func:`lightning_ae.sweep` draws. Both raw losses are logged, as
    ``reconstruction/pixel`` and ``reconstruction/perceptual``.

    Args:
        pixel: the loss that owns the output activation.
        perceptual: a loss on the reconstruction, such as ``FeatureLoss`` or ``SSIMLoss``, without an activation.
        alpha: :math:`\alpha` in [0, 1]; a schedule may change it.

    Shapes:
        as the losses themselves; the mix is ``(B,)``.

    Raises:
        TypeError: if one of them is no loss.
        ValueError: if ``alpha`` lies outside [0, 1], or the activations disagree.

    Source: Zhao et al. 2017, https://arxiv.org/abs/1511.08861; Johnson, Alahi & Fei-Fei 2016,
    https://arxiv.org/abs/1603.08155.

    Example:
        >>> import torch
        >>> from lightning_ae import FeatureLoss, ImageGradients, SquaredError
        >>> loss = AlphaMix(SquaredError(), FeatureLoss(ImageGradients()), alpha=0.5)
        >>> loss(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))  # 16 pixels off by 1, no edge
        tensor([8.])
    """

    kept = ("alpha",)

    def __init__(self, pixel: ReconstructionLoss, perceptual: ReconstructionLoss, alpha: float = 0.5) -> None:
        alpha = check_share("alpha", alpha)
        check_type("pixel", pixel, ReconstructionLoss)
        check_type("perceptual", perceptual, ReconstructionLoss)
        super().__init__({"pixel": pixel, "perceptual": perceptual})
        del self.weights  # nobody would read them
        self.alpha = alpha

    def current_weights(self) -> dict[str, float]:
        r""":math:`\alpha` and :math:`1 - \alpha`."""
        return {"pixel": self.alpha, "perceptual": 1 - self.alpha}
