"""Autoencoders on top of each other: the code of one level is the input of the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.boxes import AutoencoderOutput
from lightning_ae.checks import check_floating, describe_type
from lightning_ae.codes import Code
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder, Score
from lightning_ae.models.sparse import SparseAutoencoder
from lightning_ae.models.stacked_boxes import StackedDecoder, StackedEncoder
from lightning_ae.models.weights import check_weights
from lightning_ae.penalties import Penalty
from lightning_ae.rebuildable import KeepsAttributes


class StackedAutoencoder(KeepsAttributes, Autoencoder):
    r"""Levels, each an :class:`Autoencoder` of the codes below it: :math:`z_k = e_k(z_{k-1})`, :math:`z_{-1} = x`.

    The reconstruction goes all the way down, :math:`\hat z_{k-1} = m_k(d_k(\hat z_k))` from :math:`\hat z_{n-1} =
    z_{n-1}`, with :math:`m_k` the mean of level k's loss. Together, the levels are trained with

    .. math:: L_0(d_0(\hat z_0), x) + \sum_k \bigl( w_k\, L_k(d_k(z_k), \operatorname{sg}[z_{k-1}]) + C_k \bigr),

    ``"reconstruction"`` and for each level its own loss, ``"level_0"``, ``"level_1"``, …, and what its code and its
    penalties charge, :math:`C_k`: ``"level_0_l1"``, … with the weights that are there (``levels.0.code.weight``). The
    target of a level is no function of what is trained (:math:`\operatorname{sg}`): to make codes small would be the
    easiest way to reconstruct them well.

    ``training_level = k`` trains one level: the objective is level k's own, on inputs from the levels below as they
    are, without corruption and randomness. All other levels run without gradients, their terms are logged as before,
    and ``"reconstruction"`` and the metrics are those from depth k + 1. :class:`GreedyLevels` does this level by level
    and also freezes what is not trained, which in a loop of your own is up to you (``eval()`` for batch normalisation
    and dropout, an optimizer of ``levels[k].parameters()``).

    A level's corruption acts on that level's input in training, its target stays clean: denoising autoencoders
    stacked as by Vincent et al. Trained together, the decoder of a lower level runs twice, on codes and on
    reconstructed ones; batch normalisation in it sees both. Of a level, its ``lr``, ``weight_decay``, ``batch_key`` and
    hooks of training are not used.

    Args:
        levels: from the data upwards. Not those that need upkeep of their own (:class:`DictionaryAutoencoder`: take a
            :class:`SparseAutoencoder` with a :class:`TopKCode`), and no stacks.
        level_weights: :math:`w_k`; None for 1 each, or 0 for a single level, whose loss is the reconstruction. A plain
            list, for schedules (``level_weights.0``), kept in checkpoints.
        penalties: on the model as a whole, when the levels are trained together.
        lr: learning rate of AdamW.
        weight_decay: decoupled weight decay of AdamW.
        batch_key: where ``x`` is if a batch is a dict.
        score: as for :class:`Autoencoder`.

    Attributes:
        training_level: None to train all levels together, at first, or the one that is trained; kept in checkpoints.

    Shapes:
        ``x``: what the first level takes; ``z``: what the last one gives; every term ``(B,)`` or without dimensions.

    Raises:
        TypeError: if a level is no :class:`Autoencoder`.
        ValueError: without levels, if sizes do not fit as far as they are known, for weights that are negative or not
            one per level, or a penalty named like a level's term. On the first batch of each run, if the codes below
            are not in the support of a level's loss.

    Source: Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647; Bengio et al. 2007,
    https://papers.nips.cc/paper/3048; Vincent et al. 2010, https://www.jmlr.org/papers/v11/vincent10a.html.

    Example:
        >>> from lightning_ae import ConvAutoencoder, MLPAutoencoder
        >>> model = StackedAutoencoder([ConvAutoencoder((1, 8, 8), 16), MLPAutoencoder(16, 4, hidden=())])
        >>> x = torch.rand(2, 1, 8, 8)
        >>> model.encode(x).shape, model.encode(x, depth=1).shape, model.reconstruct(x, depth=1).shape
        (torch.Size([2, 4]), torch.Size([2, 16]), torch.Size([2, 1, 8, 8]))
        >>> list(model.terms(x, model(x)))
        ['reconstruction', 'level_0', 'level_1']
    """

    takes_mask = False

    kept = ("level_weights", "training_level")
    decoder: StackedDecoder
    levels: nn.ModuleList

    def __init__(
        self,
        levels: Sequence[Autoencoder],
        level_weights: Sequence[float] | None = None,
        *,
        penalties: Mapping[str, Penalty] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_key: str = "x",
        score: Score | None = None,
    ) -> None:
        levels = _check_levels(levels)
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "batch_key": batch_key, "score": score}
        boxes = StackedEncoder(levels), StackedDecoder(levels), levels[0].loss
        super().__init__(*boxes, code=levels[-1].code, penalties=penalties, **options)
        self.levels = nn.ModuleList(levels)
        for name in ("encoder", "decoder"):  # parameters are to be known by their names under levels
            self._modules[name] = self._modules.pop(name)
        if level_weights is None:
            level_weights = [1.0 if len(levels) > 1 else 0.0] * len(levels)
        self.level_weights = check_weights("level_weights", level_weights, len(levels), "level")
        self.training_level: int | None = None

    def _check_boxes(self) -> None:
        # each level has checked its own
        taken = [name for name in self.penalties if name.startswith("level_") or name in ("loss", "reconstruction")]
        if taken:
            raise ValueError(f"penalties: {taken} is the name of another term; choose another key.")

    # -- what people call -------------------------------------------------------------------------------------

    def encode(self, x: Tensor, depth: int | None = None) -> Tensor:
        """The code of so many levels, None for all, of clean data and without randomness."""
        for level in self._up_to(depth):
            x = level.encode(x)
        return x

    def decode(self, z: Tensor, depth: int | None = None) -> Tensor:
        """The reconstruction from the code of so many levels, None for all, output activation applied."""
        return self.loss.mean(self._params(z, len(self._up_to(depth))))

    def reconstruct(self, x: Tensor, depth: int | None = None) -> Tensor:
        """``decode(encode(x, depth), depth)``; a loss that takes a scale from ``x`` as known applies it."""
        return self.loss.prediction(self._params(self.encode(x, depth), len(self._up_to(depth))), x)

    def _up_to(self, depth: int | None) -> list[Autoencoder]:
        n = len(self.levels)
        depth = n if depth is None else depth
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= n:
            raise ValueError(f"depth: expected a whole number from 1 to the {n} levels there are, got {depth!r}.")
        levels: list[Any] = list(self.levels)[:depth]
        return levels

    def _params(self, z: Tensor, depth: int) -> Tensor:
        return self.decoder.down(self._up_to(depth)[-1].decoder(z), depth)

    def _trained(self) -> int | None:
        k, n = self.training_level, len(self.levels)
        if k is not None and k not in range(n):
            raise ValueError(f"training_level: expected None or a level from 0 to {n - 1}, got {k!r}.")
        return k

    # -- the flow ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """The last level's latent, pre-activations of ``x``, and the levels' terms, corrupted as in a step."""
        check_floating("x", x)
        trained = self._trained()
        depth = len(self.levels) if trained is None else trained + 1
        z, params, kept = x, x, {}
        for k, level in enumerate(self._up_to(None)):
            frozen = trained not in (None, k)
            if trained == k:
                z = z.detach()
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                target = z.detach()
                output = self._pass(level, z if frozen else level.corruption(z))
                for name, term in level.terms(target, output).items():
                    kept[_name(k, name)] = term
                below = trained is not None and k < trained
                z = _without_randomness(level, z, output) if below else output.z
            if k + 1 == depth:
                params = output.params
                params = self._down(z, params, depth)
        return AutoencoderOutput(z, params, kept)

    def _down(self, z: Tensor, params: Tensor, depth: int) -> Tensor:
        if self.training_level == 0:
            return params
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training_level is None):
            # as a module if it decodes the model's latent, which is how monitors know it
            down: Tensor = self.decoder(z, params) if depth == len(self.levels) else self.decoder.down(params, depth)
        return down

    def _pass(self, level: Autoencoder, x: Tensor) -> AutoencoderOutput:
        if type(level).forward is not Autoencoder.forward:
            output: AutoencoderOutput = level(x)
            return output
        # the last code is called as a part of this model, which is how monitors know it
        z, penalties = (self.code if level.code is self.code else level.code)(level.encoder(x))
        return AutoencoderOutput(z, level.decoder(z), penalties)

    def terms(self, x: Tensor, output: AutoencoderOutput) -> dict[str, Tensor]:
        """Reconstruction, the levels' terms, and the penalties, ``(B,)`` or without dimensions each."""
        terms = self.loss.terms(output.params, x)
        penalties = {name: penalty(x, output, self) for name, penalty in self.penalties.items()}
        merged = {**terms, **output.penalties, **penalties}
        if "loss" in merged or len(merged) < len(terms) + len(output.penalties) + len(penalties):
            names = [*terms, *output.penalties, *penalties]
            raise ValueError(f"terms: each needs a name of its own, other than 'loss'; got {names}.")
        return merged

    def objective(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum for all levels together, or the objective of the level that is trained, ``(B,)``."""
        trained = self._trained()
        if trained is not None:
            return self._objective_of(trained, terms, 1.0)
        total = terms["reconstruction"]
        for k, weight in enumerate(self.level_weights):
            total = total + self._objective_of(k, terms, weight)
        weights: dict[str, Any] = {name: penalty.weight for name, penalty in self.penalties.items()}
        for name, weight in weights.items():
            total = total + weight * terms[name]
        return total

    def _objective_of(self, k: int, terms: Mapping[str, Tensor], weight: float) -> Tensor:
        prefix = _name(k, "")
        own = {name.removeprefix(prefix): term for name, term in terms.items() if name.startswith(prefix)}
        return self._up_to(None)[k].objective({"reconstruction": weight * terms[_name(k, "reconstruction")], **own})

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Latent ``z``, and ``reconstruction`` and ``score`` from the depth that is trained."""
        x = self.get_input(batch)
        trained = self._trained()
        z, depth = x, len(self.levels) if trained is None else trained + 1
        codes = [z := level.encode(level.corruption(z)) for level in self._up_to(None)]
        params = self._params(codes[depth - 1], depth)
        score = self._reconstruction_score(params, x)
        return {"z": z, "reconstruction": self.loss.prediction(params, x), "score": score}

    # -- training ---------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """What logs, and what tells the levels' penalties of the Trainer."""
        there = self._trainer is not None and any(isinstance(c, _Introduce) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*super().configure_callbacks(), *([] if there else [_Introduce()])]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The step, after which atoms of the levels that were trained have norm 1 again if they have ``unit_norm``."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for k, level in enumerate(self.levels):
            if isinstance(level, SparseAutoencoder) and self.training_level in (None, k):
                level._normalise()

    def check_input(self, x: Tensor) -> None:
        """As in :class:`Autoencoder`, and that codes are in the support of the loss of the level above."""
        super().check_input(x)
        checks = [type(level.loss).check is not ReconstructionLoss.check for level in self._up_to(None)]
        if not any(checks[1:]):
            return
        # copies: batch statistics and modes are not touched, and monitors do not count them
        levels = copy.deepcopy(nn.ModuleList(self.levels)).eval()
        with torch.no_grad():
            for k, (below, level) in enumerate(pairwise(levels), 1):
                x = below.encode(x)  # type: ignore[operator]
                try:
                    level.loss.check(x)  # type: ignore[operator, union-attr]
                except ValueError as error:
                    raise ValueError(f"levels.{k}: on the codes of the level below: {error}") from error


class _Introduce(L.Callback):
    """Attaches the levels to the Trainer, which knows the model only; tells their penalties that training starts."""

    def setup(self, trainer: L.Trainer, pl_module: StackedAutoencoder, stage: str) -> None:  # type: ignore[override]
        for level in pl_module.levels:
            level.trainer = trainer  # type: ignore[assignment]

    def on_train_start(self, trainer: L.Trainer, pl_module: StackedAutoencoder) -> None:  # type: ignore[override]
        for level in pl_module._up_to(None):
            for penalty in level.penalties.values():
                penalty.on_train_start(level)  # type: ignore[operator]


def _name(k: int, term: str) -> str:
    """A level's term as it is logged."""
    return f"level_{k}" if term == "reconstruction" else f"level_{k}_{term}"


def _without_randomness(level: Autoencoder, x: Tensor, output: AutoencoderOutput) -> Tensor:
    drawn = type(level).forward is not Autoencoder.forward or type(level.code).encode is not Code.encode
    return level.encode(x) if drawn else output.z


def _check_levels(levels: Sequence[Autoencoder]) -> list[Autoencoder]:
    if not isinstance(levels, Sequence):
        raise TypeError(f"levels: expected a sequence of Autoencoders, got {describe_type(levels)}.")
    if not levels:
        raise ValueError("levels: expected at least one Autoencoder, got none.")
    for k, level in enumerate(levels):
        if not isinstance(level, Autoencoder):
            raise TypeError(f"levels[{k}]: expected an Autoencoder, got {describe_type(level)}.")
        if type(level).configure_callbacks is not Autoencoder.configure_callbacks:
            raise TypeError(
                f"levels[{k}]: expected an Autoencoder without callbacks of its own, which a level does not get; got "
                f"a {type(level).__name__}."
            )
        if level._masks:
            raise ValueError(
                f"levels[{k}]: expected an Autoencoder without mask_key and missing='mask': a stack cannot leave "
                "numbers out; fill them in before."
            )
        if any(level is other for other in levels[:k]):
            raise ValueError(f"levels[{k}]: expected another Autoencoder than those below, got one of them again.")
    for k, (below, level) in enumerate(pairwise(levels), 1):
        given, taken = getattr(below.decoder, "latent_shape", None), getattr(level.encoder, "in_shape", None)
        if given is not None and taken is not None and tuple(given) != tuple(taken):
            raise ValueError(
                f"levels[{k}]: expected an encoder for the codes below, {tuple(given)}, got {tuple(taken)}."
            )
    return list(levels)
