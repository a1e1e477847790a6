"""Images whose factors of variation are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ae.checks import check_whole


class FactorImages(NamedTuple):
    """Images, and what made each of them.

    Attributes:
        x: float32 in [0, 1], ``(N, 1, size, size)``.
        factors: int64, ``(N, 4)``: the row, column, width and brightness of the blob, each counted from 0.
    """

    x: Tensor
    factors: Tensor


def factor_images(size: int = 16, positions: int = 8, widths: int = 3, levels: int = 3) -> FactorImages:
    r"""Draw a blob in every place, width and brightness: :math:`x_{uv} = b\,e^{-((u - r)^2 + (v - c)^2)/2w^2}`.

    Every combination of the four factors occurs once, so they are independent and uniform, as
    :func:`lightning_ae.metrics.mutual_information_gap`, ``dci`` and ``sap`` take them to be.

    Args:
        size: pixels on a side.
        positions: how many rows :math:`r` and how many columns :math:`c`, from one eighth of the side to seven eighths.
        widths: how many widths :math:`w`, from 1/16 to 1/8 of the side.
        levels: how many brightnesses :math:`b`, from 1/2 to 1.

    Returns:
        The images and their factors, ``N = positions² · widths · levels``.

    Raises:
        TypeError: if a number is no integer.
        ValueError: if a number is not positive.

    Example:
        >>> x, factors = factor_images()
        >>> x.shape, factors.amax(0)
        (torch.Size([576, 1, 16, 16]), tensor([7, 7, 2, 2]))
    """
    size, positions = check_whole("size", size), check_whole("positions", positions)
    widths, levels = check_whole("widths", widths), check_whole("levels", levels)
    factors = torch.cartesian_prod(*(torch.arange(n) for n in (positions, positions, widths, levels)))
    places = torch.linspace(1 / 8, 7 / 8, positions) * size
    row, column = (places[factors[:, i], None, None] for i in (0, 1))
    width = (torch.linspace(1 / 16, 1 / 8, widths) * size)[factors[:, 2], None, None]
    level = torch.linspace(0.5, 1, levels)[factors[:, 3], None, None]
    middle = torch.arange(size) + 0.5
    squared = (middle[:, None] - row).square() + (middle - column).square()
    return FactorImages((level * (-squared / (2 * width.square())).exp()).unsqueeze(1), factors)
