r"""1 − SSIM averaged over an image, with its gradient in closed form.

With :math:`u = \hat x + x` and :math:`v = \hat x - x`, blurred means :math:`\mu` and variances :math:`\sigma^2`,

.. math::
    1 - l = \frac{\mu_v^2}{\tfrac12(\mu_u^2 + \mu_v^2) + C_1}, \qquad
    1 - cs = \frac{\sigma_v^2}{\tfrac12(\sigma_u^2 + \sigma_v^2) + C_2}, \qquad SSIM = l \cdot cs

are Wang's luminance and contrast-structure terms. Four blurred maps suffice, and what is lost where the images agree is
lost relative to their difference, not to one: 1 − SSIM and its gradient are exactly zero at :math:`\hat x = x`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ae.losses.windows import Blur

#: Elements of one map that are processed together without a compiler, so that its two dozen maps stay in the cache.
CHUNK = 2**17


Kernel: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]


class Maps(NamedTuple):
    """Statistics of pairs of images ``(N, *space)``; those that are blurred may be smaller, see :class:`Blur`."""

    #: Sum and difference of the images, less the mean of each: variances do not depend on it, and cancel less.
    u: Tensor
    v: Tensor
    #: Blurred ``u`` and ``v``.
    mu_u: Tensor
    mu_v: Tensor
    #: The same with the means added again.
    level_u: Tensor
    level_v: Tensor
    #: Their variances within the window.
    var_u: Tensor
    var_v: Tensor
    #: Twice the denominators of the two terms.
    scale_l: Tensor
    scale_cs: Tensor
    #: Half the terms: half of one minus luminance, half of one minus contrast times structure.
    half_l: Tensor
    half_cs: Tensor


def maps(x_hat: Tensor, x: Tensor, blur: Blur, c1: float, c2: float) -> Maps:
    """The statistics, by differentiable operations. Images are ``(N, *space)``."""
    u, v = x_hat + x, x_hat - x
    center_u, center_v = _center(u), _center(v)
    u, v = u.sub_(center_u), v.sub_(center_v)
    mu_u, mu_v, square_u, square_v = blur([u, v, u * u, v * v])
    var_u = square_u.addcmul_(mu_u, mu_u, value=-1)
    var_v = square_v.addcmul_(mu_v, mu_v, value=-1)
    level_u, level_v = mu_u + center_u, mu_v + center_v
    square_v = level_v * level_v
    scale_l = torch.addcmul(square_v, level_u, level_u).add_(2 * c1)
    scale_cs = (var_u + var_v).add_(2 * c2)
    return Maps(
        u, v, mu_u, mu_v, level_u, level_v, var_u, var_v, scale_l, scale_cs, square_v / scale_l, var_v / scale_cs
    )


def half_dissimilarity(m: Maps, luminance: bool) -> tuple[Tensor, Tensor]:
    """Luminance, and half of what contrast and structure lose of it: half of 1 − SSIM is ``half_l`` and the latter."""
    # half - half * alpha would round twice: 1 - 2h is exact where h is small
    bright = torch.rsub(m.half_l, 1, alpha=2) if luminance else torch.ones_like(m.half_l)
    return bright, bright * m.half_cs


def mean_dissimilarity(
    x_hat: Tensor, x: Tensor, blur: Blur, c1: float, c2: float, *, luminance: bool = True, compiled: bool = False
) -> Tensor:
    """Mean of one minus SSIM over each channel.

    The gradient is computed together with the value, since it depends on what follows by one factor for each channel
    only: what is kept for the backward pass is one map for each argument that needs it. Gradients of gradients are
    those of the plain formula.

    Args:
        x_hat: images ``(B, C, *space)``, float32 or float64.
        x: images of the same shape and type.
        blur: the window.
        c1: constant of the luminance, in units of ``x`` squared.
        c2: constant of contrast and structure, likewise.
        luminance: False for contrast times structure only.
        compiled: whether value and gradient come from a compiled kernel, where a gradient is needed.

    Returns:
        ``(B, C)``.
    """
    grad = torch.is_grad_enabled()
    needs = (grad and x_hat.requires_grad, grad and x.requires_grad)
    compiled = compiled and any(needs) and not torch.compiler.is_compiling()
    rows: Tensor = _MeanDissimilarity.apply(
        x_hat.flatten(0, 1), x.flatten(0, 1), blur, (c1, c2), luminance, needs, compiled
    )
    return rows.view(x.shape[:2])


class _MeanDissimilarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_hat: Tensor,
        x: Tensor,
        blur: Blur,
        constants: tuple[float, float],
        luminance: bool,
        needs: tuple[bool, bool],
        compiled: bool,
    ) -> Tensor:
        pairs: Any = [(x_hat, x)]  # a graph may be for any batch
        kernel = fused_kernel() if compiled else value_and_gradients
        if not (compiled or torch.compiler.is_compiling()):
            size = max(1, CHUNK // max(1, x[:1].numel()))
            pairs = zip(torch.split(x_hat, size), torch.split(x, size), strict=True)
        values, gradients = [], []
        for a, b in pairs:
            value, *units = kernel(a, b, blur, constants, luminance, needs)
            values.append(value)
            gradients.append(units)
        kept = [_join(parts) for parts, needed in zip(zip(*gradients, strict=True), needs, strict=True) if needed]
        ctx.save_for_backward(x_hat, x, *kept)
        ctx.blur, ctx.constants, ctx.luminance, ctx.needs = blur, constants, luminance, needs
        return _join(tuple(values))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, x, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            m = maps(x_hat, x, ctx.blur, *ctx.constants)
            value = _value(m, half_dissimilarity(m, ctx.luminance)[1], ctx.luminance)
            inputs = [image for image, needed in zip((x_hat, x), ctx.needs, strict=True) if needed]
            found = iter(torch.autograd.grad(value, inputs, grad, create_graph=True))
        else:
            found = iter([grad.view(-1, *[1] * (x.ndim - 1)) * unit for unit in kept])
        return *(next(found) if needed else None for needed in ctx.needs), *[None] * 5


def _value(m: Maps, lost: Tensor, luminance: bool) -> Tensor:
    return 2 * (_mean(m.half_l) + _mean(lost)) if luminance else 2 * _mean(lost)


def value_and_gradients(
    x_hat: Tensor, x: Tensor, blur: Blur, constants: tuple[float, float], luminance: bool, needs: tuple[bool, bool]
) -> Kernel:
    """The mean and its gradients with respect to both images, None where it is not needed."""
    m = maps(x_hat, x, blur, *constants)
    bright, lost = half_dissimilarity(m, luminance)
    value = _value(m, lost, luminance)
    if not any(needs):
        return value, None, None
    # the derivatives by the variances are 2 * by_var_v and -2 * by_var_u; by the squared levels likewise
    by_var_v = bright.sub_(lost).div_(m.scale_cs)
    by_var_u = lost.div_(m.scale_cs)
    by_mu_u, by_mu_v = m.mu_u * by_var_u, m.mu_v * by_var_v
    if luminance:
        level = torch.rsub(m.half_cs, 1, alpha=2).div_(m.scale_l)
        dark = level * m.half_l
        by_mu_u = by_mu_u.addcmul_(m.level_u, dark, value=-1)
        by_mu_v = by_mu_v.addcmul_(m.level_v, level.sub_(dark), value=-1)
    factor = 4 / m.half_l[0].numel()
    if not needs[1]:
        by_mu, by_var_u, by_var_v = blur.adjoint([by_mu_u.sub_(by_mu_v), by_var_u, by_var_v])
        unit = by_mu.addcmul_(m.u, by_var_u, value=-1).addcmul_(m.v, by_var_v).mul_(factor)
        return value, unit, None
    by_mu_u, by_mu_v, by_var_u, by_var_v = blur.adjoint([by_mu_u, by_mu_v, by_var_u, by_var_v])
    by_u = by_mu_u.addcmul_(m.u, by_var_u, value=-1).mul_(factor)
    by_v = (m.v * by_var_v).sub_(by_mu_v).mul_(factor)
    return value, by_u + by_v if needs[0] else None, by_u - by_v


@lru_cache(maxsize=1)
def fused_kernel() -> Callable[..., Kernel]:
    """:func:`value_and_gradients` in one pass over the images, compiled at its first call for their size.

    Where torch cannot compile (no C++ compiler, for one) it warns once and gives what is not compiled.
    """
    compiled: Any = torch.compile(value_and_gradients)
    broken = False

    def kernel(x_hat: Tensor, x: Tensor, blur: Blur, *options: Any) -> Kernel:
        nonlocal broken
        if not broken:
            try:
                # shifted copies, which a compiler fuses
                found: Kernel = compiled(x_hat.detach(), x.detach(), blur._replace(banded=False), *options)
                return found
            except Exception as error:  # whatever a toolchain may raise; an error of ours comes again below
                broken = True
                plain = value_and_gradients(x_hat, x, blur, *options)
                rank_zero_warn(f"SSIM is not compiled, and slower: {type(error).__name__}: {error}".splitlines()[0])
                return plain
        return value_and_gradients(x_hat, x, blur, *options)

    return kernel


def _mean(rows: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() or rows.ndim == 2:
        return rows.flatten(1).mean(1)
    # line by line: so the compiler can fuse it with what precedes
    return rows.sum(-1).flatten(1).sum(1) / rows[0].numel()


def _center(rows: Tensor) -> Tensor:
    return _mean(rows.detach()).view(-1, *[1] * (rows.ndim - 1))


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
