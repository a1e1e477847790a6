"""What a dictionary needs between two steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.boxes import AutoencoderOutput
from lightning_ae.checks import check_flag, check_whole
from lightning_ae.codes import Code, SelectingCode, SparseCode
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder
from lightning_ae.models.preview import first_rows
from lightning_ae.models.sharding import shards_parameters
from lightning_ae.models.spread import Spread
from lightning_ae.networks import DictionaryDecoder, DictionaryEncoder

#: Training rows, of all processes, on which mean and scale of the data are estimated before the first step.
SCALE_ROWS = 16_384
#: Of these, rows from which the code starts: as many as make so many pre-activations, and at least so many.
CODE_NUMBERS, CODE_ROWS = 2**22, 256
#: Optimizer steps in which they are refined instead where the data cannot be looked at before.
SCALE_STEPS = 10
#: Training batches between two looks at which latents are dead; each waits for the device once.
LOOK_EVERY = 50


class UpkeptAutoencoder(Autoencoder, ABC):
    """The parameters of a dictionary, and what is done to them and counted between two steps; not yet the flow.

    Args:
        encoder: see :class:`lightning_ae.DictionaryAutoencoder` for all of them.
        decoder: its atoms.
        loss: in units of the scaled data.
        unit_norm: whether atoms have norm 1.
        normalize: whether the scale of the data is estimated.
        dead_after: examples.
        resample_every: training batches; 0 for none.
        **kwargs: as for :class:`Autoencoder`.
    """

    encoder: DictionaryEncoder
    decoder: DictionaryDecoder
    input_scale: Tensor
    norm_sum: Tensor
    norm_batches: Tensor
    since_fired: Tensor
    dead: Tensor

    def __init__(
        self,
        encoder: DictionaryEncoder,
        decoder: DictionaryDecoder,
        loss: ReconstructionLoss,
        *,
        unit_norm: bool,
        normalize: bool,
        dead_after: int,
        resample_every: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, decoder, loss, **kwargs)
        self.unit_norm = check_flag("unit_norm", unit_norm)
        self.normalize = check_flag("normalize", normalize)
        self.dead_after = check_whole("dead_after", dead_after)
        self.resample_every = check_whole("resample_every", resample_every, least=0)
        num_latents, in_features = encoder.weight.shape
        self.pre_bias = nn.Parameter(torch.zeros(in_features))
        self.register_buffer("input_scale", torch.tensor(1.0))
        self.register_buffer("norm_sum", torch.tensor(0.0))
        self.register_buffer("norm_batches", torch.tensor(0))
        self.register_buffer("since_fired", torch.zeros(num_latents, dtype=torch.int64))
        self.register_buffer("dead", torch.zeros(num_latents, dtype=torch.bool))
        # each rank counts for itself between two reductions; DDP would send them rank 0's before each step
        self._ddp_params_and_buffers_to_ignore = ["since_fired", "dead"]
        # known before a step is compiled: how many there are is a shape in its graph
        self._dead: Tensor | None = torch.zeros(0, dtype=torch.int64)
        # of what was observed since the weights were made or loaded
        self._spread: Spread | None = None
        self._known: Tensor = torch.tensor(False)
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @abstractmethod
    def forward(self, x: Tensor) -> AutoencoderOutput:
        """Latent, reconstruction in units of ``x``, and the code's charges."""

    def configure_callbacks(self) -> list[L.Callback]:
        """What logs, and :class:`DictionaryUpkeep`."""
        there = self._trainer is not None and any(isinstance(c, DictionaryUpkeep) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*super().configure_callbacks(), *([] if there else [DictionaryUpkeep()])]

    @torch.no_grad()
    def observe(self, x: Tensor, reduce: Any = None) -> None:
        r"""Estimate the data's mean :math:`m` and :math:`s`, so that :math:`\mathbb E\|s(x - m)\| = \sqrt d`.

        The pre-bias starts at :math:`sm`. Each further batch refines both, and with them the pre-bias, whatever
        training has made of it: :math:`b/s` moves by as much as :math:`m`. Rows that are not finite are left out. The
        code starts from the first batch: :meth:`Code.start_from`. What comes with a checkpoint is known and stays.

        Args:
            x: ``(B, d)``.
            reduce: averages a tensor over the ranks.

        Raises:
            ValueError: if ``x`` has another shape.
        """
        if x.ndim != 2 or x.shape[1] != len(self.pre_bias):
            raise ValueError(f"x: expected a batch (B, {len(self.pre_bias)}), got {tuple(x.shape)}.")
        if self._spread is None:
            self._known = self.norm_batches > 0
        before, self._spread = self._spread, Spread.of(x, self._spread, reduce)
        scale = torch.ones_like(self._spread.distance)
        if self.normalize:
            scale = math.sqrt(x.shape[1]) / self._spread.distance
            scale = torch.where(scale.isfinite(), scale, 1.0)
        centre = self._spread.mean
        if before is not None:
            centre = self.pre_bias / self.input_scale + centre - before.mean
        batches = self.norm_batches + 1
        estimates = (
            (self.norm_batches, batches),
            (self.norm_sum, self._spread.distance * batches),
            (self.pre_bias, centre * scale),
            (self.input_scale, scale),
        )
        for tensor, value in estimates:
            tensor.copy_(torch.where(self._known, tensor, value.to(tensor.dtype)))
        if before is None and type(self.code).start_from is not Code.start_from:
            rows = x[: max(CODE_ROWS, CODE_NUMBERS // len(self.encoder.weight))].to(self.encoder.weight)
            h = self.encoder(rows * self.input_scale - self.pre_bias)
            norms = None if self.unit_norm else torch.linalg.vector_norm(self.decoder.atoms, dim=1)
            self.code.start_from(h if norms is None else h * norms, self._known, reduce)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the atoms' gradient what would only change their norms."""
        atoms = self.decoder.atoms
        if self.unit_norm and atoms.grad is not None:
            along = torch.linalg.vecdot(atoms.grad, atoms)[:, None]
            atoms.grad.addcmul_(atoms, along, value=-1)

    @torch.no_grad()
    def normalize_atoms(self) -> None:
        """Give each atom the norm 1."""
        if self.unit_norm:
            atoms = self.decoder.atoms
            norms = torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
            atoms.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))

    @torch.no_grad()
    def count(self, z: Tensor | SparseCode, world_size: int = 1) -> None:
        """Count the examples of a batch for all latents that are off in it."""
        fired = z.fired() if isinstance(z, SparseCode) else (z != 0).any(0)
        self.since_fired.add_(z.shape[0] * world_size).masked_fill_(fired, 0)

    @torch.no_grad()
    def find_dead(self, reduce: Any = None) -> Tensor:
        """Look which latents are dead, and return their indices; waits for the device.

        Args:
            reduce: takes the smallest of each number over the ranks: what fires on one of them is not dead.
        """
        if reduce is not None:
            self.since_fired.copy_(reduce(self.since_fired))
        self.dead.copy_(self.since_fired >= self.dead_after)
        self._forget_dead()
        return self.dead_latents()

    def _forget_dead(self) -> None:
        self._dead = None

    def _forget(self) -> None:
        self._dead = self._spread = None

    def dead_latents(self) -> Tensor:
        """Indices, int64, of the latents that were dead when :meth:`find_dead` last looked."""
        if self._dead is None or self._dead.device != self.dead.device:
            # kept for training steps, so no inference tensor even if it was a validation that asked first
            with torch.inference_mode(False):
                self._dead = self.dead.nonzero().flatten()
        return self._dead

    @torch.no_grad()
    def start_anew(self, dead: Tensor, directions: Tensor, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        r"""Give dead latents new atoms :math:`d_i`, and :math:`w_i = \gamma \bar w d_i`, :math:`c_i = 0`.

        :math:`\bar w` is the mean norm of the other rows of the encoder, and :math:`\gamma = 1/5` as in Bricken et al.;
        but 1 for codes that select, where a new latent has to be among the largest. What the code has learned of a
        latent, such as its threshold, is forgotten, and moments of the optimizers become 0.

        Args:
            dead: indices ``(m,)``.
            directions: of norm 1, ``(m, d)``; :meth:`resample` draws them.
            optimizers: that have state of the weights.
        """
        encoder, atoms = self.encoder, self.decoder.atoms
        norms = torch.linalg.vector_norm(encoder.weight, dim=1)
        living = norms.index_fill(0, dead, 0.0).sum() / max(1, len(norms) - len(dead))
        size = torch.where(living > 0, living, 1.0)
        gain = 1.0 if isinstance(self.code, SelectingCode) else 0.2
        encoder.weight.index_copy_(0, dead, directions.to(atoms) * (gain * size))
        encoder.bias.index_fill_(0, dead, 0.0)
        atoms.index_copy_(0, dead, directions.to(atoms))
        of_code = self.code.per_latent()
        for parameter in of_code:
            parameter.index_fill_(0, dead, 0.0)
        self.since_fired.index_fill_(0, dead, 0)
        self.dead.index_fill_(0, dead, False)
        self._forget_dead()
        for optimizer in optimizers:
            for parameter in (encoder.weight, encoder.bias, atoms, *of_code):
                for kept in optimizer.state.get(parameter, {}).values():
                    if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                        kept.index_fill_(0, dead.to(kept.device), 0)

    @torch.no_grad()
    def resample(self, x: Tensor, params: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw directions :math:`(sx - b) / \|sx - b\|` from badly reconstructed examples, ``(number, d)``.

        An example is drawn with a probability in proportion to its squared loss.

        Args:
            x: a batch ``(B, d)``.
            params: what the model made of it.
            number: how many.
            generator: of random numbers, on the device of ``x``.

        Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features#appendix-autoencoder.
        """
        loss = self.loss(params * self.input_scale, x * self.input_scale).square()
        odds = torch.where(loss.isfinite(), loss, 0.0) + torch.finfo(loss.dtype).tiny
        chosen = torch.multinomial(odds / odds.amax(), number, replacement=number > len(x), generator=generator)
        return functional.normalize(x[chosen] * self.input_scale - self.pre_bias, dim=1)


class DictionaryUpkeep(L.Callback):
    """Scales the data, keeps atoms at norm 1, counts dead latents and resamples them: a model brings it along.

    A callback rather than hooks of the model, so that a user's own hooks need no ``super()``. Ranks count for
    themselves, and agree on the minimum every 50 batches and before a checkpoint is written. Validation has no part in
    any of it.
    """

    def __init__(self) -> None:
        self._refinements = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: UpkeptAutoencoder) -> None:  # type: ignore[override]
        """Refuse what cannot work; estimate mean and scale of the data, unless they are known already."""
        if shards_parameters(trainer):
            raise ValueError(
                "DictionaryAutoencoder: expected a strategy with whole weights on each device (one device, DDP), got "
                f"{type(trainer.strategy).__name__}, which shards them."
            )
        self._refinements = 0
        if int(pl_module.norm_batches):
            return
        rows = first_rows(trainer, pl_module, -(-SCALE_ROWS // trainer.world_size))
        if rows is None:
            self._refinements = SCALE_STEPS * trainer.accumulate_grad_batches
        else:
            pl_module.observe(rows, _mean(trainer))

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: UpkeptAutoencoder, batch: Any, batch_idx: int
    ) -> None:
        """Know the dead before a step that may be compiled; refine mean and scale of data seen only once."""
        pl_module.dead_latents()
        if self._refinements:
            self._refinements -= 1
            pl_module.observe(pl_module.get_input(batch), _mean(trainer))

    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: UpkeptAutoencoder, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the gradient from changing norms."""
        pl_module.project_gradient()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: UpkeptAutoencoder, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Norms, counts, and now and then the dead."""
        pl_module.normalize_atoms()
        if not isinstance(outputs, Mapping) or "output" not in outputs:
            return  # a training step of the user's own
        pl_module.count(outputs["output"].z, trainer.world_size)
        number = trainer.fit_loop.total_batch_idx + 1
        due = pl_module.resample_every > 0 and number % pl_module.resample_every == 0
        if due or number % LOOK_EVERY == 0:
            dead = pl_module.find_dead(_smallest(trainer))
            if due and len(dead):
                x = pl_module.get_input(batch)
                generator = torch.Generator(x.device).manual_seed(number)
                drawn = pl_module.resample(x, outputs["output"].params, len(dead), generator)
                drawn = trainer.strategy.broadcast(drawn) if trainer.world_size > 1 else drawn
                pl_module.start_anew(dead, drawn, trainer.optimizers)

    def on_train_end(self, trainer: L.Trainer, pl_module: UpkeptAutoencoder) -> None:  # type: ignore[override]
        """Norms once more, if a callback has put the mean of many unit vectors there."""
        with torch.no_grad():
            error = (torch.linalg.vector_norm(pl_module.decoder.atoms, dim=1) - 1).abs().amax()
        # a run that goes on from here is as it was, to the last digit
        if error > 8 * torch.finfo(error.dtype).eps:
            pl_module.normalize_atoms()

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: UpkeptAutoencoder, checkpoint: dict[str, Any]
    ) -> None:
        """Agree on the counts, which the file's weights share memory with."""
        reduce = _smallest(trainer)
        if reduce is not None and trainer.state.fn == TrainerFn.FITTING:  # also of a validation in between
            pl_module.since_fired.copy_(reduce(pl_module.since_fired))


def _forget(model: UpkeptAutoencoder, incompatible: Any) -> None:
    model._forget()


def _mean(trainer: L.Trainer) -> Any:
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")


def _smallest(trainer: L.Trainer) -> Any:
    if trainer.world_size == 1:
        return None
    return lambda tensor: trainer.strategy.reduce(tensor.clone(), reduce_op="min")
