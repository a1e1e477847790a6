"""How much of the gradient each activation lets through, and how far each layer moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_ae.callbacks.probe import Event, Monitor, Site
from lightning_ae.callbacks.probe.counters import Key
from lightning_ae.callbacks.probe.monitor import MaskFunction, first_tensor
from lightning_ae.callbacks.probe.watch import clean_name
from lightning_ae.losses.base import full_precision
from lightning_ae.models import Autoencoder

Reduction = Literal["elements", "batch", "sum"]


class GradientSaturationMonitor(Monitor):
    r"""Watches gradients through activations, at the decoder's output and at the weights.

    For an activation :math:`y = \varphi(z)`:

    * :meth:`saturated_fraction`: share of elements with :math:`|\varphi'(z)| < \varepsilon`, taken from the output as
      autograd does;
    * :meth:`transmission`: :math:`\|\partial L/\partial z\| / \|\partial L/\partial y\|`, a root mean square of
      :math:`\varphi'` weighted by the gradient; AMP's loss scale, accumulation and the loss's reduction cancel in it.

    At the decoder's output, with pre-activations a and reconstruction :math:`\hat x`, the :meth:`output_ratio`
    :math:`\overline{|\partial L/\partial a|} \,/\, \overline{|\hat x - x|}`: 1 for Bernoulli with logits, harmless even
    where :math:`\sigma' = 0`; :math:`2\hat x(1 - \hat x)` for squared error through a sigmoid, the pathology.
    For each layer (a module with parameters of its own) the gradient's norm before clipping, and the ratio of the
    step's update to the weights, about 1e-3 in healthy training. See :class:`Monitor` for when it looks.

    Logged: ``saturation/saturated_fraction``, ``saturation/lowest_transmission``, ``saturation/gradient_norm``,
    ``saturation/output_ratio``; ``saturation/<site>/saturated_fraction`` and ``.../transmission``,
    ``saturation/<layer>/gradient_norm`` and ``.../update_ratio``.

    Args:
        every_n_steps: look at every so many optimizer steps.
        horizon: figures rest on the last samples looked at, between this many and twice as many.
        eps: :math:`\varepsilon`, below which a slope counts as flat.
        output: for a model that is not ours: name of the activation that gives the reconstruction, as ``decoder.4`` or
            ``decoder.sigmoid``, or of the module if it ends in none. It is compared with the first tensor of the batch.
        reduction: how that model's loss is averaged: over ``"elements"`` (torch's default), over the ``"batch"``, or a
            ``"sum"``. Ours is known.
        include: names of modules to which it keeps; None for all.
        mask_fn: from the batch to 1 where a position counts and 0 where it is padding.

    Raises:
        ValueError: if a number is not positive, or the reduction has another name.

    Source: Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.

    Example:
        >>> import lightning as L
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder, SquaredError
        >>> monitor = GradientSaturationMonitor(every_n_steps=5)
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(
        ...     max_epochs=1, accelerator="cpu", callbacks=monitor, enable_checkpointing=False, **quiet
        ... )
        >>> trainer.fit(MLPAutoencoder((1, 8, 8), 2, hidden=(16,), loss=SquaredError("sigmoid")), DigitsDataModule())
        >>> sorted(monitor.transmission())
        ['decoder.layers.1', 'encoder.layers.1', 'loss.sigmoid']
        >>> monitor.output_ratio() <= 0.5  # 2 x̂ (1 - x̂)
        True
    """

    prefix = "saturation"

    def __init__(
        self,
        every_n_steps: int = 20,
        horizon: int = 2_000,
        eps: float = 0.01,
        output: str | None = None,
        reduction: Reduction = "elements",
        include: Sequence[str] | None = None,
        mask_fn: MaskFunction | None = None,
    ) -> None:
        super().__init__(every_n_steps, horizon, include, None, mask_fn)
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}.")
        if reduction not in ("elements", "batch", "sum"):
            raise ValueError(f"reduction: expected 'elements', 'batch' or 'sum', got {reduction!r}.")
        self.eps = eps
        self.output = output
        self.reduction = reduction
        self.layers: list[str] = []
        self._layer_of: dict[int, int] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._shares = 1.0
        self._params: Tensor | None = None
        self._x_hat: Tensor | None = None
        self._output_grad: Tensor | None = None

    # -- activations ------------------------------------------------------------------------------------------

    def on_activation(self, event: Event) -> None:
        """Count the elements without a slope."""
        site, y = event.site, event.y
        if not self.wants(site):
            return
        if site.name == self.output:
            self._x_hat = y
        elements = event.positions() * site.units
        flat = self._flat(event, elements)
        if flat is not None:
            self.counters.add(site.name, "saturated", flat)
            self.counters.add(site.name, "elements", elements, device=y.device)

    def _flat(self, event: Event, elements: int | Tensor) -> Tensor | None:
        if event.site.activation.name in ("relu", "relu6", "hardtanh"):
            return elements - event.live().sum()
        if event.site.activation.slope is None:
            return None
        slope = event.site.activation.slope(event.z, event.y, event.options)
        if slope is None:
            return None
        flat = slope.abs() < self.eps
        return (flat if event.mask is None else flat & event.mask.bool()).sum()

    def on_gradient(self, site: Site, grad_z: Tensor, grad_y: Tensor) -> None:
        """Add the squared norms on both sides."""
        if not self.wants(site):
            return
        if site.name == self.output:
            self._output_grad = grad_z
        self._add_squares(site.name, ("grad_z", "grad_y"), (grad_z, grad_y))

    def _add_squares(self, name: str, fields: Sequence[str], tensors: Sequence[Tensor]) -> None:
        norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
        sums = [self.counters.get(name, field, (), torch.float64, norms[0].device) for field in fields]
        squares = torch.stack(norms).to(sums[0].dtype).mul_(self._unscale()).square_()
        # a step that AMP skips must not spoil the sums
        squares = torch.where(squares.isfinite().all(), squares, torch.zeros_like(squares))
        for total, square in zip(sums, squares, strict=True):
            total.add_(square)

    def _unscale(self) -> Tensor | float:
        scale = self._probe.loss_scale if self._probe is not None else None
        return 1.0 if scale is None else scale.to(torch.float32).reciprocal()

    # -- the decoder's output ---------------------------------------------------------------------------------

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Find the output, and hear its gradient."""
        if name != (self.output or "decoder") or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if self.output is not None and name in self.sites:
            return  # an activation, whose input is what counts
        self._params = output.detach()
        output.register_hook(_Keep(self))  # type: ignore[no-untyped-call]

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Compare the gradient at the output with the error there; measure the update of the step."""
        grad, params, x_hat = self._output_grad, self._params, self._x_hat
        self._output_grad = self._params = self._x_hat = None
        self._add_updates()
        if grad is None or (self.output is None and not isinstance(module, Autoencoder)):
            return
        accumulated = trainer.accumulate_grad_batches if trainer is not None else 1
        x: Tensor | None
        prediction: Tensor | None
        if isinstance(module, Autoencoder) and self.output is None:
            x = module.get_input(batch)
            prediction = module.loss.prediction(params, x) if params is not None else None
            factor = float(len(x) * accumulated)
        else:
            x, prediction = first_tensor(batch), x_hat if x_hat is not None else params
            size = {"elements": grad.numel(), "batch": len(grad), "sum": 1}[self.reduction]
            factor = float(size * accumulated)
        if x is None or prediction is None or x.shape != prediction.shape or grad.shape != x.shape:
            return
        slopes = full_precision(grad).abs() * factor * self._unscale()
        errors = (full_precision(prediction) - full_precision(x)).abs()
        values = torch.stack([slopes.sum(), errors.sum()])
        values = torch.where(values.isfinite().all(), values, torch.zeros_like(values))
        for field, value in zip(("slopes", "errors"), values, strict=True):
            self.counters.add("output", field, value, torch.float64)
        # elements that are wrong by more than a hundredth and hear of it by less than a hundredth of that
        wrong = errors > 0.01
        self.counters.add("output", "wrong", wrong.sum())
        self.counters.add("output", "starved", (wrong & (slopes < 0.01 * errors)).sum())

    # -- layers -----------------------------------------------------------------------------------------------

    def on_step(self, trainer: L.Trainer | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradients' squares by layer; remember the weights before the step."""
        self._index(module)
        owned = [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._layer_of]
        with_grad = [p for p in owned if p.grad is not None and not p.grad.is_sparse]
        if not with_grad:
            return
        scale: Tensor | float = 1.0
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = self._unscale()  # a fused optimizer unscales by itself, later
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm([_local(p.grad) for p in with_grad])).float() * scale
            self._add_layers("grad", with_grad, norms, self._shards(trainer))
            for p in with_grad:
                self._before.setdefault(id(p), (p, _local(p).clone()))
            self._shares = self._shards(trainer)

    def _add_updates(self) -> None:
        if not self._before:
            return
        stepped = [p for p, _ in self._before.values()]
        old = [before for _, before in self._before.values()]
        new = [_local(p) for p in stepped]
        weights = torch.stack(torch._foreach_norm(old)).float()
        torch._foreach_sub_(old, new)
        updates = torch.stack(torch._foreach_norm(old)).float()
        self._add_layers("weight", stepped, weights, self._shares)
        self._add_layers("update", stepped, updates, self._shares)
        self._before = {}

    def _add_layers(self, field: str, parameters: Sequence[Tensor], norms: Tensor, share: float) -> None:
        total = self.counters.get("layers", field, (len(self.layers),), torch.float64, norms.device)
        squares = norms.to(total.dtype).square() * share
        squares = torch.where(squares.isfinite().all(), squares, torch.zeros_like(squares))
        index = torch.tensor([self._layer_of[id(p)] for p in parameters], device="cpu")
        total.index_add_(0, index.to(norms.device, non_blocking=True), squares)
        steps = self.counters.get("layers", f"{field}_steps", (len(self.layers),), torch.float64, norms.device)
        touched = torch.zeros(len(self.layers)).index_fill_(0, index, share)
        steps.add_(touched.to(norms.device, steps.dtype, non_blocking=True))

    def _shards(self, trainer: L.Trainer | None) -> float:
        # every rank of DDP has the whole gradient: their sum over ranks is to count once
        if trainer is None or isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            return 1.0
        return 1.0 / trainer.world_size

    def _index(self, module: nn.Module) -> None:
        names: dict[str, int] = {}
        self._layer_of = {}
        for name, parameter in module.named_parameters():
            layer = clean_name(name.rpartition(".")[0]) or "model"
            self._layer_of[id(parameter)] = names.setdefault(layer, len(names))
        self.layers = list(names)

    def state_dict(self) -> dict[str, Any]:
        """Sums over all ranks, and the names of the layers."""
        return {**super().state_dict(), "layers": list(self.layers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        super().load_state_dict(state_dict)
        self.layers = list(state_dict["layers"])

    # -- what people ask --------------------------------------------------------------------------------------

    def saturated_fraction(self) -> dict[str, float]:
        """Share of elements whose slope is below ``eps``, by site."""
        return self._saturated(self.results())

    def transmission(self) -> dict[str, float]:
        """Norm of the gradient after (towards the input) over before each activation, by site."""
        return self._transmission(self.results())

    def gradient_norm(self) -> dict[str, float]:
        """Root mean square over steps of the norm of a layer's gradient before clipping, by layer."""
        return self._per_layer(self.results(), "grad", "grad_steps")

    def update_ratio(self) -> dict[str, float]:
        """Norm of a step's update over that of the weights before it, by layer; layers of zeros have none."""
        return self._per_layer(self.results(), "update", "weight")

    def output_ratio(self) -> float:
        """Mean gradient at the decoder's output over the mean error there; NaN if the output is not known."""
        return self._output(self.results())[0]

    def starved_fraction(self) -> float:
        """Share of the outputs that are wrong by more than 0.01 and get a gradient of less than 1 % of their error."""
        return self._output(self.results())[1]

    # -- reading ----------------------------------------------------------------------------------------------

    def _saturated(self, results: Mapping[Key, Tensor]) -> dict[str, float]:
        return {
            site: int(results[site, "saturated"]) / int(count)
            for (site, field), count in results.items()
            if field == "elements" and int(count) > 0
        }

    def _transmission(self, results: Mapping[Key, Tensor]) -> dict[str, float]:
        return {
            site: math.sqrt(float(results[site, "grad_z"]) / float(before))
            for (site, field), before in results.items()
            if field == "grad_y" and float(before) > 0
        }

    def _per_layer(self, results: Mapping[Key, Tensor], above: str, below: str) -> dict[str, float]:
        if ("layers", above) not in results:
            return {}
        ratios = (results["layers", above] / results["layers", below]).sqrt().tolist()
        return {layer: ratio for layer, ratio in zip(self.layers, ratios, strict=True) if math.isfinite(ratio)}

    def _output(self, results: Mapping[Key, Tensor]) -> tuple[float, float]:
        errors = float(results.get(("output", "errors"), torch.tensor(0.0)))
        if errors == 0:
            return math.nan, math.nan
        wrong = int(results["output", "wrong"])
        ratio = float(results["output", "slopes"]) / errors
        return ratio, int(results["output", "starved"]) / wrong if wrong else 0.0

    def scalars(self) -> dict[str, float]:
        """Summary, and figures by site and layer."""
        results = self._now
        saturated, transmission = self._saturated(results), self._transmission(results)
        norms, updates = self._per_layer(results, "grad", "grad_steps"), self._per_layer(results, "update", "weight")
        ratio, starved = self._output(results)
        values = {"output_ratio": ratio, "starved_fraction": starved}
        if saturated:
            elements = {site: int(results[site, "elements"]) for site in saturated}
            flat = sum(saturated[site] * elements[site] for site in saturated)
            values["saturated_fraction"] = flat / sum(elements.values())
        if transmission:
            values["lowest_transmission"] = min(transmission.values())
        if norms:
            values["gradient_norm"] = math.sqrt(sum(norm**2 for norm in norms.values()))
        for what, found in {
            "saturated_fraction": saturated,
            "transmission": transmission,
            "gradient_norm": norms,
            "update_ratio": updates,
        }.items():
            values.update({f"{place}/{what}": value for place, value in found.items()})
        return values


class _Keep:
    """Keeps the gradient of one tensor until the batch is done."""

    def __init__(self, monitor: GradientSaturationMonitor) -> None:
        self._monitor = monitor

    def __call__(self, grad: Tensor) -> None:
        if not torch.is_grad_enabled():
            self._monitor._output_grad = grad


def _local(tensor: Any) -> Tensor:
    # of a sharded tensor the part that is here
    local: Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return local
