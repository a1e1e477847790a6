"""What is left of the variance of the targets on data that were held out, example by example."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_ae.diagnostics.watch import Watch
from lightning_ae.diagnostics.watch.comparisons import BINARY, CLASSES, Comparison
from lightning_ae.hooks import undisturbed
from lightning_ae.losses.base import full_precision
from lightning_ae.models import Autoencoder
from lightning_ae.models.batches import imputed


class HeldOut:
    r"""Squared error of each held-out example, over that of the best constant.

    :math:`\ell_i = \|y_i - \hat y_i\|^2 / \overline{\|y - \bar y\|^2}`: 1 on average for a constant prediction, 0 for a
    perfect one, whatever the units, the loss and the output's activation. Classes are rows with one 1, predictions of
    labels and classes probabilities (then it is the Brier score over that of the base rates).

    Attributes:
        each: :math:`\ell_i`, ``(n,)``, float64, on the host; empty if nothing was heard to be compared.

    Example:
        >>> HeldOut(torch.tensor([0.25, 0.75])).value
        0.5
    """

    def __init__(self, each: Tensor) -> None:
        self.each = each.double()

    @property
    def value(self) -> float:
        """The mean; infinite if it is not finite, NaN if there is nothing."""
        if not len(self.each):
            return math.nan
        mean = float(self.each.mean())
        return round(mean, 12) if math.isfinite(mean) else math.inf

    def gain(self, earlier: HeldOut) -> tuple[float, float]:
        """How much lower it is than an earlier one, and the standard error of that, on the same examples."""
        if self.value == math.inf or earlier.value == math.inf or len(self.each) != len(earlier.each):
            return earlier.value - self.value if self.value != earlier.value else 0.0, 0.0
        apart = earlier.each - self.each
        return float(apart.mean()), float(apart.std()) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0

    def better_than(self, earlier: HeldOut) -> bool:
        """Whether it is lower by more than two standard errors and by more than 1 % of what was left."""
        if not len(self.each):
            return False
        if not len(earlier.each):
            return math.isfinite(self.value)
        gain, error = self.gain(earlier)
        return gain > 2 * error and gain > 0.01 * min(earlier.value, 1.0)


def held_out(model: L.LightningModule, batches: Any, loss: str | None = None) -> HeldOut:
    """Measure a model on held-out batches, in evaluation mode and without gradients.

    ``validation_step`` is called, or ``training_step`` where there is none; what its loss compares is what counts. What
    it logs is dropped.

    Args:
        model: a LightningModule; it is left as it was.
        batches: the held-out batches, always the same and in one order.
        loss: name of the comparison that matters, as the report has it; None for the first that is heard.

    Returns:
        The errors.

    Raises:
        ValueError: if the model optimizes by itself and has no ``validation_step``.
    """
    found = _pairs(model, batches, loss, graph=False) or _pairs(model, batches, loss, graph=True)
    if not found:
        return HeldOut(torch.zeros(0))
    targets = torch.cat([y for y, _ in found])
    errors = torch.cat([(y - y_hat).square().sum(1) for y, y_hat in found])
    level = (targets - targets.mean(0)).square().sum(1).mean()
    return HeldOut(errors / level.clamp(min=1e-30))


def _pairs(model: L.LightningModule, batches: Any, loss: str | None, graph: bool) -> list[tuple[Tensor, Tensor]]:
    """Targets and predictions; what is written out by hand is heard only where there is a graph."""
    listener, watch = _Listener(loss), Watch(("penalties",) if isinstance(model, Autoencoder) else ())
    validates = type(model).validation_step is not L.LightningModule.validation_step
    if not validates and not model.automatic_optimization:
        raise ValueError(f"model: {type(model).__name__} needs a validation_step: its training_step also trains it.")
    step = model.validation_step if validates else model.training_step
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    found = []
    with undisturbed(model), _quiet(model), torch.set_grad_enabled(graph or not validates):
        for number, given in enumerate(batches):
            batch = _moved(model, given)
            listener.heard = []
            with watch.open(model, [listener], None, batch):
                outputs = step(batch, number) if numbered else step(batch)
            pair = _of_ours(model, batch, outputs) or listener.pair()
            if pair is not None:
                found.append(pair)
    return found


def _moved(model: L.LightningModule, batch: Any) -> Any:
    """A batch on the model's device, through the hooks by which a model or a data module changes batches."""
    if model._trainer is not None:
        batch = model._trainer.precision_plugin.convert_input(batch)
    batch = model._on_before_batch_transfer(batch, dataloader_idx=0)
    return model._apply_batch_transfer_handler(batch, device=model.device, dataloader_idx=0)


