"""Structural similarity over several scales."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from lightning_ae.checks import check_flag, check_non_negative, check_sequence
from lightning_ae.losses.base import Activation
from lightning_ae.losses.dissimilarity import mean_dissimilarity
from lightning_ae.losses.intensities import IntensityLoss
from lightning_ae.losses.ssim import K1, K2, as_images, check_options
from lightning_ae.losses.windows import blur_for

#: Importance of each scale, finest first, as judged by the observers of Wang et al.
PUBLISHED_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class MultiScaleSSIMLoss(IntensityLoss):
    r"""One minus multi-scale SSIM: contrast and structure at every scale, luminance at the coarsest.

    .. math::
        1 - \mathrm{MS\text{-}SSIM} = 1 - \overline{(l\,cs)_M^{w_M} \prod_{j=1}^{M-1} (cs)_j^{w_j}},

    each factor a mean over the positions where the window fits, or 0 if that is negative, each scale the one before
    averaged over 2×2 pixels, and the bar a mean over channels. A channel whose structure is inverted at any scale has
    similarity 0 and *no gradient*: start from a model that is trained on pixels, or mix the two.

    Args:
        activation: :math:`\varphi`: ``"identity"``, ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        data_range: as for :class:`SSIMLoss`.
        window_size: as for :func:`ssim`.
        sigma: as for :func:`ssim`.
        weights: :math:`w_j`, finest scale first; fewer of them, or a smaller window, suit smaller images.
        low: as for :class:`SSIMLoss`.
        compile: as for :class:`SSIMLoss`.

    Shapes:
        ``params`` and ``x``: ``(B, C, *space)`` with one to three axes in space, each longer than
        ``(window_size - 1) * 2 ** (len(weights) - 1)`` (160 by default); the loss ``(B,)``, in [0, 1].

    Raises:
        ValueError: as :func:`ssim`, or if there are no weights or negative ones; from :meth:`check`, as that of
            :class:`SSIMLoss`.

    Source: Wang, Simoncelli & Bovik 2003, https://doi.org/10.1109/ACSSC.2003.1292216; details as in pytorch-msssim.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3, 48, 48)
        >>> MultiScaleSSIMLoss(weights=(0.3, 0.3, 0.4))(x, x)
        tensor([0., 0.])
    """

    def __init__(
        self,
        activation: Activation = "identity",
        data_range: float | None = None,
        window_size: int = 11,
        sigma: float = 1.5,
        weights: Sequence[float] = PUBLISHED_WEIGHTS,
        *,
        low: float | None = None,
        compile: bool = False,
    ) -> None:
        _, window_size, sigma = check_options(1.0 if data_range is None else data_range, window_size, sigma)
        super().__init__(activation, data_range, low)
        self.weights = tuple(check_non_negative("weights", weight) for weight in check_sequence("weights", weights))
        if not self.weights:
            raise ValueError("weights: expected one for each scale, got none.")
        self.window_size, self.sigma = window_size, sigma
        self.compiled = check_flag("compile", compile)

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """One minus MS-SSIM of each example, ``(B,)``."""
        params, x = self._prepare(params, x)
        coarsest = len(self.weights) - 1
        x_hat, x = as_images(self._shift(self.mean(params)), self._shift(x), (self.window_size - 1) * 2**coarsest + 1)
        c1, c2 = (K1 * self.data_range) ** 2, (K2 * self.data_range) ** 2
        product = x.new_ones(())
        for scale, weight in enumerate(self.weights):
            blur = blur_for(x, self.window_size, self.sigma, same=False)
            lost = mean_dissimilarity(x_hat, x, blur, c1, c2, luminance=scale == coarsest, compiled=self.compiled)
            product = product * (1 - lost).relu() ** weight
            if scale < coarsest:
                x_hat, x = _halve(x_hat), _halve(x)
        return 1 - product.mean(1)


def _halve(x: Tensor) -> Tensor:
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.ndim - 3]
    # pytorch-msssim's: an odd side has a zero before it, which counts
    halved: Tensor = pool(x, 2, padding=[size % 2 for size in x.shape[2:]])
    return halved
