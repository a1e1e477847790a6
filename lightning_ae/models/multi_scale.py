"""Coarse and fine: a decoder for each scale, and how much of each there shall be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_ae.boxes import AutoencoderOutput
from lightning_ae.checks import (
    check_flag,
    check_floating,
    check_non_negative,
    check_sequence,
    describe_type,
)
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.losses.base import full_precision
from lightning_ae.metrics.scales import ScaleError
from lightning_ae.models.base import Autoencoder
from lightning_ae.models.weights import check_weights
from lightning_ae.networks.scales import Scales
from lightning_ae.rebuildable import KeepsAttributes


class MultiScaleOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        z: the latent, ``(B, *latent)``.
        params: the sum of the parts, pre-activations ``(B, *loss.params_shape(event))``.
        penalties: raw terms that the code charges, each ``(B,)``.
        parts: what each scale adds, finest first, of the shape of ``params``: gains are in them.
    """

    z: Tensor
    params: Tensor
    penalties: dict[str, Tensor]
    parts: tuple[Tensor, ...]

    def detach(self) -> MultiScaleOutput:
        """The same, cut from the graph."""
        penalties = {name: value.detach() for name, value in self.penalties.items()}
        parts = tuple(part.detach() for part in self.parts)
        return MultiScaleOutput(self.z.detach(), self.params.detach(), penalties, parts)


class ScaleDecoder(nn.Module):
    r"""All decoders as one, from ``z`` to :math:`\sum_l c_l g_l\,\mathrm{part}_l(D_l(z))`.

    :math:`c_l` is 1, or less while ``detail`` holds fine scales back.
    """

    gains: Tensor

    def __init__(self, decoders: Sequence[nn.Module], scales: Scales, learn_gains: bool) -> None:
        super().__init__()
        self.scales = scales
        self.decoders = nn.ModuleList(decoders)
        self.detail = float(scales.num_scales)
        gains = torch.ones(scales.num_scales)
        if learn_gains:
            self.gains = nn.Parameter(gains)
        else:
            self.register_buffer("gains", gains)
        latents = {decoder.latent_shape for decoder in decoders if hasattr(decoder, "latent_shape")}
        if len(latents) > 1:
            raise ValueError(f"decoders: expected all to read latents of one shape, got {sorted(map(str, latents))}.")
        if latents:
            self.latent_shape = latents.pop()
        known = [getattr(decoder, "out_shape", None) for decoder in decoders]
        if all(shape is not None for shape in known):
            self._event_shape([tuple(shape) for shape in known if shape is not None])

    def _event_shape(self, bands: list[tuple[int, ...]]) -> tuple[int, ...]:
        shape = self.scales.event_shape(bands[0])
        expected = self.scales.shapes(shape)
        if bands != expected:
            if bands[::-1] == self.scales.shapes(self.scales.event_shape(bands[-1])):
                raise ValueError(f"decoders: expected that of the finest scale first, got them in reverse: {bands}.")
            raise ValueError(
                f"decoders: for data of shape {shape} they must give {expected}, finest scale first, got {bands}."
            )
        return shape

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """What each scale adds, finest first."""
        bands = [decoder(z) for decoder in self.decoders]
        shape = self._event_shape([tuple(band.shape[1:]) for band in bands])
        gains = full_precision(self.gains)
        parts = []
        for index, band in enumerate(bands):
            share = min(max(self.detail - (len(bands) - 1 - index), 0.0), 1.0)
            parts.append(share * gains[index] * self.scales.part(band, index, shape))
        return tuple(parts)

    def forward(self, z: Tensor, parts: tuple[Tensor, ...] | None = None) -> Tensor:
        """Their sum; of the parts given, where they are known already."""
        first, *others = self.parts(z) if parts is None else parts
        return sum(others, start=first)


