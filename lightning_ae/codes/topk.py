"""The k largest: codes whose sparsity is a number and not a penalty."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ae.checks import check_share, check_whole
from lightning_ae.codes.identity import Code, CodeOutput
from lightning_ae.codes.selection import largest
from lightning_ae.codes.sparse_code import SparseCode, select_from, select_linear


class SelectingCode(Code):
    r"""Base of codes that keep a few latents of each example, :math:`z_i = \max(0, h_i)`, and set the others to 0.

    A subclass says which in :meth:`select`. As a part of any autoencoder the latent is a dense tensor; a
    :class:`DictionaryAutoencoder` asks :meth:`project` for a :class:`SparseCode` instead, and no dense code or
    gradient is ever made.
    """

    @abstractmethod
    def select(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Values of at least 0 and indices, ``(B, m)`` each, of what is kept of ``h`` ``(B, n)``; no gradient."""

    def select_alone(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The same without regard to the batch and to whether the model is in training: see :meth:`encode`."""
        return self.select(h)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, *, alone: bool = False) -> SparseCode:
        r"""Code of :math:`h = W(x - c) + b` for ``x`` ``(B, d)``, in one function whose gradient is sparse, too.

        Args:
            x: ``(B, d)``.
            weight: ``(n, d)``.
            bias: ``(n,)``.
            centre: :math:`c`, ``(d,)``.
            alone: :meth:`encode` instead of :meth:`forward`.
        """
        return select_linear(x, weight, bias, centre, self.select_alone if alone else self.select)

    def forward(self, h: Tensor) -> CodeOutput:
        """Dense latent ``(B, n)``, free of charge."""
        return CodeOutput(select_from(h, self.select).to_dense(), {})

    def encode(self, h: Tensor) -> Tensor:
        """Dense latent ``(B, n)`` that does not depend on the rest of the batch."""
        return select_from(h, self.select_alone).to_dense()


class TopKCode(SelectingCode):
    r"""The ``k`` largest of each example: :math:`z_i = \max(0, h_i)` if :math:`h_i` is one of them, else 0.

    Of several equal numbers at the border some are kept, so that never more than ``k`` are on; fewer are if not
    ``k`` are positive. There is no penalty and no shrinkage: sparsity is ``k``.

    Args:
        k: how many.

    Shapes:
        ``h`` and ``z``: ``(B, n)`` with ``n >= k``; in a :class:`DictionaryAutoencoder` ``z`` is a
        :class:`SparseCode` with ``(B, k)`` values.

    Raises:
        TypeError: if ``k`` is no whole number.
        ValueError: if it is not positive or larger than ``n``.

    Source: Makhzani & Frey 2013, https://arxiv.org/abs/1312.5663; Gao et al. 2024, https://arxiv.org/abs/2406.04093.

    Example:
        >>> TopKCode(2)(torch.tensor([[3.0, -1.0, 1.0, 2.0]])).z
        tensor([[3., 0., 0., 2.]])
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_whole("k", k)

    def select(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest, in no order."""
        values, indices = largest(h, self.k)
        return _positive(values), indices


class BatchTopKCode(SelectingCode):
    r"""On average ``k`` of each example: in training the :math:`Bk` largest of a batch, at inference a threshold.

    .. math:: z_{bi} = h_{bi}\,[h_{bi} \ge \tau], \qquad h_{bi} > 0,

    with :math:`\tau` the :math:`Bk`-th largest of the batch in training, so that difficult examples may use more. At
    inference, and in :meth:`encode`, an example must not depend on its batch: :math:`\tau` is the running mean
    of the smallest number kept in training, a buffer in the checkpoint that only training forward passes move (under
    DDP rank 0's is sent to all). Before the first of them it is TopK. The mean forgets quickly at first: after ``t``
    batches what came before weighs at most ``(1 + t) / (10 + t)``.

    An example uses at most ``width`` latents, which bounds memory and time; the code is exactly the above where none
    would use more.

    Args:
        k: mean number of latents that are on.
        width: the most that one example may use; None for ``4 * k``.
        momentum: weight of what the threshold was before, per batch, once there were many. While a dictionary learns
            its threshold moves, and a long memory lags behind: L0 at inference after 300 steps on channels of a
            convolutional network was 4.3 % low with 0.999, 1 % low with 0.9.

    Shapes:
        ``h`` and ``z``: ``(B, n)`` with ``n >= k``; in a :class:`DictionaryAutoencoder` ``z`` is a
        :class:`SparseCode` with ``(B, min(width, n))`` values, zeros among them.

    Raises:
        TypeError: if ``k`` or ``width`` is no whole number.
        ValueError: if ``k`` is not positive or larger than ``n``, ``width`` is smaller than ``k``, or ``momentum`` is
            not in [0, 1).

    Source: Bussmann, Leask & Nanda 2024, https://arxiv.org/abs/2412.06410.

    Example:
        >>> code = BatchTopKCode(1)
        >>> code(torch.tensor([[3.0, 2.0], [1.0, 0.5]])).z
        tensor([[3., 2.],
                [0., 0.]])
        >>> code.threshold
        tensor(2.)
    """

    threshold: Tensor
    batches: Tensor

    def __init__(self, k: int, width: int | None = None, momentum: float = 0.9) -> None:
        super().__init__()
        self.k = check_whole("k", k)
        self.width = 4 * self.k if width is None else check_whole("width", width)
        if self.width < self.k:
            raise ValueError(f"width: expected at least k={k}, got {width}.")
        self.momentum = check_share("momentum", momentum, "[)")
        #: negative until the first training batch
        self.register_buffer("threshold", torch.tensor(-1.0))
        #: training batches seen
        self.register_buffer("batches", torch.tensor(0))

    def select(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of each example, and zero for those that are not among the batch's largest."""
        return self._select(h, of_batch=self.training)

    def select_alone(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of each example, and zero for those below the threshold."""
        return self._select(h, of_batch=False)

    def _select(self, h: Tensor, *, of_batch: bool) -> tuple[Tensor, Tensor]:
        if self.k > h.shape[1]:
            raise ValueError(f"k: expected at most the {h.shape[1]} latents there are, got {self.k}.")
        values, indices = largest(h, min(self.width, h.shape[1]))
        values = _positive(values)
        if of_batch:
            number = self.k * h.shape[0]
            if number == 0:
                return values, indices
            best, where = values.flatten().topk(number, sorted=False)
            kept = torch.zeros_like(values).flatten().scatter(0, where, best).view_as(values)
            self._learn(best)
            return kept, indices
        # as long as nothing was learned, the k largest of each example
        own = values.topk(self.k, dim=1).values[:, -1:] if h.shape[0] else values[:, :1]
        floor = torch.where(self.threshold < 0, own, self.threshold.to(values))
        return torch.where(values < floor, torch.zeros_like(values), values), indices  # NaN stays NaN

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchTopKCode:
        # a model made bfloat16 would round each step of the threshold away
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.threshold.data = self.threshold.data.to(torch.promote_types(self.threshold.dtype, torch.float32))
        return self

    @torch.no_grad()
    def _learn(self, kept: Tensor) -> None:
        least = torch.where(kept > 0, kept, torch.inf).amin().to(self.threshold)
        # what is left of an average from a time when the code was another would shut latents off
        rate = (9 / (10 + self.batches)).clamp(min=1 - self.momentum).to(self.threshold)
        new = torch.where(self.threshold < 0, least, torch.lerp(self.threshold, least, rate))
        self.batches += 1
        self.threshold.copy_(torch.where(least.isfinite(), new, self.threshold))


def _positive(values: Tensor) -> Tensor:
    # no ReLU: its "units" would be ranks, and monitors of dead units would count them
    return values * (values > 0)
