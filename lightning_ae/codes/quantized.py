"""Latents that are one of finitely many: what such codes share, and the codebook that is learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_ae.checks import check_flag, check_floating, check_non_negative, check_share, check_tensor, check_whole
from lightning_ae.codes.codebook import in_fixed_order, kmeans, nearest, spread
from lightning_ae.codes.identity import Code, CodeOutput
from lightning_ae.codes.ranks import Ranks
from lightning_ae.rebuildable import KeepsAttributes

#: Memory of the usage of codes that are learned by gradient, for their expiry.
_USAGE_DECAY = 0.99


def straight_through(h: Tensor, z: Tensor) -> Tensor:
    """``z`` exactly, with the gradient of ``h``."""
    return z.detach() + (h - h.detach())


class QuantizedCode(Code):
    """Base of codes with finitely many values: vectors of ``dim`` channels, each with an index below ``num_codes``.

    Args:
        num_codes: how many values a vector can have.
        dim: its size.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.num_codes = check_whole("num_codes", num_codes)
        self.dim = check_whole("dim", dim)

    @abstractmethod
    def indices(self, h: Tensor) -> Tensor:
        """Which code each vector gets, ``(B, g, *spatial)``; changes no state."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """The latent ``(B, g * dim, *spatial)`` of indices ``(B, g, *spatial)``."""

    def h_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """That of the latent; a ``ValueError`` unless ``dim`` divides its channels."""
        if not latent_shape or latent_shape[0] % self.dim:
            raise ValueError(
                f"code: expected a latent (g * {self.dim}, *spatial) for vectors of {self.dim} channels, got "
                f"{tuple(latent_shape)}."
            )
        return tuple(latent_shape)

    def _split(self, h: Tensor) -> Tensor:
        """Vectors ``(B, g, *spatial, dim)`` in float32 or wider."""
        check_floating("h", h)
        if h.ndim < 2 or h.shape[1] == 0 or h.shape[1] % self.dim:
            raise ValueError(f"h: expected (B, g * {self.dim}, *spatial), got {tuple(h.shape)}.")
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        return wide.reshape(h.shape[0], h.shape[1] // self.dim, self.dim, *h.shape[2:]).movedim(2, -1)

    def _merge(self, vectors: Tensor) -> Tensor:
        # one layout whatever the vectors come from: a decoder's kernels round differently for another one
        return vectors.movedim(-1, 2).flatten(1, 2).contiguous()

    def _checked(self, indices: Tensor) -> Tensor:
        check_tensor("indices", indices)
        if indices.is_floating_point() or indices.dtype == torch.bool or indices.is_complex() or indices.ndim < 2:
            raise ValueError(
                f"indices: expected whole numbers (B, g, *spatial), got {indices.dtype} {tuple(indices.shape)}."
            )
        return indices.long()


class VectorQuantizerCode(KeepsAttributes, QuantizedCode):
    r"""The nearest vector of a codebook: :math:`z = e_{i}`, :math:`i = \arg\min_j \|h - e_j\|^2`.

    Backward it is the identity, :math:`\partial L/\partial h := \partial L/\partial z` (straight through), and the
    encoder is charged for the distance, :math:`\beta\,\|h - \mathrm{sg}(e_i)\|^2`, summed over the example's vectors.
    Each group of ``dim`` channels, at each position, is such a vector, all with one codebook: a map has one for each
    position; a flat ``h`` of ``g * dim`` numbers has ``g``.

    **The codebook** follows the vectors that are given to each code, ``n`` of them in a step, by moving averages

    .. math:: N_i \leftarrow \gamma N_i + (1 - \gamma)\,n_i, \qquad
              e_i \leftarrow e_i + \frac{1 - \gamma}{N_i} \sum_{h \to i} (h - e_i),

    which is van den Oord's :math:`m_i / N_i` but leaves a code that nobody uses where it is. With ``decay=None`` it is
    a parameter and learns by gradient from a second term, ``"codebook"``, :math:`\|\mathrm{sg}(h) - e_i\|^2`.

    **The start**: the codebook is k-means of the first ``num_codes`` or more vectors seen in training; until there
    are so many ``h`` passes as it is, free of charge. **Expiry**: a code whose share of the vectors falls below
    ``expire`` times the even share is moved onto a recent ``h``, and its :math:`N_i` set to the even share.

    All of it happens once for each optimizer step, after it, over everything that the step saw: on several devices and
    with accumulation the codebook is that of one device and one large batch (up to rounding, and to which vectors are
    remembered where a step has more than ``max(4 * num_codes, 1024)``). Nothing is random. In a loop of your own the
    next forward pass in training does it, except in compiled code: call :meth:`after_step`. Under DDP it then goes by
    rank 0's vectors, which DDP sends to all with the buffers.

    Args:
        num_codes: size of the codebook.
        dim: size of its vectors.
        commitment: :math:`\beta`.
        decay: :math:`\gamma` in [0, 1), or None for a codebook that learns by gradient. On MNIST as 7×7, 256 codes, the
            squared error after 300 steps of 64 images was 7.39 with 0.99, 6.76 with 0.95, 6.68 with 0.9, 6.76 with 0.8;
            after 600 steps of 4 images 6.07, 5.75 and 5.93 (0.99 to 0.9; three seeds, whose spread is 0.5 to 0.9).
        kmeans: whether to start with k-means; else with small random vectors, uniform in ±1/num_codes.
        expire: share of the even share; 0 for codes that never expire.

    Shapes:
        ``h`` and ``z``: ``(B, g * dim, *spatial)``; indices ``(B, g, *spatial)``; terms ``(B,)``, in units of ``h``
        squared.

    Raises:
        ValueError: for numbers out of range, and an ``h`` of another size.

    Source: van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, with appendix A.1 for the averages; Dhariwal et
    al. 2020, https://arxiv.org/abs/2005.00341, for expiry.

    Example:
        >>> code = VectorQuantizerCode(num_codes=2, dim=1, kmeans=False).eval()
        >>> code.codebook.copy_(torch.tensor([[0.0], [1.0]]))
        tensor([[0.],
                [1.]])
        >>> code(torch.tensor([[0.2, 0.9, 1.5]]))
        CodeOutput(z=tensor([[0., 1., 1.]]), penalties={'commitment': tensor([0.3000])})
        >>> code.indices(torch.tensor([[0.2, 0.9, 1.5]]))
        tensor([[0, 1, 1]])
    """

    kept = ("commitment", "decay", "expire", "started")

    codebook: Tensor
    share: Tensor
    counts: Tensor
    sums: Tensor
    recent: Tensor
    recent_seen: Tensor
    pool: Tensor
    pool_seen: Tensor
    moved: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        commitment: float = 0.25,
        decay: float | None = 0.95,
        kmeans: bool = True,
        expire: float = 0.03,
    ) -> None:
        super().__init__(num_codes, dim)
        num_codes, dim = self.num_codes, self.dim
        self.commitment = check_non_negative("commitment", commitment)
        self.decay = None if decay is None else check_share("decay", decay, "[)")
        self.expire = check_share("expire", expire, "[)")
        #: whether there is a codebook: not before k-means
        self.started = not check_flag("kmeans", kmeans)
        codebook = torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes)
        self.by_gradient = decay is None
        if self.by_gradient:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        #: N, vectors of a step that each code gets
        self.register_buffer("share", torch.zeros(num_codes))
        # what the forward passes since the last step add up, of this rank
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, 0 if self.by_gradient else dim))
        size = max(4 * num_codes, 1024)
        self.register_buffer("recent", torch.zeros(size, dim))
        self.register_buffer("recent_seen", torch.tensor(0))
        # recent vectors of all ranks, the same on each
        self.register_buffer("pool", torch.zeros(size, dim))
        self.register_buffer("pool_seen", torch.tensor(0))
        #: codes moved by expiry so far
        self.register_buffer("moved", torch.tensor(0))

    # -- the code ---------------------------------------------------------------------------------------------

    def forward(self, h: Tensor) -> CodeOutput:
        """The nearest codes and the distance to them; in training, adds to what the next :meth:`after_step` needs."""
        if self.training and not self.managed and not torch.compiler.is_compiling():
            self.after_step(Ranks())
        vectors = self._split(h)
        rows = vectors.reshape(-1, self.dim)
        if not self.started:
            if self.training:
                self._remember(rows.detach())
            nothing = self.codebook.sum() * 0  # in the graph: DDP would miss a parameter
            return CodeOutput(h, {name: nothing.expand(h.shape[0]) for name in self.weights()})
        indices = nearest(rows.detach(), self.codebook.detach().to(rows.dtype))
        if self.training:
            self._observe(rows.detach(), indices)
        chosen = functional.embedding(indices, self.codebook).to(rows.dtype).view_as(vectors)
        penalties = {"commitment": _distance(vectors, chosen.detach())}
        if self.by_gradient:
            penalties["codebook"] = _distance(vectors.detach(), chosen)
        return CodeOutput(self._merge(straight_through(vectors, chosen)).to(h.dtype), penalties)

    def encode(self, h: Tensor) -> Tensor:
        """The nearest codes; changes no state, nor does it prepare a change."""
        if not self.started:
            return h
        vectors = self._split(h)
        chosen = functional.embedding(self.indices(h), self.codebook).to(vectors.dtype)
        return self._merge(straight_through(vectors, chosen)).to(h.dtype)

    def weights(self) -> Mapping[str, float | Tensor]:
        """The commitment's, and 1 for a codebook that learns by gradient."""
        weights: dict[str, float | Tensor] = {"commitment": self.commitment}
        return {**weights, "codebook": 1.0} if self.by_gradient else weights

    @torch.no_grad()
    def indices(self, h: Tensor) -> Tensor:
        """Index of the nearest code, ``(B, g, *spatial)``; a ``RuntimeError`` before there are codes."""
        if not self.started:
            raise RuntimeError("VectorQuantizerCode: no codebook yet: it starts with k-means in training.")
        vectors = self._split(h)
        rows = vectors.reshape(-1, self.dim)
        return nearest(rows, self.codebook.to(rows.dtype)).view(vectors.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """The latent of indices ``(B, g, *spatial)``."""
        return self._merge(functional.embedding(self._checked(indices), self.codebook))

    def statistics(self, h: Tensor) -> dict[str, Tensor]:
        """Indices and the size of the codebook, once there is one."""
        return {"indices": self.indices(h), "num_codes": torch.tensor(self.num_codes)} if self.started else {}

    # -- learning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _observe(self, rows: Tensor, indices: Tensor) -> None:
        # pending sums only: torch 2.14 recomputes for backward what hangs on a buffer, from its changed value
        fine = rows.isfinite().all(1)
        self.counts.index_add_(0, indices, fine.to(self.counts))
        if not self.by_gradient:
            self.sums.index_add_(0, indices, torch.where(fine[:, None], rows, 0.0).to(self.sums))
        if self.expire:
            self._remember(rows)

    @torch.no_grad()
    def _remember(self, rows: Tensor) -> None:
        size = len(self.recent)
        if len(rows) > size:
            rows = rows[spread(torch.arange(size, device=rows.device), len(rows))]
        places = (self.recent_seen + torch.arange(len(rows), device=rows.device)) % size
        self.recent.index_copy_(0, places, rows.to(self.recent))
        self.recent_seen += len(rows)

    @torch.no_grad()
    def after_step(self, ranks: Ranks) -> None:
        """Take the vectors since the last call into account: start, averages, expiry."""
        if self.by_gradient and ranks.sharded:
            raise ValueError(
                "decay: a codebook that learns by gradient needs whole parameters on each device, which this strategy "
                "shards; use DDP, or moving averages (decay=0.99)."
            )
        if not self.started:
            self._fill_pool(ranks)
            known = int(self.pool_seen.clamp_max(len(self.pool)))  # waits for the device, until there is a codebook
            if known >= self.num_codes:
                self._start(self.pool[:known], ranks)
            return
        total = ranks.sum(torch.cat([self.counts[:, None], self.sums], 1))
        self.counts.zero_()
        self.sums.zero_()
        number, any_seen = total[:, 0], total[:, 0].sum() > 0
        rate = any_seen.to(number.dtype) * (1 - self._memory())
        self.share.lerp_(number, rate)
        if not self.by_gradient:
            offset = total[:, 1:] - number[:, None] * self.codebook
            self.codebook += rate * offset / self.share.clamp_min(torch.finfo(number.dtype).tiny)[:, None]
        if self.expire:
            self._fill_pool(ranks)
            self._move_dead(any_seen)

    def _memory(self) -> float:
        return _USAGE_DECAY if self.decay is None else self.decay

    def _fill_pool(self, ranks: Ranks) -> None:
        size = len(self.pool)
        part = max(1, size // ranks.world_size)
        valid = torch.arange(part, device=self.recent.device) < self.recent_seen
        sent = torch.cat([self.recent[:part], valid[:, None].to(self.recent)], 1)
        rows = ranks.gather(sent).flatten(0, 1)[:size]
        self.recent_seen.zero_()
        valid = (rows[:, -1] > 0) & rows.isfinite().all(1)
        rows, number = in_fixed_order(rows[:, :-1], valid), valid.sum()
        turn = (torch.arange(size, device=rows.device) - self.pool_seen) % size
        self.pool.copy_(torch.where((turn < number)[:, None], rows[turn.clamp_max(len(rows) - 1)], self.pool))
        self.pool_seen += number

    def _start(self, x: Tensor, ranks: Ranks) -> None:
        # rank 0's, as sums on a GPU differ in their last digits from one time to the next
        centres = ranks.gather(kmeans(x, self.num_codes))[0]
        self.codebook.copy_(centres)
        self.share.copy_((1 - self._memory()) * torch.bincount(nearest(x, centres), minlength=self.num_codes))
        self.started = True

    def _move_dead(self, any_seen: Tensor) -> None:
        even, known = self.share.mean(), self.pool_seen.clamp_max(len(self.pool))
        dead = (self.share < self.expire * even) & any_seen
        dead &= dead.cumsum(0) <= known  # the others have to wait: copies of one vector are no use
        places = spread(self.moved + dead.cumsum(0) - 1, known)
        self.codebook.copy_(torch.where(dead[:, None], self.pool[places].to(self.codebook), self.codebook))
        self.share.copy_(torch.where(dead, even, self.share))
        self.moved += dead.sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorQuantizerCode:
        # a model made bfloat16 would round each step of the averages away
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in self.buffers():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        return self

    def extra_repr(self) -> str:
        """Sizes and settings."""
        settings = f"commitment={self.commitment}, decay={self.decay}, expire={self.expire}"
        return f"num_codes={self.num_codes}, dim={self.dim}, {settings}"


def _distance(h: Tensor, e: Tensor) -> Tensor:
    return (h - e).square().flatten(1).sum(1)
