"""The flow, written once: corruption → encoder → code → decoder → loss → terms → objective."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import check_non_negative, check_one_of, check_tensor, check_type
from lightning_ae.codes import Code, Identity
from lightning_ae.losses import ReconstructionLoss, SquaredError
from lightning_ae.metrics import reconstruction_metrics
from lightning_ae.models.batches import Missing, corrupted, input_of, mask_of, split_missing, without_missing
from lightning_ae.models.fitting import check_sizes_of_boxes, warn_of_second_activation
from lightning_ae.models.optimising import TrainsWithAdamW
from lightning_ae.models.recorder import Recorder
from lightning_ae.penalties import Penalty
from lightning_ae.rebuildable import Rebuildable, describe

#: what the ``score`` of a prediction can be; each class says which of them it has
Score = Literal["excess", "loss", "bound", "evidence"]
#: names that cannot be a penalty's: the sums, and the metrics beside which terms are logged
_RESERVED = {"loss", "reconstruction", "mse", "mae", "fvu", "psnr", "ssim", "ms_ssim"}


def check_loss(loss: ReconstructionLoss | None) -> ReconstructionLoss:
    """The loss given, or :class:`SquaredError` for None; a ``TypeError`` for anything else."""
    check_type("loss", loss, ReconstructionLoss, None)
    return SquaredError() if loss is None else loss


class Autoencoder(Rebuildable, TrainsWithAdamW):
    r"""An autoencoder made of boxes: :math:`x \to \text{encoder} \to \text{code} \to \text{decoder} \to \text{loss}`.

    The objective of an example is the sum of terms

    .. math:: L(a, x) + \sum_j w_j\, c_j(z) + \sum_j v_j\, p_j(x, z, a; \theta),

    reconstruction, what the code charges, and penalties; the training loss is its mean over the batch. Losses sum
    over the event, so the objective does not depend on batch size, accumulation or number of devices, and is in
    nats for a likelihood. (In gradients a smaller last batch weighs as much as a full one, as everywhere in
    Lightning; ``drop_last`` avoids it.)

    Each term is logged raw, without its weight, as ``train/<term>``, ``val/<term>``, ``test/<term>`` beside
    ``.../loss``. In training the logged number is the mean over the steps since the last one logged, and
    ``train/<term>_epoch`` that over the epoch; nothing is read from the device in between.

    Subclass it to choose the boxes, or override :meth:`terms`, :meth:`objective`, :meth:`configure_metrics` or
    :meth:`configure_optimizers`; the step is shared and need not be touched. For ``torch.export``, whose graphs have a
    ``code`` of their own, put it into a module: ``torch.export.export(nn.Sequential(model), ...)``.

    Args:
        encoder: any module from ``(B, *event)`` to ``h``.
        decoder: any module from ``z`` to pre-activations ``(B, *loss.params_shape(event))``.
        loss: scores pre-activations against ``x`` and owns the output activation; None for :class:`SquaredError`.
        code: makes the latent of ``h`` and charges for it; None for :class:`Identity`.
        penalties: further terms by the name under which they are logged.
        corruption: module applied to the encoder's input in the steps; the loss scores the clean ``x``.
        lr: learning rate of AdamW.
        weight_decay: decoupled weight decay of AdamW; thresholds and gains of codes and scales of losses do not decay.
            For the Gaussian prior of MAP use :class:`WeightPrior`.
        batch_key: where ``x`` is if a batch is a dict; of a tuple or list it is the first item.
        mask_key: where in the batch (a key, or a position) a mask is, true or 1 where a number of ``x`` is there, of
            its shape or to be broadcast to it. What is missing is 0 for the encoder and has neither loss nor gradient;
            sums are over what is there.
        missing: what NaN in ``x`` is: ``"refuse"``, an error; ``"mask"``, a number that is missing, in all methods.
        score: what ``predict_step`` gives as anomaly score, the higher the odder; None for the first of ``scores``.
            ``"excess"`` is the part of the reconstruction loss that a perfect reconstruction would not have
            (:meth:`ReconstructionLoss.excess`), 0 at best whatever the data cost by themselves; ``"loss"`` is all of
            it. A :class:`VariationalAutoencoder` has two more.

    Shapes:
        ``x``: ``(B, *event)``; every term: ``(B,)`` or without dimensions.

    Raises:
        ValueError: if two terms have the same name, or the sizes of encoder, code and decoder do not fit as far as they
            are known (``encoder.h_shape``, ``decoder.latent_shape``). On the first batch of each run, if the data do
            not suit the loss or are not finite.

    Example:
        >>> from lightning_ae import BernoulliNLL, mlp_pair
        >>> model = Autoencoder(*mlp_pair((1, 8, 8), latent_dim=3), loss=BernoulliNLL())
        >>> model.reconstruct(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    #: Whether numbers of x may be missing.
    takes_mask: bool = True
    #: What ``score`` can be; the first is the default.
    scores: tuple[Score, ...] = ("excess", "loss")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        loss: ReconstructionLoss | None = None,
        *,
        code: Code | None = None,
        penalties: Mapping[str, Penalty] | None = None,
        corruption: nn.Module | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        batch_key: str = "x",
        mask_key: str | int | None = None,
        missing: Missing = "refuse",
        score: Score | None = None,
    ) -> None:
        super().__init__()
        check_type("encoder", encoder, nn.Module)
        check_type("decoder", decoder, nn.Module)
        check_type("code", code, Code, None)
        check_type("penalties", penalties, Mapping, None)
        for name, penalty in (penalties or {}).items():
            check_type(f"penalties[{name!r}]", penalty, Penalty)
        check_type("corruption", corruption, nn.Module, None)
        check_type("batch_key", batch_key, str)
        loss = check_loss(loss)
        self._record(describe(self))
        self.encoder = encoder
        self.decoder = decoder
        self.loss = loss
        self.code = Identity() if code is None else code
        self.penalties = nn.ModuleDict(dict(penalties or {}))
        self.corruption = nn.Identity() if corruption is None else corruption
        # checkpoints have the optimizer's settings, too, and hold no numbers of NumPy
        self.lr = float(check_non_negative("lr", lr))
        self.weight_decay = float(check_non_negative("weight_decay", weight_decay))
        self.batch_key = batch_key
        self.mask_key = mask_key
        self.missing = missing
        self.score = self.scores[0] if score is None else check_one_of("score", score, self.scores)
        self._check_mask()
        self._check_boxes()

    @property
    def _masks(self) -> bool:
        return self.mask_key is not None or self.missing == "mask"

    def _check_mask(self) -> None:
        check_one_of("missing", self.missing, get_args(Missing))
        if self.mask_key is not None and type(self.mask_key) not in (str, int):
            raise TypeError(
                f"mask_key: expected a key or a position in the batch, got a {type(self.mask_key).__name__}."
            )
        if self._masks and not (self.takes_mask and self.loss.takes_mask):
            what = self.loss if self.takes_mask else self
            name = "missing" if self.mask_key is None else "mask_key"
            raise ValueError(f"{name}: a {type(what).__name__} cannot leave numbers out; fill them in before.")

    def _check_boxes(self) -> None:
        check_sizes_of_boxes(self.encoder, self.code, self.decoder, self.loss, self.corruption)
        taken = (_RESERVED | set(self.code.weights())) & set(self.penalties)
        if taken:
            raise ValueError(f"penalties: {sorted(taken)} is the name of another term; choose another key.")
        warn_of_second_activation(self.decoder, self.loss, stacklevel=3)

    # -- what people call -------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """The latent ``z`` of clean data, without randomness."""
        return self.code.encode(self.encoder(self._there(x)[0]))

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction of a latent, output activation applied."""
        return self.loss.mean(self.decoder(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``; a loss that takes a scale from ``x`` as known applies it."""
        return self.loss.prediction(self.decoder(self.encode(x)), *self._there(x))

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """Latent, pre-activations and the code's charges of a batch, without corruption."""
        z, penalties = self.code(self.encoder(self._there(x)[0]))
        return AutoencoderOutput(z, self.decoder(z), penalties)

    def _there(self, x: Tensor) -> tuple[Tensor] | tuple[Tensor, Tensor]:
        # without a mask there is nothing to tell those who take none
        return split_missing(x) if self.missing == "mask" and isinstance(x, Tensor) else (x,)

    # -- the objective ----------------------------------------------------------------------------------------

    def terms(self, x: Tensor, output: AutoencoderOutput) -> dict[str, Tensor]:
        """Raw, unweighted terms by name, ``(B,)`` or without dimensions each; every one is logged."""
        mask = getattr(output, "mask", None)
        masked = () if mask is None else (mask,)  # somebody's own output may have none
        terms = self.loss.terms(output.params, x, *masked)
        model: AutoencoderLike = self  # all that penalties rely on
        penalties = {name: penalty(x, output, model) for name, penalty in self.penalties.items()}
        charges = {**output.penalties, **self.code.auxiliary(lambda z: self._score_frozen(z, x, *masked))}
        if set(charges) != set(self.code.weights()):
            raise ValueError(
                f"{type(self.code).__name__}: charges {sorted(charges)}, but weights() has "
                f"{sorted(self.code.weights())}."
            )
        merged = {**terms, **charges, **penalties}
        if "loss" in merged or len(merged) < len(terms) + len(charges) + len(penalties):
            names = [*terms, *charges, *penalties]
            raise ValueError(f"terms: each needs a name of its own, other than 'loss'; got {names}.")
        return merged

    def _score_frozen(self, z: Tensor, x: Tensor, *masked: Tensor) -> Tensor:
        frozen = {name: parameter.detach() for name, parameter in self.decoder.named_parameters()}
        return self.loss(torch.func.functional_call(self.decoder, frozen, (z,)), x, *masked)  # type: ignore[no-any-return]

    def objective(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the terms, each of the code's and of the penalties times its weight, ``(B,)``.

        A term of your own, added in :meth:`terms`, counts once you add it here.
        """
        total = terms["reconstruction"]
        weights: dict[str, Any] = {name: penalty.weight for name, penalty in self.penalties.items()}
        for name, weight in {**self.code.weights(), **weights}.items():
            total = total + weight * terms[name]
        return total

    def get_input(self, batch: Any) -> Tensor:
        """``x`` of a batch that is a tensor, a tuple or list with ``x`` first, or a dict with ``batch_key``.

        What the dict has under that key may be a tuple again, as from loaders by name: ``{"x": loader, ...}``.
        """
        return input_of(batch, self.batch_key)

    def observed(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """``x`` with 0 where it is missing, and the mask of what is there; None for a model that masks nothing."""
        x = self.get_input(batch)
        if not self._masks:
            return x, None
        mask = ~x.isnan() if self.missing == "mask" else torch.ones_like(x, dtype=torch.bool)
        mask = mask if self.mask_key is None else mask & mask_of(batch, self.mask_key, x)
        return without_missing(x, mask), mask

    def _step(self, batch: Any) -> dict[str, Any]:
        x, mask = self.observed(batch)
        if x.ndim and not len(x):
            raise ValueError(
                f"x: expected a batch (B, *event) with B > 0, got {tuple(x.shape)}, of which there is no mean; leave "
                "empty batches out in the loader."
            )
        output = self(corrupted(self.corruption, x, mask))
        output = output if mask is None else output._replace(mask=mask)
        terms = self.terms(x, output)
        for name, term in terms.items():
            if term.shape not in ((), x.shape[:1]):
                raise ValueError(f"terms: {name!r} must have shape ({x.shape[0]},) or (), got {tuple(term.shape)}.")
        loss = self.objective(terms).mean()
        means = {"loss": loss.detach(), **{name: term.detach().mean() for name, term in terms.items()}}
        return {"loss": loss, "output": output.detach(), "terms": means}

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """``loss`` (with its graph), the detached ``output``, and the batch means of all ``terms``."""
        return self._step(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """The same as in training."""
        return self._step(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """The same as in training."""
        return self._step(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Latent ``z``, ``reconstruction``, and the anomaly ``score`` ``(B,)``, as chosen by ``score``."""
        x, mask = self.observed(batch)
        z = self.encode(corrupted(self.corruption, x, mask))
        params = self.decoder(z)
        given = (params, x) if mask is None else (params, x, mask)
        score = self._reconstruction_score(params, x, mask)
        return {"z": z, "reconstruction": self.loss.prediction(*given), "score": score}

    def _reconstruction_score(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        score = self.loss if self.score == "loss" else self.loss.excess
        return score(params, x) if mask is None else score(params, x, mask)  # type: ignore[call-arg]

    def configure_callbacks(self) -> list[L.Callback]:
        """The :class:`Recorder` that logs; keep it if you add your own: ``[*super().configure_callbacks(), ...]``."""
        attached = self._trainer is not None and any(isinstance(c, Recorder) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if attached else [Recorder()]

    # -- data and metrics -------------------------------------------------------------------------------------

    def check_input(self, x: Tensor) -> None:
        """A clear error unless ``x`` is finite floating-point data in the support of the loss.

        Called with the first batch of each stage; it reads from the device.
        """
        check_tensor("x", x)
        if not x.is_floating_point():
            raise TypeError(
                f"x: expected floating-point data, got {x.dtype}. Is x the first item of the batch? Scale bytes to "
                "[0, 1]; call .float() on counts."
            )
        if x.ndim < 2 or x.shape[0] == 0:
            raise ValueError(f"x: expected a batch (B, *event) with B > 0, got {tuple(x.shape)}.")
        own = next((p.dtype for p in self.parameters()), x.dtype)
        if x.dtype == torch.float64 != own:
            raise TypeError(f"x: expected {own} as the weights are, got float64; convert it, or set precision=64-true.")
        bad = int((~x.isfinite()).sum())
        if bad:
            raise ValueError(
                f"x: expected finite numbers, got {bad} NaN or infinite of {x.numel()} in the first batch."
            )
        if getattr(self.encoder, "input_transform", None) == "log1p" and bool(x.amin() <= -1):
            raise ValueError(f"x: expected numbers above -1 for input_transform='log1p', got some of {x.amin():.4g}.")
        self.loss.check(x)

    def configure_metrics(self, x: Tensor) -> MetricCollection:
        """Metrics of ``(reconstruction, x)`` for validation and test; override to choose others.

        Args:
            x: the first batch, ``(B, *event)``.

        Returns:
            The collection chosen by the shape of the data: see :func:`reconstruction_metrics`. The interval of image
            data, for PSNR and SSIM, is the one that the loss takes them to have, else [0, 1].
        """
        interval = self.loss.data_interval
        low, high = (0.0, 1.0) if interval is None else interval
        if interval is None and x.ndim == 4:
            least, most = float(x.amin()), float(x.amax())
            if most - least > 1 or least < -0.01:
                warnings.warn(
                    "psnr and ssim take images to have a range of 1, from 0 on, but the first batch reaches from "
                    f"{least:.4g} to {most:.4g}: scale them, or override configure_metrics with "
                    "reconstruction_metrics(shape, data_range, low=low).",
                    stacklevel=2,
                )
        return reconstruction_metrics(x.shape[1:], data_range=high - low, low=low)
