"""From what the monitors hold to a report."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_ae.diagnostics.causes import Evidence, find
from lightning_ae.diagnostics.remedies import prescribe
from lightning_ae.diagnostics.report.examples import ExampleMonitor
from lightning_ae.diagnostics.report.record import Line
from lightning_ae.diagnostics.report.report import Report
from lightning_ae.diagnostics.report.words import INNER


def make_report(evidence: Evidence, examples: ExampleMonitor | None = None) -> Report:
    """Read the monitors.

    Args:
        evidence: the monitors, and the model they have watched.
        examples: what has kept inputs and reconstructions; None for a report without pictures of them.
    """
    dead, saturation = evidence.whole_dead, evidence.whole_saturation
    samples, frequencies, units = dead.num_samples(), dead.firing_frequency(), dead.dead_units()
    saturated, transmission = saturation.saturated_fraction(), saturation.transmission()
    sites: dict[str, dict[str, Any]] = {}
    for name, info in dead.sites.items():
        if name in samples:
            row: dict[str, Any] = {"activation": info.activation, "units": info.units}
            if name in units:
                row |= {"dead": len(units[name]), "frequency": float(frequencies[name].median())}
            if name in saturated:
                row["flat"] = saturated[name]
            if name in transmission:
                row["transmission"] = transmission[name]
            sites[name] = row | {"n": samples[name]}
    norms, updates = saturation.gradient_norm(), saturation.update_ratio()
    layers = {name: {"gradient norm": norms[name], "update ratio": updates.get(name, float("nan"))} for name in norms}
    output = {name: value for name, value in evidence.output.figures().items() if name not in INNER}
    if saturation.output_ratio() == saturation.output_ratio():
        output |= {"output_ratio": saturation.output_ratio(), "starved_fraction": saturation.starved_fraction()}
    return Report(
        [f._replace(remedies=prescribe(evidence, f)) for f in find(evidence)],
        sites,
        layers,
        {} if evidence.whole_latent is None else evidence.whole_latent.summary(),
        output,
        list(evidence.output.history),
        {site: values.tolist() for site, values in frequencies.items()},
        compared={
            name: f"{tuple(pair.prediction_shape)} with {tuple(pair.target_shape)}"
            for name, pair in evidence.pairs.items()
        },
        curves=_curves(evidence),
        dormancy={site: scores.tolist() for site, scores in dead.dormant_scores().items() if site not in frequencies},
        latents=_latents(evidence),
        examples=None if examples is None or not evidence.reconstructs else examples.read(evidence.main or ""),
        about=_about(evidence),
    )


def _curves(e: Evidence) -> dict[str, Line]:
    """The loss at each look, what is left of the best constant's, and the losses that validation has logged."""
    found = {"loss": Line(*e.curve("loss")), "relative": Line(*e.progress)}
    if e.validation is not None:
        found |= {name: Line(list(steps), list(values)) for name, (steps, values) in e.validation.losses.items()}
    return {name: line for name, line in found.items() if line.steps}


def _latents(e: Evidence) -> dict[str, list[float]]:
    """Figures of each latent by itself."""
    code = e.whole_latent
    if code is None or code.num_samples() == 0:
        return {}
    found = {"variance": code.variance(), "frequency": code.firing_frequency()}
    if "kl" in code.summary():
        found["kl"] = code.kl_per_dimension()
    return {name: values.flatten().tolist() for name, values in found.items()}


def _about(e: Evidence) -> dict[str, str]:
    """What was looked at."""
    parameters = sum(p.numel() for p in e.model.parameters() if not isinstance(p, torch.nn.UninitializedParameter))
    about = {"model": type(e.model).__name__, "parameters": f"{parameters:,}"}
    if e.training is not None:
        about["optimizer steps"] = f"{e.steps:,}"
        settings = dict.fromkeys(f"{held.kind}, learning rate {held.lr:g}" for held in e.training.settings)
        about |= {"optimizer": "; ".join(settings)} if settings else {}
    samples = max(e.whole_dead.num_samples().values(), default=e.n)
    about["examples looked at"] = f"{samples:,}"
    return about | {"torch": torch.__version__, "lightning": L.__version__}
