"""A model, its data and the Trainer's options, as ``lightning-ae fit`` would make them, as often as asked."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import yaml
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    ModelSummary,
    ProgressBar,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_ae.checkpoint import read_tree
from lightning_ae.cli.base import AutoencoderCLI
from lightning_ae.cli.checkpoints import inline, is_ours, model_of_checkpoint, named_model, read
from lightning_ae.cli.failing import Failure, failed
from lightning_ae.diagnostics import ApplyRemedies, DiagnosticsReport
from lightning_ae.diagnostics.remedies import OptimizerRemedy
from lightning_ae.models import load
from lightning_ae.rebuildable import rebuild

#: The Trainer's options that change what is learnt in some hundred steps on one device.
_KEPT = (
    "accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches",
    "deterministic", "benchmark", "detect_anomaly", "inference_mode", "overfit_batches", "limit_train_batches",
    "limit_val_batches", "plugins", "reload_dataloaders_every_n_epochs", "default_root_dir",
)  # fmt: skip
#: Callbacks that write, draw, or end a longer fit.
_LEFT_OUT = (
    Checkpoint, DeviceStatsMonitor, EarlyStopping, ModelSummary, ProgressBar, ThroughputMonitor, Timer,
    DiagnosticsReport,
)  # fmt: skip
#: Batches of a validation, where the Trainer is not told how many.
_VALIDATED = 50
_OWN = ("config", "ckpt_path", "weights_only", "steps", "folder", "treat", "trials", "json")


class Latent(NamedTuple):
    """What a :class:`lightning_ae.DiagnosticsReport` on the user's Trainer says of the model."""

    latent: Any = None
    output: str | None = None


class DoctorCLI(AutoencoderCLI):
    """Parses the arguments of ``lightning-ae doctor``; makes nothing until it is asked to.

    Args:
        args: the command line after ``doctor``.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lightning-ae doctor",
                "description": "Says why a model does not learn. Fits some steps and diagnoses, or diagnoses a "
                "checkpoint; prints findings and writes a page. Exit code: 0 if no error was found, 1 if one was, 2 if "
                "there is no diagnosis.",
                "usage": "lightning-ae doctor [-c CONFIG] [--ckpt_path FILE] [--model CLASS] [--data CLASS]\n"
                "            [--steps 300] [--folder FOLDER] [--treat [--trials 4]] [--json]\n"
                "            [--trainer.… --optimizer … --lr_scheduler … as for lightning-ae fit]",
            },
            args=list(args),
            run=False,
        )
        self.written = self.config.clone()
        self.config.trainer.logger = False  # one of the user's would write

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Trainer, and model and data that need not be named: a checkpoint may say one, the model bring the other."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is to be done."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, help="Checkpoint to diagnose as it is, without a fit.")
        parser.add_argument("--weights_only", type=bool | None, help="Of no effect: nothing else is read from a file.")
        parser.add_argument("--steps", type=int, default=300, help="Steps of the fit, or batches of a checkpoint.")
        parser.add_argument(
            "--folder", type=str | None, help="Where to write; doctor in the Trainer's default_root_dir by default."
        )
        parser.add_argument("--treat", action="store_true", help="Try remedies, and write those that help.")
        parser.add_argument("--trials", type=int, default=4, help="How many remedies to try.")
        parser.add_argument("--json", action="store_true", help="Print JSON alone.")

    def instantiate_classes(self) -> None:
        """Nothing yet."""

    # -- what is made -------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where to write."""
        found = self.config.folder
        return Path(found) if found else Path(self.config.trainer.default_root_dir or ".") / "doctor"

    def make_all(self) -> None:
        """New model, data and callbacks, and the user's optimizer.

        Raises:
            Failure: if one of them cannot be built.
        """
        path = self.config.ckpt_path
        if self.config.model is None and path is None:
            raise Failure("model: none is named. Give --model some.module.Class, -c config.yaml or --ckpt_path FILE.")
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
            self.model = self.config_init.model if self.config.model is not None else rebuild(read_tree(path))
            self.datamodule = self.config_init.data
            self._add_configure_optimizers_method_to_model(None)
        except Exception as error:
            raise failed("Model or data cannot be built", error) from error
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            raise Failure("data: none are named. Give --data some.module.DataModule, with its arguments.")

    def make_model(self) -> L.LightningModule:
        """A new model."""
        self.make_all()
        model: L.LightningModule = self.model
        return model

    def load(self) -> None:
        """Model and data as with :meth:`make_all`, the model as it is in the checkpoint.

        Raises:
            Failure: if it cannot be read, or does not fit.
        """
        path = self.config.ckpt_path
        try:
            if self.config.model is None:
                self.make_all()
                self.model = load(path)
                return
            checkpoint = read(path)
        except (FileNotFoundError, ValueError) as error:
            raise Failure(str(error)) from error
        self.make_all()
        try:
            for callback in self.callbacks(_of=ApplyRemedies):
                for remedy in callback.remedies:
                    if not isinstance(remedy, OptimizerRemedy):
                        remedy.apply(self.model)
            self.model.configure_model()
            self.model.on_load_checkpoint(checkpoint)
            self.model.load_state_dict(checkpoint["state_dict"], strict=self.model.strict_loading)
        except Exception as error:
            raise failed(f"{path} does not fit a {type(self.model).__name__} with these arguments", error) from error

    # -- the Trainer --------------------------------------------------------------------------------------------

    def callbacks(self, _of: type | None = None) -> list[Any]:
        """The user's callbacks that act on learning; or those of one kind."""
        found = self.config_init.trainer.get("callbacks") or []
        found = found if isinstance(found, list) else [found]
        return [c for c in found if (isinstance(c, _of) if _of else not isinstance(c, _LEFT_OUT))]

    @property
    def latent(self) -> Latent:
        """What a report of the user's would look at."""
        given = next(iter(self.callbacks(_of=DiagnosticsReport)), None)
        return Latent() if given is None else Latent(given.latent, given.output)

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Of a Trainer on one device that writes and prints nothing."""
        given = self.config_init.trainer
        options = {name: given[name] for name in _KEPT if given.get(name) is not None}
        devices = given.get("devices")
        one = devices[:1] if isinstance(devices, list) and devices else 1
        return {
            "logger": DummyLogger(),  # steps that draw with self.logger go on to work
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": _VALIDATED,
            **options,
            "devices": one,
            "callbacks": self.callbacks(),
        }

    # -- the data -----------------------------------------------------------------------------------------------

    def batches(self, stage: str, number: int) -> Iterator[Any]:
        """Some batches of ``"train"`` or ``"val"``, with what hooks make of them; none where there are no such data."""
        owner = self.datamodule if self.datamodule is not None else self.model
        if not is_overridden(f"{stage}_dataloader", owner):
            return
        loader = getattr(owner, f"{stage}_dataloader")()
        if isinstance(loader, (list, tuple)) and stage == "val":
            loader = loader[0] if loader else ()
        if isinstance(loader, (dict, list, tuple)):
            loader = (batch for batch, _, _ in iter(CombinedLoader(loader, "max_size_cycle")))
        for batch in islice(loader, number):
            for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
                of_data = self.datamodule is not None and is_overridden(hook, self.datamodule)
                batch = getattr(self.datamodule if of_data else self.model, hook)(batch, 0)
            yield batch

    # -- the configuration --------------------------------------------------------------------------------------

    def configuration(self) -> dict[str, Any]:
        """All of the user's configuration, as ``lightning-ae fit -c`` takes it."""
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.written, skip_none=False, format="yaml"))
        config = copy.deepcopy({name: value for name, value in config.items() if name not in _OWN})
        if config.get("model") is None and self.config.ckpt_path is not None:
            config["model"] = model_of_checkpoint(self.config.ckpt_path)
        return {name: value for name, value in config.items() if value is not None or name == "seed_everything"}


