"""The code of a variational autoencoder: a Gaussian posterior, and what it costs in nats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, distributions

from lightning_ae.checks import check_floating, check_non_negative, check_one_of, check_whole
from lightning_ae.codes.identity import Code, CodeOutput
from lightning_ae.limits import soft_limit
from lightning_ae.rebuildable import KeepsAttributes

Covariance = Literal["diagonal", "full"]
#: Where the logarithm of a standard deviation is held back; the variance alone would be infinite from 44 on.
_LIMITS = (-30.0, 10.0)


class _Parts(NamedTuple):
    """A batch of Gaussians with covariance LLᵀ, in float32 or wider.

    Attributes:
        mean: ``(B, *latent)``.
        log_scale: logarithm of L's diagonal, ``(B, *latent)``.
        below: L under its diagonal and zeros elsewhere, ``(B, D, D)``; None if L is diagonal.
    """

    mean: Tensor
    log_scale: Tensor
    below: Tensor | None

    def move(self, noise: Tensor) -> Tensor:
        """The latents of standard normal numbers ``(..., B, *latent)``."""
        z = self.mean + self.log_scale.exp() * noise
        # no matrix product: autocast would do it in half precision
        return z if self.below is None else z + (self.below * noise.unsqueeze(-2)).sum(-1)

    def spread(self) -> Tensor:
        """Sum of the squares in each row of L under its diagonal, ``(B, *latent)``."""
        return torch.zeros_like(self.mean) if self.below is None else self.below.square().sum(-1)

    def kl(self) -> Tensor:
        """Nats of each latent, ``(B, *latent)``."""
        # a posterior near the prior has a variance near one, whose difference from one expm1 keeps
        kl = 0.5 * (self.mean.square() + (2 * self.log_scale).expm1()) - self.log_scale
        return kl if self.below is None else kl + 0.5 * self.spread()


class GaussianCode(KeepsAttributes, Code):
    r"""Gaussian posterior, drawn from by :math:`z = \mu + L\varepsilon`, charged :math:`\beta\,\mathrm{KL}(q\,\|\,p)`.

    :math:`q(z \mid x) = \mathcal N(\mu, LL^\top)` with :math:`\mu, L` the encoder's output, prior
    :math:`p = \mathcal N(0, I)`, and in nats, summed over latents,

    .. math:: \mathrm{KL} = \sum_j \mathrm{KL}_j, \qquad
        \mathrm{KL}_j = \tfrac12\Big(\mu_j^2 + \sum_{k \le j} L_{jk}^2 - 1\Big) - \ln L_{jj}.

    For a diagonal covariance :math:`\mathrm{KL}_j` is that of latent j, with :math:`L_{jj} = \sigma_j`; for a full one
    that of latent j given those before it (chain rule). With a likelihood as the loss and :math:`\beta = 1`, loss
    plus KL is the negative evidence bound. :math:`\beta` is nats for nats whichever loss it is: no loss averages over
    pixels. ``SquaredError`` is no likelihood; its :math:`\beta` equals :math:`2\sigma^2` times that of
    ``GaussianNLL(sigma)``.

    Outside of :math:`e^{-30} < L_{jj} < e^{10}` the encoder's logarithm counts only by its own logarithm
    (:func:`~lightning_ae.limits.soft_limit`), so that an encoder that starts with huge outputs has a finite KL, and a
    gradient that brings it back.

    Latents are drawn in evaluation too, so that ``val/reconstruction + val/kl`` is the bound; ``encode`` gives the
    mean. :math:`\beta`, ``free_bits`` and ``capacity`` are plain attributes that a schedule may set, kept in
    checkpoints. With either of the last two the charge in the objective is ``"kl_charge"``, and ``"kl"`` is logged
    beside it, so that the bound can be read in any case.

    Args:
        beta: :math:`\beta \ge 0`.
        free_bits: :math:`\lambda` nats (the field's name for them), not charged: :math:`\sum_j \max(\lambda,
            \mathrm{KL}_j)` of each example. Kingma et al. take the maximum after averaging :math:`\mathrm{KL}_j` over
            the minibatch, which makes the objective depend on batch size and devices. Here a latent is free for the
            examples on which it costs less; by Jensen the charge is never smaller than theirs.
        capacity: :math:`C` nats that the latent of an example shall carry: the charge is
            :math:`|\mathrm{KL} - C|`; raise it while training. Not together with ``free_bits``.
        covariance: ``"diagonal"``, or ``"full"`` for flat latents: :math:`L` lower triangular.

    Shapes:
        ``h``: ``(B, 2D, *spatial)``, mean and :math:`\ln\sigma^2` as blocks along dimension 1; full
        ``(B, 2D + D(D-1)/2)``, mean, :math:`\ln L_{jj}`, and the rows of :math:`L` under its diagonal.
        ``z``: ``(B, D, *spatial)``. Charges ``"kl"`` and ``"kl_charge"``: ``(B,)``, nats.

    Raises:
        ValueError: for a negative number, both ``free_bits`` and ``capacity``, an unknown covariance, or ``h`` of a
            size that no number of latents has.

    Source: Kingma & Welling 2014, https://arxiv.org/abs/1312.6114; Higgins et al. 2017,
    https://openreview.net/forum?id=Sy2fzU9gl (:math:`\beta`); Kingma et al. 2016, https://arxiv.org/abs/1606.04934
    (free bits); Burgess et al. 2018, https://arxiv.org/abs/1804.03599 (capacity).

    Example:
        >>> code = GaussianCode()
        >>> code(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).penalties  # means 1 and 0, variances 1
        {'kl': tensor([0.5000])}
        >>> code.encode(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[1., 0.]])
    """

    kept = ("beta", "free_bits", "capacity")

    def __init__(
        self,
        beta: float = 1.0,
        free_bits: float | None = None,
        capacity: float | None = None,
        covariance: Covariance = "diagonal",
    ) -> None:
        super().__init__()
        self.beta = check_non_negative("beta", beta)
        self.free_bits = None if free_bits is None else check_non_negative("free_bits", free_bits)
        self.capacity = None if capacity is None else check_non_negative("capacity", capacity)
        self.covariance = check_one_of("covariance", covariance, ("diagonal", "full"))
        self._charge_name()

    def _charge_name(self) -> str:
        if self.free_bits is not None and self.capacity is not None:
            raise ValueError(
                f"free_bits, capacity: expected one at most, got {self.free_bits} and {self.capacity}: each says what "
                "is not charged."
            )
        return "kl" if self.free_bits is None and self.capacity is None else "kl_charge"

    # -- the encoder's output -----------------------------------------------------------------------------------

    def h_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """What the encoder must give for a latent of this shape: twice the channels, or the numbers of mean and L."""
        first, *rest = latent_shape
        if self.covariance == "full":
            if rest:
                raise ValueError(f"covariance: 'full' is for flat latents, got {tuple(latent_shape)}; take 'diagonal'.")
            return (2 * first + first * (first - 1) // 2,)
        return (2 * first, *rest)

    def latent_shape(self, h_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latent for an encoder's output of this shape (both without the batch dimension)."""
        first, *rest = h_shape
        if self.covariance == "full":
            size = 1
            while size * (size + 3) < 2 * first:
                size += 1
            if rest or size * (size + 3) != 2 * first:
                raise ValueError(
                    "h: expected (B, 2D + D(D-1)/2), mean and lower triangle of D latents with full covariance, got "
                    f"(B, {', '.join(map(str, h_shape))})."
                )
            return (size,)
        if first < 2 or first % 2:
            raise ValueError(
                "h: expected (B, 2D, ...), means and log-variances of D latents, got "
                f"(B, {', '.join(map(str, h_shape))})."
            )
        return (first // 2, *rest)

    def _split(self, h: Tensor) -> _Parts:
        if not isinstance(h, Tensor):
            raise TypeError(
                "h: expected one tensor from the encoder, means and log-variances as blocks along dimension 1 "
                f"(torch.cat([mean, log_variance], 1)), got a {type(h).__name__}."
            )
        if h.ndim < 2:
            raise ValueError(f"h: expected a batch (B, 2D, ...), got {tuple(h.shape)}.")
        check_floating("h", h)
        size = self.latent_shape(h.shape[1:])[0]
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        mean, second = wide[:, :size], wide[:, size : 2 * size]
        log_scale = soft_limit(0.5 * second if self.covariance == "diagonal" else second, *_LIMITS)
        if self.covariance == "diagonal":
            return _Parts(mean, log_scale, None)
        rows, columns = torch.tril_indices(size, size, -1, device=h.device)
        below = wide.new_zeros(h.shape[0], size, size)
        below[:, rows, columns] = wide[:, 2 * size :]
        return _Parts(mean, log_scale, below)

    # -- the flow -----------------------------------------------------------------------------------------------

    def forward(self, h: Tensor) -> CodeOutput:
        """A draw from the posterior of each example, in the dtype of ``h``, and its charges."""
        parts = self._split(h)
        z = parts.move(torch.randn_like(parts.mean)).to(h.dtype)
        each = parts.kl().flatten(1)
        kl = each.sum(1)
        if self._charge_name() == "kl":
            return CodeOutput(z, {"kl": kl})
        if self.free_bits is not None:
            # the maximum: a compiled clamp would be compiled anew for each value that a schedule sets, and a ReLU be
            # taken for one of the network's
            above = each - self.free_bits
            charge = (self.free_bits + above * (above > 0)).sum(1)
        elif self.capacity is not None:
            charge = (kl - self.capacity).abs()
        return CodeOutput(z, {"kl": kl, "kl_charge": charge})

    def encode(self, h: Tensor) -> Tensor:
        """The posterior's mean."""
        return self._split(h).mean.to(h.dtype)

    def weights(self) -> Mapping[str, float | Tensor]:
        """β of what is charged; a ``"kl"`` that is only logged has weight 0."""
        charged = self._charge_name()
        return {"kl": self.beta} if charged == "kl" else {"kl": 0.0, charged: self.beta}

    def statistics(self, h: Tensor) -> dict[str, Tensor]:
        """Means, logarithms of the marginal variances, and nats of each latent, in the latent's shape."""
        check_floating("h", h)
        parts = self._split(h.detach())
        log_variance = 2 * parts.log_scale
        if parts.below is not None:
            log_variance = torch.logaddexp(log_variance, parts.spread().log())
        return {"mean": parts.mean, "log_variance": log_variance, "kl": parts.kl()}

    # -- the distributions --------------------------------------------------------------------------------------

    def posterior(self, h: Tensor) -> distributions.Distribution:
        r""":math:`q(z \mid x)`: batch ``(B,)``, event the latent; ``rsample`` and ``log_prob`` are differentiable.

        Args:
            h: the encoder's output.
        """
        parts = self._split(h)
        scale = parts.log_scale.exp()
        # arguments are not looked at, which would wait for the device
        if parts.below is None:
            normal = distributions.Normal(parts.mean, scale, validate_args=False)
            return distributions.Independent(normal, parts.mean.ndim - 1, validate_args=False)
        factor = parts.below + scale.diag_embed()
        return distributions.MultivariateNormal(parts.mean, scale_tril=factor, validate_args=False)

    def draw(self, h: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""Latents of given noise, and what importance sampling needs beside the likelihood.

        :math:`\ln p(z) - \ln q(z \mid x) = \tfrac12(\|\varepsilon\|^2 - \|z\|^2) + \sum_j \ln L_{jj}`.

        Args:
            h: the encoder's output for ``B`` examples.
            noise: standard normal :math:`\varepsilon`, ``(B, *latent)`` or with several draws ``(K, B, *latent)``.

        Returns:
            ``z`` in the shape of the noise, and the logarithm of the ratio, ``(B,)`` or ``(K, B)``, float32 or wider.
        """
        parts = self._split(h)
        noise = noise.to(parts.mean.dtype)
        z = parts.move(noise)
        event = tuple(range(-(h.ndim - 1), 0))
        ratio = 0.5 * (noise.square() - z.square()).sum(event) + parts.log_scale.sum(event)
        return z.to(h.dtype), ratio

    def sample_prior(self, n: int, latent_shape: Sequence[int], like: Tensor) -> Tensor:
        """Draw latents from the prior, ``(n, *latent_shape)``, with the device and dtype of ``like``."""
        return torch.randn(check_whole("n", n, least=0), *latent_shape, device=like.device, dtype=like.dtype)

    def extra_repr(self) -> str:
        """What is charged."""
        return f"beta={self.beta}, free_bits={self.free_bits}, capacity={self.capacity}, covariance={self.covariance!r}"
