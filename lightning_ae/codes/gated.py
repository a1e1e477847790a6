"""Gated codes: one part decides which latents are active, another how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.checks import check_floating, check_whole
from lightning_ae.codes.identity import CodeOutput
from lightning_ae.codes.priced import PricedCode, norm1, per_latent
from lightning_ae.exporting import exporting


class GatedCode(PricedCode):
    r"""Gates and magnitudes apart: :math:`z = H(h)\,\max(0,\ e^{r} h + b)` with :math:`r, b` learned for each latent.

    Only the gates are charged, :math:`\lambda\|\max(0, h)\|_1`, so magnitudes are not shrunk. The step :math:`H` passes
    no gradient to the gates; they learn from the charge and from an auxiliary reconstruction, the loss of decoding
    :math:`\max(0, h)` with the decoder's weights frozen. The model adds it as the term ``"gate"``:

    .. math:: L(\mathrm{dec}(z), x) + \lambda\,\|\max(0, h)\|_1 + L(\overline{\mathrm{dec}}(\max(0, h)), x).

    With the encoder :math:`h = W x + b_{gate}` this is the paper's pair of encoders with shared directions, its
    magnitudes' bias being :math:`b + e^r b_{gate}`. Keep the atoms' norms at 1, or growing atoms make gates cheap.

    The gates of the latest forward pass are kept until the next, for that term.

    Args:
        num_latents: number of latents; for maps the number of channels.
        weight: :math:`\lambda`; with ``target_l0`` where it starts.
        target_l0: as for :class:`L1Code`.

    Shapes:
        ``h`` and ``z``: ``(B, num_latents)`` or ``(B, num_latents, *spatial)``; charges ``"l1"`` and ``"gate"``
        ``(B,)``, and ``"l0"``, logged only, if there is a target.

    Raises:
        ValueError: for numbers out of range, or another number of latents.

    Source: Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014.

    Example:
        >>> GatedCode(2, weight=0.1).encode(torch.tensor([[2.0, -3.0]])).tolist()
        [[2.0, 0.0]]
    """

    def __init__(self, num_latents: int, weight: float, target_l0: float | None = None) -> None:
        super().__init__(weight, target_l0)
        num_latents = check_whole("num_latents", num_latents)
        self.log_gain = nn.Parameter(torch.zeros(num_latents))
        self.bias = nn.Parameter(torch.zeros(num_latents))
        self._gates: Tensor | None = None

    def encode(self, h: Tensor) -> Tensor:
        """Magnitudes where the gates are open."""
        check_floating("h", h)
        gain, bias = per_latent(self.log_gain.exp(), h), per_latent(self.bias, h)
        magnitudes = functional.relu(gain.to(h.dtype) * h + bias.to(h.dtype))
        return torch.where(h <= 0, 0, magnitudes)  # NaN stays NaN

    def charge(self, h: Tensor, z: Tensor) -> Tensor:
        """The L1 norm of what the gates let through."""
        return norm1(functional.relu(h))

    def forward(self, h: Tensor) -> CodeOutput:
        """Latent and charge; the gates are kept for :meth:`auxiliary`."""
        check_floating("h", h)
        gates = functional.relu(h)
        if not exporting():
            self._gates = gates
        z = self.encode(h)
        return CodeOutput(z, self._penalties(z, norm1(gates)))

    def auxiliary(self, score: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The loss of decoding the gates of the latest forward pass, ``"gate"``."""
        if self._gates is None:
            raise ValueError("GatedCode: its auxiliary term belongs to a forward pass, and there was none.")
        return {"gate": score(self._gates)}

    def weights(self) -> Mapping[str, float | Tensor]:
        """The weight of the charge now, and 1 for the auxiliary reconstruction."""
        return {**super().weights(), "gate": 1.0}

    def per_latent(self) -> list[nn.Parameter]:
        """Gain and bias."""
        return [self.log_gain, self.bias]

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """The bias times ``factor``."""
        self.bias.mul_(factor)

    def __getstate__(self) -> dict[str, Any]:
        # tensors with a graph can be neither copied nor pickled
        return {**super().__getstate__(), "_gates": None}

    def extra_repr(self) -> str:
        """Number of latents, weight and target."""
        return f"{len(self.bias)}, {super().extra_repr()}"
