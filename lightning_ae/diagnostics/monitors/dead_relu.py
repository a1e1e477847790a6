"""Units that never fire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.watch import Event
from lightning_ae.diagnostics.watch.batch import MaskFunction


class DeadReLUMonitor(Monitor):
    r"""Counts how often each unit fires; which never do, and which hardly do anything.

    A unit (a channel, for a convolution) of an activation with a hard zero is *dead* if no output in n samples had a
    slope: none positive, for a ReLU; for ReLU6 and Hardtanh, none strictly between the ends. None of n independent
    samples bounds the firing rate at :math:`3/n` (95 %), so read :meth:`num_samples` with the verdict. Its *firing
    frequency* is an average over examples and positions. Any activation has a *dormant score*

    .. math:: s_j = \frac{\mathrm{mean}\,|a_j|}{\frac1u \sum_i \mathrm{mean}\,|a_i|},

    and a unit is dormant if it is at most :math:`\tau`. A unit with values that are not finite is counted apart, and
    is never dead. See :class:`Monitor` for when it looks, and for the arguments that all monitors have.

    Logged: ``dead_relu/dead_fraction`` of all units of hard-zero activations, ``dead_relu/dormant_fraction`` of all,
    ``dead_relu/samples``, and ``dead_relu/nonfinite_units`` if there are any; the first two also for each site, as
    ``dead_relu/<site>/dead_fraction``, with a histogram of log10 of the firing frequencies.

    Args:
        every_n_steps: look at every so many optimizer steps.
        horizon: verdicts rest on the last samples looked at, between this many and twice as many.
        tau: :math:`\tau`, the highest dormant score of a dormant unit.
        include: names of modules to which it keeps, e.g. ``["encoder"]``; None for all.
        unit_dim: the axis of the units, by the name of a site or of a module around it; found from the layer before
            the activation unless given.
        mask_fn: from the batch to 1 where a position counts and 0 where it is padding.

    Raises:
        ValueError: if a number is not positive, or ``tau`` negative.

    Source: Lu et al. 2019, https://arxiv.org/abs/1903.06733 (dying ReLU); Sokar et al. 2023,
    https://arxiv.org/abs/2302.12902 (dormant score).

    Example:
        >>> import lightning as L
        >>> from lightning_ae import DigitsDataModule, MLPAutoencoder
        >>> monitor = DeadReLUMonitor(every_n_steps=5)
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(
        ...     max_epochs=1, accelerator="cpu", callbacks=monitor, enable_checkpointing=False, **quiet
        ... )
        >>> model = MLPAutoencoder((1, 8, 8), 2, hidden=(16,), activation="relu")
        >>> with torch.no_grad():
        ...     _ = model.encoder.layers[0].bias[3].fill_(-100.0)
        >>> trainer.fit(model, DigitsDataModule())
        >>> 3 in monitor.dead_units()["encoder.layers.1"]
        True
    """

    prefix = "dead_relu"

    def __init__(
        self,
        every_n_steps: int = 25,
        horizon: int = 2_000,
        tau: float = 0.025,
        include: Sequence[str] | None = None,
        unit_dim: int | Mapping[str, int] | None = None,
        mask_fn: MaskFunction | None = None,
    ) -> None:
        super().__init__(every_n_steps, horizon, include, unit_dim, mask_fn)
        if not tau >= 0:
            raise ValueError(f"tau: expected a number of at least 0, got {tau}.")
        self.tau = tau
        #: calls of a batch: site, sums of absolute outputs, firings, positions, examples
        self._heard: list[tuple[str, Tensor, Tensor | None, Tensor | int, Tensor | int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._heard = []

    def on_activation(self, event: Event) -> None:
        """Count a call of an activation."""
        if self.wants(event.site):
            fired = None if event.site.interval is None else event.live()
            self._heard.append((event.site.name, event.magnitude(), fired, event.positions(), event.examples()))

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Add the calls of a batch: those of all sites together, since small kernels cost more than what they do."""
        heard, self._heard = self._heard, []
        add = self.counters.add
        for name, _, fired, positions, examples in heard:
            add(name, "positions", positions)
            add(name, "examples", examples)
            if fired is not None:
                add(name, "fired", fired)
        for device in {mass.device for _, mass, *_ in heard}:
            there = [(name, mass) for name, mass, *_ in heard if mass.device == device]
            mass = torch.cat([mass for _, mass in there])
            finite = mass.isfinite()
            sizes = [len(mass) for _, mass in there]
            parts = torch.split(torch.where(finite, mass, 0.0), sizes), torch.split(~finite, sizes)
            for (name, _), size, nonfinite in zip(there, *parts, strict=True):
                add(name, "mass", size, torch.float64)
                add(name, "nonfinite", nonfinite)

    # -- what people ask --------------------------------------------------------------------------------------

    def dead_units(self) -> dict[str, Tensor]:
        """Indices of the units that never fired, by site; of activations with a hard zero."""
        results = self.results()
        return {
            site: self._dead(results, site).nonzero().flatten()
            for site in self._seen(results)
            if (site, "fired") in results
        }

    def firing_frequency(self) -> dict[str, Tensor]:
        """Share of the outputs with a slope, of each unit ``(units,)``, float64; of activations with a hard zero."""
        results = self.results()
        return {
            site: results[site, "fired"].double() / results[site, "positions"].double()
            for site in self._seen(results)
            if (site, "fired") in results
        }

    def num_samples(self) -> dict[str, int]:
        """Examples on which the verdicts rest, by site."""
        results = self.results()
        return {site: int(results[site, "examples"]) for site in self._seen(results)}

    def dormant_scores(self) -> dict[str, Tensor]:
        """Mean absolute output of each unit over the site's mean, ``(units,)``, float64; 0 where all are zero."""
        results = self.results()
        return {site: self._scores(results, site) for site in self._seen(results)}

    def dormant_units(self) -> dict[str, Tensor]:
        """Indices of the units whose dormant score is at most ``tau``, by site."""
        return {site: (scores <= self.tau).nonzero().flatten() for site, scores in self.dormant_scores().items()}

    def nonfinite_units(self) -> dict[str, Tensor]:
        """Indices of the units that gave values which are not finite, by site."""
        results = self.results()
        return {site: results[site, "nonfinite"].nonzero().flatten() for site in self._seen(results)}

    # -- reading ----------------------------------------------------------------------------------------------

    def _seen(self, results: Mapping[tuple[str, str], Tensor]) -> list[str]:
        return [site for site, field in results if field == "examples" and int(results[site, field]) > 0]

    def _dead(self, results: Mapping[tuple[str, str], Tensor], site: str) -> Tensor:
        return (results[site, "fired"] == 0) & (results[site, "nonfinite"] == 0)

    def _scores(self, results: Mapping[tuple[str, str], Tensor], site: str) -> Tensor:
        mass = results[site, "mass"]
        mean = mass.mean()
        return mass / mean if mean > 0 else torch.zeros_like(mass)

    def scalars(self) -> dict[str, float]:
        """Fractions, in all and by site."""
        results = self._now
        values: dict[str, float] = {}
        dead = units = dormant = all_units = nonfinite = 0
        for site in self._seen(results):
            scores = self._scores(results, site)
            dormant += int((scores <= self.tau).sum())
            all_units += len(scores)
            nonfinite += int((results[site, "nonfinite"] > 0).sum())
            values[f"{site}/dormant_fraction"] = float((scores <= self.tau).double().mean())
            if (site, "fired") in results:
                found = self._dead(results, site)
                dead += int(found.sum())
                units += len(found)
                values[f"{site}/dead_fraction"] = float(found.double().mean())
        if units:
            values["dead_fraction"] = dead / units
        if all_units:
            values["dormant_fraction"] = dormant / all_units
            values["samples"] = float(max(int(results[site, "examples"]) for site in self._seen(results)))
        if nonfinite:
            values["nonfinite_units"] = float(nonfinite)
        return values

    def histograms(self) -> dict[str, Tensor]:
        """Log10 of the firing frequencies; a unit that never fired is at that of half a sample."""
        results = self._now
        found = {}
        for site in self._seen(results):
            if (site, "fired") in results:
                positions = results[site, "positions"].double()
                found[f"{site}/log10_frequency"] = (results[site, "fired"].double().clamp(min=0.5) / positions).log10()
        return found
