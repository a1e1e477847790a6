"""Terms on the model as a whole: weight prior, Jacobian, orthogonality, physical constraints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ae.checkpoint import Rebuildable
from lightning_ae.codes import Identity
from lightning_ae.losses.base import full_precision
from lightning_ae.networks import LinearEncoder, MLPEncoder

if TYPE_CHECKING:
    from lightning_ae.models.base import Autoencoder, AutoencoderOutput

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Penalty(Rebuildable, nn.Module, ABC):
    """Base of all penalties: a raw term, and the weight with which it enters the objective.

    Args:
        weight: a number; a schedule may change it while training.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, x: Tensor, output: AutoencoderOutput, model: Autoencoder) -> Tensor:
        """The raw term, ``(B,)`` or without dimensions, for clean data ``x`` and what the model made of it."""

    def on_fit_start(self, model: Autoencoder) -> None:
        """Called once when training starts, with the Trainer attached."""


class WeightPrior(Penalty):
    r"""A Gaussian prior on the weights: maximum a posteriori instead of maximum likelihood.

    With noise :math:`x \mid W \sim N(\hat x, \sigma^2)` and prior :math:`W \sim N(0, \sigma_p^2)`, minus the log
    posterior times :math:`2\sigma^2` is :math:`\sum_i \|x_i - \hat x_i\|^2 + \lambda\|W\|^2` with
    :math:`\lambda = \sigma^2/\sigma_p^2`. A mean over batches estimates that sum divided by the number of
    examples :math:`N`, so the raw term is :math:`\|W\|^2 / N`, and ``weight`` is :math:`\lambda`. This is the
    objective with :class:`SquaredError`; with a loss in nats, whose scale is already its own, leave
    ``noise_variance`` at one half.

    Args:
        noise_variance: :math:`\sigma^2 > 0` in units of ``x`` squared; ½ for a likelihood in nats.
        prior_variance: :math:`\sigma_p^2 > 0` of each weight.
        num_examples: :math:`N`; None takes it from the Trainer's data when training starts.
        biases: whether biases have the prior too, and every other parameter with fewer than two dimensions.

    Raises:
        ValueError: if a variance is not positive, or ``N`` is neither given nor known.

    Source: MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.448; Bishop 2006, section 5.5.

    Example:
        >>> WeightPrior(noise_variance=0.5, prior_variance=5.0).weight
        0.1
    """

    def __init__(
        self,
        noise_variance: float = 0.5,
        prior_variance: float = 1.0,
        num_examples: int | None = None,
        biases: bool = False,
    ) -> None:
        for name, value in (("noise_variance", noise_variance), ("prior_variance", prior_variance)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}.")
        if num_examples is not None and num_examples <= 0:
            raise ValueError(f"num_examples: expected a positive number, got {num_examples}.")
        super().__init__(noise_variance / prior_variance)
        self.num_examples = num_examples
        self.from_data = num_examples is None
        self.biases = biases

    def on_fit_start(self, model: Autoencoder) -> None:
        """Take the number of examples from the data, unless it was given."""
        if self.from_data:
            self.num_examples = _count_examples(model)

    def forward(self, x: Tensor, output: AutoencoderOutput, model: Autoencoder) -> Tensor:
        r""":math:`\|W\|^2 / N` over encoder and decoder, without dimensions."""
        if self.num_examples is None:
            raise ValueError("num_examples: not known before training; pass it to WeightPrior.")
        total = torch.zeros((), device=x.device)
        for weight in self._weights(model):
            total = total + full_precision(weight).square().sum()
        return total / self.num_examples

    def _weights(self, model: Autoencoder) -> Iterator[nn.Parameter]:
        # one container, so that a tied weight is counted once
        for weight in nn.ModuleList([model.encoder, model.decoder]).parameters():
            if self.biases or weight.ndim > 1:
                yield weight

    def get_extra_state(self) -> dict[str, Any]:
        """The number of examples, so that a checkpoint evaluates as it was trained."""
        return {"num_examples": self.num_examples}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what was known when the checkpoint was written."""
        if self.from_data:
            self.num_examples = state["num_examples"]


def _count_examples(model: Autoencoder) -> int:
    """Examples in one epoch over all ranks, of what ``limit_train_batches`` leaves."""
    trainer = model.trainer
    trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader
    try:
        total = loader.num_examples if hasattr(loader, "num_examples") else len(loader.dataset)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"num_examples: cannot be read off a {type(loader).__name__}; pass it to WeightPrior."
        ) from error
    batches = trainer.num_training_batches
    if batches < len(loader):
        total = min(total, int(batches) * loader.batch_size * trainer.world_size)
    return int(total)


class JacobianPenalty(Penalty):
    r"""Contractive penalty :math:`\|\partial z / \partial x\|_F^2` of the deterministic encoder, at the clean data.

    For a one-layer encoder :math:`z = \varphi(Wx + b)` in closed form, :math:`\sum_j \varphi'(a_j)^2 \|W_j\|^2`.
    Otherwise exactly, by one vector-Jacobian product for each latent, vectorised; or with ``num_projections``
    by Hutchinson's estimate :math:`E_v\|v^\top J\|^2`, :math:`v \sim N(0, I)`, which is unbiased and costs that many
    products whatever the size of the latent.

    Args:
        weight: its weight in the objective.
        num_projections: random projections per example; None computes it exactly.

    Shapes:
        the raw term: ``(B,)``, in units of z² / x².

    Raises:
        ValueError: if ``num_projections`` is not positive, or the encoder has batch normalisation, which
            mixes the examples so that no example has a Jacobian of its own.

    Source: Rifai et al. 2011, https://icml.cc/2011/papers/455_icmlpaper.pdf; Hutchinson 1990,
    https://doi.org/10.1080/03610919008812866.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> model = LinearAutoencoder(3, latent_dim=2)
        >>> x = torch.zeros(1, 3)
        >>> torch.allclose(JacobianPenalty()(x, model(x), model), model.encoder.weight.square().sum())
        True
    """

    def __init__(self, weight: float = 0.1, num_projections: int | None = None) -> None:
        super().__init__(weight)
        if num_projections is not None and num_projections <= 0:
            raise ValueError(f"num_projections: expected a positive number or None, got {num_projections}.")
        self.num_projections = num_projections

    def forward(self, x: Tensor, output: AutoencoderOutput, model: Autoencoder) -> Tensor:
        """Squared Frobenius norm of each example's Jacobian."""
        one_layer = _one_layer(model)
        if one_layer is not None and self.num_projections is None:
            return full_precision(_one_layer_norm(x, *one_layer))
        if any(isinstance(module, _BATCH_NORMS) for module in model.encoder.modules()):
            raise ValueError("JacobianPenalty: the encoder has batch normalisation; use norm='layer' or None.")
        z, pull_back = torch.func.vjp(model.encode, x)
        if self.num_projections is None:
            size = z[0].numel()
            vectors = torch.eye(size, dtype=z.dtype, device=z.device).view(size, 1, *z.shape[1:])
            vectors = vectors.expand(size, *z.shape)
        else:
            vectors = torch.randn(self.num_projections, *z.shape, dtype=z.dtype, device=z.device)
        (rows,) = torch.func.vmap(pull_back)(vectors)
        norms = full_precision(rows).flatten(2).square().sum(2)
        return norms.sum(0) if self.num_projections is None else norms.mean(0)


