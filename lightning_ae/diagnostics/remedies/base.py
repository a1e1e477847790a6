"""What a remedy is: a change that needs no edit of anybody's source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from lightning_ae.diagnostics.watch.site import clean_name
from lightning_ae.models import Autoencoder
from lightning_ae.rebuildable import describe

Options = MutableMapping[str, Any]


class Change(NamedTuple):
    """What a remedy did; true if it did something.

    Attributes:
        done: whether anything was changed.
        what: what was changed, or why nothing could be.

    Example:
        >>> bool(Change(False, "the loss is called in training_step"))
        False
    """

    done: bool
    what: str

    def __bool__(self) -> bool:
        """Whether anything was changed."""
        return self.done


@dataclass(frozen=True)
class Remedy(ABC):
    """A change of a model, of its optimizer, of the Trainer or of the data, to be made before a fit.

    It is plain data: it can be printed, compared, and written into a configuration.

    Example:
        >>> from lightning_ae.diagnostics.remedies import ScaleLearningRate
        >>> remedy = ScaleLearningRate(0.1)
        >>> remedy.describe()
        'Multiply the learning rate by 0.1.'
        >>> options = {}
        >>> remedy.apply(nn.Linear(2, 1), options).done, options["callbacks"]
        (True, [ApplyRemedies(ScaleLearningRate(factor=0.1))])
    """

    #: whether it makes new weights, which those of a checkpoint that is loaded later replace
    draws: ClassVar[bool] = False

    @abstractmethod
    def describe(self) -> str:
        """What it does, in one sentence."""

    @abstractmethod
    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Make the change.

        Args:
            model: to be trained; it is changed in place, before the fit.
            trainer_options: the arguments of ``lightning.Trainer``, changed in place.
            data: the arguments of ``Trainer.fit`` after the model (``datamodule``, or ``train_dataloaders`` and
                ``val_dataloaders``), changed in place.

        Returns:
            What was changed, or why nothing could be.
        """

    def neighbours(self) -> tuple[Remedy, ...]:
        """The same change with other numbers to try, where its number is a guess."""
        return ()

    def python(self) -> str:
        """The code that makes the change for good, see :func:`code`."""
        return code([self])

    def statements(self) -> list[str]:
        """The part of the code that changes ``model``."""
        return [f"remedies.{self!r}.apply(model)"]

    def arguments(self) -> dict[str, Any]:
        """The part of the code that is in the Trainer's arguments: an expression by name, of ``callbacks`` a list."""
        return {}

    def config(self) -> dict[str, Any]:
        """What makes the change for good in LightningCLI's YAML, as far as it can be said there."""
        return {"trainer": {"callbacks": [{"class_path": "lightning_ae.ApplyRemedies", "init_args": self._as_arg()}]}}

    def _as_arg(self) -> dict[str, Any]:
        path = f"lightning_ae.diagnostics.remedies.{type(self).__name__}"
        arguments = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"remedies": [{"class_path": path, "init_args": arguments}]}


