"""Independent work on several devices, a process each."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator


def single_devices(accelerator: Any, devices: int | list[int] | Literal["auto"]) -> list[dict[str, Any]]:
    """Trainer options for each of the devices alone, chosen as the Trainer chooses.

    Args:
        accelerator: as for :class:`lightning.Trainer`.
        devices: the same.

    Example:
        >>> single_devices("cpu", 2)
        [{'accelerator': 'cpu', 'devices': 1}, {'accelerator': 'cpu', 'devices': 1}]
    """
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(accelerator=accelerator, devices=devices, enable_checkpointing=False, **quiet)
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    return [{"accelerator": accelerator, "devices": 1 if on_cpu else [index]} for index in trainer.device_ids]


def in_processes(work: Callable[..., Any], jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Call ``work(**job)`` for all jobs at the same time, each in a fresh process.

    The CPU threads of this process are divided among them.

    Args:
        work: a function of a module.
        jobs: the keyword arguments of each call.

    Returns:
        The results, in the order of the jobs.

    Raises:
        ValueError: if an argument cannot be sent to another process.
    """
    for job in jobs:
        for name, value in job.items():
            try:
                pickle.dumps(value)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"{name}: to use several devices it has to be picklable, such as a function of a module "
                    f"(no lambda, no function inside another): {error}"
                ) from error
    threads = max(1, torch.get_num_threads() // len(jobs))
    context = torch.multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(len(jobs), context, torch.set_num_threads, (threads,)) as pool:
        futures = [pool.submit(work, **job) for job in jobs]
        return [future.result() for future in futures]
