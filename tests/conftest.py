"""Shared by all tests."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch

# Lightning 2.6's CLI calls what newer jsonargparse is going to drop
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
# two workers on two cores: a second thread in each would only wait
torch.set_num_threads(1)
# Lightning hands out tips at INFO
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, in any order; and no graphs of others, whose number is limited."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    L.seed_everything(0, verbose=False)


@pytest.fixture(scope="session", autouse=True)
def compiled_here(tmp_path_factory) -> None:
    """Nothing compiled before, or by another worker, is used.

    torch 2.14 keeps generated code by the graph and not by ATEN_CPU_CAPABILITY: that for AVX-512, found by a run
    without it, does not compile.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., L.Trainer]:
    """A quiet Trainer on the CPU that writes nowhere but to ``tmp_path``."""

    def make(**options: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module beside this file, importable under a name of its own so that its classes can be pickled."""
    name = "callbacks_oracle"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("oracle.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
