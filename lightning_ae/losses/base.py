"""What every reconstruction loss promises: one number per example, and the mean that goes with it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_floating, check_one_of, check_tensor
from lightning_ae.rebuildable import Rebuildable

Activation = Literal["identity", "sigmoid", "tanh", "relu"]

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "identity": (lambda a: a, (-math.inf, math.inf)),
    "sigmoid": (torch.sigmoid, (0.0, 1.0)),
    "tanh": (torch.tanh, (-1.0, 1.0)),
    "relu": (torch.relu, (0.0, math.inf)),
}


def full_precision(tensor: Tensor, name: str = "params") -> Tensor:
    """float32 and float64 as they are, other real numbers as float32: losses and statistics are computed there.

    Args:
        tensor: of any real type.
        name: the argument's, for the message.

    Raises:
        TypeError: if it is no tensor, or a complex one.

    Example:
        >>> full_precision(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    check_tensor(name, tensor)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def widest(x: Tensor) -> torch.dtype:
    """The precision for small differences of large numbers: float64, where the device has it.

    Example:
        >>> widest(torch.zeros(1))
        torch.float64
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


def value_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest number in a batch, without dimensions.

    Raises:
        TypeError: if it is no tensor of real numbers.
        ValueError: if there is none.

    Example:
        >>> value_range(torch.tensor([[1.0, 3.0]]))
        (tensor(1.), tensor(3.))
    """
    check_tensor("x", x)
    if not x.numel():
        raise ValueError(f"x: expected a batch with numbers in it, got one of shape {tuple(x.shape)}.")
    return x.amin(), x.amax()


class ReconstructionLoss(Rebuildable, nn.Module, ABC):
    r"""Base of all reconstruction losses :math:`L(a, x)` on the decoder's output ``params`` :math:`= a`.

    The loss owns the output activation: ``mean(params)`` is the reconstruction :math:`\hat x`, so a decoder ends
    in pre-activations and a mismatched pair cannot be built. Losses are sums over the event dimensions, one number
    per example; the mean over the batch is taken once, by the model.

    Shapes:
        ``x``: ``(B, *event)``; ``params``: ``(B, *params_shape(event))``; the loss: ``(B,)``.
    """

    #: Name of the activation that :meth:`mean` applies; a decoder must not end in one of its own.
    output_activation: str = "identity"
    #: The interval in which :meth:`mean` lies.
    output_range: tuple[float, float] = (-math.inf, math.inf)
    #: What no loss of an example can be below, for data that it is defined for.
    lower_bound: float = -math.inf
    #: Whether :meth:`forward` and :meth:`terms` take a third argument, ``mask``.
    takes_mask: bool = False
    #: How many numbers the decoder gives for each number of ``x``; they are blocks along the first event dimension.
    params_per_feature: int = 1

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """Reconstruction ``(B, *event)`` from the decoder's output: the output activation, applied."""

    @abstractmethod
    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        """Loss of each example, ``(B,)``, in float32 or wider also under autocast."""

    def terms(self, params: Tensor, x: Tensor) -> dict[str, Tensor]:
        """The loss as ``"reconstruction"``, and parts of it to be logged beside it, ``(B,)`` each."""
        return {"reconstruction": self(params, x)}

    def excess(self, params: Tensor, x: Tensor) -> Tensor:
        r"""What of the loss is the reconstruction's, :math:`L(a, x) - L(a^*(x), x)`, ``(B,)``: the anomaly score.

        :math:`a^*` is what reconstructs ``x`` perfectly, the best there is for it; what that costs, the data cost by
        themselves. A scale that the loss owns (:math:`\sigma`, a dispersion) stays as it is, so that the score ranks
        examples by how well they are reconstructed; what the decoder predicts is all :math:`a`'s. Of a likelihood it
        is half of the deviance of generalised linear models. This one is the loss itself, for losses that are 0 for a
        perfect reconstruction, as distances are.
        """
        loss: Tensor = self(params, x)
        return loss

    def prediction(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What is compared with ``x`` in metrics; :meth:`mean`, unless the loss takes a known scale from ``x``.

        Args:
            params: the decoder's output.
            x: the data.
            mask: true where a number is there; None if all are. Given only to losses that take masks.
        """
        return self.mean(params)

    def check(self, x: Tensor) -> None:
        """Raise a ``ValueError`` if ``x`` holds values that the loss is not defined for. Called once per fit."""

    def within(self, interval: tuple[float, float]) -> None:
        """Hear in which interval the reconstruction lies, from the loss that owns the activation in a sum of losses."""

    @property
    def data_interval(self) -> tuple[float, float] | None:
        """The interval that the data are taken to span, for metrics of images; None if there is no telling."""
        low, high = self.output_range
        return (low, high) if math.isfinite(high - low) else None

    def params_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape that the decoder must give for targets of this shape (both without the batch dimension)."""
        first, *rest = event_shape
        return (self.params_per_feature * first, *rest)

    def _prepare(self, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        check_tensor("x", x, least_dims=2)
        check_floating("params", params)
        expected = (x.shape[0], *self.params_shape(x.shape[1:]))
        if params.shape != expected:
            raise ValueError(
                f"params: {type(self).__name__}: for targets of shape {tuple(x.shape)} the decoder must give "
                f"{expected}, got {tuple(params.shape)}."
            )
        return full_precision(params), full_precision(x)


class PointwiseLoss(ReconstructionLoss):
    """A loss that is a sum of one term per number of ``x``: a subclass gives :meth:`mean` and :meth:`pointwise`.

    Numbers that are missing can be left out by a mask.
    """

    takes_mask = True

    @abstractmethod
    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """The terms, of the shape of ``x``; both arguments are float32 or wider."""

    def forward(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Sum of the terms of each example, ``(B,)``; with a mask :math:`\sum_i m_i\, \ell(a_i, x_i)`.

        Args:
            params: the decoder's output.
            x: the data; where the mask is false it may be anything, NaN too.
            mask: booleans of the shape of ``x``, true where a number is there; None if all are. What is not there has
                neither loss nor gradient.

        Returns:
            The loss of each example.
        """
        return self._sum(self.pointwise, params, x, mask)

    def pointwise_excess(self, params: Tensor, x: Tensor) -> Tensor:
        """The terms of :meth:`excess`; those of the loss, unless a perfect reconstruction costs something."""
        return self.pointwise(params, x)

    def excess(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What of the loss is the reconstruction's, ``(B,)``: 0 for a perfect one. Arguments as for the loss."""
        return self._sum(self.pointwise_excess, params, x, mask)

    def _sum(self, each: Callable[[Tensor, Tensor], Tensor], params: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        params, x = self._prepare(params, x)
        if mask is None:
            return each(params, x).flatten(1).sum(1)
        if mask.dtype != torch.bool or mask.shape != x.shape:
            raise ValueError(f"mask: expected booleans {tuple(x.shape)}, got {mask.dtype} {tuple(mask.shape)}.")
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        terms = each(self._leave_out(params, mask), torch.where(mask, x, zero))
        return torch.where(mask, terms, torch.zeros((), dtype=terms.dtype, device=x.device)).flatten(1).sum(1)

    def _leave_out(self, params: Tensor, mask: Tensor) -> Tensor:
        # for losses whose terms depend on each other's parameters
        return params

    def terms(self, params: Tensor, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The loss as ``"reconstruction"``."""
        return {"reconstruction": self(params, x) if mask is None else self(params, x, mask)}


class ActivatedLoss(ReconstructionLoss):
    """A loss whose output activation is chosen by name.

    Args:
        activation: ``"identity"``, ``"sigmoid"``, ``"tanh"`` or ``"relu"``.

    Raises:
        ValueError: if the activation has another name.
    """

    lower_bound = 0.0  # distances are not negative

    def __init__(self, activation: Activation = "identity") -> None:
        super().__init__()
        check_one_of("activation", activation, sorted(_ACTIVATIONS))
        self.output_activation = activation
        self.output_range = _ACTIVATIONS[activation][1]

    def mean(self, params: Tensor) -> Tensor:
        """The activation, applied."""
        return _ACTIVATIONS[self.output_activation][0](full_precision(params))


class SquaredError(ActivatedLoss, PointwiseLoss):
    r"""Squared error :math:`\|x - \hat x\|^2` with :math:`\hat x = \varphi(a)`.

    With the identity it is the Gaussian likelihood up to constants (:class:`GaussianNLL` with
    :math:`\sigma^2 = \tfrac12` less its constant). The gradient is
    :math:`\partial L / \partial a = 2(\hat x - x)\,\varphi'(a)`; for the sigmoid
    :math:`2(\hat x - x)\hat x(1 - \hat x)`, which vanishes where the output is confidently wrong:
    the other activations are here so that this can be studied.

    Args:
        activation: :math:`\varphi`: ``"identity"``, ``"sigmoid"``, ``"tanh"`` or ``"relu"``.

    Shapes:
        ``params`` and ``x``: ``(B, *event)``; the loss ``(B,)``, in units of ``x`` squared.

    Raises:
        ValueError: if the activation has another name.

    Source: Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.

    Example:
        >>> SquaredError()(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([5.])
    """

    def pointwise(self, params: Tensor, x: Tensor) -> Tensor:
        """Squared difference of each number."""
        return (self.mean(params) - x).square()
