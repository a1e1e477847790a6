"""The monitors' measurements on any module, in one call and without a Trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.causes import Evidence
from lightning_ae.diagnostics.monitors.dead_relu import DeadReLUMonitor
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor, Reduction
from lightning_ae.diagnostics.monitors.latent_sparsity import Latent, LatentSparsityMonitor
from lightning_ae.diagnostics.monitors.output import OutputMonitor
from lightning_ae.diagnostics.report import Report, make_report
from lightning_ae.diagnostics.watch import Watch
from lightning_ae.diagnostics.watch.batch import MaskFunction, first_tensor
from lightning_ae.models import Autoencoder

LossFunction = Callable[[Any, Any], Tensor]


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    *,
    latent: Latent | None = None,
    output: str | None = None,
    reduction: Reduction = "elements",
    unit_dim: int | Mapping[str, int] | None = None,
    mask_fn: MaskFunction | None = None,
) -> Report:
    r"""Look at a model on some batches: dead units, saturation, gradients, latent, output, and what is wrong.

    The model stays as it is: its mode (training or evaluation), weights, buffers and gradients, and the random state.
    Without a loss there are no gradients, so no transmission; a LightningModule brings its own by ``training_step``.

    Args:
        model: any module. It is called with the first tensor of a batch, a LightningModule by its ``training_step``.
        batches: some batches, on the CPU or the model's device, as tensors, tuples, lists or dicts of them. A loader
            will do.
        loss: from (the model's output, batch) to a number.
        latent: as for :class:`lightning_ae.LatentSparsityMonitor`; None for a model of ours, and for none in others.
        output: name of the module, or of the activation, that gives the reconstruction; found unless given.
        reduction: how the loss is averaged, as for :class:`lightning_ae.GradientSaturationMonitor`.
        unit_dim: the axis of the units, by the name of a site or of a module around it, or for all.
        mask_fn: from the batch to 1 where a position counts and 0 where it is padding.

    Returns:
        A report; print it, or read ``report.findings``.

    Raises:
        ValueError: if there is no batch, a batch instead of batches, or one without a tensor; if
            ``training_step`` cannot run without a Trainer and no loss is given.

    Source: as for the three monitors.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> with torch.no_grad():
        ...     _ = network[0].bias.copy_(torch.tensor([100.0, 100.0, -100.0, 100.0]))
        >>> report = diagnose(network, [torch.rand(200, 3)], lambda x_hat, x: (x_hat - x).square().mean())
        >>> [(finding.site, finding.measure, finding.value) for finding in report.findings if finding.site == "1"]
        [('1', 'dead_fraction', 0.25)]
        >>> report.sites["1"]["transmission"] <= 1
        True
    """
    if isinstance(batches, Tensor) or (isinstance(batches, tuple) and all(isinstance(b, Tensor) for b in batches)):
        raise ValueError("batches: expected several batches, got what looks like one; give [batch].")
    dead = DeadReLUMonitor(1, unit_dim=unit_dim)
    saturation = GradientSaturationMonitor(1, output=output, reduction=reduction)
    seen = OutputMonitor(output, 1)
    code = LatentSparsityMonitor(latent, 1, mask_fn=mask_fn) if _has_latent(model, latent) else None
    monitors = [monitor for monitor in (dead, saturation, code, seen) if monitor is not None]
    watch = Watch(("penalties",) if isinstance(model, Autoencoder) else (), unit_dim)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    trainable = torch.optim.SGD(parameters, lr=0.0) if parameters else None
    count = 0
    with _unchanged(model), torch.compiler.set_stance("force_eager"):
        for given in batches:
            batch = _to(given, device)
            x = first_tensor(batch)
            if x is None:
                raise ValueError(
                    f"batches: expected tensors, or tuples, lists or dicts of them, got {type(given).__name__}."
                )
            mask = None if mask_fn is None else mask_fn(batch).to(device, torch.float32)
            with watch.open(model, monitors, mask, batch), torch.enable_grad():
                outputs = _run(model, batch, x, loss)
                objective = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
                if isinstance(objective, Tensor) and objective.requires_grad and objective.ndim == 0:
                    model.zero_grad()
                    objective.backward()  # type: ignore[no-untyped-call]
                    if trainable is not None:
                        saturation.on_step(None, model, trainable)
            with torch.no_grad():
                for monitor in monitors:
                    monitor.counters.add("", "samples", len(x) if x.ndim else 1)
                    monitor.on_batch(None, model, outputs, batch)
                    monitor.counters.flush()
            count += 1
    if count == 0:
        raise ValueError("batches: expected at least one.")
    report = make_report(Evidence(model, dead, saturation, code, seen))
    for row in report.layers.values():
        del row["update ratio"]  # there was no step
    return report


def _has_latent(model: nn.Module, latent: Latent | None) -> bool:
    return latent is not None or isinstance(model, Autoencoder)


def _run(model: nn.Module, batch: Any, x: Tensor, loss: LossFunction | None) -> Any:
    if isinstance(model, Autoencoder) and loss is None:
        return model.training_step(batch, 0)
    if isinstance(model, L.LightningModule) and loss is None:
        try:
            return model.training_step(batch, 0)
        except (RuntimeError, AttributeError) as error:
            if model._trainer is None:
                raise ValueError(
                    f"loss: {type(model).__name__}.training_step does not run without a Trainer ({error}); give a "
                    "loss, or attach DiagnosticsReport to the Trainer."
                ) from error
            raise
    result = model(x)
    return {"result": result} if loss is None else {"loss": loss(result, batch), "result": result}


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give back gradients, buffers and random states, and keep Lightning from talking about a missing Trainer."""
    gradients = [(p, p.grad) for p in model.parameters()]
    trainer = model._trainer if isinstance(model, L.LightningModule) else None
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        if isinstance(model, L.LightningModule):
            model._trainer = None  # one that has finished takes no more logs
        for p, _ in gradients:
            p.grad = None
        devices = {p.device for p, _ in gradients if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"You are trying to `self\.log\(\)` but the")
            logger.setLevel(logging.ERROR)
            yield
    finally:
        if isinstance(model, L.LightningModule):
            model._trainer = trainer
        logger.setLevel(level)
        with torch.no_grad():
            for p, gradient in gradients:
                p.grad = gradient
            for buffer, before in buffers:
                buffer.copy_(before)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to(item, device) for item in batch]
    return batch
