"""How much of the gradient each activation lets through, and how far each layer moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.monitors.layer_steps import LayerSteps, norms_of
from lightning_ae.diagnostics.monitors.saturation_summary import (
    output_figures,
    per_layer,
    saturated_fraction,
    summary,
    transmission,
)
from lightning_ae.diagnostics.watch import Event, Site
from lightning_ae.diagnostics.watch.batch import MaskFunction, first_tensor
from lightning_ae.diagnostics.watch.comparisons import Comparison
from lightning_ae.diagnostics.watch.part import ALL, MOST_NUMBERS, part_of
from lightning_ae.diagnostics.watch.trace import same_numbers
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
    It is :math:`\sum|\partial L/\partial a| \,/\, \sum|\hat x - x|` for a loss that is a sum over the event, so large
    errors weigh more. For each layer (a module with parameters of its own) the gradient's norm before clipping, and the
    ratio of the step's update to the weights, about 1e-3 in healthy training; steps whose gradient is not finite, which
    AMP skips, are left out. See :class:`Monitor` for when it looks.

    Logged: ``saturation/saturated_fraction``, ``saturation/lowest_transmission``, ``saturation/gradient_norm``,
    ``saturation/output_ratio``; ``saturation/<site>/saturated_fraction`` and ``.../transmission``,
    ``saturation/<layer>/gradient_norm`` and ``.../update_ratio``.

    Args:
        every_n_steps: look at every so many optimizer steps.
        horizon: figures rest on the last samples looked at, between this many and twice as many.
        eps: :math:`\varepsilon`, below which a slope counts as flat.
        output: for a model that is not ours: name of the activation that gives the reconstruction, as ``decoder.4`` or
            ``decoder.sigmoid``, or of the module if it ends in none. It is compared with the first tensor of the batch,
            in its shape or flattened. Steps that compute it more often than they differentiate it are left out.
        reduction: how that model's loss is averaged: over ``"elements"`` (torch's default), over the ``"batch"``, or a
            ``"sum"``. Ours is known.
        include: names of modules to which it keeps; None for all.
        mask_fn: from the batch to 1 where a position counts and 0 where it is padding.

    Raises:
        ValueError: if a number is not positive, or the reduction has another name; in training, if nothing is called
            ``output``, or it has not the size of the data.

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
        every_n_steps: int = 25,
        horizon: int = 500,
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
        self.steps = LayerSteps()
        self._output_seen = False
        self._forget()

    def _forget(self) -> None:
        """What is kept from one hook of a batch to the next."""
        #: of each call of the output: what it gave, the gradient before it, and what to multiply that with
        self._pairs: list[tuple[Tensor, Tensor, Tensor | float]] = []
        self._outputs: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._norms: list[tuple[str, Tensor]] = []
        self._output_grads: list[tuple[Tensor, Tensor | float]] = []
        self._is_activation = False
        self.steps.forget()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._output_seen = False
            self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    # -- activations ------------------------------------------------------------------------------------------

    def hears(self, event: str) -> bool:
        """Losses say something of an output that was named alone."""
        return super().hears(event) and (event != "on_loss" or self.output is not None)

    def on_activation(self, event: Event) -> None:
        """Count the elements without a slope."""
        site, y = event.site, event.y
        if site.name == self.output:
            self._is_activation = True
            self._outputs.append(y)
        if not self.wants(site):
            return
        elements = event.positions() * site.units
        if (flat := self._flat(event, elements)) is not None:
            self.counters.add(site.name, "saturated", flat)
            self.counters.add(site.name, "elements", elements)

    def _flat(self, event: Event, elements: int | Tensor) -> Tensor | None:
        if event.site.activation.name in ("relu", "relu6", "hardtanh"):
            return elements - event.live().sum()
        slope_of = event.site.activation.slope
        z = None if event.z is None else event.of_part(event.z)
        if slope_of is None or (slope := slope_of(z, event.of_part(event.y), event.options)) is None:
            return None
        flat = slope.abs() < self.eps
        mask = event.counted_mask()
        return (flat if mask is None else flat & mask.bool()).sum()

    def on_gradient(self, site: Site, grad_z: Tensor, grad_y: Tensor) -> None:
        """Add the squared norms on both sides."""
        if site.name == self.output:
            self._output_grads.append((grad_z, self._unscale()))
        if not self.wants(site):
            return
        part = site.part(grad_y.shape, self._number)
        both = (grad_z, grad_y) if part is ALL else (grad_z[part].contiguous(), grad_y[part].contiguous())
        norms, unscale = norms_of(both), self._unscale()
        self._norms.append((site.name, norms.double() * unscale if isinstance(unscale, Tensor) else norms))

    def _add_gradients(self) -> None:
        """The norms of a batch together, since small kernels cost more than what they compute."""
        if not self._norms:
            return
        names, norms = zip(*self._norms, strict=True)
        wide = torch.float32 if norms[0].device.type == "mps" else torch.float64
        squares = torch.cat([norm.to(norms[0].device, wide) for norm in norms]).view(-1, 2).square_()
        # a step that AMP skips must not spoil the sums
        squares = torch.where(squares.isfinite().all(1, keepdim=True), squares, 0.0)
        for name, pair in zip(names, squares.unbind(), strict=True):
            self.counters.add(name, "gradients", pair, torch.float64)

    def _unscale(self) -> Tensor | float:
        # asked for when a gradient comes: the scaler makes its scale with the first loss, and changes it after the step
        trainer = self._probe._trainer() if self._probe is not None else None
        scale = getattr(getattr(getattr(trainer, "precision_plugin", None), "scaler", None), "_scale", None)
        return 1.0 if scale is None else scale.to(torch.float32).reciprocal()

    # -- the decoder's output ---------------------------------------------------------------------------------

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Find the output, and hear its gradient."""
        wanted = self.output or "decoder"
        if not isinstance(output, Tensor) or (
            # one that is also a part of another has several names
            name != wanted and (self._probe is None or wanted not in self._probe.watch.names_of(module))
        ):
            return
        if self._is_activation:  # whose input is what counts
            if not output.requires_grad and self._outputs:
                self._outputs.pop()
        elif output.requires_grad:
            self._output_seen = True
            output.register_hook(_Keep(self, output.detach()))  # type: ignore[no-untyped-call]

    def on_loss(self, comparison: Comparison) -> None:
        """Learn that the output is read as logits."""
        if comparison.loss == "binary_cross_entropy_with_logits":
            self._logits.append(comparison.prediction)

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Compare the gradient at the output with the error there; measure the update of the step."""
        pairs, from_activation, logits = list(self._pairs), self._is_activation, self._logits
        if not isinstance(module, Autoencoder) and logits:  # whose loss knows
            pairs = [(v.sigmoid() if any(same_numbers(v, a) for a in logits) else v, g, scale) for v, g, scale in pairs]
        self._output_seen |= from_activation
        if from_activation and len(self._outputs) == len(self._output_grads):  # gradients come in the opposite order
            pairs = [(y, *grad) for y, grad in zip(self._outputs, reversed(self._output_grads), strict=True)]
        self._add_gradients()
        total = self.steps.after(self.counters)
        if total is not None:
            self.curve.add("gradient_norm", trainer.global_step if trainer is not None else 0, total)
        self._forget()
        if self.output is not None and not self._output_seen:
            raise ValueError(
                f"output: nothing called {self.output!r} has given a tensor with a gradient in training_step; the "
                f"activations are {list(self.sites)}."
            )
        if pairs and (self.output is not None or isinstance(module, Autoencoder)):
            accumulated = trainer.accumulate_grad_batches if trainer is not None else 1
            self._add_outputs(module, batch, pairs, from_activation, accumulated)

    def _add_outputs(
        self,
        module: nn.Module,
        batch: Any,
        pairs: Sequence[tuple[Tensor, Tensor, Tensor | float]],
        from_activation: bool,
        accumulated: int,
    ) -> None:
        reduction = "batch" if isinstance(module, Autoencoder) else self.reduction  # ours sum over the event
        x, mask = module.observed(batch) if isinstance(module, Autoencoder) else (first_tensor(batch), None)
        for value, grad, unscale in pairs:
            own = module.loss if isinstance(module, Autoencoder) and not from_activation else None
            if own is None and (x is None or x.numel() != value.numel() or len(x) != len(value)):
                got = "has no tensor" if x is None else f"begins with one of shape {tuple(x.shape)}"
                raise ValueError(f"output: {self.output!r} gives {tuple(value.shape)}, but the batch {got}.")
            if x is None or (own is not None and grad.shape != x.shape):
                continue  # several parameters for each number of x
            part = part_of(x.shape, self._number, MOST_NUMBERS)
            given, prediction = x[part], value[part]
            prediction = prediction if own is None else own.prediction(prediction, given)
            given = given if mask is None else torch.where(mask[part], given, prediction.reshape(given.shape))
            size = {"elements": grad.numel(), "batch": len(grad), "sum": 1}[reduction]
            slopes = full_precision(grad[part]).abs().mul_(size * accumulated)
            slopes = slopes * unscale if isinstance(unscale, Tensor) else slopes
            self._add_output(slopes, prediction, given.reshape(prediction.shape))

    def _add_output(self, slopes: Tensor, prediction: Tensor, x: Tensor) -> None:
        errors = (full_precision(prediction) - full_precision(x)).abs_()
        # elements that are wrong by more than a hundredth and hear of it by less than a hundredth of that
        wrong = errors > 0.01
        starved = wrong & (slopes < 0.01 * errors)
        values = torch.stack([slopes.sum().to(errors.dtype), errors.sum()])
        finite = values.isfinite().all()
        self.counters.add("output", "sums", torch.where(finite, values, 0.0), torch.float64)
        for field, marked in (("wrong", wrong), ("starved", starved)):
            self.counters.add("output", field, marked.sum() * finite)

    # -- layers -----------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Names of the modules with parameters of their own."""
        return self.steps.names

    def on_step(self, trainer: L.Trainer | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients' norms; remember the weights before the step."""
        # a fused optimizer unscales by itself, later
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        known = () if self._probe is None else self._probe.watch.structure
        self.steps.before(trainer, module, optimizer, self._unscale() if fused else 1.0, known)

    def state_dict(self) -> dict[str, Any]:
        """Sums over all ranks, and the names of the layers."""
        return {**super().state_dict(), "layers": list(self.layers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        super().load_state_dict(state_dict)
        self.steps.names = list(state_dict["layers"])

    def first_weights(self) -> dict[str, float]:
        """Squared norm of each layer's weights before the first step looked at."""
        found, steps = (self.first_results().get(("layers", field)) for field in ("weight", "grad_steps"))
        if found is None or steps is None or len(found) != len(self.layers):
            return {}
        return {layer: float(w) for layer, w, n in zip(self.layers, found, steps, strict=True) if n > 0}

    def first_update_ratio(self) -> float:
        """Median over the layers of the share of its weights that the first step looked at has changed; NaN if none."""
        ratios = per_layer(self.first_results(), self.layers, "update", "weight").values()
        found = sorted(ratio for ratio in ratios if ratio > 0)
        return found[len(found) // 2] if found else float("nan")

    # -- what people ask --------------------------------------------------------------------------------------

    def saturated_fraction(self) -> dict[str, float]:
        """Share of elements whose slope is below ``eps``, by site."""
        return saturated_fraction(self.results())

    def transmission(self) -> dict[str, float]:
        """Norm of the gradient after (towards the input) over before each activation, by site."""
        return transmission(self.results())

    def gradient_norm(self) -> dict[str, float]:
        """Root mean square over steps of the norm of a layer's gradient before clipping, by layer."""
        return per_layer(self.results(), self.layers, "grad", "grad_steps")

    def update_ratio(self) -> dict[str, float]:
        """Norm of a step's update over that of the weights before it, by layer; layers of zeros have none."""
        return per_layer(self.results(), self.layers, "update", "weight")

    def output_ratio(self) -> float:
        """Mean gradient at the decoder's output over the mean error there; NaN if the output is not known."""
        return output_figures(self.results())[0]

    def starved_fraction(self) -> float:
        """Share of the outputs that are wrong by more than 0.01 and get a gradient of less than 1 % of their error."""
        return output_figures(self.results())[1]

    def scalars(self) -> dict[str, float]:
        """Summary, and figures by site and layer."""
        return summary(self._now, self.layers)


class _Keep:
    """Keeps what a module gave, and its gradient, until the batch is done."""

    def __init__(self, monitor: GradientSaturationMonitor, output: Tensor) -> None:
        self._monitor, self._output, self._pairs = monitor, output, monitor._pairs

    def __call__(self, grad: Tensor) -> None:
        # not if the graph has outlived its batch
        if not torch.is_grad_enabled() and self._pairs is self._monitor._pairs:
            self._pairs.append((self._output, grad, self._monitor._unscale()))
