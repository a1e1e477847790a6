"""What the latent does: how sparse it is, how much of it is used, and whether anybody reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.callbacks.probe import Monitor
from lightning_ae.callbacks.probe.counters import Key
from lightning_ae.callbacks.probe.monitor import MaskFunction
from lightning_ae.metrics.latents import active_units, codebook_usage, effective_rank, kl_per_dimension, perplexity
from lightning_ae.metrics.sparsity import gini, hoyer, lifetime_sparsity, population_sparsity
from lightning_ae.models import Autoencoder

#: Elements of a batch from which the measures that sort or compare a whole code are taken.
SHAPE_ELEMENTS = 2**16
#: Widest code whose covariance is kept.
WIDEST_COVARIANCE = 256

_PARTS = ("z", "mean", "log_variance", "kl", "indices")
Latent = str | Mapping[str, str] | Callable[[Any, Any], Any]


class LatentSparsityMonitor(Monitor):
    r"""Measures the latent: L0, L1, Hoyer, Gini, population and lifetime sparsity, dead and always-on latents, rank.

    :meth:`summary` has, as means over the rows of codes (examples; of a map or a sequence each position is a row):

    * ``l0``: number of :math:`|z_i| > \varepsilon`; ``l1``: :math:`\|z\|_1`;
    * ``hoyer``, ``gini`` and ``population_sparsity`` (Treves–Rolls), between 0 (dense) and 1 (sparse), over codes that
      are not all zero, from at most 65,536 numbers of a batch;
    * ``lifetime_sparsity``: Treves–Rolls of each latent over the data, averaged over those that are not always zero;
    * ``dead_fraction`` and ``always_on_fraction``: latents with :math:`|z_i| > \varepsilon` in no row, and in all;
    * ``effective_rank`` of the covariance (codes up to 256 wide) and ``active_units``, latents whose (posterior) mean
      has a variance over the data above 0.01: what means something for dense codes;
    * ``unread_fraction``: latents that vary, and from which the loss takes less than a millionth of the largest
      gradient; None reads them;
    * ``kl``: nats in all, for Gaussian codes; :meth:`kl_per_dimension` has them apart;
    * ``codebook_usage`` and ``perplexity``, for quantised codes.

    Logged as ``latent/<name>``, and as a histogram log10 of the firing frequencies.

    Args:
        latent: None for the latent of a model of ours. Of others the name of the module whose output it is; or such
            names for any of ``"z"``, ``"mean"``, ``"log_variance"``, ``"kl"`` and ``"indices"``; or a function of
            (what ``training_step`` returned, batch) that returns a tensor or a dict of these, with ``"num_codes"``
            where there are indices.
        every_n_steps: look at every so many optimizer steps.
        horizon: figures rest on the last samples looked at, between this many and twice as many.
        eps: :math:`\varepsilon \ge 0`.
        unit_dim: the axis of the latents; the last one unless given, for maps ``(B, C, H, W)`` the channels.
        mask_fn: from the batch to 1 where a row counts and 0 where it is padding.

    Raises:
        ValueError: if a number is not positive, or a name is none of those above; in training, if the latent is not
            found.

    Source: Hurley & Rickard 2009, https://arxiv.org/abs/0811.4706; Hoyer 2004; Treves & Rolls 1991; Willmore & Tolhurst
    2001 (lifetime); Burda et al. 2016, https://arxiv.org/abs/1509.00519 (active units); Roy & Vetterli 2007 (rank).

    Example:
        >>> import lightning as L
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder
        >>> monitor = LatentSparsityMonitor(every_n_steps=5)
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(
        ...     max_epochs=1, accelerator="cpu", callbacks=monitor, enable_checkpointing=False, **quiet
        ... )
        >>> trainer.fit(MLPAutoencoder((1, 8, 8), 4, hidden=(16,)), DigitsDataModule())
        >>> summary = monitor.summary()
        >>> summary["l0"], summary["dead_fraction"]  # a dense code
        (4.0, 0.0)
    """

    prefix = "latent"

    def __init__(
        self,
        latent: Latent | None = None,
        every_n_steps: int = 20,
        horizon: int = 10_000,
        eps: float = 0.0,
        unit_dim: int | None = None,
        mask_fn: MaskFunction | None = None,
    ) -> None:
        super().__init__(every_n_steps, horizon, None, None, mask_fn)
        if not eps >= 0:
            raise ValueError(f"eps: expected a number of at least 0, got {eps}.")
        if isinstance(latent, Mapping) and (not latent or not set(latent) <= set(_PARTS)):
            raise ValueError(f"latent: expected names for some of {list(_PARTS)}, got {sorted(latent)}.")
        if latent is not None and not isinstance(latent, (str, Mapping)) and not callable(latent):
            raise TypeError(f"latent: expected a name, a dict of names or a function, got {type(latent).__name__}.")
        self.latent = latent
        self.eps = eps
        self.latent_dim_axis = unit_dim
        self._modules = {latent: "z"} if isinstance(latent, str) else {}
        if isinstance(latent, Mapping):
            self._modules = {name: part for part, name in latent.items()}
        self._found: dict[str, Tensor] = {}
        self._h: Tensor | None = None
        self._read: Tensor | None = None

    # -- finding it -------------------------------------------------------------------------------------------

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Take up outputs by name, and hear what the decoder asks of the latent."""
        part = self._modules.get(name)
        if part is not None:
            value = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(value, Tensor):
                self._found[part] = value.detach()
                if part in ("z", "mean"):
                    self._listen(value)
        elif self.latent is None and name == "encoder" and isinstance(output, Tensor):
            self._h = output.detach()
        elif self.latent is None and name == "decoder" and inputs and isinstance(inputs[0], Tensor):
            self._listen(inputs[0])

    def _listen(self, z: Tensor) -> None:
        if z.requires_grad:
            z.register_hook(_Keep(self))  # type: ignore[no-untyped-call]

    def _parts_of(self, module: nn.Module, outputs: Any, batch: Any) -> dict[str, Any]:
        found, h = self._found, self._h
        self._found, self._h = {}, None
        if callable(self.latent):
            given = self.latent(outputs, batch)
            return {"z": given} if not isinstance(given, Mapping) else dict(given)
        if self.latent is not None:
            missing = set(self._modules.values()) - set(found)
            if missing:
                names = [name for name, part in self._modules.items() if part in missing]
                raise ValueError(f"latent: no module {names} has returned a tensor in training_step.")
            return found
        if not isinstance(module, Autoencoder):
            raise ValueError(
                f"latent: {type(module).__name__} is no lightning_ae.Autoencoder; name the module whose output is the "
                "latent, or give a function of (outputs, batch)."
            )
        statistics = module.code.statistics(h) if h is not None else {}
        z = outputs["output"].z if isinstance(outputs, Mapping) and "output" in outputs else None
        return {**({"z": z} if z is not None else {}), **statistics}

    # -- counting ---------------------------------------------------------------------------------------------

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Add the codes of a batch."""
        read, self._read = self._read, None
        parts = self._parts_of(module, outputs, batch)
        if parts.get("mean") is not None and parts.get("log_variance") is not None and "kl" not in parts:
            # the mean over the batch, times its size: a sum as all others are
            mean, log_variance = (self._rows(parts[name].detach()) for name in ("mean", "log_variance"))
            self._add_kl(kl_per_dimension(mean, log_variance) * len(mean), len(mean))
        elif "kl" in parts:
            kl = self._rows(parts["kl"].detach())
            self._add_kl(kl.sum(0), len(kl))
        if parts.get("indices") is not None:
            self._add_codes(parts["indices"], parts.get("num_codes"))
        z = parts.get("z")
        if z is None:
            z = parts.get("mean")
        if z is None:
            return
        if not isinstance(z, Tensor) and hasattr(z, "to_dense"):
            z = z.to_dense()
        if not isinstance(z, Tensor) or z.ndim < 2 or not z.is_floating_point():
            raise ValueError(f"latent: expected floating-point codes (B, ...), got {_what(z)}.")
        mask = None if self.mask_fn is None else self.mask_fn(batch)
        self._add_codes_dense(self._rows(z.detach()), mask)
        if parts.get("mean") is not None:
            self._add_moments("mean", self._rows(parts["mean"].detach()))
        if read is not None and read.shape == z.shape:
            asked = self._rows(read).square().sum(0)
            # a step that AMP skips must not spoil the sum
            asked = torch.where(asked.isfinite().all(), asked, torch.zeros_like(asked))
            self.counters.add("latent", "read", asked, torch.float64)

    def _rows(self, z: Tensor) -> Tensor:
        axis = self.latent_dim_axis if self.latent_dim_axis is not None else (1 if z.ndim >= 4 else -1)
        rows = z.movedim(axis, -1).flatten(0, -2)
        return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows

    def _add_codes_dense(self, z: Tensor, mask: Tensor | None) -> None:
        count: int | Tensor = len(z)
        if mask is not None and mask.numel() == len(z):
            weight = mask.to(z.device, z.dtype).reshape(-1, 1)
            z, count = z * weight, weight.sum(dtype=torch.float64).long()
        add = self.counters.add
        add("latent", "rows", count, device=z.device)
        on = z.abs() > self.eps
        add("latent", "fired", on.sum(0))
        magnitude = z.abs()
        add("latent", "abs", magnitude.sum(0), torch.float64)
        self._add_moments("z", z)
        head = z[: max(1, SHAPE_ELEMENTS // z.shape[1])]
        if z.shape[1] > 1:
            for name, measure in (("hoyer", hoyer), ("gini", gini), ("population_sparsity", population_sparsity)):
                add("latent", name, measure(head).nan_to_num(0.0, 0.0, 0.0).sum(), torch.float64)
            add("latent", "shaped", head.ne(0).any(1).sum())

    def _add_moments(self, name: str, z: Tensor) -> None:
        # float64: the covariance is a difference
        wide = z if z.device.type == "mps" else z.double()
        self.counters.add(name, "sum", wide.sum(0), torch.float64)
        if z.shape[1] <= WIDEST_COVARIANCE:
            self.counters.add(name, "cross", wide.t() @ wide, torch.float64)
        else:
            self.counters.add(name, "square", wide.square().sum(0), torch.float64)

    def _add_kl(self, total: Tensor, rows: int) -> None:
        self.counters.add("latent", "kl", total, torch.float64)
        self.counters.add("latent", "kl_rows", rows, device=total.device)

    def _add_codes(self, indices: Tensor, num_codes: Tensor | int | None) -> None:
        if num_codes is None:
            raise ValueError("latent: indices need num_codes beside them, the size of the codebook.")
        flat = indices.detach().reshape(-1).long()
        counts = self.counters.get("latent", "codes", (int(num_codes),), torch.int64, flat.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))

    # -- what people ask --------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """All figures that apply, by name."""
        return self._summary(self.results())

    def firing_frequency(self) -> Tensor:
        """Share of the rows in which each latent is on, ``(D,)``, float64."""
        results = self.results()
        return results["latent", "fired"].double() / results["latent", "rows"].double()

    def kl_per_dimension(self) -> Tensor:
        """Mean KL divergence of each dimension of a Gaussian code, ``(D,)``, nats, float64."""
        results = self.results()
        if ("latent", "kl") not in results:
            raise ValueError("kl_per_dimension: the code has no mean and log-variance.")
        return results["latent", "kl"] / results["latent", "kl_rows"].double()

    def unread_latents(self) -> Tensor:
        """Indices of the latents that vary and that nobody reads."""
        return self._unread(self.results()).nonzero().flatten()

    def num_samples(self) -> int:
        """Rows on which the figures rest."""
        return int(self.results().get(("latent", "rows"), torch.tensor(0)))

    def variance(self) -> Tensor:
        """Variance of each latent over the data, ``(D,)``, float64."""
        return self._covariance(self.results(), "z")[1]

    # -- reading ----------------------------------------------------------------------------------------------

    def _covariance(self, results: Mapping[Key, Tensor], name: str) -> tuple[Tensor | None, Tensor]:
        rows = results["latent", "rows"].double()
        mean = results[name, "sum"] / rows
        if (name, "cross") in results:
            covariance = results[name, "cross"] / rows - mean[:, None] * mean
            return covariance, covariance.diagonal().clamp(min=0)
        return None, (results[name, "square"] / rows - mean.square()).clamp(min=0)

    def _unread(self, results: Mapping[Key, Tensor]) -> Tensor:
        _, variance = self._covariance(results, "z")
        read = results.get(("latent", "read"))
        if read is None or not read.max() > 0:
            return torch.zeros_like(variance, dtype=torch.bool)
        # gradients by a latent's own spread: a rescaled latent is read as much
        weighted = read * variance
        varies = variance > 1e-12 * variance.max()
        return varies & (weighted <= 1e-12 * weighted.max())

    def _summary(self, results: Mapping[Key, Tensor]) -> dict[str, float]:
        values: dict[str, float] = {}
        if ("latent", "codes") in results:
            values["codebook_usage"] = float(codebook_usage(results["latent", "codes"]))
            values["perplexity"] = float(perplexity(results["latent", "codes"]))
        if ("latent", "kl") in results:
            values["kl"] = float((results["latent", "kl"] / results["latent", "kl_rows"].double()).sum())
        rows = int(results.get(("latent", "rows"), torch.tensor(0)))
        if rows == 0:
            return values
        fired = results["latent", "fired"]
        values |= {
            "l0": float(fired.sum()) / rows,
            "l1": float(results["latent", "abs"].sum()) / rows,
            "dead_fraction": float((fired == 0).double().mean()),
            "always_on_fraction": float((fired == rows).double().mean()),
            "samples": float(rows),
        }
        shaped = int(results.get(("latent", "shaped"), torch.tensor(0)))
        for name in ("hoyer", "gini", "population_sparsity"):
            if shaped:
                values[name] = float(results["latent", name]) / shaped
        covariance, variance = self._covariance(results, "z")
        if rows > 1:
            square = variance + (results["z", "sum"] / rows).square()
            lifetimes = lifetime_sparsity(results["latent", "abs"] / rows, square, rows)
            values["lifetime_sparsity"] = float(lifetimes.nanmean())
        name = "mean" if ("mean", "sum") in results else "z"
        values["active_units"] = float(active_units(self._covariance(results, name)[1]))
        if covariance is not None:
            values["effective_rank"] = float(effective_rank(covariance))
        if ("latent", "read") in results:
            values["unread_fraction"] = float(self._unread(results).double().mean())
        return values

    def scalars(self) -> dict[str, float]:
        """The summary."""
        return self._summary(self._now)

    def histograms(self) -> dict[str, Tensor]:
        """Log10 of the firing frequencies; a latent that was never on is at that of half a row."""
        if ("latent", "fired") not in self._now:
            return {}
        rows = self._now["latent", "rows"].double()
        return {"log10_frequency": (self._now["latent", "fired"].double().clamp(min=0.5) / rows).log10()}


class _Keep:
    """Keeps the gradient of one tensor until the batch is done."""

    def __init__(self, monitor: LatentSparsityMonitor) -> None:
        self._monitor = monitor

    def __call__(self, grad: Tensor) -> None:
        if not torch.is_grad_enabled():
            self._monitor._read = grad


def _what(z: Any) -> str:
    return f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
