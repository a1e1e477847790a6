"""An encoder that infers sparse codes by a fixed number of soft-thresholding steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.checks import check_floating, check_non_negative, check_type, check_whole
from lightning_ae.networks.linear import LinearDecoder
from lightning_ae.networks.shapes import Shape, check_input, check_shape
from lightning_ae.rebuildable import Rebuildable


class LISTAEncoder(Rebuildable, nn.Module):
    r"""Unrolled ISTA: :math:`z_{t+1} = S_\theta(W x + b + G z_t)` from :math:`z_0 = 0`, ``num_steps`` times.

    With :math:`W = \eta D^\top`, :math:`G = I - \eta D^\top D`, :math:`\theta = \eta\lambda/2` and
    :math:`\eta = 1/\sigma_{max}^2(D)` a step is one of ISTA, which minimises :math:`\|x - Dz\|^2 + \lambda\|z\|_1`; the
    steps share their weights.

    * *Tied* to a linear decoder, :math:`D` is that decoder's weight at every moment, less its bias from the data, and
      there is nothing else to learn: gradients reach the dictionary through the steps. It converges to
      :func:`sparse_encode` as ``num_steps`` grows.
    * *Learned* (LISTA), :math:`W, b, G, \theta` are free. They start from ``dictionary``, so that training begins at
      ISTA and ends nearer the minimum than ISTA in as many steps; with no dictionary, from a random one.

    Codes have exact zeros and signs; with it go ``L1Code(weight)`` and a linear decoder. Do not threshold again.

    Args:
        in_shape: shape of one example, flattened inside; a number is a flat vector.
        latent_dim: ``k``.
        weight: :math:`\lambda`, which decides the threshold (where it starts, if learned), in units of ``x`` squared
            over those of ``z``.
        num_steps: soft-thresholdings, at least one.
        tied_to: the decoder whose dictionary is used; None to learn.
        dictionary: where learning starts, ``(prod(in_shape), latent_dim)``; None for random unit-norm atoms.

    Shapes:
        ``(B, *in_shape)`` to ``(B, latent_dim)``.

    Raises:
        ValueError: for numbers out of range, a decoder or dictionary of other sizes, or both at once.

    Source: Gregor & LeCun 2010, https://icml.cc/Conferences/2010/papers/449.pdf.

    Example:
        >>> encoder = LISTAEncoder(2, 2, weight=1.0, num_steps=1, dictionary=torch.eye(2))
        >>> encoder(torch.tensor([[2.0, -0.3]])).detach()
        tensor([[1.5000, 0.0000]])
    """

    def __init__(
        self,
        in_shape: Shape,
        latent_dim: int,
        weight: float,
        num_steps: int = 3,
        tied_to: LinearDecoder | None = None,
        dictionary: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_shape = check_shape(in_shape)
        self.num_steps = check_whole("num_steps", num_steps)
        self.weight = weight = check_non_negative("weight", weight)
        check_type("tied_to", tied_to, LinearDecoder, None)
        sizes = (math.prod(self.in_shape), check_whole("latent_dim", latent_dim))
        #: of ``h``, without the batch dimension
        self.h_shape = sizes[1:]
        if dictionary is not None:
            check_floating("dictionary", dictionary)
        # a list, as the decoder is the model's: its weights are not the encoder's as well
        self._decoder = [] if tied_to is None else [tied_to]
        self.register_buffer("start", functional.normalize(torch.randn(sizes[1]), dim=0))
        if tied_to is None:
            atoms = functional.normalize(torch.randn(sizes), dim=0) if dictionary is None else dictionary.float()
            self._check("dictionary", atoms, sizes)
            eta = self._step_size(atoms)
            self.analysis = nn.Parameter(eta * atoms.t())
            self.bias = nn.Parameter(torch.zeros(sizes[1]))
            self.mixing = nn.Parameter(torch.eye(sizes[1]) - eta * atoms.t() @ atoms)
            self.threshold = nn.Parameter((eta * weight / 2).expand(sizes[1]).clone())
        elif dictionary is not None:
            raise ValueError("dictionary: the one of the decoder in tied_to is used; give one of the two.")
        else:
            self._check("tied_to", tied_to.weight, sizes)

    @staticmethod
    def _check(name: str, atoms: Tensor, sizes: tuple[int, int]) -> None:
        if tuple(atoms.shape) != sizes:
            raise ValueError(f"{name}: expected a dictionary {sizes}, got {tuple(atoms.shape)}.")

    def _step_size(self, atoms: Tensor) -> Tensor:
        r""":math:`1/\sigma_{max}^2` by power iteration: ISTA converges up to twice that, so an estimate will do."""
        vector = self.get_buffer("start").to(atoms.dtype)
        with torch.no_grad():
            for _ in range(20):
                vector = functional.normalize(atoms.t() @ (atoms @ vector), dim=0)
            return 1 / (atoms @ vector).square().sum().clamp_min(torch.finfo(atoms.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        """Infer codes."""
        check_input(x, self.in_shape, self)
        x = x.flatten(1)
        return self._tied(x, self._decoder[0]) if self._decoder else self._learned(x)

    def _tied(self, x: Tensor, decoder: LinearDecoder) -> Tensor:
        atoms = decoder.weight
        eta = self._step_size(atoms)
        bias = decoder.layer.bias
        x = x if bias is None else x - bias  # type: ignore[operator]
        threshold = eta * self.weight / 2
        z = _shrink(eta * (x @ atoms), threshold)
        for _ in range(self.num_steps - 1):
            z = _shrink(z - eta * ((z @ atoms.t() - x) @ atoms), threshold)
        return z

    def _learned(self, x: Tensor) -> Tensor:
        threshold = self.threshold.abs()
        projected = functional.linear(x, self.analysis, self.bias)
        z = _shrink(projected, threshold)
        for _ in range(self.num_steps - 1):
            z = _shrink(projected + functional.linear(z, self.mixing), threshold)
        return z


def _shrink(c: Tensor, threshold: Tensor) -> Tensor:
    return c - torch.minimum(torch.maximum(c, -threshold), threshold)
