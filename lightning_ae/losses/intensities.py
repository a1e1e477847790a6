"""Losses that compare intensities, for which black is 0: where the range of the images begins."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from lightning_ae.checks import check_finite, check_positive
from lightning_ae.losses.base import ActivatedLoss, Activation, value_range

#: A range this many times the span of the targets is taken for a mistake.
FAR_ABOVE = 10


class IntensityLoss(ActivatedLoss):
    r"""Base of losses of intensities :math:`x - x_{low} \in [0, L]`, SSIM's, whose luminance has no meaning below 0.

    Args:
        activation: :math:`\varphi`: ``"identity"``, ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        data_range: :math:`L`; None for that of the output: of the activation, or of the loss that owns it beside this
            one; 1 if that is not bounded.
        low: :math:`x_{low}`; None for the lower end of the output, 0 if it has none.

    Raises:
        ValueError: if ``low`` is not finite.
    """

    def __init__(self, activation: Activation, data_range: float | None, low: float | None) -> None:
        super().__init__(activation)
        self._given = (
            None if data_range is None else check_positive("data_range", data_range),
            None if low is None else check_finite("low", low),
        )
        self._settle(self.output_range)

    def _settle(self, interval: tuple[float, float]) -> None:
        data_range, low = self._given
        bounded = math.isfinite(interval[1] - interval[0])
        #: :math:`L`
        self.data_range = data_range if data_range is not None else interval[1] - interval[0] if bounded else 1.0
        #: :math:`x_{low}`
        self.low = low if low is not None else interval[0] if math.isfinite(interval[0]) else 0.0

    def within(self, interval: tuple[float, float]) -> None:
        """Take what was not given from the interval in which the reconstruction lies."""
        if self.output_activation == "identity":
            self._settle(interval)

    @property
    def data_interval(self) -> tuple[float, float]:
        """Lowest and highest intensity."""
        return self.low, self.low + self.data_range

    def check(self, x: Tensor) -> None:
        """Targets must not span more than ``data_range``, nor far less, and not lie below ``low``."""
        low, high = (float(end) for end in value_range(x))
        reach = f"the targets reach from {low:.4g} to {high:.4g}"
        if high - low > self.data_range * (1 + 1e-3):
            raise ValueError(
                f"data_range: expected at least the span of the targets, which reach from {low:.4g} to {high:.4g}, got "
                f"{self.data_range}. Give the span that the data can have, or scale the data."
            )
        if low < self.low - 1e-3 * self.data_range:
            message = (
                f"low: {reach}, but intensities are taken to begin at {self.low:g}, and below that SSIM's luminance "
                "rewards the opposite sign. Give low, the smallest value that the data can have."
            )
            if self._given[1] is not None:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        if 0 < (high - low) * FAR_ABOVE < self.data_range:
            warnings.warn(
                f"data_range: {reach}, far less than data_range={self.data_range:g}, beside which all images look "
                "alike to SSIM. Give the span that the data can have, or scale the data.",
                stacklevel=2,
            )

    def _shift(self, image: Tensor) -> Tensor:
        return image - self.low if self.low else image