def _of_ours(model: nn.Module, batch: Any, outputs: Any) -> tuple[Tensor, Tensor] | None:
    if not isinstance(model, Autoencoder) or not isinstance(outputs, Mapping) or "output" not in outputs:
        return None
    x = imputed(model, batch, outputs["output"])
    return _rows(x, model.loss.prediction(outputs["output"].params, x))


def _rows(y: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor] | None:
    if y.numel() != y_hat.numel() or not y.numel():
        return None
    rows = (len(y), -1) if y.ndim > 1 else (-1, 1)
    return full_precision(y.detach()).reshape(rows).double().cpu(), full_precision(y_hat).reshape(rows).double().cpu()


class _Listener:
    """Keeps what is compared; hears nothing else."""

    def __init__(self, loss: str | None) -> None:
        self.heard: list[Comparison] = []
        self.name, _, number = (loss or "").partition("#")
        self.number = int(number) if number.isdigit() else 0

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Targets and predictions of the comparison that matters, as rows."""
        named = [c for c in self.heard if c.loss == self.name][self.number :]
        chosen = (named or self.heard)[:1]
        if not chosen:
            return None
        heard = chosen[0]
        y, y_hat = heard.target, full_precision(heard.prediction)
        if heard.loss in ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"):
            y_hat = y_hat.sigmoid()
        elif heard.loss in ("cross_entropy", "target × log_softmax"):
            y_hat = y_hat.softmax(1 if y_hat.ndim > 1 and heard.loss == "cross_entropy" else -1)
        elif heard.loss in ("nll_loss", "kl_div") or self._is_log(heard):
            y_hat = y_hat.exp()
        if heard.loss == "kl_div" and heard.options.get("log_target"):
            y = y.exp()
        if heard.loss in CLASSES and not y.is_floating_point() and y_hat.ndim == y.ndim + 1 and y.ndim > 0:
            y_hat = y_hat.movedim(1, -1).reshape(-1, y_hat.shape[1])
            labels = y.reshape(-1)
            inside = (labels >= 0) & (labels < y_hat.shape[1]) & (labels != heard.options.get("ignore_index", -100))
            y_hat, labels = y_hat[inside], labels[inside]
            y = torch.nn.functional.one_hot(labels, y_hat.shape[1]).float()
        elif heard.loss in BINARY:
            y = y.float()
        return _rows(y, y_hat)

    @staticmethod
    def _is_log(heard: Comparison) -> bool:
        return heard.loss == "poisson_nll_loss" and bool(heard.options.get("log_input", True))

    def on_loss(self, comparison: Comparison) -> None:
        self.heard.append(comparison)

    def on_activation(self, event: Any) -> None:
        pass

    def on_gradient(self, site: Any, grad_z: Any, grad_y: Any) -> None:
        pass

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def on_entry(self, name: str, module: nn.Module, x: Any) -> None:
        pass

    def on_pattern(self, pattern: Any) -> None:
        pass


@contextmanager
def _quiet(model: L.LightningModule) -> Iterator[None]:
    """Drop what is logged, draw the same random numbers for all models, and give back the buffers."""
    names, level = ("log", "log_dict"), logging.getLogger("lightning.pytorch").level
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    own = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        # what a step logs has no loop any more to go to
        model.__dict__.update(dict.fromkeys(names, _nothing))
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)  # what is drawn, as a posterior's sample, is the same for all models
            yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)
        logging.getLogger("lightning.pytorch").setLevel(level)
        for buffer, before in buffers:
            buffer.data.copy_(before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of ``self.log``."""
