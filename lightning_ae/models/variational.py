"""The variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributions, nn

from lightning_ae.checks import check_finite, check_flag, check_floating, check_sequence, check_type, check_whole
from lightning_ae.codes.gaussian import GaussianCode
from lightning_ae.losses import GaussianNLL, Likelihood, ReconstructionLoss
from lightning_ae.models.base import Autoencoder, Score
from lightning_ae.models.batches import corrupted
from lightning_ae.networks.shapes import check_shape


class VariationalAutoencoder(Autoencoder):
    r"""Gaussian latents, trained on the bound :math:`\mathbb E_q[-\ln p(x|z)] + \beta\,\mathrm{KL}(q\|p)`.

    With a likelihood as the loss and :math:`\beta = 1` (see :class:`GaussianCode`), ``val/loss`` is an upper bound of
    :math:`-\ln p(x)` in nats, from one draw of the latent for each example; for other :math:`\beta` the bound is
    ``val/reconstruction + val/kl``. :meth:`log_likelihood` comes closer.

    The loss decides what a nat of KL buys. The default has a learned :math:`\sigma`, which finds the exchange rate by
    maximum likelihood where squared error would fix it at :math:`\sigma^2 = \tfrac12` whatever the data. It starts at
    1, right for standardised data; for grey levels in [0, 1] start lower, ``GaussianNLL(0.1, learn_scale=True)``, or
    take a :class:`BernoulliNLL` for binary ones. A linear VAE with this loss is probabilistic PCA.

    The anomaly score of ``predict_step`` is, by ``score``: ``"bound"``, the excess of the reconstruction from the
    posterior's mean, plus KL, where a likelihood counts KL as it is and other losses :math:`\beta` times;
    ``"evidence"``, :math:`-\ln p(x)` by ``score_samples`` importance samples, less what ``x`` costs in a perfect
    reconstruction (nothing for zeros and ones, the same for all examples under a :class:`GaussianNLL`); ``"excess"``
    or ``"loss"``, the reconstruction alone. The evidence takes a pass through the decoder for each sample.

    ``encode`` gives the posterior's mean, so ``reconstruct`` and ``predict_step`` have no randomness, but for
    ``score="evidence"``. Methods that draw go by torch's global random state, and use the model as it is: call
    ``eval()`` first, or dropout and batch normalisation act as in training.

    Args:
        encoder: from ``(B, *event)`` to ``h``, of shape ``code.h_shape(latent_shape)``: twice as many numbers as
            latents, for a diagonal covariance. For pairs: ``mlp_pair(784, 40, h_dim=80)``.
        decoder: any module from ``z`` to pre-activations.
        loss: None for ``GaussianNLL(learn_scale=True)``. Others than a :class:`Likelihood` have no evidence to bound.
        code: None for :class:`GaussianCode`.
        score_samples: importance samples of each example for ``score="evidence"``.
        **kwargs: as for :class:`Autoencoder`.

    Shapes:
        ``x``: ``(B, *event)``; ``z``: ``(B, D)`` or ``(B, D, *spatial)``; every term ``(B,)``, nats for a likelihood.

    Raises:
        TypeError: if the code is none of Gaussians.
        ValueError: as :class:`Autoencoder`.

    Source: Kingma & Welling 2014, https://arxiv.org/abs/1312.6114; Rybkin et al. 2021,
    https://arxiv.org/abs/2006.13202 (learned scale); Lucas et al. 2019, https://arxiv.org/abs/1911.02469 (the linear
    case).

    Example:
        >>> from lightning_ae import BernoulliNLL, mlp_pair
        >>> model = VariationalAutoencoder(*mlp_pair((1, 8, 8), 3, h_dim=6), BernoulliNLL())
        >>> model.sample(5).shape
        torch.Size([5, 1, 8, 8])
        >>> model.log_likelihood(torch.ones(2, 1, 8, 8), num_samples=100).shape
        torch.Size([2])
    """

    code: GaussianCode
    scores: tuple[Score, ...] = ("bound", "evidence", "excess", "loss")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        loss: ReconstructionLoss | None = None,
        *,
        code: GaussianCode | None = None,
        score_samples: int = 100,
        **kwargs: Any,
    ) -> None:
        check_type("code", code, GaussianCode, None)
        loss = GaussianNLL(learn_scale=True) if loss is None else loss
        super().__init__(encoder, decoder, loss, code=GaussianCode() if code is None else code, **kwargs)
        self.score_samples = check_whole("score_samples", score_samples)
        if self.score == "evidence":
            self._likelihood("score='evidence'")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As in :class:`Autoencoder`, ``z`` the posterior's mean."""
        x, mask = self.observed(batch)
        seen = corrupted(self.corruption, x, mask)
        h = self.encoder(seen)
        z = self.code.encode(h)
        params = self.decoder(z)
        if self.score == "evidence":
            score = -self._log_evidence(x, seen, self.score_samples, mask=mask, excess=True)
        else:
            score = self._reconstruction_score(params, x, mask)
        if self.score == "bound":
            beta = 1.0 if isinstance(self.loss, Likelihood) else self.code.beta
            score = score + beta * self.code.statistics(h)["kl"].flatten(1).sum(1)
        given = (params, x) if mask is None else (params, x, mask)
        return {"z": z, "reconstruction": self.loss.prediction(*given), "score": score}

    def _latent_shape(self) -> tuple[int, ...] | None:
        shape = getattr(self.decoder, "latent_shape", None)
        return None if shape is None else tuple(shape)

    # -- the latent ---------------------------------------------------------------------------------------------

    def posterior(self, x: Tensor) -> distributions.Distribution:
        r""":math:`q(z \mid x)`: batch ``(B,)``, event the latent."""
        return self.code.posterior(self.encoder(self._there(x)[0]))

    @torch.no_grad()
    def sample(self, n: int, *, draw: bool = False, latent_shape: Sequence[int] | None = None) -> Tensor:
        """Decode latents drawn from the prior, without gradients.

        Args:
            n: how many.
            draw: draw ``x`` from the likelihood, with its noise, instead of giving its mean.
            latent_shape: shape of one latent, for a decoder without an attribute ``latent_shape``.

        Returns:
            ``(n, *event)``.

        Raises:
            TypeError: if ``x`` is to be drawn and the loss is no :class:`Likelihood`.
            ValueError: if ``n`` is not positive, or the latent's shape is not known.
        """
        shape = self._latent_shape() if latent_shape is None else check_shape(latent_shape, "latent_shape")
        draw = check_flag("draw", draw)
        if shape is None:
            raise ValueError(
                f"latent_shape: expected the shape of one latent, as {type(self.decoder).__name__} does not tell it; "
                "got None."
            )
        give = self._likelihood("sample(draw=True)").sample if draw else self.loss.mean
        return give(self.decoder(self.code.sample_prior(check_whole("n", n), shape, next(self.parameters()))))

    @torch.no_grad()
    def interpolate(self, x: Tensor, y: Tensor, steps: int = 8) -> Tensor:
        """Reconstructions on the straight line between the latents of ``x`` and ``y``, without gradients.

        Args:
            x: where it starts, ``(B, *event)``.
            y: where it ends, of the same shape.
            steps: points on the line, both ends among them, where these are the reconstructions.

        Returns:
            ``(B, steps, *event)``.

        Raises:
            ValueError: if the shapes differ, or there are fewer than two steps.
        """
        check_floating("x", x)
        check_floating("y", y)
        if x.dtype != y.dtype:
            raise TypeError(f"y: expected {x.dtype} as x is, got {y.dtype}.")
        if x.shape != y.shape:
            raise ValueError(f"y: expected the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}.")
        if check_whole("steps", steps) < 2:
            raise ValueError(f"steps: expected at least 2, the ends, got {steps}.")
        start, end = self.encode(x), self.encode(y)
        way = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype).view(-1, *[1] * (start.ndim - 1))
        return self._decode_each((1 - way) * start.unsqueeze(1) + way * end.unsqueeze(1))

    @torch.no_grad()
    def traverse(self, x: Tensor, dim: int, values: Sequence[float] | Tensor) -> Tensor:
        """Reconstructions of ``x`` with one latent set to each of some values, without gradients.

        Args:
            x: ``(B, *event)``.
            dim: which latent; of a map a channel, set at all places.
            values: in units of the prior's standard deviation.

        Returns:
            ``(B, len(values), *event)``.

        Raises:
            ValueError: if there is no such latent, or ``values`` is not a sequence of finite numbers.
        """
        z = self.encode(x)
        if isinstance(dim, bool) or not hasattr(dim, "__index__") or not -z.shape[1] <= dim < z.shape[1]:
            raise ValueError(f"dim: expected a latent from 0 to {z.shape[1] - 1}, got {dim!r}.")
        given = [check_finite("values", value) for value in check_sequence("values", values)]
        grid = torch.tensor(given, device=z.device, dtype=z.dtype)
        if not len(grid):
            raise ValueError(f"values: expected a sequence of finite numbers, got {values}.")
        each = z.unsqueeze(1).repeat(1, len(grid), *[1] * (z.ndim - 1))
        each[:, :, dim] = grid.view(-1, *[1] * (z.ndim - 2))
        return self._decode_each(each)

    def _decode_each(self, z: Tensor) -> Tensor:
        x_hat = self.decode(z.flatten(0, 1))
        return x_hat.reshape(*z.shape[:2], *x_hat.shape[1:])

    # -- the evidence -------------------------------------------------------------------------------------------

    def iwae_bound(self, x: Tensor, num_samples: int) -> Tensor:
        r"""A lower bound of the log-likelihood, with gradients.

        .. math:: \ln \frac1K \sum_{k=1}^K \frac{p(x \mid z_k)\,p(z_k)}{q(z_k \mid x)}, \qquad z_k \sim q(z \mid x):

        for :math:`K = 1` the evidence bound; its expectation never falls with :math:`K`, and tends to
        :math:`\ln p(x)`. Neither :math:`\beta` nor penalties of the model enter.

        Args:
            x: the data, ``(B, *event)``.
            num_samples: :math:`K`; all are decoded together and kept for the backward pass.

        Returns:
            Nats, ``(B,)``.

        Raises:
            TypeError: if the loss is no :class:`Likelihood`.
            ValueError: if ``num_samples`` is not positive.

        Source: Burda et al. 2016, https://arxiv.org/abs/1509.00519.
        """
        loss = self._likelihood("iwae_bound")
        count = check_whole("num_samples", num_samples)
        check_floating("x", x, least_dims=2)
        given = self._there(x)
        h = self.encoder(given[0])
        z, ratio = self.code.draw(h, self._noise(h, count))
        repeated = [part.expand(count, *x.shape).flatten(0, 1) for part in given]
        log_weights: Tensor = ratio - loss(self.decoder(z.flatten(0, 1)), *repeated).view_as(ratio)
        return log_weights.logsumexp(0) - math.log(count)

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, num_samples: int = 200, *, chunk_size: int = 8192) -> Tensor:
        r"""Estimate of :math:`\ln p(x)` by importance samples from the posterior, without gradients.

        :meth:`iwae_bound` in bounded memory. It is low in expectation, by about :math:`\operatorname{Var}(w)/2K` for
        weights :math:`w` of mean 1, so compare models at the same ``num_samples``. The numbers do not depend on
        ``chunk_size`` but for rounding.

        Args:
            x: the data, ``(B, *event)``.
            num_samples: :math:`K`.
            chunk_size: latents decoded at once.

        Returns:
            Nats, ``(B,)``.

        Raises:
            TypeError: if the loss is no :class:`Likelihood`.
            ValueError: if a number is not positive.

        Source: Burda et al. 2016, https://arxiv.org/abs/1509.00519, section 5.
        """
        self._likelihood("log_likelihood")
        count, chunk_size = check_whole("num_samples", num_samples), check_whole("chunk_size", chunk_size)
        check_floating("x", x, least_dims=2)
        given = self._there(x)
        return self._log_evidence(given[0], given[0], count, chunk_size, mask=given[1] if len(given) > 1 else None)

    @torch.no_grad()
    def _log_evidence(
        self,
        x: Tensor,
        encoded: Tensor,
        count: int,
        chunk_size: int = 8192,
        *,
        mask: Tensor | None = None,
        excess: bool = False,
    ) -> Tensor:
        """Log-likelihood with the posterior of what is encoded, of what is there; relative to the best for ``x``."""
        cost: Any = self.loss.excess if excess else self.loss
        h = torch.cat([self.encoder(rows) for rows in torch.split(encoded, chunk_size)])
        together = max(1, chunk_size // max(1, len(x)))
        total = torch.full((len(x),), -math.inf, device=x.device)
        for start in range(0, count, together):
            z, ratio = self.code.draw(h, self._noise(h, min(together, count - start)))
            targets = [x] if mask is None else [x, mask]
            given = [z.flatten(0, 1), *(target.expand(len(z), *x.shape).flatten(0, 1) for target in targets)]
            pieces = zip(*(torch.split(rows, chunk_size) for rows in given), strict=True)
            log_weights = ratio - torch.cat([cost(self.decoder(z), *rows) for z, *rows in pieces]).view_as(ratio)
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        return total - math.log(count)

    def _noise(self, h: Tensor, count: int) -> Tensor:
        # a call for each sample, so that the numbers are the same however samples are put together
        mean = self.code.encode(h)
        wide = mean.to(torch.promote_types(mean.dtype, torch.float32))
        return torch.stack([torch.randn_like(wide) for _ in range(count)])

    def _likelihood(self, method: str) -> Likelihood:
        if not isinstance(self.loss, Likelihood):
            raise TypeError(
                f"loss: {method} needs a Likelihood, such as GaussianNLL or BernoulliNLL, got "
                f"{type(self.loss).__name__}, which is no density of x."
            )
        return self.loss
