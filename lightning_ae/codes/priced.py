"""What sparse codes share: one charge with its weight, and a controller that finds the weight for a stated L0."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_floating, check_non_negative, check_positive
from lightning_ae.codes.identity import Code, CodeOutput
from lightning_ae.codes.ranks import Ranks
from lightning_ae.rebuildable import KeepsAttributes


def count_active(z: Tensor) -> Tensor:
    """Latents of each example that are not zero, ``(B,)``, in float32 or wider."""
    return (z != 0).flatten(1).sum(1, dtype=torch.promote_types(z.dtype, torch.float32))


def norm1(z: Tensor) -> Tensor:
    """Sum of the absolute values of each example, ``(B,)``, in float32 or wider."""
    return z.abs().flatten(1).sum(1, dtype=torch.promote_types(z.dtype, torch.float32))


def per_latent(parameter: Tensor, h: Tensor) -> Tensor:
    """A vector ``(D,)`` so that it broadcasts along dimension 1 of ``h``; a ``ValueError`` if that has another size."""
    check_floating("h", h)
    if h.ndim < 2 or h.shape[1] != len(parameter):
        raise ValueError(f"num_latents: expected h to be (B, {len(parameter)}, ...), got {tuple(h.shape)}.")
    return parameter.view(-1, *[1] * (h.ndim - 2))


class L0Controller(nn.Module):
    r"""Finds the weight of a charge at which a stated number of latents is active.

    Integral control of the logarithm, :math:`\ln w \leftarrow \ln w + \rho\,e` with the error
    :math:`e = \ln(L_0 / L_0^*)` cut off at ±1, once for each optimizer step, and a proportional part: the weight in
    use is :math:`w\,e^{\kappa e}` with :math:`e` averaged over some steps, which keeps the two from swinging against
    each other. All of it is state on the device, kept in checkpoints.

    Start with a weight that is too small rather than too large: a code that was made too sparse at first comes back
    slowly. Allow about a thousand batches, more the smaller the learning rate.

    Under the Trainer an optimizer step goes by all examples of its batches and ranks. In a loop of your own the next
    forward pass takes the last one into account, except in compiled code: call :meth:`step`.

    Args:
        weight: where the weight starts.
        target: :math:`L_0^*`, active latents of an example on average.
        rate: :math:`\rho`; the weight grows or falls by this fraction a step at most.
        gain: :math:`\kappa`.
    """

    weight: Tensor
    error: Tensor
    seen: Tensor

    def __init__(self, weight: float, target: float, rate: float = 0.007, gain: float = 0.5) -> None:
        super().__init__()
        self.target = target
        self.rate: float | Tensor = rate
        self.gain: float | Tensor = gain
        self.register_buffer("weight", torch.tensor(float(weight)))
        self.register_buffer("error", torch.tensor(0.0))
        #: active latents and examples since the last step
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def make_adjustable(self) -> None:
        """Make rate and gain state on the device, for a code that changes them as it starts."""
        for name in ("rate", "gain"):
            value = vars(self).pop(name)
            self.register_buffer(name, torch.tensor(float(value)))

    def current(self) -> Tensor:
        """The weight in use, without dimensions: not a buffer, as the objective's graph may outlive the next step."""
        return self.weight * (self.gain * self.error).exp()

    @torch.no_grad()
    def observe(self, active: Tensor) -> None:
        """Keep a batch's active latents, ``(B,)``, for the next :meth:`step`."""
        # whole numbers, as single precision has none beyond 2²⁴: a large batch of a dense code
        self.seen.add_(torch.stack([active.sum(dtype=torch.int64), self.seen.new_full((), len(active))]))

    @torch.no_grad()
    def step(self, ranks: Ranks | None = None) -> None:
        """Take the batches since the last step into account.

        Args:
            ranks: the processes that train together; None if this is the only one.
        """
        active, examples = (self.seen if ranks is None else ranks.sum(self.seen)).unbind()
        # in single precision whatever the default is, bfloat16 while a Trainer of that precision runs
        error = (active.float() / examples.float() / self.target).log().clamp(-1, 1)
        fresh = examples > 0
        self.weight.mul_(torch.where(fresh, (self.rate * error).exp(), 1.0)).clamp_(1e-12, 1e12)
        self.error.copy_(torch.where(fresh, 0.9 * self.error + 0.1 * error, self.error))
        self.seen.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> L0Controller:
        # a model made bfloat16 would round each step of the weight away
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in self.buffers():
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        return self


class PricedCode(KeepsAttributes, Code):
    """Base of codes with one charge that keeps them sparse; a subclass gives :meth:`encode` and :meth:`charge`.

    Args:
        weight: of the charge in the objective; with ``target_l0`` where it starts.
        target_l0: how many latents of an example shall be active on average; None to leave the weight as it is.

    Raises:
        ValueError: if the weight is negative or, where it is to be adapted, zero; if the target is not positive.
    """

    kept = ("weight",)
    #: Name of the charge.
    term = "l1"

    def __init__(self, weight: float, target_l0: float | None = None) -> None:
        super().__init__()
        self.weight = check_non_negative("weight", weight)
        self.controller: L0Controller | None = None
        if target_l0 is not None:
            target = check_positive("target_l0", target_l0)
            if self.weight == 0:
                raise ValueError("weight: expected a positive number to start from where target_l0 is given, got 0.")
            self.controller = L0Controller(self.weight, target)

    @abstractmethod
    def encode(self, h: Tensor) -> Tensor:
        """The latent; changes no state."""

    @abstractmethod
    def charge(self, h: Tensor, z: Tensor) -> Tensor:
        """The raw charge, ``(B,)``."""

    def forward(self, h: Tensor) -> CodeOutput:
        """Latent and charge; with a target also the number of active latents, ``"l0"``."""
        z = self.encode(h)
        return CodeOutput(z, self._penalties(z, self.charge(h, z)))

    def _penalties(self, z: Tensor, charge: Tensor) -> dict[str, Tensor]:
        if self.controller is None:
            return {self.term: charge}
        active = charge.detach() if self.term == "l0" else count_active(z.detach())
        if self.training and z.shape[0]:
            # not in a graph: torch 2.14 recomputes for backward what hangs on a buffer, from its changed value
            if not (self.managed or torch.compiler.is_compiling()):
                self.controller.step()
            self.controller.observe(active)
        return {"l0": active, self.term: charge}

    def after_step(self, ranks: Ranks) -> None:
        """Adapt the weight to the batches of the step."""
        if self.controller is not None:
            self.controller.step(ranks)

    def weights(self) -> Mapping[str, float | Tensor]:
        """The weight of the charge now; active latents that are only logged have weight 0."""
        if self.controller is None:
            return {self.term: self.weight}
        return {"l0": 0.0, self.term: self.controller.current()}

    def extra_repr(self) -> str:
        """Weight and target."""
        target = "" if self.controller is None else f", target_l0={self.controller.target}"
        return f"weight={self.weight}{target}"
