"""Overcomplete dictionaries, as they are trained on the activations of networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ae.boxes import AutoencoderOutput
from lightning_ae.checks import check_sequence, check_type
from lightning_ae.codes import Code, SelectingCode, SparseCode, TopKCode
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.base import check_loss
from lightning_ae.models.upkeep import UpkeptAutoencoder
from lightning_ae.networks import DictionaryDecoder, DictionaryEncoder
from lightning_ae.networks.shapes import check_input
from lightning_ae.penalties import AuxiliaryK, Penalty, PrefixReconstruction

#: Norm of the encoder's rows at the start, for codes that select: see the class.
ENCODER_NORM = 2 / 3
#: Rate up to so many latents, for codes that select; beyond it falls with the square root of their number.
RATE, RATE_LATENTS = 4e-3, 3072
#: Rate for other codes.
CHARGED_RATE = 1e-3
#: The encoder's rate, as a share of the default one.
ENCODER_SHARE = 0.5
#: Examples without a sign of life, in multiples of those in which a latent is on once on average.
DEAD_TURNS, DEAD_MOST = 300, 10_000_000


class DictionaryAutoencoder(UpkeptAutoencoder):
    r"""Sparse autoencoder of one layer: :math:`z = \mathrm{code}(W(sx - b) + c)`, :math:`\hat x = (Dz + b)/s`.

    * :math:`b` is the pre-bias, at first :math:`s` times the data's mean :math:`m`; :math:`c` the encoder's bias, at
      first 0.
    * The atoms, columns of :math:`D`, have norm 1: after each step they are rescaled, and before it the part of the
      gradient along them is removed. The encoder starts as their transpose,
      :math:`W = D^\top`; for codes that select two thirds of it, as atoms overlap and would together say too much.
    * :math:`s` makes :math:`\mathbb E\|s(x - m)\| = \sqrt d`, so that learning rates and weights mean the same for any
      data: in any unit, and wherever they lie. :math:`m` and :math:`s` are estimated before the first step, on the
      first 16,384 training rows, which does not depend on how they come in batches (streams without a length, which may
      be read only once, are observed in the first ten steps instead), and kept in checkpoints. Terms and scores are in
      units of :math:`sx`, whereas ``params``, metrics and predictions are in those of ``x``.
    * A latent is dead that was off in the last ``dead_after`` training examples, of all devices together.
      :class:`AuxiliaryK` is there for them; ``resample_every`` starts them anew.

    With :class:`TopKCode` and :class:`BatchTopKCode` the latent ``z``, of :meth:`encode` too, is a
    :class:`SparseCode` (``z.to_dense()`` for a tensor; a tensor has the same method): what is off is not stored, and
    neither the decoder nor the gradient of any weight touches it. Other codes give a dense tensor.

    Defaults were chosen at 300 to 3,000 steps of 1,024 on a known dictionary, channels of a convolutional network on
    MNIST and MiniLM's third layer. ``recipes/benchmarks/dictionary_quality.py`` on other seeds, 300 steps: unexplained
    variance .020 on a classifier of digits (sparsify .022, dictionary_learning .057), .172 on the known dictionary
    (.207, .318); with a rate of 1e-3 .035 and .301.

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
        dead_after: examples; None for :math:`300\,n/k`, 300 times what a latent waits for on average, with codes that
            select, and 10,000,000 at most and with others.
        resample_every: training batches between resamplings of dead latents; 0 for none.
        lr: learning rate of AdamW. None with codes that select for :math:`0.004 \min(1, \sqrt{3072/n})`, and half of
            it for the encoder, which at the whole leaves more dead; with others for 0.001. As attribute ``lr`` it is a
            number; one that is set, here or there, is the rate of all.
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

    takes_mask = False

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
        dead_after: int | None = None,
        resample_every: int = 0,
        lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        code = TopKCode(32) if code is None else code
        loss = check_loss(loss)
        check_type("penalties", penalties, Mapping, None)
        if penalties is None:
            penalties = {"auxiliary": AuxiliaryK()} if isinstance(code, SelectingCode) else {}
        if prefixes is not None:
            prefixes = check_sequence("prefixes", prefixes)
            penalties = {**penalties, "prefixes": PrefixReconstruction(prefixes)}
        encoder, decoder = DictionaryEncoder(in_features, num_latents), DictionaryDecoder(num_latents, in_features)
        selects = isinstance(code, SelectingCode)
        if dead_after is None:
            turn = num_latents / max(1, getattr(code, "k", 1))
            dead_after = min(DEAD_MOST, math.ceil(DEAD_TURNS * turn)) if selects else DEAD_MOST
        rate = RATE * min(1.0, math.sqrt(RATE_LATENTS / num_latents)) if selects else CHARGED_RATE
        super().__init__(
            encoder,
            decoder,
            loss,
            code=code,
            penalties=penalties,
            unit_norm=unit_norm,
            normalize=normalize,
            dead_after=dead_after,
            resample_every=resample_every,
            lr=rate if lr is None else lr,
            **kwargs,
        )
        #: the rate that nobody chose, if so
        self._own_rate = rate if lr is None and selects else None
        self._check_numbers(num_latents, prefixes)
        with torch.no_grad():
            encoder.weight.copy_(decoder.atoms * (ENCODER_NORM if selects else 1.0))

    def _check_numbers(self, n: int, prefixes: Sequence[int] | None) -> None:
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

    # -- the flow ---------------------------------------------------------------------------------------------

    def _code(self, x: Tensor, *, alone: bool) -> tuple[Any, dict[str, Tensor]]:
        check_input(x, self.encoder.weight.shape[1:], self.encoder)
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

    def _score_frozen(self, z: Tensor, x: Tensor, *masked: Tensor) -> Tensor:
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
        """``reconstruction``, ``score`` and ``z``, or of a sparse code ``z_values`` and ``z_indices``.

        The score is in the units of the terms, those of :math:`sx`: the same whatever the unit of ``x``.
        """
        x = self.get_input(batch)
        z: Any = self.encode(self.corruption(x))
        params = self._decode(z)
        latent = {"z_values": z.values, "z_indices": z.indices} if isinstance(z, SparseCode) else {"z": z}
        score = self._reconstruction_score(params * self.input_scale, x * self.input_scale)
        return {**latent, "reconstruction": self.loss.prediction(params, x), "score": score}

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """As in :class:`Autoencoder`, and the pre-bias, as it is where the data lie."""
        return [self.pre_bias, *super().undecayed_parameters()]

    def parameter_groups(self) -> Any:
        """As in :class:`Autoencoder`, with the encoder's in a group of their own, last; see ``lr``."""
        groups = super().parameter_groups()
        share = ENCODER_SHARE if self.lr == self._own_rate else 1.0
        encoder = {id(parameter) for parameter in self.encoder.parameters()}
        own = [p for p in self.trained_parameters() if id(p) in encoder]
        others = [{**group, "params": [p for p in group["params"] if id(p) not in encoder]} for group in groups]
        return [group for group in (*others, {"params": own, "lr": share * float(self.lr)}) if group["params"]]

    # -- export -----------------------------------------------------------------------------------------------

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
