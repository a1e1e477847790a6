"""One model for each weight of a mix, and the front they make."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_ae.checks import check_one_of, check_seed, check_sequence, check_share, describe_type
from lightning_ae.losses import AlphaMix
from lightning_ae.models import Autoencoder
from lightning_ae.pareto.front import ParetoFront
from lightning_ae.pareto.spread import in_processes, single_devices
from lightning_ae.pareto.together import AutoencoderGroup, raw_losses, why_not_together

MakeModel = Callable[[float], Autoencoder]
Split = Literal["train", "val", "test"]

#: Trainer options unless the caller has others: a sweep is quiet and only trains
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


def sweep(
    make_model: MakeModel,
    alphas: Sequence[float],
    data: L.LightningDataModule,
    *,
    together: bool | Literal["auto"] = "auto",
    split: Split = "val",
    seed: int = 0,
    devices: int | list[int] | Literal["auto"] = 1,
    **trainer_options: Any,
) -> ParetoFront:
    r"""Train a model for each :math:`\alpha` of :math:`\alpha L_{pixel} + (1 - \alpha) L_{perceptual}`.

    Every point starts from the same seed and sees the same stream of batches, so that points differ by
    :math:`\alpha` alone and the sweep can be repeated. The objectives are the raw losses of the clean reconstruction,
    averaged over the examples of a split.

    Small models train together: perceptrons and linear models of one shape, with the plain step and AdamW of
    :class:`Autoencoder`, become one module whose products are batched over the models. Results are those of training
    one by one, up to rounding. Other models get a Trainer each.

    On several devices the points are dealt out to a process each, in which they train together or not.

    Args:
        make_model: from :math:`\alpha` to a new model whose loss is an ``AlphaMix`` with this ``alpha``.
        alphas: the weights, each in [0, 1]; the order is kept.
        data: the data; its training loader is to be made anew for each run, without a state that runs share.
        together: True to insist on training together, False to train one by one, ``"auto"`` for together if possible.
        split: where the objectives are measured.
        seed: of the initial weights, and of shuffles that use the global generators.
        devices: as for the Trainer; if there are several, ``make_model`` and ``data`` have to be picklable, and a
            script calls it below ``if __name__ == "__main__":``.
        **trainer_options: for :class:`lightning.Trainer`, e.g. ``max_epochs``; by default it logs, saves and validates
            nothing. Callbacks belong into the model's ``configure_callbacks``, so that each point has its own.

    Returns:
        The points in the order of ``alphas``, the models on the CPU in evaluation mode.

    Raises:
        TypeError: if ``data`` is no data module, or ``make_model`` returns no ``Autoencoder``.
        ValueError: if there is no alpha, if ``make_model`` does not follow it or gives models that share parts, if the
            split is empty, or if ``together=True`` is impossible; the message says why.

    Source: Miettinen 1998, Nonlinear Multiobjective Optimization, section 3.1: minimisers of the sum with positive
    weights are Pareto optimal, and on a convex front all points are found so.

    Example:
        >>> from lightning_ae import FeatureLoss, ImageGradients, LinearAutoencoder, SquaredError, TensorDataModule
        >>> def make_model(alpha):
        ...     loss = AlphaMix(SquaredError(), FeatureLoss(ImageGradients()), alpha)
        ...     return LinearAutoencoder((1, 8, 8), latent_dim=2, loss=loss)
        >>> data = TensorDataModule(torch.rand(64, 1, 8, 8), batch_size=16)
        >>> front = sweep(make_model, [0.0, 0.5, 1.0], data, max_epochs=1, accelerator="cpu")
        >>> front.objectives.shape, len(front.models)
        (torch.Size([3, 2]), 3)
    """
    if not callable(make_model):
        raise TypeError(f"make_model: expected a function, got {describe_type(make_model)}.")
    alphas = [float(check_share("alphas", alpha)) for alpha in check_sequence("alphas", alphas)]
    seed = check_seed("seed", seed, most=2**32 - 1)
    _check(alphas, data, split, together, trainer_options)
    options = {**QUIET, **trainer_options}
    places = single_devices(options.pop("accelerator", "auto"), devices)[: len(alphas)]
    settings = {"together": together, "split": split, "seed": seed, **options}
    if len(places) > 1:
        return _sweep_spread(make_model, alphas, data, places, settings)
    with isolate_rng():
        models = _make_all(make_model, alphas, seed)
        runs = _runs(models, together, options)
        _check_split(data, split, L.Trainer(**places[0], **options))
        for run in runs:
            _seed(seed)
            trainer = L.Trainer(**places[0], **options)
            trainer.fit(run, datamodule=data)
            run.trainer = None  # which would keep its loaders and optimizers alive
            if isinstance(run, AutoencoderGroup):
                run.write_back()
        objectives = measure(models, data, split, trainer.strategy.root_device)
    return ParetoFront(alphas, objectives, models)


def measure(models: Sequence[Autoencoder], data: L.LightningDataModule, split: Split, device: torch.device) -> Tensor:
    """Raw pixel and perceptual losses of clean reconstructions, averaged over a split's examples.

    Args:
        models: the models; they stay on the CPU, in evaluation mode.
        data: the data, already set up for training.
        split: which part of them.
        device: where to compute.

    Returns:
        ``(n, 2)``, float64, on the CPU.
    """
    totals = torch.zeros(len(models), 2, dtype=torch.float64)
    count = 0
    for model in models:
        model.to(device).eval()
    for batch in _batches(data, split):
        batch = data.on_before_batch_transfer(batch, 0)
        batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)
        for total, model in zip(totals, models, strict=True):
            x = model.get_input(batch).to(device, next(model.parameters()).dtype)
            with torch.no_grad():
                total += raw_losses(model.loss, model.decoder(model.encode(x)), x).sum(1).cpu()
        count += len(x)
    for model in models:
        model.cpu()
    return totals / count


def _batches(data: L.LightningDataModule, split: Split) -> Iterator[Any]:
    if split == "test":
        data.setup("test")
    loaders = getattr(data, f"{split}_dataloader")()
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        yield from loader


def _check(alphas: list[float], data: Any, split: str, together: Any, options: dict[str, Any]) -> None:
    if not alphas:
        raise ValueError("alphas: expected at least one number in [0, 1], got none.")
    if not isinstance(data, L.LightningDataModule):
        raise TypeError(
            f"data: expected a LightningDataModule, such as TensorDataModule(x), got {type(data).__name__}."
        )
    check_one_of("split", split, ("train", "val", "test"))
    check_one_of("together", together, (True, False, "auto"))
    if options.get("callbacks"):
        raise ValueError(
            "callbacks: they would carry their state from one point to the next; "
            "make them in the model's configure_callbacks."
        )


def _check_split(data: L.LightningDataModule, split: Split, trainer: L.Trainer) -> None:
    # before the training, not after it; what a loader asks its trainer it can
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    if next(_batches(data, split), None) is None:
        raise ValueError(f"split: the data have no {split} examples to measure the objectives on.")


def _seed(seed: int) -> None:
    # not L.seed_everything, which would leave PL_GLOBAL_SEED behind for later runs
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _make_all(make_model: MakeModel, alphas: list[float], seed: int) -> list[Autoencoder]:
    models = [_make(make_model, alpha, seed) for alpha in alphas]
    parts = [id(part) for model in models for part in (model.loss, *model.parameters())]
    if len(set(parts)) < len(parts):
        raise ValueError("make_model: expected a new model and a new loss each time, got parts that models share.")
    return models


def _make(make_model: MakeModel, alpha: float, seed: int) -> Autoencoder:
    _seed(seed)
    model = make_model(alpha)
    if not isinstance(model, Autoencoder):
        raise TypeError(f"make_model: expected to get an Autoencoder, got a {type(model).__name__}.")
    if not isinstance(model.loss, AlphaMix) or model.loss.alpha != alpha:
        got = f"{type(model.loss).__name__} with alpha={getattr(model.loss, 'alpha', None)}"
        raise ValueError(f"make_model: expected a model whose loss is an AlphaMix with alpha={alpha}, got {got}.")
    return model


def _runs(models: list[Autoencoder], together: bool | str, options: dict[str, Any]) -> Sequence[Any]:
    """What is given to a Trainer each: the models, or one group of them."""
    if together is False or (together == "auto" and len(models) == 1):
        return models
    reason = why_not_together(models, options)
    if reason and together is True:
        raise ValueError(f"together: these models cannot train together: {reason}")
    return models if reason else [AutoencoderGroup(models)]


def _sweep_spread(
    make_model: MakeModel,
    alphas: list[float],
    data: L.LightningDataModule,
    places: list[dict[str, Any]],
    settings: dict[str, Any],
) -> ParetoFront:
    """Every device sweeps over a share of the points; models come back as their numbers."""
    data = copy.copy(data)
    data.trainer = None  # of an earlier run; it cannot be sent
    shares = [range(first, len(alphas), len(places)) for first in range(len(places))]
    jobs = [
        {"make_model": make_model, "alphas": [alphas[i] for i in share], "data": data, "settings": place | settings}
        for share, place in zip(shares, places, strict=True)
    ]
    with isolate_rng():
        models = [model.eval() for model in _make_all(make_model, alphas, settings["seed"])]
    objectives = torch.empty(len(alphas), 2, dtype=torch.float64)
    for share, packed in zip(shares, in_processes(_sweep_share, jobs), strict=True):
        measured, states = torch.load(io.BytesIO(packed), weights_only=True)
        objectives[list(share)] = measured
        for i, state in zip(share, states, strict=True):
            (dtype,) = {state[name].dtype for name, _ in models[i].named_parameters()}
            models[i].to(dtype=dtype).load_state_dict(state)
    return ParetoFront(alphas, objectives, models)


def _sweep_share(
    make_model: MakeModel, alphas: list[float], data: L.LightningDataModule, settings: dict[str, Any]
) -> bytes:
    front = sweep(make_model, alphas, data, **settings)
    file = io.BytesIO()
    torch.save((front.objectives, [dict(model.state_dict()) for model in front.models]), file)
    return file.getvalue()
