"""Overcomplete dictionaries, as they are trained on the activations of networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.boxes import AutoencoderOutput
from lightning_ae.codes import Code, SelectingCode, SparseCode, TopKCode
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import Autoencoder, check_loss
from lightning_ae.models.upkeep import DictionaryUpkeep
from lightning_ae.networks import DictionaryDecoder, DictionaryEncoder
from lightning_ae.penalties import AuxiliaryK, Penalty, PrefixReconstruction


class DictionaryAutoencoder(Autoencoder):
    r"""Sparse autoencoder of one layer: :math:`z = \mathrm{code}(W(sx - b) + c)`, :math:`\hat x = (Dz + b)/s`.

    * :math:`b` is the pre-bias, at first the mean of the first batch; :math:`c` the encoder's bias, at first 0.
    * The atoms, columns of :math:`D`, have norm 1: after each step they are rescaled, and before it the part of the
      gradient along them is removed. The encoder starts as their transpose, :math:`W = D^\top`.
    * :math:`s` makes :math:`\mathbb E\|sx\| = \sqrt d`, so that learning rates and weights mean the same for any data;
      it is estimated on the first batches and kept in checkpoints. Terms are in units of :math:`sx`, whereas
      ``params``, metrics and predictions are in those of ``x``.
    * A latent is dead that was off in the last ``dead_after`` training examples, of all devices together.
      :class:`AuxiliaryK` is there for them; ``resample_every`` starts them anew.

    With :class:`TopKCode` and :class:`BatchTopKCode` the latent ``z``, of :meth:`encode` too, is a
    :class:`SparseCode` (``z.to_dense()`` for a tensor; a tensor has the same method): what is off is not stored, and
    neither the decoder nor the gradient of any weight touches it. Other codes give a dense tensor.

    A loop of your own calls :meth:`observe` before, and :meth:`project_gradient`, :meth:`normalize_atoms`,
    :meth:`count` and, now and then, :meth:`find_dead` around the optimizer's step; the Trainer does it by itself.

    Args:
        in_features: ``d``.
        num_latents: ``n``.
        code: None for ``TopKCode(32)``.
        loss: None for :class:`SquaredError`; its output activation must be the identity.
        penalties: None for ``{"auxiliary": AuxiliaryK()}`` with codes that select, nothing with others.
        prefixes: sizes for a :class:`PrefixReconstruction` (Matryoshka), which is added to the penalties.
        unit_norm: whether atoms have norm 1. If not, codes that charge see each :math:`h_i` times its atom's norm, so
            that the norm is in the penalty: :math:`\lambda \sum_i |z_i| \|d_i\|`.
        normalize: whether :math:`s` is estimated, and not 1.
        dead_after: examples.
        resample_every: training batches between resamplings of dead latents; 0 for none.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, in_features)``; ``z``: ``(B, num_latents)``. ``encoder.weight`` ``(n, d)``, ``encoder.bias``
        ``(n,)``, ``decoder.atoms`` ``(n, d)``, ``decoder.weight`` its transpose, ``pre_bias`` ``(d,)``,
        ``input_scale`` ``()``, ``since_fired`` int64 ``(n,)``, in examples.

    Raises:
        ValueError: for numbers out of range, ``k`` larger than ``num_latents``, or a loss with an output activation.

    Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features; Gao et al. 2024,
    https://arxiv.org/abs/2406.04093; norm in the penalty: Conerly et al. 2024,
    https://transformer-circuits.pub/2024/april-update.

    Example:
        >>> model = DictionaryAutoencoder(8, 64, TopKCode(4))
        >>> z = model.encode(torch.randn(5, 8))
        >>> z, model.decode(z).shape
        (SparseCode(shape=(5, 64), entries=4, dtype=torch.float32), torch.Size([5, 8]))
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
        in_features: int,
        num_latents: int,
        code: Code | None = None,
        *,
        loss: ReconstructionLoss | None = None,
        penalties: Mapping[str, Penalty] | None = None,
        prefixes: Sequence[int] | None = None,
        unit_norm: bool = True,
        normalize: bool = True,
        dead_after: int = 10_000_000,
        resample_every: int = 0,
        **kwargs: Any,
    ) -> None:
        code = TopKCode(32) if code is None else code
        loss = check_loss(loss)
        if penalties is None:
            penalties = {"auxiliary": AuxiliaryK()} if isinstance(code, SelectingCode) else {}
        if prefixes is not None:
            penalties = {**penalties, "prefixes": PrefixReconstruction(prefixes)}
        encoder, decoder = DictionaryEncoder(in_features, num_latents), DictionaryDecoder(num_latents, in_features)
        super().__init__(encoder, decoder, loss, code=code, penalties=penalties, **kwargs)
        self._check_numbers(num_latents, prefixes, dead_after, resample_every)
        self.unit_norm = unit_norm
        self.normalize = normalize
        self.dead_after = dead_after
        self.resample_every = resample_every
        with torch.no_grad():
            encoder.weight.copy_(decoder.atoms)
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
        self.register_load_state_dict_post_hook(lambda module, _: module._forget_dead())  # type: ignore[no-untyped-call]

    def _check_numbers(self, n: int, prefixes: Sequence[int] | None, dead_after: int, resample_every: int) -> None:
        if self.loss.output_activation != "identity" or self.loss.params_per_feature != 1:
            raise ValueError(f"loss: expected one without output activation, got {type(self.loss).__name__}.")
        for name, parameter in self.code.named_parameters():
            if parameter.ndim == 1 and len(parameter) != n:
                raise ValueError(f"code: expected one for {n} latents, got {name} of {len(parameter)}.")
        target = getattr(getattr(self.code, "controller", None), "target", 0)
        if target > n:
            raise ValueError(f"target_l0: expected at most the {n} latents there are, got {target}.")
        k = getattr(self.code, "k", 0)
        if isinstance(self.code, SelectingCode) and k > n:
            raise ValueError(f"code: expected k of at most num_latents={n}, got {k}.")
        if prefixes is not None and prefixes[-1] >= n:
            raise ValueError(f"prefixes: expected less than num_latents={n}, got {list(prefixes)}.")
        for name, value, least in (("dead_after", dead_after, 1), ("resample_every", resample_every, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}.")

    # -- the flow ---------------------------------------------------------------------------------------------

    def _code(self, x: Tensor, *, alone: bool) -> tuple[Any, dict[str, Tensor]]:
        x = x * self.input_scale
        if isinstance(self.code, SelectingCode):
            return self.code.project(x, self.encoder.weight, self.encoder.bias, self.pre_bias, alone=alone), {}
        h = self.encoder(x - self.pre_bias)
        norms = None if self.unit_norm else torch.linalg.vector_norm(self.decoder.atoms, dim=1)
        h = h if norms is None else h * norms
        z, penalties = (self.code.encode(h), {}) if alone else self.code(h)
        return (z if norms is None else z / norms.clamp_min(torch.finfo(norms.dtype).tiny)), penalties

    def _decode(self, z: Any) -> Tensor:
        decoded: Tensor = (self.decoder(z) + self.pre_bias) / self.input_scale
        return decoded

    def _score_frozen(self, z: Tensor, x: Tensor) -> Tensor:
        atoms = self.decoder.atoms.detach()
        if not self.unit_norm:
            # not detached: z has the norms as a factor, whose gradient this takes back
            z = z / torch.linalg.vector_norm(self.decoder.atoms, dim=1).clamp_min(torch.finfo(atoms.dtype).tiny)
        loss: Tensor = self.loss(z @ atoms + self.pre_bias.detach(), x)
        return loss

    def encode(self, x: Tensor) -> Tensor | SparseCode:  # type: ignore[override]
        """The latent of clean data: a :class:`SparseCode` if the code selects, else a tensor."""
        z: Tensor | SparseCode = self._code(x, alone=True)[0]
        return z

    def decode(self, z: Tensor | SparseCode) -> Tensor:
        """The reconstruction of a latent, dense or not, in units of ``x``."""
        return self.loss.mean(self._decode(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """Latent, reconstruction in units of ``x``, and the code's charges."""
        z, penalties = self._code(x, alone=False)
        return AutoencoderOutput(z, self._decode(z), penalties)

    def terms(self, x: Tensor, output: AutoencoderOutput) -> dict[str, Tensor]:
        """As in :class:`Autoencoder`, in units of the normalised data."""
        return super().terms(x * self.input_scale, output._replace(params=output.params * self.input_scale))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``reconstruction`` and ``score``, and ``z``, or of a sparse code ``z_values`` and ``z_indices``."""
        x = self.get_input(batch)
        z: Any = self.encode(self.corruption(x))
        params = self._decode(z)
        latent = {"z_values": z.values, "z_indices": z.indices} if isinstance(z, SparseCode) else {"z": z}
        return {**latent, "reconstruction": self.loss.prediction(params, x), "score": self.loss(params, x)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, fused where that is possible: with this many weights it is a large part of a step."""
        precision = "" if self._trainer is None else str(self.trainer.precision)
        # Lightning clips no gradients of a fused optimizer in mixed precision
        clipped = precision.endswith("-mixed") and bool(self.trainer.gradient_clip_val)
        fused = (
            precision != "16-mixed" and not clipped and all(p.device.type in ("cpu", "cuda") for p in self.parameters())
        )
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=fused)

    def configure_callbacks(self) -> list[L.Callback]:
        """What logs, and :class:`DictionaryUpkeep`."""
        there = self._trainer is not None and any(isinstance(c, DictionaryUpkeep) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*super().configure_callbacks(), *([] if there else [DictionaryUpkeep()])]

    # -- upkeep -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, x: Tensor, reduce: Any = None) -> None:
        r"""Refine :math:`s` with a batch; the first one also sets the pre-bias, to its mean.

        Args:
            x: ``(B, d)``.
            reduce: averages a tensor over the ranks.
        """
        seen = torch.cat([torch.linalg.vector_norm(x.float(), dim=1).mean()[None], x.float().mean(0)])
        seen = seen if reduce is None else reduce(seen)
        self.norm_sum.add_(seen[0])
        self.norm_batches.add_(1)
        if self.normalize:
            scale = math.sqrt(x.shape[1]) * self.norm_batches / self.norm_sum
            self.input_scale.copy_(torch.where(scale.isfinite(), scale, 1.0))
        self.pre_bias.copy_(torch.where(self.norm_batches == 1, seen[1:] * self.input_scale, self.pre_bias))

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

    @torch.no_grad()
    def fold_normalization(self) -> None:
        r"""Move :math:`s` into the weights, for a model that takes data as they are: the function stays the same.

        :math:`W \leftarrow sW`, :math:`D \leftarrow D / s`, :math:`b \leftarrow b / s`, :math:`s \leftarrow 1`; latents
        are what they were. Atoms then have norm :math:`1/s`: for use, not for further training. Without ``unit_norm``
        the thresholds of the code, which go by the atoms' norms, are divided by :math:`s`, too.

        Raises:
            ValueError: without ``unit_norm``, if the code cannot do that; nothing is changed then.
        """
        if not self.unit_norm and not isinstance(self.code, SelectingCode):
            self.code.rescale(1 / self.input_scale)
        self.encoder.weight.mul_(self.input_scale)
        self.decoder.atoms.div_(self.input_scale)
        self.pre_bias.div_(self.input_scale)
        self.input_scale.fill_(1.0)
