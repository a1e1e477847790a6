"""JumpReLU: hard thresholds that are learned against the number of active latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ae.checks import check_floating, check_positive, check_share, check_whole
from lightning_ae.codes.identity import CodeOutput
from lightning_ae.codes.priced import PricedCode, per_latent

#: Thresholds that were not given, before data are seen.
FIRST = 0.01
#: Active latents at the start, in multiples of the target.
START_L0 = 2.0
#: Weight at the start, in squares of the threshold: below the 1 of an optimum, so that fewer latents die.
START_WEIGHT = 0.3
#: Rate and gain of the controller once it starts near its target.
START_RATE, START_GAIN = 0.03, 1.0
#: How much faster the logarithm of a threshold moves than the parameter behind it.
GAIN = 16.0


class _JumpReLU(torch.autograd.Function):
    """``h`` above its threshold and the number of those, with the rectangle's estimate of the thresholds' gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = ~(h <= threshold)  # NaN is active, and stays NaN
        wide = torch.promote_types(h.dtype, torch.float32)
        return torch.where(active, h, 0), active.flatten(1).sum(1, dtype=wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        h, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(h, threshold)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_count: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, threshold = ctx.saved_tensors
        grad_h = torch.where(h > threshold, grad_z, 0) if ctx.needs_input_grad[0] else None
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            near = (h - threshold).abs() < 0.5 * ctx.bandwidth * threshold
            per_unit = grad_z.to(threshold.dtype) * threshold + grad_count.view(-1, *[1] * (h.ndim - 1))
            dims = [d for d in range(h.ndim) if d != 1]
            total = torch.where(near, per_unit, 0).sum(dims)
            grad_threshold = -(total / (ctx.bandwidth * threshold.flatten())).view_as(threshold)
        return grad_h, grad_threshold, None


class JumpReLUCode(PricedCode):
    r"""Each latent with a threshold of its own, :math:`z = h\,H(h - \theta)`, charged :math:`\lambda\|z\|_0`.

    The step :math:`H` has no useful gradient, so thresholds learn from the straight-through estimates

    .. math:: \frac{\partial z}{\partial\theta} = -\frac{\theta}{\varepsilon} K(u),
        \qquad \frac{\partial \|z\|_0}{\partial\theta} = -\frac{1}{\varepsilon} K(u),
        \qquad u = \frac{h-\theta}{\varepsilon},

    with the rectangle :math:`K` of width and height 1: over many examples these are the derivatives of expectations.
    The encoder is not charged for the count. Active latents are not shrunk, unlike those of :class:`L1Code`.

    Two choices differ from the paper's and make the coefficient bite. The threshold is
    :math:`\theta = \theta_0 e^{16\rho}` with :math:`\rho` the parameter, starting at 0: one step of Adam at ``lr=1e-3``
    moves it by 1.6 % (with :math:`\theta = e^\rho` by 0.1 %, and in bfloat16, where :math:`\ln 0.001` has neighbours
    0.03 away, by nothing; here the parameter stays float32 in a model made bfloat16). And :math:`\varepsilon` is a
    share of :math:`\theta`, not a fixed number, so the window holds data at any threshold and is wide against the
    spacing of bfloat16.

    At the optimum a latent is active where it saves more squared error than :math:`\lambda`, so with unit-norm atoms
    :math:`\theta \approx \sqrt\lambda`.

    Args:
        num_latents: number of thresholds; for maps the number of channels.
        weight: :math:`\lambda`, in units of the loss for each active latent; with ``target_l0`` where it starts.
        target_l0: as for :class:`L1Code`.
        init_threshold: :math:`\theta_0`, in units of ``h``; take it well below the typical ``|h|``, as a latent that
            nowhere comes near its threshold does not learn. None for 0.01, and for a start from data where there is
            a target and the model looks at the data first, as :class:`DictionaryAutoencoder` does: at the quantile of
            :math:`h` that leaves twice the target active, with :math:`\lambda = 0.3\,\theta_0^2` in place of
            ``weight``, and a controller that is four times as fast: L0 was
            within 8 % of the target after 500 steps (known dictionary and channels of a convolutional network, lr
            1e-3), where 0.01 leaves 2.4 to 5.6 times the target.
        bandwidth: :math:`\varepsilon/\theta`, in (0, 2).

    Shapes:
        ``h`` and ``z``: ``(B, num_latents)`` or ``(B, num_latents, *spatial)``; charge ``"l0"`` ``(B,)``.

    Raises:
        ValueError: for numbers out of range, or another number of latents.

    Source: Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435.

    Example:
        >>> z, penalties = JumpReLUCode(2, weight=0.1, init_threshold=0.5)(torch.tensor([[0.4, 2.0]]))
        >>> z.tolist(), penalties["l0"].tolist()
        ([[0.0, 2.0]], [1.0])
    """

    term = "l0"
    start: Tensor

    def __init__(
        self,
        num_latents: int,
        weight: float,
        target_l0: float | None = None,
        init_threshold: float | None = None,
        bandwidth: float = 0.5,
    ) -> None:
        super().__init__(weight, target_l0)
        num_latents = check_whole("num_latents", num_latents)
        self.init_threshold: float | None = None
        if init_threshold is not None or self.controller is None:
            self.init_threshold = check_positive("init_threshold", FIRST if init_threshold is None else init_threshold)
        else:
            #: of thresholds that were not given
            self.register_buffer("start", torch.tensor(FIRST))
            self.controller.make_adjustable()
        self.bandwidth = check_share("bandwidth", bandwidth, "()", high=2)
        self.log_scale = nn.Parameter(torch.zeros(num_latents))

    @property
    def threshold(self) -> Tensor:
        r""":math:`\theta` of each latent, ``(num_latents,)``, in float32 or wider."""
        wide = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        return self._first() * (GAIN * wide).exp()

    def _first(self) -> Tensor | float:
        return self.start if self.init_threshold is None else self.init_threshold

    @torch.no_grad()
    def set_threshold(self, threshold: Tensor) -> None:
        r"""Take these :math:`\theta > 0`, ``(num_latents,)``, from elsewhere."""
        check_floating("threshold", threshold)
        if threshold.shape != self.log_scale.shape or not bool((threshold > 0).all()):
            got = f"{tuple(threshold.shape)} with {int((threshold <= 0).sum())} that are not"
            raise ValueError(f"threshold: expected {tuple(self.log_scale.shape)} positive numbers, got {got}.")
        self.log_scale.copy_((threshold / self._first()).log() / GAIN)

    @torch.no_grad()
    def start_from(self, h: Tensor, known: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take the start of thresholds that were not given, and of the weight, from data: see the class."""
        if self.init_threshold is not None or self.controller is None:
            return
        check_floating("h", h)
        numbers = h.detach().flatten().float()
        finite = numbers.isfinite()
        share = min(START_L0 * self.controller.target * len(h) / max(1, len(numbers)), 1.0)
        place = ((1 - share) * finite.sum()).long().clamp_max(len(numbers) - 1)
        # no number at all: an infinite start, which is none
        start = torch.where(finite, numbers, torch.inf).sort().values[place] if len(h) else numbers.sum() + torch.inf
        start = start if reduce is None else reduce(start)
        fresh = ~known & (start > 0) & start.isfinite()
        self.start.copy_(torch.where(fresh, start, self.start))
        controller: Any = self.controller
        for tensor, value in (
            (controller.weight, START_WEIGHT * start.square()),
            (controller.rate, START_RATE),
            (controller.gain, START_GAIN),
        ):
            tensor.copy_(torch.where(fresh, value, tensor))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # files from when 0.01 was the start of all
        if self.init_threshold is None and f"{prefix}log_scale" in state_dict:
            state_dict.setdefault(f"{prefix}start", torch.tensor(FIRST))
            for name in ("rate", "gain"):
                state_dict.setdefault(f"{prefix}controller.{name}", getattr(self.controller, name).detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def per_latent(self) -> list[nn.Parameter]:
        """The parameter behind the thresholds."""
        return [self.log_scale]

    def rescale(self, factor: Tensor) -> None:
        """Thresholds times ``factor``."""
        self.set_threshold(self.threshold.detach() * factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JumpReLUCode:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.log_scale.data = self.log_scale.data.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        if self.init_threshold is None:
            self.start.data = self.start.data.to(torch.promote_types(self.start.dtype, torch.float32))
        return self

    def _jump(self, h: Tensor) -> tuple[Tensor, Tensor]:
        z, count = _JumpReLU.apply(h, per_latent(self.threshold, h), self.bandwidth)
        return z, count

    def encode(self, h: Tensor) -> Tensor:
        """``h`` where it exceeds its threshold, else 0."""
        return self._jump(h)[0]

    def charge(self, h: Tensor, z: Tensor) -> Tensor:
        """Active latents of each example, with the estimate of its gradient."""
        return self._jump(h)[1]

    def forward(self, h: Tensor) -> CodeOutput:
        """Latent and its number of active latents, in one pass."""
        z, count = self._jump(h)
        return CodeOutput(z, self._penalties(z, count))

    def extra_repr(self) -> str:
        """Number of latents, weight and target."""
        return f"{len(self.log_scale)}, {super().extra_repr()}"
