"""Structural similarity, and the loss that maximises it."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from lightning_ae.checks import (
    check_finite,
    check_flag,
    check_non_negative,
    check_one_of,
    check_positive,
    check_tensor,
    check_whole,
)
from lightning_ae.losses.base import Activation, full_precision
from lightning_ae.losses.dissimilarity import half_dissimilarity, maps, mean_dissimilarity
from lightning_ae.losses.intensities import IntensityLoss
from lightning_ae.losses.windows import Blur, blur_for

Padding = Literal["same", "valid"]
#: Wang's constants: C1 = (K1 L)² and C2 = (K2 L)² for images that span L.
K1, K2 = 0.01, 0.03


class SSIMParts(NamedTuple):
    """Means over channels and space of SSIM and of its three factors, ``(B,)`` each; see :func:`ssim`."""

    ssim: Tensor
    luminance: Tensor
    contrast: Tensor
    structure: Tensor


@overload
def ssim(
    x_hat: Tensor,
    x: Tensor,
    *,
    data_range: float = ...,
    window_size: int = ...,
    sigma: float = ...,
    k1: float = ...,
    k2: float = ...,
    padding: Padding = ...,
    parts: Literal[False] = ...,
    low: float = ...,
) -> Tensor: ...
@overload
def ssim(
    x_hat: Tensor,
    x: Tensor,
    *,
    data_range: float = ...,
    window_size: int = ...,
    sigma: float = ...,
    k1: float = ...,
    k2: float = ...,
    padding: Padding = ...,
    parts: Literal[True],
    low: float = ...,
) -> SSIMParts: ...
def ssim(
    x_hat: Tensor,
    x: Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = K1,
    k2: float = K2,
    padding: Padding = "same",
    parts: bool = False,
    low: float = 0.0,
) -> Tensor | SSIMParts:
    r"""Structural similarity of each example: :math:`l \cdot c \cdot s` in [-1, 1], averaged over channels and space.

    With means, variances and covariance under a Gaussian window around each pixel,

    .. math::
        l = \frac{2\mu_{\hat x}\mu_x + C_1}{\mu_{\hat x}^2 + \mu_x^2 + C_1}, \quad
        c = \frac{2\sigma_{\hat x}\sigma_x + C_2}{\sigma_{\hat x}^2 + \sigma_x^2 + C_2}, \quad
        s = \frac{\sigma_{\hat x x} + C_2/2}{\sigma_{\hat x}\sigma_x + C_2/2},

    :math:`C_i = (k_i \cdot` ``data_range`` :math:`)^2`. Intensities begin at 0: images in [-1, 1] are shifted by their
    ``low``, without which an image and its negative have the luminance of equals. It is differentiable twice, in both
    arguments; the first gradient is in closed form and keeps one map. Half precision is computed in float32, also under
    autocast.

    Args:
        x_hat: reconstruction.
        x: target.
        data_range: what the data can span: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.
        window_size: pixels of the window along each axis, odd.
        sigma: standard deviation of the window in pixels.
        k1: stabilises the luminance where both images are dark.
        k2: stabilises contrast and structure where both images are flat.
        padding: ``"same"`` reflects the images at their borders and scores every pixel (torchmetrics);
            ``"valid"`` scores those pixels whose window lies inside (Wang et al., pytorch-msssim, scikit-image).
            The two give different values.
        parts: also return the three factors. Slower: their gradients come from autograd.
        low: the lower end of what the data can span: 0 for [0, 1], -1 for [-1, 1].

    Returns:
        ``(B,)``, or with ``parts`` a tuple of four such tensors. The mean SSIM is not the product of the mean factors.

    Shapes:
        ``x_hat`` and ``x``: ``(B, C, L)``, ``(B, C, H, W)`` or ``(B, C, D, H, W)``.

    Raises:
        ValueError: if the shapes differ or are others, an image is smaller than the window, or the images are not
            floating-point; if ``window_size`` is even, or ``data_range`` or ``sigma`` not positive.

    Source: Wang, Bovik, Sheikh & Simoncelli 2004, https://doi.org/10.1109/TIP.2003.819861.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
        >>> ssim(x, x)
        tensor([1.])
        >>> ssim(1 - x, x, parts=True).structure  # a negative
        tensor([-0.8755])
    """
    data_range, window_size, sigma = check_options(data_range, window_size, sigma, padding)
    k1, k2, parts = check_non_negative("k1", k1), check_non_negative("k2", k2), check_flag("parts", parts)
    low = check_finite("low", low)
    x_hat, x = as_images(x_hat, x, window_size)
    if low:
        x_hat, x = x_hat - low, x - low
    blur = blur_for(x, window_size, sigma, padding == "same")
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    if not parts:
        return 1 - mean_dissimilarity(x_hat, x, blur, c1, c2).mean(1)
    return _parts(x_hat, x, blur, c1, c2)


class SSIMLoss(IntensityLoss):
    r"""One minus structural similarity, :math:`1 - \mathrm{SSIM}(\hat x, x)` with :math:`\hat x = \varphi(a)`.

    It looks at edges and texture where squared error looks at pixels, and is blind to small shifts of brightness.
    It is a mean over the image where likelihoods are sums: beside one, give it a weight of about the number of pixels.

    Args:
        activation: :math:`\varphi`: ``"identity"``, ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        data_range: what the data can span: 1 for [0, 1], 2 for [-1, 1]. None for the span of the output, where the
            activation, or that of the first loss in a :class:`WeightedLoss`, bounds it, else 1.
        window_size: as for :func:`ssim`.
        sigma: as for :func:`ssim`.
        padding: as for :func:`ssim`.
        low: the lower end of what the data can span; None for that of the output, 0 if it has none.
        compile: whether value and gradient come from a kernel that is compiled at the first training step (some ten
            seconds, for each size of images), also if the model is not; needs a C++ compiler, and warns and does
            without it where there is none. Equal up to rounding, so a run that is to be resumed keeps to one of them.

    Shapes:
        ``params`` and ``x``: ``(B, C, *space)`` with one to three axes in space; the loss ``(B,)``, in [0, 2].

    Raises:
        ValueError: as :func:`ssim`; from :meth:`check`, if the targets span more than ``data_range``, or reach below
            the ``low`` that was given. Where it was not that is a warning, and so is a span of less than a tenth of
            ``data_range``.

    Source: Zhao et al. 2017, https://arxiv.org/abs/1511.08861.

    Example:
        >>> import torch
        >>> loss = SSIMLoss("sigmoid")
        >>> loss(torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16, 16), 0.5))
        tensor([0.])
    """

    def __init__(
        self,
        activation: Activation = "identity",
        data_range: float | None = None,
        window_size: int = 11,
        sigma: float = 1.5,
        padding: Padding = "same",
        *,
        low: float | None = None,
        compile: bool = False,
    ) -> None:
        _, window_size, sigma = check_options(1.0 if data_range is None else data_range, window_size, sigma, padding)
        super().__init__(activation, data_range, low)
        self.window_size, self.sigma = window_size, sigma
        self.padding = padding
        self.compiled = check_flag("compile", compile)  # nn.Module has a compile of its own

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """One minus SSIM of each example, ``(B,)``."""
        params, x = self._prepare(params, x)
        x_hat, x = as_images(self._shift(self.mean(params)), self._shift(x), self.window_size)
        blur = blur_for(x, self.window_size, self.sigma, self.padding == "same")
        # not 1 - ssim(): that would round off what is left to learn
        c1, c2 = (K1 * self.data_range) ** 2, (K2 * self.data_range) ** 2
        return mean_dissimilarity(x_hat, x, blur, c1, c2, compiled=self.compiled).mean(1)


def check_options(
    data_range: float, window_size: int, sigma: float, padding: str = "valid"
) -> tuple[float, int, float]:
    """Range, window and its width as numbers, or an error that names the option which is off."""
    window_size = check_whole("window_size", window_size)
    if window_size < 3 or window_size % 2 == 0:
        raise ValueError(f"window_size: expected an odd number of pixels, 3 or more, got {window_size}.")
    check_one_of("padding", padding, ("same", "valid"))
    return check_positive("data_range", data_range), window_size, check_positive("sigma", sigma)


def as_images(x_hat: Tensor, x: Tensor, smallest: int) -> tuple[Tensor, Tensor]:
    """Both as images of one type, float32 or wider, with sides of ``smallest`` or more; else a ``ValueError``."""
    check_tensor("x_hat", x_hat)
    check_tensor("x", x)
    if x_hat.shape != x.shape:
        raise ValueError(f"x_hat: expected the shape of x, {tuple(x.shape)}, got {tuple(x_hat.shape)}.")
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"x: expected (B, C, L), (B, C, H, W) or (B, C, D, H, W), got the shape {tuple(x.shape)}.")
    if not (x.is_floating_point() and x_hat.is_floating_point()):
        raise ValueError(f"x_hat and x: expected floating-point images, got {x_hat.dtype} and {x.dtype}.")
    if min(x.shape[2:]) < smallest:
        raise ValueError(
            f"x: expected images of {smallest} pixels or more along each axis, got {tuple(x.shape[2:])}. "
            "Use a smaller window_size (and sigma), or larger images."
        )
    x_hat, x = full_precision(x_hat), full_precision(x)
    common = torch.promote_types(x_hat.dtype, x.dtype)
    return x_hat.to(common), x.to(common)


def _parts(x_hat: Tensor, x: Tensor, blur: Blur, c1: float, c2: float) -> SSIMParts:
    m = maps(x_hat.flatten(0, 1), x.flatten(0, 1), blur, c1, c2)
    half_covariance = 0.5 * (blur([m.u * m.v])[0] - m.mu_u * m.mu_v)
    mean_variance = 0.25 * (m.var_u + m.var_v)
    # the square root has no slope at 0: flat regions give none
    product = (mean_variance + half_covariance).relu() * (mean_variance - half_covariance).relu()
    deviations = product.clamp(min=torch.finfo(product.dtype).tiny).sqrt()
    contrast = (2 * deviations + c2) / (2 * mean_variance + c2)
    structure = (0.25 * (m.var_u - m.var_v) + c2 / 2) / (deviations + c2 / 2)
    luminance, lost = half_dissimilarity(m, luminance=True)
    factors = (1 - 2 * (m.half_l + lost), luminance, contrast, structure)
    return SSIMParts(*(factor.reshape(x.shape[0], -1).mean(1) for factor in factors))