@dataclass(frozen=True)
class ByHand(Remedy):
    """What cannot be applied: it says what is to be done, and why it cannot be done from outside.

    Args:
        why: what stands in the way.

    Example:
        >>> ByHand("which values are right is not known").apply(nn.Linear(1, 1)).done
        False
    """

    why: str

    def describe(self) -> str:
        """Why it cannot be applied."""
        return f"Not to be applied from outside: {self.why}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Nothing."""
        return Change(False, self.why)

    def statements(self) -> list[str]:
        """A comment."""
        return [f"# {self.describe()}"]

    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Together(Remedy):
    """Several changes that only help together.

    Args:
        remedies: in the order in which they are made.

    Example:
        >>> from lightning_ae.diagnostics.remedies import Reinitialize, SwapActivation
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
        >>> Together((SwapActivation("relu"), Reinitialize("he"))).apply(network).done, network[1]
        (True, ReLU())
    """

    remedies: tuple[Remedy, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "remedies", tuple(self.remedies))

    def describe(self) -> str:
        """All of them."""
        return " ".join(remedy.describe() for remedy in self.remedies)

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Make all that can be made; it counts as done if one was."""
        changes = [remedy.apply(model, trainer_options, data) for remedy in self.remedies]
        made = [change.what for change in changes if change]
        return Change(bool(made), " ".join(made) if made else "; ".join(change.what for change in changes))

    def statements(self) -> list[str]:
        """Those of all."""
        return [line for remedy in self.remedies for line in remedy.statements()]

    def arguments(self) -> dict[str, Any]:
        """Those of all."""
        return merge(remedy.arguments() for remedy in self.remedies)

    def config(self) -> dict[str, Any]:
        """All of them."""
        return merge(remedy.config() for remedy in self.remedies)


class TrainerRemedy(Remedy):
    """A change of the Trainer's arguments."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The arguments."""

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set the arguments."""
        if trainer_options is None:
            return Change(False, "it is an argument of the Trainer: give trainer_options")
        trainer_options.update(self.options())
        return Change(True, self.describe())

    def statements(self) -> list[str]:
        """None: they are arguments of the Trainer."""
        return []

    def arguments(self) -> dict[str, Any]:
        """The arguments."""
        return {name: repr(value) for name, value in self.options().items()}

    def config(self) -> dict[str, Any]:
        """The arguments."""
        return {"trainer": self.options()}


# -- what remedies share --------------------------------------------------------------------------------------------


def code(remedies: Iterable[Remedy]) -> str:
    """Python that makes the changes for good, after ``import lightning as L`` and ``import lightning_ae as ae``.

    Example:
        >>> from lightning_ae.diagnostics.remedies import ClipGradients, ScaleLearningRate, SetBias
        >>> print(code([SetBias(("0",)), ScaleLearningRate(0.1), ClipGradients()]))
        remedies.SetBias(layers=('0',), value=0.1).apply(model)
        trainer = L.Trainer(callbacks=[ae.ApplyRemedies([remedies.ScaleLearningRate(factor=0.1)])],
            gradient_clip_val=1.0)
    """
    everything = Together(tuple(remedies))
    arguments = [
        f"{name}=[{', '.join(value)}]" if isinstance(value, list) else f"{name}={value}"
        for name, value in everything.arguments().items()
    ]
    return "\n".join(
        [*everything.statements(), *([f"trainer = L.Trainer({', '.join(arguments)})"] if arguments else [])]
    )


def merge(configs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One configuration of several: mappings are joined, lists one after the other.

    Example:
        >>> merge([{"trainer": {"callbacks": [1]}}, {"trainer": {"callbacks": [2], "max_steps": 5}}])
        {'trainer': {'callbacks': [1, 2], 'max_steps': 5}}
    """
    whole: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            if isinstance(value, dict):
                whole[key] = merge([whole.get(key, {}), value])
            elif isinstance(value, list):
                whole[key] = [*whole.get(key, []), *value]
            else:
                whole[key] = value
    return whole


def add_callback(options: Options, callback: Any, instead_of: Any = None) -> None:
    """Add a callback to the Trainer's arguments, in the place of another if one is given."""
    there = options.get("callbacks") or []
    there = list(there) if isinstance(there, (list, tuple)) else [there]
    options["callbacks"] = [*(c for c in there if c is not instead_of), callback]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules, by their names without what compilers and wrappers add; of a wrapper what it wraps."""
    return {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, with what wraps it, wherever the same object is used."""
    old = [module for known, module in model.named_modules(remove_duplicate=False) if clean_name(known) == name]
    new.training = old[-1].training
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if any(child is module for module in old) and parent is not new:
                parent._modules[key] = new


def weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with weights that can draw them anew, in order."""
    for name, module in modules_by_name(model).items():
        resets = hasattr(module, "reset_parameters") or isinstance(module, nn.MultiheadAttention)
        if resets and (module._parameters or parametrize.is_parametrized(module)):
            yield name, module


def shown(names: tuple[str, ...]) -> str:
    """The first three names.

    Example:
        >>> shown(("a", "b", "c", "d"))
        'a, b, c and 1 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def note(model: nn.Module, **arguments: Any) -> None:
    """Write changed arguments of a model of ours into what its checkpoints record."""
    if isinstance(model, Autoencoder) and model._init_args is not None:
        model._init_args.update(arguments)
        model._record(describe(model))
