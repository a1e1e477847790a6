"""What is added to the objective of a dictionary: latents that died, and prefixes that must do on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import check_sequence, check_whole
from lightning_ae.codes.topk import TopKCode
from lightning_ae.losses.base import full_precision
from lightning_ae.penalties.base import Penalty

#: A residual with less than this share of the data's variance has nothing left to be explained.
_NOTHING_LEFT = 1e-9


class AuxiliaryK(Penalty):
    r"""Dead latents explain what the living ones left: :math:`V_x \|e - \hat e\|^2 / V_e` with :math:`e = x - \hat x`.

    .. math:: \hat e = D \, \mathrm{TopK}_{k_{aux}}(W_{dead}(x - b) + c_{dead})

    is decoded from the largest ``k`` dead latents *without* the pre-bias :math:`b`, which is in :math:`\hat x` already,
    and :math:`e` has no gradient, so nothing but dead latents (and the encoder's pre-bias) hears of it.
    :math:`V_e` and :math:`V_x` are the variances of residual and data in the batch, summed over features, so relative
    to the reconstruction the term is what Gao et al. have, in any unit; the default weight is theirs. It is 0 as
    long as nothing is dead, or nothing is left to explain.

    Args:
        k: :math:`k_{aux}`; None for half the number of features. Of fewer dead latents all are used.
        weight: its weight in the objective.

    Shapes:
        the raw term: ``(B,)``, in units of the reconstruction.

    Raises:
        ValueError: if ``k`` is not a positive whole number.
        TypeError: in a model that is no :class:`DictionaryAutoencoder`.

    Source: Gao et al. 2024, https://arxiv.org/abs/2406.04093, appendix A.2.

    Example:
        >>> from lightning_ae import DictionaryAutoencoder, TopKCode
        >>> model = DictionaryAutoencoder(8, 32, TopKCode(2), penalties={"auxiliary": AuxiliaryK(k=4)})
        >>> x = torch.randn(5, 8)
        >>> model.terms(x, model(x))["auxiliary"]  # nothing is dead yet
        tensor([0., 0., 0., 0., 0.])
    """

    def __init__(self, k: int | None = None, weight: float = 1 / 32) -> None:
        super().__init__(weight)
        self.k = None if k is None else check_whole("k", k)

    def forward(self, x: Tensor, output: AutoencoderOutput, model: AutoencoderLike) -> Tensor:
        """The error in explaining each example's residual."""
        dictionary = _check(model, self)
        dead: Tensor = dictionary.dead_latents()
        if len(dead) == 0 or x.shape[0] == 0:
            return full_precision(x).new_zeros(x.shape[0])
        target = full_precision(x)
        residual = (target - full_precision(output.params)).detach()
        weight, bias = dictionary.encoder.weight.index_select(0, dead), dictionary.encoder.bias.index_select(0, dead)
        k = min(self.k or max(1, x.shape[1] // 2), len(dead))
        z = TopKCode(k).project(x, weight, bias, dictionary.pre_bias)
        explained = full_precision(z.decode(dictionary.decoder.atoms.index_select(0, dead)))
        left, whole = _variance(residual), _variance(target)
        something = left > _NOTHING_LEFT * whole
        ratio = torch.where(something, whole / torch.where(something, left, torch.ones_like(left)), 0.0)
        return (residual - explained).square().sum(1) * ratio


class PrefixReconstruction(Penalty):
    r"""The first latents have to reconstruct on their own: :math:`\sum_m L(b + D_{1:m} z_{1:m}, x)`, of Matryoshka.

    With it, general features come first and are not split over later ones. Added to the reconstruction from all
    latents with weight 1, the objective is that of Bussmann et al.

    Args:
        prefixes: numbers of latents :math:`m`, rising, without the whole.
        weight: its weight in the objective.

    Shapes:
        the raw term: ``(B,)``, in units of the reconstruction.

    Raises:
        ValueError: if the prefixes do not rise, or one is not smaller than the number of latents.
        TypeError: in a model that is no :class:`DictionaryAutoencoder`.

    Source: Bussmann et al. 2025, https://arxiv.org/abs/2503.17547.

    Example:
        >>> from lightning_ae import DictionaryAutoencoder, TopKCode
        >>> model = DictionaryAutoencoder(8, 32, TopKCode(2), penalties={"prefixes": PrefixReconstruction([8, 16])})
        >>> x = torch.randn(5, 8)
        >>> model.terms(x, model(x))["prefixes"].shape
        torch.Size([5])
    """

    def __init__(self, prefixes: Sequence[int], weight: float = 1.0) -> None:
        super().__init__(weight)
        self.prefixes = tuple(check_whole("prefixes", size) for size in check_sequence("prefixes", prefixes))
        if not self.prefixes or any(a >= b for a, b in zip(self.prefixes, self.prefixes[1:], strict=False)):
            raise ValueError(f"prefixes: expected rising numbers of latents, got {list(prefixes)}.")

    def forward(self, x: Tensor, output: AutoencoderOutput, model: AutoencoderLike) -> Tensor:
        """Sum of the losses of the prefixes."""
        dictionary = _check(model, self)
        z: Any = output.z
        if self.prefixes[-1] >= z.shape[1]:
            raise ValueError(f"prefixes: expected less than the {z.shape[1]} latents, got {list(self.prefixes)}.")
        total = full_precision(x).new_zeros(x.shape[0])
        for size in self.prefixes:
            if isinstance(z, Tensor):
                decoded = z[:, :size] @ dictionary.decoder.atoms[:size]
            else:
                decoded = dictionary.decoder(z.prefix(size))
            total = total + model.loss(decoded + dictionary.pre_bias, x)
        return total


def _check(model: AutoencoderLike, penalty: Penalty) -> Any:
    if not hasattr(model, "dead_latents"):
        raise TypeError(f"{type(penalty).__name__}: expected a DictionaryAutoencoder, got a {type(model).__name__}.")
    return model


def _variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum(1).mean()
