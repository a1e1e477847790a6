"""Short fits of fresh models, each with its own remedies, all alike in everything else."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_ae.diagnostics.attach import DiagnosticsReport
from lightning_ae.diagnostics.causes import Finding
from lightning_ae.diagnostics.causes.explain import LAST
from lightning_ae.diagnostics.held_out import HeldOut, held_out
from lightning_ae.diagnostics.monitors.latent_sparsity import Latent
from lightning_ae.diagnostics.remedies import ClipGradients, Remedy, ScaleLearningRate, Together
from lightning_ae.diagnostics.report import Report

#: Validations in a fit.
VALIDATIONS = 8


class Fit(NamedTuple):
    """What came of a fit.

    Attributes:
        model: as it was at the end.
        report: its diagnosis.
        left: its errors on the held-out data.
        options: arguments of its Trainer.
    """

    model: L.LightningModule
    report: Report
    left: HeldOut
    options: dict[str, Any]


@dataclass
class Fits:
    """Makes fits that differ in their remedies alone.

    Args:
        make_model: gives a new model at each call.
        data: a data module, or training and validation loader.
        given: arguments of the Trainer, with ``max_steps``.
        seed: of each fit.
        latent: as for :class:`lightning_ae.DiagnosticsReport`.

    Raises:
        ValueError: if there are no held-out data.
    """

    make_model: Callable[[], L.LightningModule]
    data: Any
    given: dict[str, Any]
    seed: int = 0
    latent: Latent | None = None
    _compared: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._states = [(draw, draw.get_state()) for draw in _generators(self.data)]
        self._fed()  # the errors at the door

    def fit(self, remedies: list[Remedy]) -> Fit | str:
        """A fit with remedies; in words, why the last of them could not be applied."""
        L.seed_everything(self.seed, verbose=False)
        for draw, state in self._states:
            draw.set_state(state)
        model = self.make_model()
        if not isinstance(model, L.LightningModule):
            raise TypeError(f"make_model: expected it to give a LightningModule, got a {type(model).__name__}.")
        options, fed = dict(self.given), self._fed()
        if "callbacks" in self.given:  # what one fit has counted is nothing to the next
            options["callbacks"] = copy.deepcopy(self.given["callbacks"])
        for remedy in remedies:
            change = remedy.apply(model, options, fed)
            if not change and remedy is remedies[-1]:
                return change.what
        return self._run(model, options, fed, bool(remedies))

    def _run(self, model: L.LightningModule, options: dict[str, Any], fed: dict[str, Any], treated: bool) -> Fit | str:
        steps = options["max_steps"]
        report = DiagnosticsReport(self.latent, every_n_steps=max(1, steps // 50), quiet=True)
        extra = options.pop("callbacks", None) or []
        extra = list(extra) if isinstance(extra, (list, tuple)) else [extra]
        broken: Exception | None = None
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            settings = {
                "max_epochs": -1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "default_root_dir": folder,
                # of whatever length an epoch is
                "val_check_interval": max(1, steps // VALIDATIONS) * options.get("accumulate_grad_batches", 1),
                "check_val_every_n_epoch": None,
                **options,
            }
            trainer = L.Trainer(**settings, callbacks=[report, _ValidateEpochs(), *extra])
            try:
                trainer.fit(model, **fed)
            except Exception as error:
                # what breaks off in the middle is as bad as can be, and its report says why; an error at the start is
                # the user's, or shows that a remedy does not suit the model
                if report.report is None or trainer.global_step == 0:
                    if treated:
                        return f"the fit broke off ({type(error).__name__}: {error})"
                    raise
                broken = error
                report.report.findings = _of_broken(report.report.findings, trainer.global_step, error)
                rank_zero_info(f"treat: the fit broke off: {type(error).__name__}: {error}")
            loader = _held_out_loader(fed)
        assert report.report is not None
        options["callbacks"] = extra
        if not self._compared:
            self._compared.append(report.comparison)
        try:
            left = held_out(model, loader, self._compared[0])
        except Exception:
            if broken is None:
                raise
            left = HeldOut(torch.tensor([math.nan]))
        if not treated and not len(left.each):
            raise ValueError(
                f"make_model: no loss of a {type(model).__name__} was heard to compare a prediction with a target on "
                "the held-out data, so no remedy can be judged."
            )
        return Fit(model, report.report, left, options)

    def _fed(self) -> dict[str, Any]:
        """Arguments of ``Trainer.fit`` after the model."""
        data = self.data
        if isinstance(data, L.LightningDataModule):
            if not is_overridden("val_dataloader", data, L.LightningDataModule):
                raise ValueError(f"data: this {type(data).__name__} has no val_dataloader; held-out data are needed.")
            return {"datamodule": copy.copy(data)}  # a remedy may change its batch size
        if isinstance(data, (tuple, list)) and len(data) == 2 and data[1] is not None:
            return {"train_dataloaders": data[0], "val_dataloaders": data[1]}
        raise ValueError(
            "data: expected a data module, or (training loader, validation loader); held-out data are needed."
        )


def _of_broken(findings: list[Finding], steps: int, error: Exception) -> list[Finding]:
    """What was found in a fit that broke off; it is no wonder that it was short."""
    found = [finding for finding in findings if finding.cause not in LAST]
    if any(finding.severity == "error" for finding in found):
        return found
    rates = ScaleLearningRate(0.1), ScaleLearningRate(0.01)
    what = f"The fit broke off after {steps} steps ({type(error).__name__}: {error})."
    advice = "If it was for numbers that grew too large: lower the learning rate, and clip gradients."
    remedies = *rates, Together((rates[1], ClipGradients()))
    large = Finding(
        "error", "loss", "broken", float(steps), steps, what, advice, "learning_rate_high", ("learning_rate", -1)
    )
    return [large._replace(remedies=remedies), *found]


class _ValidateEpochs(L.Callback):
    """Where a schedule goes by a validation loss, it is to find a new one at the end of each epoch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Now the length of an epoch is known, and of how many batches there are validations is set."""
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            trainer.check_val_every_n_epoch, epoch = 1, trainer.num_training_batches
            if trainer.val_check_batch is None or math.isinf(epoch) or trainer.val_check_batch > epoch:
                trainer.val_check_batch = epoch


def _held_out_loader(fed: dict[str, Any]) -> Any:
    found = fed["datamodule"].val_dataloader() if "datamodule" in fed else fed["val_dataloaders"]
    if isinstance(found, (list, tuple)):
        found = found[0] if found else None
    if found is None:
        raise ValueError("data: no held-out data, so no remedy can be judged: give a validation loader.")
    return found


def _generators(data: Any) -> list[torch.Generator]:
    """Generators of the loaders' own, which a fit leaves in another state."""
    loaders = [] if isinstance(data, L.LightningDataModule) or not isinstance(data, (list, tuple)) else list(data)
    owners = [owner for loader in loaders for owner in (loader, getattr(loader, "sampler", None))]
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(draw): draw for draw in found if isinstance(draw, torch.Generator)}.values())


@contextlib.contextmanager
def undisturbed_draws(data: Any) -> Iterator[None]:
    """Give back the states of all random numbers, those of the loaders included, and the seed that Lightning notes."""
    states = [(draw, draw.get_state()) for draw in _generators(data)]
    noted = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        with isolate_rng():
            yield
    finally:
        for draw, state in states:
            draw.set_state(state)
        for name, value in noted.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from announcing each fit."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
