"""Continuous data from recorded values, for densities."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ae.checks import check_tensor, check_whole


def dequantize(x: Tensor, levels: int = 256, generator: torch.Generator | None = None) -> Tensor:
    r"""Spread each of ``levels`` values over a cell of its own: :math:`y = (k + u) / n`, :math:`u \sim U[0, 1)`.

    For densities of numbers that were recorded with a spacing, which otherwise grow without limit on the few values
    that occur. By Jensen :math:`\mathbb E_u[-\log_2 p(y)] - d\log_2\delta \ge -\log_2 P(x)` with
    :math:`P(x) = \int p(y)\,dy` over the cell and :math:`\delta = 1/n`: with noise anew each time,
    ``BitsPerDim(1 / levels)`` of a density's loss on ``y`` bounds the length of a code for ``x`` from above, and is to
    be compared with that of a discretised likelihood. Give it to the model and to the loss alike; as a corruption the
    loss would score ``x`` itself.

    Args:
        x: values :math:`k / (n - 1)`, ``k = 0, 1, …, n - 1``, as bytes scaled to [0, 1] are; any shape.
        levels: :math:`n`.
        generator: of random numbers, on the device of ``x``.

    Returns:
        ``y`` in [0, 1), of the shape and dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not floating-point or ``levels`` no whole number.
        ValueError: if there are fewer than two levels.

    Source: Theis, van den Oord & Bethge 2016, https://arxiv.org/abs/1511.01844, section 3.1; Uria, Murray & Larochelle
    2013, https://arxiv.org/abs/1306.0186.

    Example:
        >>> from lightning_ae import ContinuousBernoulliNLL, VariationalAutoencoder
        >>> class OfBytes(VariationalAutoencoder):
        ...     def get_input(self, batch):
        ...         return dequantize(super().get_input(batch))
        >>> y = dequantize(torch.tensor([0.0, 1.0]))
        >>> (256 * y).floor()  # the bytes are still there
        tensor([  0., 255.])
    """
    check_tensor("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating-point values in [0, 1], got {x.dtype}; divide bytes by 255.")
    check_whole("levels", levels, least=2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    bins = (wide * (levels - 1)).round()
    u = torch.rand(x.shape, dtype=wide.dtype, device=x.device, generator=generator)
    # the sum rounds up to the next cell where u is within half a unit in the last place of 1
    highest = torch.nextafter(bins + 1, bins)
    return (torch.minimum(bins + u, highest) / levels).to(x.dtype)
