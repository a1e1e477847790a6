"""How a dictionary's latents are used, how its atoms lie, and whether its reconstructions are too short.

A code is a tensor ``(B, n)`` or an object with ``values``, ``indices`` and ``num_latents``, as ``SparseCode`` has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from lightning_ae.checks import check_positive, check_share, check_tensor, check_whole
from lightning_ae.metrics.sparsity import check_pair, widen


class FeatureDensity(Metric):
    r"""How often each latent is on: :math:`f_i = \frac1N \#\{b : z_{bi} \ne 0\}`, over all examples.

    From it come, by the functions of the same names on what it gives, :func:`log10_density` and
    :func:`dead_fraction`. The mean L0 is ``fired.sum() / count``; :math:`\sum_i f_i` is that up to rounding.

    Args:
        num_latents: ``n``.

    Shapes:
        updates with a code ``(B, n)``, dense or sparse; the result is ``(n,)``, from 0 to 1, no unit, NaN for latents
        that were NaN. ``fired`` ``(n,)`` and ``count`` ``()`` are int64, of this process.

    Raises:
        ValueError: if ``n`` is not positive, a code has another width, or there were no examples.

    Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features (feature density).

    Example:
        >>> density = FeatureDensity(3)
        >>> density.update(torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 3.0]]))
        >>> density.compute(), density.fired.sum() / density.count  # the mean L0
        (tensor([0.0000, 0.5000, 1.0000]), tensor(1.5000))
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    fired: Tensor
    undefined: Tensor
    count: Tensor

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.num_latents = check_whole("num_latents", num_latents)
        for name in ("fired", "undefined"):
            self.add_state(name, torch.zeros(self.num_latents, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, z: Any) -> None:
        """Add the codes of a batch."""
        width = z.shape[1] if isinstance(z, Tensor) and z.ndim == 2 else getattr(z, "num_latents", None)
        if width is None:
            check_tensor("z", z)
        if width != self.num_latents:
            raise ValueError(f"z: expected codes (B, {self.num_latents}), got {tuple(z.shape)}.")
        if isinstance(z, Tensor):
            check_tensor("z", z)
            self.fired = self.fired + (z != 0).sum(0)
            self.undefined = self.undefined + z.isnan().sum(0)
            self.count = self.count + len(z)
        else:
            values, indices = z.values.flatten(), z.indices.flatten()
            self.fired = self.fired.index_add(0, indices, (values != 0).long())
            self.undefined = self.undefined.index_add(0, indices, values.isnan().long())
            self.count = self.count + z.values.shape[0]

    def compute(self) -> Tensor:
        """The frequencies; NaN if there were no examples, and for latents that were NaN in any."""
        return torch.where(self.undefined > 0, torch.nan, (self.fired.double() / self.count).float())


def log10_density(density: Tensor, floor: float = 1e-10) -> Tensor:
    r"""Decimal logarithm of firing frequencies, as in histograms of feature density: :math:`\log_{10}(f_i + \epsilon)`.

    Args:
        density: :math:`f_i`, ``(n,)``.
        floor: :math:`\epsilon`, where dead latents end up.

    Returns:
        ``(n,)``, no unit; :math:`\log_{10}\epsilon` for latents that never fire, NaN for what is no frequency:
        below 0 or above 1.

    Raises:
        TypeError: if ``density`` is no tensor of real numbers.
        ValueError: if ``floor`` is not positive.

    Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features.

    Example:
        >>> log10_density(torch.tensor([0.0, 0.01, 1.0]))
        tensor([-10.,  -2.,   0.])
    """
    check_tensor("density", density)
    density, floor = widen(density), check_positive("floor", floor)
    return torch.where((density >= 0) & (density <= 1), (density + floor).log10(), torch.nan)


def dead_fraction(density: Tensor, at_most: float = 0.0) -> Tensor:
    r"""Share of latents that hardly fire: :math:`\frac1n\#\{i : f_i \le t\}`.

    Args:
        density: firing frequencies :math:`f_i` over many examples, ``(n,)``.
        at_most: :math:`t`, 0 for those that never fire.

    Returns:
        From 0 to 1, no unit, ``()``; NaN if a frequency is, and without latents.

    Raises:
        TypeError: if ``density`` is no tensor of real numbers.
        ValueError: if ``at_most`` is not in [0, 1].

    Example:
        >>> dead_fraction(torch.tensor([0.0, 0.0, 0.1, 1.0]))
        tensor(0.5000)
    """
    check_tensor("density", density)
    share = widen(density <= check_share("at_most", at_most)).mean()
    return torch.where(density.isnan().any(), torch.nan, share)


class Shrinkage(Metric):
    r"""Whether reconstructions are too short: :math:`\frac1N\sum_b \|\hat x_b\| / \|x_b\|`, and the relative bias.

    The relative reconstruction bias is the factor by which :math:`\hat x` would best be divided,

    .. math:: \gamma = \arg\min_{\gamma'} \mathbb E \|\hat x / \gamma' - x\|^2
        = \frac{\mathbb E \|\hat x\|^2}{\mathbb E [\hat x \cdot x]}.

    1 is unbiased. A penalty on the size of the code makes :math:`\gamma < 1`. The ratio of norms is below 1 for any
    reconstruction that leaves something out, even an unbiased one, which is why there are two numbers.

    Shapes:
        updates with ``(B, *event)`` twice, first :math:`\hat x`; the result is ``{"norm_ratio": (),
        "relative_bias": ()}``, no unit. Examples with :math:`x = 0` are left out of the ratio.

    Source: Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014 (relative reconstruction bias).

    Example:
        >>> metric = Shrinkage()
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> metric.update(0.8 * x, x)
        >>> metric.compute()
        {'norm_ratio': tensor(0.8000), 'relative_bias': tensor(0.8000)}
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    ratio: Tensor
    count: Tensor
    square: Tensor
    product: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("ratio", "count", "square", "product"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")  # float64 from the first batch on

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of reconstructions and what they should be."""
        check_pair(preds, target)
        wide = torch.float32 if target.device.type == "mps" else torch.float64
        preds, target = preds.flatten(1).to(wide), target.flatten(1).to(wide)
        norm = torch.linalg.vector_norm(target, dim=1)
        there = norm != 0  # NaN is there
        ratio = torch.linalg.vector_norm(preds, dim=1) / torch.where(there, norm, 1)
        self.ratio = self.ratio + torch.where(there, ratio, 0).sum()
        self.count = self.count + there.sum()
        self.square = self.square + preds.square().sum()
        self.product = self.product + (preds * target).sum()

    def compute(self) -> dict[str, Tensor]:
        """Both numbers over all examples."""
        return {
            "norm_ratio": (self.ratio / self.count).float(),
            "relative_bias": (self.square / self.product).float(),
        }


def max_cosine(atoms: Tensor, among: Tensor) -> Tensor:
    r"""How near each atom is to the nearest of others: :math:`m_i = \max_j |\cos(a_i, b_j)|`.

    Its mean is the mean max cosine similarity (MMCS) of two dictionaries. The matrix of all pairs is made in parts.

    Args:
        atoms: :math:`a_i` in columns, ``(d, n)``.
        among: :math:`b_j` in columns, ``(d, m)``.

    Returns:
        From 0 to 1, no unit, ``(n,)``; 0 for an atom that is zero.

    Raises:
        ValueError: if the shapes do not fit or there are no columns.

    Source: Sharkey et al. 2022, https://www.alignmentforum.org/posts/z6QQJbtpkEAX3Aojj.

    Example:
        >>> max_cosine(torch.eye(2), torch.tensor([[-3.0, 1.0], [0.0, 1.0]]))
        tensor([1.0000, 0.7071])
    """
    return _max_cosine(atoms, among, skip_self=False)


def decoder_overlap(decoder: Tensor) -> Tensor:
    r"""How near each atom is to the nearest other: :math:`\max_{j \ne i} |\cos(d_i, d_j)|`.

    Near 1 where an atom is there twice, or one is the other's negative.

    Args:
        decoder: atoms in columns, ``(d, n)`` with ``n >= 2``, as ``model.decoder.weight`` has them.

    Returns:
        From 0 to 1, no unit, ``(n,)``; 0 for an atom that is zero.

    Raises:
        ValueError: if ``decoder`` is no matrix or has fewer than two columns.

    Example:
        >>> decoder_overlap(torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0]]))
        tensor([0.7071, 0.7071, 0.7071])
    """
    check_tensor("decoder", decoder)
    if decoder.ndim != 2 or decoder.shape[1] < 2 or not len(decoder):
        raise ValueError(f"decoder: expected (d, n) with n >= 2, got {tuple(decoder.shape)}.")
    return _max_cosine(decoder, decoder, skip_self=True)


def atom_recovery(learned: Tensor, true: Tensor, threshold: float = 0.9) -> Tensor:
    r"""Share of the true atoms that were found: :math:`\frac1m\#\{j : \max_i |\cos(d_i, t_j)| > 0.9\}`.

    Args:
        learned: :math:`d_i` in columns, ``(d, n)``.
        true: :math:`t_j` in columns, ``(d, m)``.
        threshold: which cosine counts as found.

    Returns:
        From 0 to 1, no unit, ``()``; NaN if any atom has a NaN in it.

    Raises:
        ValueError: if the shapes do not fit or there are no columns, or the threshold is not in [0, 1].

    Source: the criterion of Sharkey et al. 2022, https://www.alignmentforum.org/posts/z6QQJbtpkEAX3Aojj.

    Example:
        >>> true = torch.eye(4)
        >>> atom_recovery(torch.cat([-2 * true[:, :3], torch.ones(4, 5)], dim=1), true)
        tensor(0.7500)
    """
    found = _max_cosine(true, learned, skip_self=False, names=("true", "learned"))
    share = widen(found > check_share("threshold", threshold)).mean()
    return torch.where(found.isnan().any(), torch.nan, share)


def _max_cosine(atoms: Tensor, among: Tensor, skip_self: bool, names: tuple[str, str] = ("atoms", "among")) -> Tensor:
    check_tensor(names[0], atoms)
    check_tensor(names[1], among)
    if atoms.ndim != 2 or among.ndim != 2 or atoms.shape[0] != among.shape[0] or not atoms.numel() * among.numel():
        raise ValueError(
            f"{names[0]} and {names[1]}: expected atoms (d, n) and (d, m) in columns, got {(*atoms.shape,)} and "
            f"{(*among.shape,)}."
        )
    common = torch.promote_types(widen(atoms).dtype, widen(among).dtype)
    a, b = (functional.normalize(matrix.detach().to(common).t(), dim=1) for matrix in (atoms, among))
    found = []
    for start in range(0, len(a), 1024):
        cosines = (a[start : start + 1024] @ b.t()).abs()
        if skip_self:
            cosines.diagonal(start).zero_()
        found.append(cosines.amax(1).clamp(max=1))
    return torch.cat(found)
