"""What the latent does: how sparse it is, how much of it is used, and whether anybody reads it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.monitors.latent_rows import (
    PARTS,
    KeepGradient,
    Latent,
    add_rows,
    as_rows,
    describe,
    module_names,
    rows_of,
    widest,
)
from lightning_ae.diagnostics.monitors.latent_summary import FAST, covariance, has_kl, square, summary, unread
from lightning_ae.diagnostics.watch.batch import MaskFunction
from lightning_ae.diagnostics.watch.counters import Key, flat, nested
from lightning_ae.diagnostics.watch.site import clean_name
from lightning_ae.metrics.latents import kl_per_dimension
from lightning_ae.metrics.sparsity import widen
from lightning_ae.models import Autoencoder

__all__ = ["Latent", "LatentSparsityMonitor"]


class LatentSparsityMonitor(Monitor):
    r"""Measures the latent: L0, L1, Hoyer, Gini, population and lifetime sparsity, dead and always-on latents, rank.

    :meth:`summary` has, as means over the rows of codes (examples; of a map or a sequence each position is a row):

    * ``l0``: number of :math:`|z_i| > \varepsilon`; ``l1``: :math:`\|z\|_1`;
    * ``hoyer``, ``gini`` and ``population_sparsity`` (Treves–Rolls), between 0 (dense) and 1 (sparse), over codes that
      are not all zero, from at most 65,536 numbers of a batch;
    * ``lifetime_sparsity``: Treves–Rolls of each latent over the data, averaged over those that are not always zero;
    * ``dead_fraction`` and ``always_on_fraction``: latents with :math:`|z_i| > \varepsilon` in no row, and in all;
    * ``effective_rank`` of the covariance (codes up to 256 wide) and ``active_units``, latents whose (posterior) mean
      has a variance over the data above 0.01: what means something for dense codes. Of Gaussian codes it is the
      variance within batches, since a mean that moves while training tells no examples apart;
    * ``unread_fraction``: latents that vary, and to which the loss gives less than a millionth of the largest gradient
      (each times the latent's spread): the decoder does not read them, and no penalty sees them;
    * ``kl``: nats in all, for Gaussian codes; :meth:`kl_per_dimension` has them apart. This and their ``active_units``
      rest on the steps since the last log alone, as they change faster than other figures;
    * ``codebook_usage`` and ``perplexity``, for quantised codes; negative indices are padding;
    * ``nonfinite_rows``, if there are any: they are left out of all the others.

    A latent that varies by less than a millionth of its size is constant.

    Logged as ``latent/<name>``, and as a histogram log10 of the firing frequencies.

    Args:
        latent: None for the latent of a model of ours. Of others the name of the module whose output it is,
            ``"encoder[1]"`` for the second item if that is a tuple; or a dict of such names for any of ``"z"``,
            ``"mean"``, ``"log_variance"``, ``"kl"`` (all with latents on the same axis) and ``"indices"``, with the
            number ``"num_codes"`` beside the last; or a function of (what ``training_step`` returned, batch) that
            returns a tensor or such a dict of tensors.
        every_n_steps: look at every so many optimizer steps.
        horizon: figures rest on the last samples looked at, between this many and twice as many.
        eps: :math:`\varepsilon \ge 0`.
        unit_dim: the axis of the latents; the last one unless given, for maps ``(B, C, H, W)`` the channels.
        mask_fn: from the batch to 1 where a row counts and 0 where it is padding: ``(B,)``, or with as many of the
            positions as it tells apart, ``(B, T)``.

    Raises:
        ValueError: if a number is not positive, or a name is none of those above; in training, if the latent is not
            found or has another shape.
        TypeError: if ``latent`` is none of those above.

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
        every_n_steps: int = 25,
        horizon: int = 2_000,
        eps: float = 0.0,
        unit_dim: int | None = None,
        mask_fn: MaskFunction | None = None,
    ) -> None:
        super().__init__(every_n_steps, horizon, None, None, mask_fn)
        if not eps >= 0:
            raise ValueError(f"eps: expected a number of at least 0, got {eps}.")
        self._names = module_names(latent)
        if unit_dim is not None and not isinstance(unit_dim, int):
            raise TypeError(f"unit_dim: expected a whole number, got {type(unit_dim).__name__}.")
        self.latent = latent
        self.eps = eps
        self.latent_dim_axis = unit_dim
        self._seen: set[str] = set()
        self._num_codes: int | None = None
        self._latest: dict[Key, Tensor] = {}
        self._forget()

    def _settings(self) -> dict[str, Any]:
        """Several latents of one model may be looked at."""
        latent = getattr(self.latent, "__qualname__", self.latent) if callable(self.latent) else self.latent
        return {"every_n_steps": self.every_n_steps, "horizon": self.horizon, "latent": latent}

    def _forget(self) -> None:
        """What is kept from one hook of a batch to the next."""
        self._found: dict[str, Any] = {}
        self._listened = False
        self._read: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._seen, self._num_codes, self._latest = set(), None, {}
            self._forget()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the sums of an interrupted run; look whether the model has what was named."""
        super().on_train_start(trainer, pl_module)
        there = {clean_name(name) for name, _ in pl_module.named_modules()}
        for name, _ in self._names.values():
            if name not in there:
                close = difflib.get_close_matches(name, there, 3)
                raise ValueError(f"latent: {type(pl_module).__name__} has no module {name!r}; close to it: {close}.")
        if self.latent is None and not isinstance(pl_module, Autoencoder):
            raise ValueError(
                f"latent: {type(pl_module).__name__} is no lightning_ae.Autoencoder; name the module whose output is "
                "the latent, or give a function of (outputs, batch)."
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    # -- finding it -------------------------------------------------------------------------------------------

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Take up outputs by name, and hear what the loss asks of the latent."""
        if not self._names and name not in ("code", "decoder"):
            return
        # one that is also a part of another has several names
        names = {name, *(self._probe.watch.names_of(module) if self._probe is not None else ())}
        for part, (wanted, item) in self._names.items():
            if wanted not in names:
                continue
            value = output
            if isinstance(output, (tuple, list)):
                value = output[item] if item < len(output) else None
            if isinstance(value, Tensor):
                self._found[part] = value.detach()
                if part == "z" or (part == "mean" and "z" not in self._names):
                    self._listen(value)
        if self.latent is not None or not inputs or not isinstance(inputs[0], Tensor):
            return
        if name == "code":
            # here and not later: before the step, with the precision of the forward pass
            statistics = getattr(module, "statistics", None)
            self._found.update(statistics(inputs[0]) if statistics is not None else {})
        elif name == "decoder":
            self._found["z"] = inputs[0].detach()
            self._listen(inputs[0])

    def _listen(self, z: Tensor) -> None:
        if z.requires_grad:
            self._listened = True
            z.register_hook(KeepGradient(self))  # type: ignore[no-untyped-call]

    def _parts_of(self, found: dict[str, Any], outputs: Any, batch: Any) -> dict[str, Any]:
        if callable(self.latent):
            given = self.latent(outputs, batch)
            found = dict(given) if isinstance(given, Mapping) else {"z": given}
            if not set(found) <= set(PARTS):
                raise ValueError(f"latent: expected a dict with some of {list(PARTS)}, got {sorted(found)}.")
        elif self.latent is None:
            # the decoder's input, unless it is something else than the latent that the model has returned
            z = outputs["output"].z if isinstance(outputs, Mapping) and "output" in outputs else None
            found = found if z is None else {**found, "z": z}
        elif isinstance(self.latent, Mapping) and "num_codes" in self.latent and found:
            found = {**found, "num_codes": self.latent["num_codes"]}
        found = {part: value for part, value in found.items() if value is not None}
        missing = set(self._names) - set(found) - self._seen
        if missing or (not found and not self._seen):
            where = [self._names[part][0] for part in missing] or ["decoder" if self.latent is None else "the function"]
            raise ValueError(f"latent: {', '.join(sorted(where))} has given no tensor in training_step.")
        self._seen |= set(found)
        return found

    # -- counting ---------------------------------------------------------------------------------------------

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Add the codes of a batch."""
        found, read, listened = self._found, self._read, self._listened
        self._forget()
        parts = self._parts_of(found, outputs, batch)
        mask, axis = None if self.mask_fn is None else self.mask_fn(batch), self.latent_dim_axis
        mean, log_variance, kl = (
            rows_of(part, parts[part], axis, mask) if parts.get(part) is not None else None
            for part in ("mean", "log_variance", "kl")
        )
        if kl is not None:
            self._add_kl(kl.values.sum(0), kl.number)
        elif mean is not None and log_variance is not None:
            both = (mean.counts & log_variance.counts)[:, None]
            given = (torch.where(both, widest(rows.values), 0.0) for rows in (mean, log_variance))
            # at zeros the divergence is zero too
            self._add_kl(kl_per_dimension(*given) * len(both), both.sum())
        if parts.get("indices") is not None:
            self._add_codes(parts["indices"], parts.get("num_codes"))
        name = "z" if parts.get("z") is not None else "mean"
        if parts.get(name) is None:
            return
        rows = rows_of(name, parts[name], axis, mask)
        add_rows(self.counters, rows, self.eps)
        if mean is not None:
            wide = widest(mean.values)
            off = torch.where(mean.counts[:, None], wide - wide.sum(0) / mean.number.clamp(min=1), 0.0)
            self.counters.add("mean", "within", off.square().sum(0), torch.float64)
            self.counters.add("mean", "freedom", (mean.number - 1).clamp(min=0))
        for grad in read:
            if grad.shape == rows.shape:
                self._add_read(widen(as_rows("gradient", grad, axis)).square().sum(0))
        # a decoder that is blind to its input gives no gradient at all
        automatic = trainer is not None and trainer.lightning_module.automatic_optimization and outputs is not None
        if listened and not read and automatic:
            self._add_read(torch.zeros(rows.values.shape[1], device=rows.values.device))

    def _add_read(self, asked: Tensor) -> None:
        # a step that AMP skips must not spoil the sum
        finite = asked.isfinite().all()
        self.counters.add("latent", "read", torch.where(finite, asked, 0.0), torch.float64)
        self.counters.add("latent", "read_steps", finite)

    def _add_kl(self, total: Tensor, count: Tensor) -> None:
        self.counters.add("latent", "kl", total, torch.float64)
        self.counters.add("latent", "kl_rows", count)

    def _add_codes(self, indices: Any, num_codes: Tensor | int | None) -> None:
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.is_complex():
            raise ValueError(f"latent: indices: expected whole numbers (B, ...), got {describe(indices)}.")
        if num_codes is None:
            raise ValueError("latent: indices need num_codes beside them, the size of the codebook.")
        if not isinstance(num_codes, Tensor) or num_codes.device.type == "cpu":
            self._num_codes = int(num_codes)
        elif self._num_codes is None:
            self._num_codes = int(num_codes)  # waits for the device, once
        flat = indices.detach().reshape(-1).long()
        counts = self.counters.get("latent", "codes", (self._num_codes,), torch.int64, flat.device)
        inside = flat.ge(0) & flat.lt(self._num_codes)
        counts.scatter_add_(0, flat.clamp(0, self._num_codes - 1), inside.long())
        self.counters.add("latent", "codes_outside", flat.ge(self._num_codes).sum())

    def take(self, results: dict[Key, Tensor], keep: bool) -> None:
        """Receive sums over all ranks; those since the last log are the latest."""
        super().take(results, keep)
        if has_kl(self.interval()):
            self._latest = {key: self.interval()[key] for key in FAST if key in self.interval()}

    def state_dict(self) -> dict[str, Any]:
        """Sums over all ranks, and the latest span of those that change fast."""
        return {**super().state_dict(), "latest": nested(self._latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up saved sums."""
        super().load_state_dict(state_dict)
        self._latest = flat(state_dict["latest"])

    # -- what people ask --------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """All figures that apply, by name."""
        results = self.results()
        return summary(results, self._recent(results))

    def _recent(self, results: dict[Key, Tensor]) -> Mapping[Key, Tensor]:
        since = self.since_log(results)
        return since if has_kl(since) else self._latest

    def firing_frequency(self) -> Tensor:
        """Share of the rows in which each latent is on, ``(D,)``, float64."""
        results = self._with_rows()
        return results["latent", "fired"].double() / results["latent", "rows"].double()

    def kl_per_dimension(self) -> Tensor:
        """Mean KL divergence of each dimension of a Gaussian code, ``(D,)``, nats, float64."""
        recent = self._recent(self.results())
        if ("latent", "kl") not in recent:
            raise ValueError("kl_per_dimension: no code with mean and log-variance, or kl, was seen.")
        return recent["latent", "kl"] / recent["latent", "kl_rows"].double()

    def unread_latents(self) -> Tensor:
        """Indices of the latents that vary and that nobody reads."""
        return unread(self._with_rows()).nonzero().flatten()

    def constant_latents(self) -> Tensor:
        """Indices of the latents that were the same in all rows of a batch, but for rounding; those always 0 are."""
        results = self._with_rows()
        still: Tensor = results["z", "within"] <= 1e-10 * square(results)
        return still.nonzero().flatten()

    def num_samples(self) -> int:
        """Rows on which the figures rest."""
        return int(self.results().get(("latent", "rows"), torch.tensor(0)))

    def variance(self) -> Tensor:
        """Variance of each latent over the data, ``(D,)``, float64."""
        return covariance(self._with_rows())[1]

    # -- reading ----------------------------------------------------------------------------------------------

    def _with_rows(self) -> dict[Key, Tensor]:
        results = self.results()
        if int(results.get(("latent", "rows"), torch.tensor(0))) == 0:
            raise ValueError("No codes were seen yet: fit first, with every_n_steps so small that a step is looked at.")
        return results

    def scalars(self) -> dict[str, float]:
        """The summary."""
        return summary(self._now, self._latest)

    def histograms(self) -> dict[str, Tensor]:
        """Log10 of the firing frequencies; a latent that was never on is at that of half a row."""
        if int(self._now.get(("latent", "rows"), torch.tensor(0))) == 0:
            return {}
        rows = self._now["latent", "rows"].double()
        return {"log10_frequency": (self._now["latent", "fired"].double().clamp(min=0.5) / rows).log10()}
