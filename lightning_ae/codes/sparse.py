"""Sparse codes of the textbook: soft-thresholding, the L1 norm, and a target rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.checks import check_floating, check_non_negative, check_one_of, check_share, check_tensor, check_whole
from lightning_ae.codes.identity import Code, CodeOutput
from lightning_ae.codes.priced import PricedCode, norm1, per_latent
from lightning_ae.rebuildable import KeepsAttributes


def soft_threshold(c: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Shrink towards zero: :math:`\operatorname{sgn}(c)\max(0, |c| - t)`.

    The minimiser of :math:`(z - c)^2 + 2t|z|`, so with an orthonormal decoder the optimal
    sparse code for penalty ``lam`` is ``soft_threshold(D.T @ x, lam / 2)``.

    Args:
        c: projected inputs, shape ``(B, k)`` or any other.
        threshold: ``t >= 0``, a number or broadcastable to ``c``.

    Returns:
        The sparse code, in the shape of ``c``.

    Raises:
        ValueError: if ``threshold`` is a negative number.

    Source: Daubechies et al. 2004, https://arxiv.org/abs/math/0307152.

    Example:
        >>> soft_threshold(torch.tensor([[2.0, -0.3]]), 0.5)
        tensor([[1.5000, 0.0000]])
    """
    check_tensor("c", c)
    c = c if c.is_floating_point() else c.float()
    if not isinstance(threshold, Tensor):
        threshold = min(check_non_negative("threshold", threshold, finite=False), torch.finfo(c.dtype).max)
    if isinstance(threshold, Tensor):
        check_tensor("threshold", threshold)
        try:
            threshold = threshold.to(c.dtype).expand_as(c)
        except RuntimeError as error:
            raise ValueError(
                f"threshold: expected a number, or a tensor that broadcasts to {tuple(c.shape)}, got "
                f"{tuple(threshold.shape)}."
            ) from error
        return c - torch.minimum(torch.maximum(c, -threshold), threshold)
    return c - c.clamp(-threshold, threshold)


class L1Code(PricedCode):
    r"""The textbook's sparse code: :math:`z = \varphi(h)`, charged :math:`\lambda\|z\|_1`.

    With squared error the objective is :math:`\|x - \hat x\|^2 + \lambda\|z\|_1`: minus the log posterior of a code
    with a Laplace prior. With an orthonormal linear decoder its optimum is
    ``soft_threshold(D.T @ x, weight / 2)``; of the activations ReLU gives exact zeros, the identity values that are
    merely small, so for signed codes with exact zeros take :class:`SoftThresholdCode`. A decoder free to grow makes
    the charge cheap without making the code sparse: see ``unit_norm`` of :class:`SparseAutoencoder`.

    Args:
        weight: :math:`\lambda`, in units of ``x`` squared over those of ``z``; with ``target_l0`` where it starts.
        activation: :math:`\varphi`, ``"identity"`` or ``"relu"``.
        target_l0: active latents of an example, on average, that the weight is adapted to (in training, state of the
            checkpoint: see :class:`~lightning_ae.codes.priced.L0Controller`); ``weights()`` has the weight in use.
            It takes about a thousand batches, and meanwhile ``val/loss`` has another meaning at each epoch: watch
            ``val/fvu`` or ``val/reconstruction``.

    Shapes:
        ``h`` and ``z``: ``(B, *latent)``; charge ``"l1"`` ``(B,)``, and ``"l0"``, logged only, if there is a target.

    Raises:
        ValueError: for a negative weight, an unknown activation, a target that is not positive, or one with the
            identity, under which no latent is ever exactly zero.

    Source: Olshausen & Field 1996, https://doi.org/10.1038/381607a0; Goodfellow, Bengio & Courville 2016, Deep
    Learning, section 14.2.1.

    Example:
        >>> L1Code(0.1, "relu")(torch.tensor([[2.0, -3.0]]))
        CodeOutput(z=tensor([[2., 0.]]), penalties={'l1': tensor([2.])})
    """

    def __init__(
        self, weight: float, activation: Literal["identity", "relu"] = "identity", target_l0: float | None = None
    ) -> None:
        check_one_of("activation", activation, ("identity", "relu"))
        if target_l0 is not None and activation == "identity":
            raise ValueError("target_l0: with the identity no latent is zero; take activation='relu'.")
        super().__init__(weight, target_l0)
        self.activation = activation

    def encode(self, h: Tensor) -> Tensor:
        """The activation, applied."""
        check_floating("h", h, least_dims=2)
        return h if self.activation == "identity" else functional.relu(h)

    def charge(self, h: Tensor, z: Tensor) -> Tensor:
        """The L1 norm of each example."""
        return norm1(z)

    def rescale(self, factor: Tensor) -> None:
        """Nothing to do."""


