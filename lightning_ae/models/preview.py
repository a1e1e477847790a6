"""A look at the training data before the first step, which changes neither the data's order nor random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ae.models.base import Autoencoder


def first_rows(trainer: L.Trainer, model: Autoencoder, number: int) -> Tensor | None:
    """The first rows of the training data, on the model's device, as a training step sees them.

    Exactly as many, where there are so many, so that what is estimated on them does not depend on how the data come in
    batches. They pass the same hooks as batches in training, and ``limit_train_batches`` holds.

    Args:
        trainer: at the start of training.
        model: it says where ``x`` is in a batch.
        number: how many rows of this process.

    Returns:
        ``(n, *event)`` with ``n <= number``; None where a look may take batches away from training: several loaders,
        iterators, data without a length, as streams are, of which nobody knows whether they begin anew, and subclasses
        of :class:`torch.utils.data.DataLoader`, which may keep a state.
    """
    loader = _again(trainer.train_dataloader)
    if loader is None:
        return None
    rows: list[Tensor] = []
    seen = 0
    with isolate_rng(), _unmoved(trainer.train_dataloader):
        for index, batch in enumerate(loader):
            if index >= trainer.num_training_batches or seen >= number:
                break
            batch = trainer.precision_plugin.convert_input(batch)
            batch = model._on_before_batch_transfer(batch, dataloader_idx=0)
            x = model.get_input(trainer.strategy.batch_to_device(batch, model.device, dataloader_idx=0))
            rows.append(x[: number - seen].detach())
            seen += len(rows[-1])
    return torch.cat(rows) if seen else None


def _again(loader: Any) -> Any:
    """What gives the same batches as a loader that Lightning has called ``iter`` on, and leaves that alone."""
    if type(loader) is DataLoader:
        # in this process: persistent workers have one iterator for all, and others take long to start
        data, collate = loader.dataset, loader.collate_fn
        if isinstance(data, Iterator):
            return None
        if isinstance(data, IterableDataset):
            if not isinstance(data, Sized):
                return None
            return DataLoader(data, loader.batch_size, drop_last=loader.drop_last, collate_fn=collate)
        if loader.batch_sampler is None:
            return DataLoader(data, None, sampler=loader.sampler, collate_fn=collate)
        return DataLoader(data, batch_sampler=loader.batch_sampler, collate_fn=collate)
    several = isinstance(loader, (Mapping, list, tuple))
    read_once = isinstance(loader, (DataLoader, Iterator)) or not isinstance(loader, Sized)
    if several or read_once or not isinstance(loader, Iterable):
        return None
    return loader


@contextmanager
def _unmoved(loader: Any) -> Iterator[None]:
    """Put a loader's place in the data, and its samplers' random numbers, back to where they were."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    generators = [found for owner in owners if (found := getattr(owner, "generator", None)) is not None]
    numbers = [generator.get_state() for generator in generators]
    place = loader.state_dict() if hasattr(loader, "state_dict") else None
    yield
    for generator, state in zip(generators, numbers, strict=True):
        generator.set_state(state)
    if place is not None:
        loader.load_state_dict(place)
