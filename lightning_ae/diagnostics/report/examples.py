"""A few inputs beside their reconstructions, of the last batch that was looked at."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.report.record import Example, Examples
from lightning_ae.diagnostics.watch.batch import first_tensor
from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.models import Autoencoder

#: Examples of a batch that are kept, and numbers of them, until the next look.
_MOST, _NUMBERS = 64, 2**21
_SHOWN = 8
#: Pixels of the longer side, and numbers of a curve.
_LARGEST, _LONGEST = 64, 256
#: Black, violet, orange, light yellow: readable without colour, as it grows lighter.
_HEAT = torch.tensor([[8, 8, 20], [96, 28, 110], [222, 84, 56], [252, 252, 190]], dtype=torch.float32)

Kept = tuple[Tensor, Tensor, str]


class ExampleMonitor(Monitor):
    """Keeps what a loss compares with data in the first examples of the last batch looked at; it logs nothing.

    Copies of up to 64 examples stay on the device; they are read, ranked and drawn by :meth:`read` at the end alone.

    Args:
        every_n_steps: look at every so many optimizer steps.

    Raises:
        ValueError: if the number is not positive.
    """

    prefix = "examples"

    def __init__(self, every_n_steps: int = 25) -> None:
        super().__init__(every_n_steps, 1)
        self._forget()

    def _forget(self) -> None:
        self._heard: list[tuple[str, Kept | None]] = []
        self._event: dict[str, tuple[int, ...]] = {}
        self._kept: dict[str, dict[str, Kept]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer, with nothing kept."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Without data."""
        return {**super().__getstate__(), "_heard": [], "_kept": {}}

    def on_loss(self, comparison: Comparison) -> None:
        """Keep prediction and target, if they are of one size."""
        same = sum(name.partition("#")[0] == comparison.loss for name, _ in self._heard)
        name = f"{comparison.loss}#{same}" if same else comparison.loss
        x, x_hat = comparison.target, comparison.prediction
        fits = comparison.target_is_data and x.is_floating_point() and x.ndim > 1 and x.shape == x_hat.shape
        self._heard.append((name, _head(x, x_hat, comparison.loss) if fits else None))

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Keep the batch in place of the one before."""
        heard, self._heard = self._heard, []
        kept = {name: found for name, found in heard if found is not None}
        x = first_tensor(batch)
        if isinstance(module, Autoencoder) and isinstance(outputs, Mapping) and "output" in outputs:
            x, params = module.observed(batch)[0], outputs["output"].params
            if isinstance(params, Tensor) and x.ndim > 1 and len(params) == len(x):
                rows = _rows(x)
                x_hat = module.loss.prediction(params[:rows].detach(), x[:rows])
                kept = {"output": (x[:rows].clone(), x_hat.reshape_as(x[:rows]), "")} if _fits(x[:rows], x_hat) else {}
        stage = "validation" if trainer is None else "training"
        self._kept[stage] = kept
        self._event[stage] = () if x is None else tuple(x.shape[1:])

    def scalars(self) -> dict[str, float]:
        """Nothing is logged."""
        return {}

    def read(self, name: str) -> Examples | None:
        """The first and the worst examples of a comparison, of validation if it was seen there.

        Args:
            name: as in :class:`OutputMonitor`; for an output that was named by the user the first comparison is taken.
        """
        for stage in ("validation", "training"):
            kept = self._kept.get(stage, {})
            found = kept.get(name) or (next(iter(kept.values()), None) if name == "output" else None)
            if found is not None and len(found[0]):
                return _examples(stage, *found, self._event[stage])
        return None


def _fits(x: Tensor, x_hat: Tensor) -> bool:
    return x.is_floating_point() and x.numel() == x_hat.numel()


def _rows(x: Tensor) -> int:
    return min(_MOST, max(_SHOWN, _NUMBERS // max(1, x[0].numel() if len(x) else 1)))


def _head(x: Tensor, x_hat: Tensor, loss: str) -> Kept:
    rows = _rows(x)
    return x[:rows].detach().clone(), x_hat[:rows].detach().clone(), loss


def _examples(stage: str, x: Tensor, x_hat: Tensor, loss: str, event: tuple[int, ...]) -> Examples | None:
    """Rank and draw; None for events of a single number, of which there is no picture."""
    x, x_hat = x.cpu().float(), x_hat.cpu().float()
    if loss == "binary_cross_entropy_with_logits":
        x_hat = x_hat.sigmoid()
    if math.prod(event) == x[0].numel():
        x, x_hat = x.reshape(len(x), *event), x_hat.reshape(len(x), *event)
    if x[0].numel() < 2:
        return None
    errors = (x_hat - x).square().flatten(1).mean(1)
    order = errors.nan_to_num(math.inf, math.inf).argsort(descending=True, stable=True)
    finite = x[x.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low >= 0 and high <= 1 and high > 0:
        low, high = 0.0, 1.0
    if not low < high:
        low, high = low - 0.5, low + 0.5
    drawn = [_example(number, float(errors[number]), x[number], x_hat[number], low, high) for number in range(len(x))]
    worst = [drawn[number] for number in order.tolist()[: min(_SHOWN, len(x) // 2)]]
    return Examples(stage, len(x), list(x.shape[1:]), low, high, drawn[:_SHOWN], worst)


def _example(number: int, error: float, x: Tensor, x_hat: Tensor, low: float, high: float) -> Example:
    a, b = _plane(x), _plane(x_hat)
    if a.ndim == 1:
        parts = [[float(f"{v:.4g}") for v in values.tolist()] for values in (a, b, (b - a).abs())]
        return Example(number, error, *parts)
    far = ((b - a).abs().mean(0, keepdim=True) / (high - low)).nan_to_num(1.0)
    grey = [((picture - low) / (high - low)).nan_to_num(0.0) for picture in (a, b)]
    return Example(number, error, _png(grey[0]), _png(grey[1]), _png(_heat(far.clamp(0, 1))))


def _plane(event: Tensor) -> Tensor:
    """An image ``(C, H, W)`` with one or three channels, no larger than is drawn, or a curve ``(L,)``."""
    event = event.squeeze() if event.ndim > 3 or event.numel() in event.shape else event
    if event.ndim < 2:
        shape = event.reshape(1, 1, -1)
        return functional.adaptive_avg_pool1d(shape, min(_LONGEST, shape.shape[-1])).flatten()
    if event.ndim == 2:
        event = event[None]
    if event.ndim > 3 or event.shape[0] not in (1, 3):
        event = event.reshape(-1, *event.shape[-2:]).mean(0, keepdim=True)
    height, width = event.shape[-2:]
    factor = max(height, width) / _LARGEST
    if factor <= 1:
        return event
    return functional.adaptive_avg_pool2d(event, (max(1, round(height / factor)), max(1, round(width / factor))))


def _heat(share: Tensor) -> Tensor:
    """Colours, ``(3, H, W)`` in [0, 1], of numbers in [0, 1], ``(1, H, W)``."""
    place = share[0] * (len(_HEAT) - 1)
    below = place.floor().clamp(max=len(_HEAT) - 2).long()
    part = (place - below)[..., None]
    return (_HEAT[below] * (1 - part) + _HEAT[below + 1] * part).permute(2, 0, 1) / 255


def _png(picture: Tensor) -> str:
    """An image ``(C, H, W)`` in [0, 1] as a PNG in base64."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
