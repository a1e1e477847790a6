"""Remedies in the objective and the code of a model of ours: weights of terms, the loss, the codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
from torch import nn

from lightning_ae.diagnostics.remedies.apply import OptimizerRemedy
from lightning_ae.diagnostics.remedies.base import Change, Options, Remedy, note
from lightning_ae.losses import BernoulliNLL, ReconstructionLoss, SquaredError
from lightning_ae.models import Autoencoder
from lightning_ae.rebuildable import describe, rebuild

Loss = Literal["BernoulliNLL", "SquaredError"]
_OTHERS = "its loss is put together in training_step, which only its author can change"


def owner_of(model: Autoencoder, term: str) -> tuple[object, str] | None:
    """The object and attribute in which the weight of a term is; None if it is not a plain number."""
    if term in model.penalties:
        return model.penalties[term], "weight"
    code: Any = model.code
    for name in ("weight", "beta", "commitment"):
        held = getattr(code, name, None)
        if isinstance(held, (int, float)) and term in code.weights():
            setattr(code, name, held + 1)  # another term may weigh as much, and not be its
            follows = code.weights()[term] == held + 1
            setattr(code, name, held)
            if follows:
                return code, name
    return None


def _rebuilds(model: Autoencoder) -> bool:
    """Whether a model of ours can be built from what its checkpoints record; its weights and no draw are touched."""
    try:
        with torch.random.fork_rng():
            rebuild(describe(model), cls=type(model))
    except (ValueError, TypeError):
        return False
    return True


@dataclass(frozen=True)
class SetWeight(Remedy):
    """Set the weight of a term of the objective.

    Args:
        term: the name under which it is logged.
        weight: the new weight.

    Example:
        >>> from lightning_ae import L1Code, MLPAutoencoder
        >>> model = MLPAutoencoder(8, 4, code=L1Code(100.0))
        >>> SetWeight("l1", 0.1).apply(model).done, model.code.weight
        (True, 0.1)
    """

    term: str
    weight: float

    def describe(self) -> str:
        """Term and weight."""
        return f"Set the weight of {self.term!r} to {self.weight:g}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Set the attribute."""
        if not isinstance(model, Autoencoder):
            return Change(False, _OTHERS)
        found = owner_of(model, self.term)
        if found is None:
            return Change(False, f"the weight of {self.term!r} is no plain number of the model")
        owner, name = found
        setattr(owner, name, self.weight)
        arguments = getattr(owner, "_init_args", None)
        if arguments is not None and name in arguments:
            arguments[name] = self.weight
        note(model)
        return Change(True, self.describe())


@dataclass(frozen=True)
class WarmUpWeight(OptimizerRemedy):
    """Raise the weight of a term from 0 to a value over a part of the run.

    Args:
        term: the name under which it is logged.
        weight: where it ends.
        share: of the run's steps, or of 1000 where their number is not known.

    Source: Bowman et al. 2016, https://arxiv.org/abs/1511.06349.

    Example:
        >>> WarmUpWeight("kl", 1.0).describe()
        "Raise the weight of 'kl' from 0 to 1 over the first 50% of the run."
    """

    term: str
    weight: float
    share: float = 0.5

    def describe(self) -> str:
        """Term, weight and share."""
        return (
            f"Raise the weight of {self.term!r} from 0 to {self.weight:g} over the first {self.share:.0%} of the run."
        )

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Through the callback."""
        if not isinstance(model, Autoencoder):
            return Change(False, _OTHERS)
        if owner_of(model, self.term) is None:
            return Change(False, f"the weight of {self.term!r} is no plain number of the model")
        return super().apply(model, trainer_options, data)

    def on_step(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Set the weight of this step; where it is, is known from the step, so that a resumed run goes on."""
        found = owner_of(model, self.term) if isinstance(model, Autoencoder) else None
        if found is not None:
            total = trainer.estimated_stepping_batches
            steps = max(1.0, self.share * (total if 0 < total < float("inf") else 1000))
            setattr(*found, self.weight * min(1.0, trainer.global_step / steps))


@dataclass(frozen=True)
class ExchangeLoss(Remedy):
    r"""Score with another loss of ours, with the same numbers from the decoder.

    Args:
        loss: ``"BernoulliNLL"``, whose gradient is :math:`\hat x - x`, or ``"SquaredError"`` with no activation.

    Example:
        >>> from lightning_ae import MLPAutoencoder
        >>> model = MLPAutoencoder(8, 4, loss=SquaredError("sigmoid"))
        >>> ExchangeLoss("BernoulliNLL").apply(model).done, type(model.loss).__name__
        (True, 'BernoulliNLL')
    """

    loss: Loss

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss: expected one of {get_args(Loss)}, got {self.loss!r}.")

    def describe(self) -> str:
        """Which."""
        return f"Score with {self.loss}()."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Exchange it."""
        if not isinstance(model, Autoencoder):
            return Change(False, _OTHERS)
        new: ReconstructionLoss = {"BernoulliNLL": BernoulliNLL, "SquaredError": SquaredError}[self.loss]()
        if new.params_per_feature != model.loss.params_per_feature:
            return Change(False, f"the decoder gives {model.loss.params_per_feature} numbers for each of the data's")
        if type(new) is type(model.loss) and new.output_activation == model.loss.output_activation:
            return Change(False, f"it scores with {self.loss}() already")
        old, whole = model.loss, _rebuilds(model)
        model.loss = new
        note(model, loss=new)
        if whole and not _rebuilds(model):
            model.loss = old
            note(model, loss=old)
            return Change(False, f"a {type(model).__name__} takes no {self.loss}")
        return Change(True, self.describe())


@dataclass(frozen=True)
class RestartCodebook(Remedy):
    """Let a codebook begin from data by k-means, and move codes that are not used.

    Args:
        expire: share of the mean use below which a code is moved.

    Source: Zeghidour et al. 2021, https://arxiv.org/abs/2107.03312.

    Example:
        >>> from lightning_ae import VectorQuantizerCode, VectorQuantizedAutoencoder, mlp_pair
        >>> code = VectorQuantizerCode(16, 2, kmeans=False, expire=0.0)
        >>> model = VectorQuantizedAutoencoder(*mlp_pair(8, 4), code=code)
        >>> RestartCodebook().apply(model).done, model.code.started, model.code.expire
        (True, False, 0.03)
    """

    draws: ClassVar[bool] = True
    expire: float = 0.03

    def describe(self) -> str:
        """What it does."""
        return "Start the codebook from data by k-means, and move codes that are not used."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Forget the codebook."""
        code = getattr(model, "code", None)
        if not isinstance(model, Autoencoder) or not hasattr(code, "started") or not hasattr(code, "expire"):
            return Change(False, "it has no codebook of this package's")
        code.started, code.expire = False, self.expire  # type: ignore[union-attr]
        arguments = getattr(code, "_init_args", None) or {}
        arguments.update({"kmeans": True, "expire": self.expire})
        note(model)
        return Change(True, self.describe())