def with_hyperparameters(args: Sequence[str]) -> list[str]:
    """Give a model that is named beside a checkpoint the hyperparameters in it; what the user says comes after.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, or does not say which model it has and none is named.
    """
    path = _last(args, "--ckpt_path")
    if path is None or any(arg.split("=")[0] in ("-c", "--config", "-h", "--help") for arg in args):
        return list(args)
    checkpoint, name = read(path), _last(args, "--model")
    if name is None:
        if not is_ours(checkpoint):
            raise ValueError(
                f"{path} does not say of which class its model is: give --model some.module.Class, and --model.x for "
                "arguments that are not among its hyperparameters."
            )
        return list(args)
    cls = find_class(name)
    return list(args) if cls is None else _named(args, inline(named_model(cls, checkpoint, path)))


def _last(args: Sequence[str], option: str) -> str | None:
    found = None
    for i, arg in enumerate(args):
        if arg == option and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"{option}="):
            found = arg.partition("=")[2]
    return found


def _named(args: Sequence[str], model: str) -> list[str]:
    """With another ``--model``."""
    done, rest = list[str](), list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--model" and rest:
            rest.pop(0)
        if arg == "--model" or arg.startswith("--model="):
            done.append(f"--model={model}")
        else:
            done.append(arg)
    return done


def find_class(name: str, base: type = L.LightningModule) -> type | None:
    """The class of a dotted path, or of a short name among those that are imported; None for what is no such name.

    Raises:
        Failure: if its module cannot be imported, or has no such class.
    """
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or name.endswith((".yaml", ".yml", ".json")):
        return None
    module, _, attribute = name.rpartition(".")
    if not module:
        known = [cls for cls in _subclasses(base) if cls.__name__ == name]
        if not known:
            raise Failure(f"There is no {base.__name__} called {name}: give its whole path, as some.module.{name}.")
        return known[0] if len(known) == 1 else None
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise Failure(
                f"There is no module {error.name}, in which {name} would be; modules are looked for in the current "
                f"folder ({Path.cwd()}) and among those installed."
            ) from error
        raise failed(f"{module} cannot be imported", error) from error
    except Exception as error:
        raise failed(f"{module} cannot be imported", error) from error
    if not isinstance(found, type) or not issubclass(found, base):
        what = "has no class of that name" if found is None else f"is no {base.__name__}"
        raise Failure(f"{name}: the module {module} {what}." if found is None else f"{name} {what}.")
    return found


def _subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _subclasses(sub)
