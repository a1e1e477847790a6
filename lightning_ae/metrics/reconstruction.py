"""Which metrics suit data of a given shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

from lightning_ae.checks import check_finite, check_positive, check_sequence, check_whole
from lightning_ae.metrics.variance import FractionVarianceUnexplained

# the Gaussian window of SSIM; MS-SSIM halves the image four times and needs a window's width of what is left
_WINDOW = 11
_MULTI_SCALE_SIDE = _WINDOW * 2**4


class _ShiftedSSIM(StructuralSimilarityIndexMeasure):
    """SSIM of ``x - low``: its luminance takes intensities to begin at 0."""

    def __init__(self, data_range: float, low: float) -> None:
        super().__init__(data_range=data_range)
        self.low = low

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of reconstructions and what they should be."""
        super().update(preds - self.low, target - self.low)


class _ShiftedMultiScaleSSIM(MultiScaleStructuralSimilarityIndexMeasure):
    """MS-SSIM of ``x - low``."""

    def __init__(self, data_range: float, low: float) -> None:
        super().__init__(data_range=data_range)
        self.low = low

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of reconstructions and what they should be."""
        super().update(preds - self.low, target - self.low)


def reconstruction_metrics(
    event_shape: Sequence[int], data_range: float = 1.0, *, low: float = 0.0
) -> MetricCollection:
    """Metrics of ``(reconstruction, x)`` for data of one shape.

    Always ``mse`` and ``mae`` (means over all numbers) and ``fvu`` (:class:`FractionVarianceUnexplained`); for
    images ``(1 or 3 channels, H, W)`` also ``psnr`` in dB, from 11×11 pixels on ``ssim``, and from 176×176 on
    ``ms_ssim``. All are torchmetrics' own but ``fvu``; the last two are of ``x - low``, as in them black is 0.

    Args:
        event_shape: shape of one example.
        data_range: difference of the largest and the smallest value that the data may have.
        low: that smallest value: 0 for [0, 1], -1 for [-1, 1].

    Returns:
        A collection to update batch by batch, exact under ragged batches and on several devices.

    Raises:
        TypeError: if the shape is no sequence of whole numbers, or the range no number.
        ValueError: if one of them is not positive.

    Example:
        >>> sorted(reconstruction_metrics((1, 28, 28)))
        ['fvu', 'mae', 'mse', 'psnr', 'ssim']
    """
    data_range, low = check_positive("data_range", data_range), check_finite("low", low)
    event_shape = [check_whole("event_shape", size) for size in check_sequence("event_shape", event_shape)]
    metrics: dict[str, Metric | MetricCollection] = {
        "mse": MeanSquaredError(),
        "mae": MeanAbsoluteError(),
        "fvu": FractionVarianceUnexplained(),
    }
    if len(event_shape) == 3 and event_shape[0] in (1, 3):
        side = min(event_shape[1:])
        metrics["psnr"] = PeakSignalNoiseRatio(data_range=data_range)
        if side >= _WINDOW:
            metrics["ssim"] = _ShiftedSSIM(data_range, low)
        if side >= _MULTI_SCALE_SIDE:
            metrics["ms_ssim"] = _ShiftedMultiScaleSSIM(data_range, low)
    # each keeps its own state: the states are small, and grouping costs a second look at the first batch
    return MetricCollection(metrics, compute_groups=False)