def _one_layer(model: Autoencoder) -> tuple[nn.Linear, nn.Module] | None:
    """The layer and activation of an encoder that is no more than these."""
    if not isinstance(model.code, Identity):
        return None
    if type(model.encoder) is LinearEncoder:  # a subclass may compute something else
        return model.encoder, nn.Identity()
    if type(model.encoder) is MLPEncoder and len(model.encoder.linears()) == 1:
        linear, *rest = model.encoder.layers
        return linear, nn.Sequential(*rest)
    return None


def _one_layer_norm(x: Tensor, linear: nn.Linear, activation: nn.Module) -> Tensor:
    a = nn.functional.linear(x.flatten(1), linear.weight, linear.bias)
    # elementwise, so the derivative is the product with a vector of ones
    y, pull_back = torch.func.vjp(activation, a)
    slope: Tensor = pull_back(torch.ones_like(y))[0]
    return slope.square() @ linear.weight.square().sum(1).to(slope.dtype)


class OrthogonalityPenalty(Penalty):
    r"""Distance from orthonormality :math:`\|W^\top W - I\|_F^2`, summed over the matrices of one box.

    Of a wide matrix the rows are compared instead of the columns. For a linear decoder the columns are the atoms.

    Args:
        weight: its weight in the objective.
        box: the attribute of the model whose matrices are meant, ``"decoder"`` or ``"encoder"``.

    Shapes:
        the raw term has no dimensions.

    Raises:
        ValueError: if the box has another name, or holds no matrix.

    Source: Brock et al. 2017, https://arxiv.org/abs/1609.07093.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> model = LinearAutoencoder(3, latent_dim=2)
        >>> _ = torch.nn.init.orthogonal_(model.encoder.weight)
        >>> x = torch.zeros(1, 3)
        >>> bool(OrthogonalityPenalty()(x, model(x), model) < 1e-10)
        True
    """

    def __init__(self, weight: float = 1.0, box: str = "decoder") -> None:
        super().__init__(weight)
        if box not in ("encoder", "decoder"):
            raise ValueError(f"box: expected 'encoder' or 'decoder', got {box!r}.")
        self.box = box

    def forward(self, x: Tensor, output: AutoencoderOutput, model: Autoencoder) -> Tensor:
        """Sum over the matrices of the box."""
        matrices = [weight for weight in getattr(model, self.box).parameters() if weight.ndim == 2]
        if not matrices:
            raise ValueError(f"box: the {self.box} has no weight matrix.")
        total = torch.zeros((), device=x.device)
        for matrix in matrices:
            w = full_precision(matrix)
            gram = w.t() @ w if w.shape[0] >= w.shape[1] else w @ w.t()
            total = total + (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()
        return total


class ConstraintPenalty(Penalty):
    r"""A law that the reconstruction must obey: :math:`\|r(\hat x)\|^2`, zero where it holds.

    With ``conserve`` the law is that the residual is unchanged, :math:`\|r(\hat x) - r(x)\|^2`: a total that
    is conserved rather than zero. :class:`Total` and :class:`Divergence` are shipped residuals.

    Args:
        residual: from ``(B, *event)`` to ``(B, ...)``; any function or module.
        weight: its weight in the objective.
        conserve: penalise the change of the residual instead of the residual.

    Shapes:
        the raw term: ``(B,)``, in units of the residual squared.

    Source: Raissi, Perdikaris & Karniadakis 2019, https://doi.org/10.1016/j.jcp.2018.10.045.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> model = LinearAutoencoder(3, latent_dim=2, penalties={"mass": ConstraintPenalty(Total(), conserve=True)})
        >>> sorted(model.terms(torch.ones(2, 3), model(torch.ones(2, 3))))
        ['mass', 'reconstruction']
    """

    def __init__(self, residual: Callable[[Tensor], Tensor], weight: float = 1.0, conserve: bool = False) -> None:
        super().__init__(weight)
        self.residual = residual
        self.conserve = conserve

    def forward(self, x: Tensor, output: AutoencoderOutput, model: Autoencoder) -> Tensor:
        """Squared norm of each example's residual."""
        residual = self.residual(full_precision(model.loss.prediction(output.params, x)))
        if self.conserve:
            residual = residual - self.residual(full_precision(x))
        return residual.reshape(len(x), -1).square().sum(1)


class Total(Rebuildable, nn.Module):
    r"""Residual :math:`\sum_i x_i \, \Delta V`, of an extensive quantity; use it with ``conserve``.

    Args:
        volume: :math:`\Delta V` of one cell.

    Shapes:
        ``(B, *event)`` to ``(B, 1)``.

    Example:
        >>> Total()(torch.ones(1, 2, 2))
        tensor([[4.]])
    """

    def __init__(self, volume: float = 1.0) -> None:
        super().__init__()
        self.volume = volume

    def forward(self, x: Tensor) -> Tensor:
        """Sum each example."""
        return x.flatten(1).sum(1, keepdim=True) * self.volume


class Divergence(Rebuildable, nn.Module):
    r"""Residual :math:`\nabla \cdot v` of a vector field on a regular grid, by central differences.

    Channel ``i`` is the component along spatial dimension ``i``. Points at the border have no central
    difference and are left out.

    Args:
        spacing: distance of grid points.

    Shapes:
        ``(B, n, *spatial)`` with ``n`` spatial dimensions to ``(B, *(s - 2 for s in spatial))``.

    Raises:
        ValueError: if there is not one channel for each spatial dimension, or a side is shorter than 3.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        >>> Divergence()(torch.stack([y, -x])[None]).abs().max()  # (y, −x) flows in as much as out
        tensor(0.)
    """

    def __init__(self, spacing: float = 1.0) -> None:
        super().__init__()
        self.spacing = spacing

    def forward(self, v: Tensor) -> Tensor:
        """Divergence at the inner points."""
        dims = v.ndim - 2
        if dims < 1 or v.shape[1] != dims or min(v.shape[2:]) < 3:
            raise ValueError(f"Divergence: expected (B, n, *spatial) with n sides of at least 3, got {tuple(v.shape)}.")
        total = torch.zeros((), device=v.device)
        for i in range(dims):
            component = v[:, i]
            for j in range(dims):
                size = component.shape[j + 1]
                if i != j:
                    component = component.narrow(j + 1, 1, size - 2)
            size = component.shape[i + 1]
            difference = component.narrow(i + 1, 2, size - 2) - component.narrow(i + 1, 0, size - 2)
            total = total + difference / (2 * self.spacing)
        return total