class SoftThresholdCode(PricedCode):
    r"""Signed, with exact zeros: :math:`z = \operatorname{sgn}(h)\max(0, |h| - t)`, charged :math:`\lambda\|z\|_1`.

    With an orthonormal linear decoder, its transpose as the encoder and :math:`t = \lambda/2` this *is* the optimum of
    :math:`\|x - \hat x\|^2 + \lambda\|z\|_1`. A learned threshold is :math:`t\,e^{\rho}` with :math:`\rho` the
    parameter, so that it stays positive.

    Args:
        threshold: :math:`t`, in units of ``h``; where it starts, if it is learned.
        weight: :math:`\lambda`; 0 to charge nothing.
        num_latents: number of learned thresholds, one for each latent (for maps, for each channel); None for the one
            fixed threshold.
        target_l0: as for :class:`L1Code`.

    Shapes:
        ``h`` and ``z``: ``(B, *latent)``, with ``num_latents`` ``(B, num_latents, ...)``; charge ``"l1"`` ``(B,)``,
        and ``"l0"``, logged only, if there is a target.

    Raises:
        ValueError: for a threshold that is negative or, if it is to be learned, zero; for a negative weight; for
            another number of latents.

    Source: Daubechies et al. 2004, https://arxiv.org/abs/math/0307152; Gregor & LeCun 2010,
    https://icml.cc/Conferences/2010/papers/449.pdf.

    Example:
        >>> SoftThresholdCode(0.5).encode(torch.tensor([[2.0, -0.3, -1.0]]))
        tensor([[ 1.5000,  0.0000, -0.5000]])
    """

    def __init__(
        self,
        threshold: float,
        weight: float = 0.0,
        num_latents: int | None = None,
        target_l0: float | None = None,
    ) -> None:
        super().__init__(weight, target_l0)
        self.initial = check_non_negative("threshold", threshold)
        if num_latents is None:
            self.log_scale = None
        else:
            self.log_scale = nn.Parameter(torch.zeros(check_whole("num_latents", num_latents)))
            if self.initial == 0:
                raise ValueError("threshold: expected a positive number for thresholds that are learned, got 0.")

    @property
    def threshold(self) -> float | Tensor:
        """The threshold now: a number, or ``(num_latents,)`` if it is learned."""
        return self.initial if self.log_scale is None else self.initial * self.log_scale.exp()

    def encode(self, h: Tensor) -> Tensor:
        """Soft-threshold."""
        check_floating("h", h, least_dims=2)
        threshold = self.threshold
        if isinstance(threshold, Tensor):
            threshold = per_latent(threshold, h).to(h.dtype)
        return soft_threshold(h, threshold)

    def charge(self, h: Tensor, z: Tensor) -> Tensor:
        """The L1 norm of each example."""
        return norm1(z)

    def per_latent(self) -> list[nn.Parameter]:
        """The parameter behind learned thresholds."""
        return [] if self.log_scale is None else [self.log_scale]

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Learned thresholds times ``factor``; a ``ValueError`` for a fixed one, which checkpoints do not hold."""
        if self.log_scale is None:
            super().rescale(factor)
        else:
            self.log_scale.add_(factor.log())


class KLSparsityCode(KeepsAttributes, Code):
    r"""Sigmoids with a target rate: :math:`z = \sigma(h)`, charged :math:`\sum_j \mathrm{KL}(\rho\,\|\,\hat\rho_j)`.

    :math:`\mathrm{KL}(\rho\,\|\,\hat\rho) = \rho\ln\frac{\rho}{\hat\rho} + (1-\rho)\ln\frac{1-\rho}{1-\hat\rho}` in
    nats, with :math:`\hat\rho_j` the mean of :math:`z_j` over the batch: each unit is to be active in a share
    :math:`\rho` of the examples, which says nothing of a single example. Every example is charged the batch's number.

    So this charge, alone among the codes, depends on the batch size: the mean over ``B`` examples scatters with
    variance up to :math:`\rho(1-\rho)/B`, and as the divergence is convex its expectation lies above that of the
    true rate by up to :math:`1/2B` for each unit. Take :math:`B \gg 1/\rho`. On several devices, or with
    accumulation, the mean is that of each device's batch.

    Args:
        target: :math:`\rho` in (0, 1).
        weight: of the charge in the objective.

    Shapes:
        ``h`` and ``z``: ``(B, D)``, or maps ``(B, C, *spatial)`` whose units are channels and whose means are also
        taken over positions; charge ``"kl_sparsity"`` ``(B,)``, in nats.

    Raises:
        ValueError: for a target outside (0, 1) or a negative weight.

    Source: Lee, Ekanadham & Ng 2007, https://papers.nips.cc/paper/3313; Ng 2011, CS294A lecture notes,
    https://web.stanford.edu/class/cs294a/sparseAutoencoder_2011new.pdf.

    Example:
        >>> KLSparsityCode(target=0.5, weight=1.0)(torch.zeros(2, 3)).penalties
        {'kl_sparsity': tensor([0., 0.])}
    """

    kept = ("weight",)

    def __init__(self, target: float, weight: float) -> None:
        super().__init__()
        self.target = check_share("target", target, "()")
        self.weight = check_non_negative("weight", weight)

    def encode(self, h: Tensor) -> Tensor:
        """The sigmoid."""
        check_floating("h", h, least_dims=2)
        return h.sigmoid()

    def forward(self, h: Tensor) -> CodeOutput:
        """Rates between 0 and 1, and their divergence from the target."""
        check_floating("h", h, least_dims=2)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        # in logarithms: a rate that rounds to 0 or 1 would have no gradient
        units = wide.transpose(0, 1).flatten(1)
        count = torch.ones_like(units[:1]).sum().clamp_min(1).log()  # a tensor, as a graph may be for any batch
        log_on = functional.logsigmoid(units).logsumexp(1) - count
        log_off = functional.logsigmoid(-units).logsumexp(1) - count
        rho = self.target
        divergence = rho * (math.log(rho) - log_on) + (1 - rho) * (math.log1p(-rho) - log_off)
        return CodeOutput(self.encode(h), {"kl_sparsity": divergence.sum().clamp_min(0).expand(h.shape[0])})

    def weights(self) -> Mapping[str, float | Tensor]:
        """The weight of the divergence."""
        return {"kl_sparsity": self.weight}

    def extra_repr(self) -> str:
        """Target and weight."""
        return f"target={self.target}, weight={self.weight}"
