"""The contractive penalty: how fast the code moves with the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import check_whole
from lightning_ae.codes import Identity, SelectingCode
from lightning_ae.codes.quantized import QuantizedCode
from lightning_ae.losses.base import full_precision
from lightning_ae.networks import LinearEncoder, MLPEncoder
from lightning_ae.penalties.base import Penalty

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


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
        TypeError: with a code that has no Jacobian: quantised ones are constant almost everywhere, and what comes back
            through them is a surrogate; a :class:`DictionaryAutoencoder` whose code selects gives no dense latent.
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
        self.num_projections = None if num_projections is None else check_whole("num_projections", num_projections)

    def forward(self, x: Tensor, output: AutoencoderOutput, model: AutoencoderLike) -> Tensor:
        """Squared Frobenius norm of each example's Jacobian."""
        _check_code(model)
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._norm(x, model)
        # torch 2.6 takes derivatives of inference tensors to be 0; a copy made outside of the mode is none
        with torch.inference_mode(False), torch.no_grad():
            return self._norm(x.clone(), model)

    def _norm(self, x: Tensor, model: AutoencoderLike) -> Tensor:
        one_layer = _one_layer(model)
        if one_layer is not None and self.num_projections is None:
            with torch.autocast(x.device.type, enabled=False):
                return full_precision(_one_layer_norm(x, *one_layer))
        if any(isinstance(module, _BATCH_NORMS) and module.training for module in model.encoder.modules()):
            raise ValueError(
                "JacobianPenalty: the encoder has batch normalisation; use norm='layer', or none, in training."
            )
        z, pull_back = _vjp(model.encode, x)
        if self.num_projections is None:
            size = z[0].numel()
            vectors = torch.eye(size, dtype=z.dtype, device=z.device).view(size, 1, *z.shape[1:])
            vectors = vectors.expand(size, *z.shape)
        else:
            vectors = torch.randn(self.num_projections, *z.shape, dtype=z.dtype, device=z.device)
        (rows,) = torch.func.vmap(pull_back)(vectors)
        norms = full_precision(rows).flatten(2).square().sum(2)
        return norms.sum(0) if self.num_projections is None else norms.mean(0)


def _check_code(model: AutoencoderLike) -> None:
    code = model.code
    within = [part for level in getattr(model, "levels", ()) for part in level.modules()]  # of a stack
    for quantised in (part for part in (code, *within) if isinstance(part, QuantizedCode)):
        raise TypeError(
            f"JacobianPenalty: {type(quantised).__name__} is constant almost everywhere, so its Jacobian is 0, and the "
            "gradient that passes it is a surrogate's; use a continuous code."
        )
    if isinstance(code, SelectingCode) and hasattr(model, "dead_latents"):
        raise TypeError(
            f"JacobianPenalty: {type(model).__name__} with {type(code).__name__} keeps only what it selects and has no "
            "dense latent; use a code that charges, such as JumpReLUCode, or an MLPAutoencoder with this one."
        )


def _one_layer(model: AutoencoderLike) -> tuple[nn.Linear, nn.Module] | None:
    """The layer and activation of an encoder that is no more than these."""
    if not isinstance(model.code, Identity):
        return None
    if type(model.encoder) is LinearEncoder:  # a subclass may compute something else
        return model.encoder, nn.Identity()
    if type(model.encoder) is MLPEncoder and model.encoder.input_transform == "identity":
        linears = model.encoder.linears()
        return (linears[0], model.encoder.layers[1:]) if len(linears) == 1 else None
    return None


def _one_layer_norm(x: Tensor, linear: nn.Linear, activation: nn.Module) -> Tensor:
    a = nn.functional.linear(x.flatten(1), linear.weight, linear.bias)
    # elementwise, so the derivative is the product with a vector of ones
    y, pull_back = _vjp(activation, a)
    slope: Tensor = pull_back(torch.ones_like(y))[0]
    return slope.square() @ linear.weight.square().sum(1).to(slope.dtype)


def _vjp(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    """``torch.func.vjp`` of one argument and one result."""
    y, pull_back = torch.func.vjp(function, x)[:2]
    return y, pull_back