class MultiScaleAutoencoder(KeepsAttributes, Autoencoder):
    r"""A decoder and a gain for each scale, scored together and in partial sums from the fine side.

    .. math::
        \hat x_l = \sum_{j \le l} g_j P_j D_j(z), \qquad
        \sum_{l=1}^{L} \lambda_l L(\hat x_l, x) + \sum_{l=1}^{L} \rho_l g_l^2 + \dots

    For two scales and squared error :math:`\lambda_1\|x - \hat x_{fine}\|^2 + \lambda_2\|x - \hat x_{full}\|^2 +
    \rho_1 g_1^2 + \rho_2 g_2^2`. With decoders that are perfect and orthogonal projections the gains that are best are
    :math:`g_l = \Lambda_l E_l / (\Lambda_l E_l + \rho_l)`, where :math:`\Lambda_l = \sum_{j \ge l} \lambda_j` and
    :math:`E_l = \mathbb E\|P_l x\|^2`; :func:`optimal_gains` gives them for any splitting. A charge on gains binds what
    the decoders cannot make up for: their last layers are as free as the gains, unless weight decay, a prior or their
    form says otherwise.

    Decoders give bands in the form of ``scales``, and in pre-activations: parts add up before the loss's output
    activation, so any loss will do. Terms are logged raw: ``reconstruction`` is :math:`L(\hat x_L, x)`, ``scale_<l>``
    that of the partial sums, ``squared_gain_<l>`` the squares. Scales are numbered from 0, the finest.

    ``detail``, from 1 to the number of scales, brings coarse structure first: the coarsest scale alone takes part at 1,
    each whole number adds the next finer one, and between them it fades in. What does not take part has no gradient
    but that of its charges. ``LinearSchedule("detail", 1, L)`` goes through them. A scale that joins disturbs the
    others for a while: all read one latent.

    Args:
        encoder: any module from ``(B, *event)`` to ``h``.
        decoders: for each scale, finest first, one from ``z`` to a band of it: see :func:`scale_decoders`.
        scales: the splitting.
        loss: None for :class:`SquaredError`.
        level_weights: :math:`\lambda_l`; None for 1 on the full reconstruction and 0 on the partial ones.
        gain_ridge: :math:`\rho_l`, one number for all or one for each.
        learn_gains: whether the gains are parameters, from 1 on; else they stay 1.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, C, *space)``; ``gains`` ``(L,)``; every term ``(B,)`` or without dimensions. ``level_weights`` and
        ``gain_ridge`` are lists of L numbers that a schedule may change, as ``"level_weights.0"``.

    Raises:
        ValueError: for numbers that are not one for each scale or negative, a charge on gains that are not learned, or
            decoders whose outputs are not the bands of data of one shape.

    Source: Burt & Adelson 1983, https://doi.org/10.1109/TCOM.1983.1095851; Denton et al. 2015,
    https://arxiv.org/abs/1506.05751.

    Example:
        >>> from lightning_ae import BlockMean, MLPEncoder, scale_decoders
        >>> scales = BlockMean(4)
        >>> decoders = scale_decoders(scales, (1, 8, 8), latent_dim=6, hidden=(32,))
        >>> model = MultiScaleAutoencoder(MLPEncoder((1, 8, 8), 6), decoders, scales, level_weights=[0.5, 1.0])
        >>> sorted(model.terms(torch.ones(2, 1, 8, 8), model(torch.ones(2, 1, 8, 8))))
        ['reconstruction', 'scale_0', 'squared_gain_0', 'squared_gain_1']
        >>> coarse, full = model.stages(torch.ones(2, 1, 8, 8))
    """

    takes_mask = False

    kept = ("level_weights", "gain_ridge", "detail")
    decoder: ScaleDecoder

    def __init__(
        self,
        encoder: nn.Module,
        decoders: Sequence[nn.Module],
        scales: Scales,
        loss: ReconstructionLoss | None = None,
        *,
        level_weights: Sequence[float] | None = None,
        gain_ridge: float | Sequence[float] = 0.0,
        learn_gains: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(scales, Scales):
            raise TypeError(f"scales: expected a Scales, such as BlockMean, got {describe_type(scales)}.")
        count = scales.num_scales
        if not isinstance(decoders, Sequence) or not all(isinstance(decoder, nn.Module) for decoder in decoders):
            raise TypeError(f"decoders: expected a list of modules, got {describe_type(decoders)}.")
        if len(decoders) != count:
            raise ValueError(f"decoders: expected one for each of {count} scales, got {len(decoders)}.")
        if level_weights is None:
            level_weights = [0.0] * (count - 1) + [1.0]
        weights = check_weights("level_weights", level_weights, count, "scale")
        charges = _one_for_each("gain_ridge", gain_ridge, count)
        learn_gains = check_flag("learn_gains", learn_gains)
        if any(charges) and not learn_gains:
            raise ValueError(f"gain_ridge: expected 0 for gains that are not learned, got {gain_ridge}.")
        super().__init__(encoder, ScaleDecoder(decoders, scales, learn_gains), loss, **kwargs)
        self.level_weights = weights
        self.gain_ridge = charges
        self.learn_gains = learn_gains
        taken = set(self._own_terms()) & (set(self.penalties) | set(self.code.weights()))
        if taken:
            raise ValueError(f"penalties: {sorted(taken)} is the name of another term; choose another key.")

    def _own_terms(self) -> list[str]:
        count = self.scales.num_scales
        gains = [f"squared_gain_{index}" for index in range(count)] if self.learn_gains else []
        return [*(f"scale_{index}" for index in range(count - 1)), *gains]

    @property
    def scales(self) -> Scales:
        """The splitting."""
        return self.decoder.scales

    @property
    def gains(self) -> Tensor:
        r""":math:`g_l`, finest scale first, ``(L,)``."""
        return self.decoder.gains

    @property
    def detail(self) -> float:
        """How many scales take part, from the coarsest on; with a fraction, the last of them in part."""
        return self.decoder.detail

    @detail.setter
    def detail(self, value: float) -> None:
        self.decoder.detail = float(check_non_negative("detail", value))

    def forward(self, x: Tensor) -> MultiScaleOutput:  # type: ignore[override]
        """Latent, pre-activations, the code's charges, and the parts, without corruption."""
        z, penalties = self.code(self.encoder(x))
        parts = self.decoder.parts(z)
        return MultiScaleOutput(z, self.decoder(z, parts), penalties, parts)

    def terms(self, x: Tensor, output: AutoencoderOutput | MultiScaleOutput) -> dict[str, Tensor]:
        """As in :class:`Autoencoder`, the loss of the partial sums, and the squares of the gains."""
        terms = super().terms(x, output)  # type: ignore[arg-type]
        values: list[Tensor] = []
        partial: Tensor | None = None
        for part in output.parts[:-1]:  # type: ignore[union-attr]
            partial = part if partial is None else partial + part
            values.append(self.loss(partial, x))
        if self.learn_gains:
            values += full_precision(self.gains).square().unbind()
        return {**terms, **dict(zip(self._own_terms(), values, strict=True))}

    def objective(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of all terms times their weights, ``(B,)``."""
        weights = dict(zip(self._own_terms(), [*self.level_weights[:-1], *self.gain_ridge], strict=False))
        total = super().objective({**terms, "reconstruction": self.level_weights[-1] * terms["reconstruction"]})
        for name, weight in weights.items():
            if weight:  # a partial sum may be infinitely far off, where nobody asks
                total = total + weight * terms[name]
        return total

    def stages(self, x: Tensor) -> list[Tensor]:
        """Reconstructions from the coarsest scale alone to all scales, ``(B, *event)`` each, for pictures."""
        parts = self.decoder.parts(self.encode(x))
        stages, total = [], torch.zeros_like(parts[-1])
        for part in reversed(parts):
            total = total + part
            stages.append(self.loss.prediction(total, x))
        return stages

    def configure_metrics(self, x: Tensor) -> MetricCollection:
        """As in :class:`Autoencoder`, and the error of each scale, ``mse_scale_<l>`` (:class:`ScaleError`)."""
        metrics = super().configure_metrics(x)
        metrics.add_metrics({"scale_error": ScaleError(self.scales.parts, self.scales.num_scales)})
        return metrics


def _one_for_each(name: str, values: float | Sequence[float], count: int) -> list[float]:
    values = values if isinstance(values, Sequence) else [values] * count
    return check_weights(name, values, count, "scale")


def optimal_gains(
    parts: Sequence[Tensor],
    x: Tensor,
    level_weights: Sequence[float],
    gain_ridge: float | Sequence[float] = 0.0,
) -> Tensor:
    r"""Gains of least :math:`\sum_l \lambda_l \mathbb E\|x - \sum_{j \le l} g_j p_j\|^2 + \sum_l \rho_l g_l^2`.

    A quadratic in :math:`g`: they solve :math:`(A + \mathrm{diag}\,\rho)\,g = b` with
    :math:`A_{jk} = \Lambda_{\max(j, k)} \mathbb E\langle p_j, p_k\rangle`,
    :math:`b_j = \Lambda_j \mathbb E\langle p_j, x\rangle` and :math:`\Lambda_j = \sum_{l \ge j} \lambda_l`. For
    orthogonal projections :math:`p_j = P_j x` that is :math:`g_j = \Lambda_j E_j / (\Lambda_j E_j + \rho_j)`,
    :math:`E_j = \mathbb E\|P_j x\|^2`.

    Args:
        parts: :math:`p_l` for a sample of data, finest scale first: ``scales.parts(x)`` for decoders that are perfect,
            or what decoders give, without their gains.
        x: the data, ``(N, *event)``.
        level_weights: :math:`\lambda_l`.
        gain_ridge: :math:`\rho_l`, one number for all or one for each.

    Returns:
        The gains, ``(L,)`` float64; of several that are equally good, the smallest.

    Raises:
        ValueError: if the numbers are not one for each part, or negative, or the parts not of the shape of ``x``.

    Example:
        >>> from lightning_ae import BlockMean
        >>> x = torch.tensor([[[3.0, 1.0]]])  # energies 2 and 8
        >>> optimal_gains(BlockMean(2).parts(x), x, [1.0, 1.0], [4.0, 8.0])
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    parts = check_sequence("parts", parts, "tensors")
    check_floating("x", x, least_dims=2)
    for part in parts:
        check_floating("parts", part)
    count = len(parts)
    shapes = [tuple(part.shape) for part in parts]
    if not parts or any(shape != tuple(x.shape) for shape in shapes):
        raise ValueError(f"parts: expected tensors of the shape {tuple(x.shape)} of x, got {shapes}.")
    for name, tensors in (("x", [x]), ("parts", parts)):
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError(f"{name}: expected finite numbers, got some that are NaN or infinite.")
    weights = torch.tensor(check_weights("level_weights", level_weights, count, "scale"), dtype=torch.float64)
    rho = torch.tensor(_one_for_each("gain_ridge", gain_ridge, count), dtype=torch.float64)
    rows = torch.stack([part.detach().flatten() for part in parts]).cpu().double()
    above = weights.flip(0).cumsum(0).flip(0)
    index = torch.arange(count)
    gram = above[torch.maximum(index[:, None], index)] * (rows @ rows.T) / len(x)
    target = above * (rows @ x.detach().flatten().cpu().double()) / len(x)
    gains: Tensor = torch.linalg.lstsq(gram + rho.diag(), target[:, None], driver="gelsd").solution[:, 0]
    return gains
