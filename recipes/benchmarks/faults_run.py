"""One run: a network with its fault, trained with the report attached."""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from faults_hosts import LAYERS, Keep, Knobs, Plain, PlainVAE, Trained, split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ae as ae


class OurMLP(Trained, ae.MLPAutoencoder):
    """Ours, trained as the knobs have it."""


class OurConv(Trained, ae.ConvAutoencoder):
    """Ours, trained as the knobs have it."""


class OurVAE(Trained, ae.VariationalAutoencoder):
    """Ours, trained as the knobs have it."""


class OurVQ(Trained, ae.VectorQuantizedAutoencoder):
    """Ours, trained as the knobs have it."""


def ours(k: Knobs) -> Trained:
    """One of the package's autoencoders."""
    shape, hidden = (1, 8, 8), [k.width] * k.depth
    loss = (
        ae.BernoulliNLL()
        if k.loss == "bce_logits"
        else ae.SquaredError("sigmoid" if k.loss == "sigmoid_mse" else "identity")
    )
    if k.network == "our mlp":
        code = ae.L1Code(k.l1) if k.l1 else None
        model = OurMLP(shape, k.code, hidden=hidden, activation=k.activation, loss=loss, code=code)
    elif k.network == "our conv":
        code = ae.L1Code(k.l1) if k.l1 else None
        model = OurConv(shape, k.code, channels=(16, 32), activation=k.activation, loss=loss, code=code)
    elif k.network == "our vae":
        pair = ae.mlp_pair(shape, k.code, hidden, k.activation, h_dim=2 * k.code)
        model = OurVAE(*pair, loss, code=ae.GaussianCode(beta=k.kl))
    else:
        pair = ae.mlp_pair(shape, k.code, hidden, k.activation)
        moved = k.codebook_shift != 0
        codes = ae.VectorQuantizerCode(32, 2, kmeans=not moved, expire=0.0 if moved else 0.03)
        codes.codebook += k.codebook_shift
        model = OurVQ(*pair, loss, code=codes)
    model.knobs = k
    return model


def append(model: nn.Module, part: str, layers: list[nn.Module], front: bool = False) -> None:
    """Lengthen a part."""
    if layers:
        old = getattr(model, part)
        setattr(model, part, nn.Sequential(*layers, old) if front else nn.Sequential(old, *layers))


def build(k: Knobs) -> Trained:
    """The network with the faults that all kinds can have."""
    plain = {"vae": PlainVAE}.get(k.network, Plain)
    model = ours(k) if k.network.startswith("our") else plain(k)
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
    weighted = [m for m in model.encoder.modules() if isinstance(m, kinds)]
    if k.hidden_bias is not None:
        for layer in weighted[:-1] if k.task == "reconstruction" and k.network != "vae" else weighted:
            nn.init.constant_(layer.bias, k.hidden_bias)
    if k.code_bias is not None:
        nn.init.constant_(weighted[-1].bias, k.code_bias)
    if k.output_bias is not None:
        nn.init.constant_([m for m in model.decoder.modules() if hasattr(m, "bias")][-1].bias, k.output_bias)
    for parameter in model.parameters():
        if k.gain != 1 and (parameter.ndim > 1 or k.gain == 0):
            parameter.data *= k.gain
    dropout = [nn.Dropout(k.dropout_code)] if k.dropout_code else []
    append(model, "encoder", [*(LAYERS[name]() for name in k.code_layers), *dropout])
    append(model, "decoder", [Keep(k.read)] if k.read else [], front=True)
    append(model, "decoder", [LAYERS[name]() for name in k.output])
    for part in k.frozen:
        getattr(model, part).requires_grad_(False)
    return model


@torch.no_grad()
def held_out_error(model: Trained, data: TensorDataset, k: Knobs) -> float:
    """Share of wrong answers, or of the variance unexplained; at most 10, also where it is not finite."""
    x, y = data.tensors
    out = model.eval().reconstruct(x)
    if k.task == "classes":
        return float((out.argmax(1) != y).float().mean())
    if k.task in ("binary", "labels"):
        return float(((out > 0.5) != (y > 0.5)).float().mean())
    y = y.view_as(out)
    error = float((out - y).square().mean() / (y - y.mean(0)).square().mean().clamp(min=1e-12))
    return min(error, 10.0) if math.isfinite(error) else 10.0


class Report(ae.DiagnosticsReport):
    """Without the pictures, which take longer than the training here."""

    def _show(self, *args: Any, **named: Any) -> None:
        return


def fit(model: Trained, train: TensorDataset, val: TensorDataset, k: Knobs, callbacks: Any = None) -> None:
    """For as many steps as the knobs have, with eight validations and no word."""
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=k.steps,
        val_check_interval=max(1, k.steps // 8),
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    trainer.fit(model, DataLoader(train, k.batch, shuffle=True), DataLoader(val, 1000))


def run(k: Knobs, seed: int) -> dict[str, Any]:
    """Train with the report attached; its findings, the held-out error, and what was raised, if anything."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start, raised, error = time.perf_counter(), "", 10.0
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        L.seed_everything(seed, verbose=False)
        report = Report(k.told, every_n_steps=max(1, k.steps // 50), folder=folder, quiet=True)
        try:
            model, (train, val) = build(k), split(k)
            fit(model, train, val, k, report)
            error = held_out_error(model, val, k)
        except Exception as problem:  # a refusal is a result, too
            raised = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    findings = [
        {
            "severity": f.severity,
            "site": str(f.site),
            "cause": getattr(f, "cause", "") or "",
            "change": getattr(f, "change", None),
            "text": str(f),
        }
        for f in report.findings
    ]
    return {"error": error, "raised": raised, "findings": findings, "seconds": time.perf_counter() - start}
