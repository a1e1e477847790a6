"""Names of the places in a model that remedies change, and new weights for all of them."""

from __future__ import annotations

from lightning_ae.diagnostics.causes.base import Evidence
from lightning_ae.diagnostics.remedies.activations import activation_modules
from lightning_ae.diagnostics.remedies.base import Remedy, Together, modules_by_name, weighted
from lightning_ae.diagnostics.remedies.layers import Reinitialize, Scheme


def sites_of(e: Evidence, kind: str) -> tuple[str, ...]:
    """Names of the activation modules of a kind, in order."""
    return tuple(name for name, of in activation_modules(e.model) if of == kind)


def output_activations(e: Evidence) -> tuple[str, ...]:
    """Activation modules between the last layer and the main comparison, the last one first."""
    if e.pair is None:
        return ()
    known = dict(activation_modules(e.model))
    frames = [f for n, f in zip(e.pair.path, e.pair.frames, strict=False) if n not in ("dropout", "layer")]
    if not frames and e.output.site is not None:
        frames = [e.output.site.partition("#")[0]]
    return tuple(dict.fromkeys(name for name in frames if name in known))


def last_layer(e: Evidence) -> str | None:
    """The layer that gives the prediction of the main comparison; None if it is not known."""
    layers = [name for name, _ in weighted(e.model)]
    if e.ours:
        inside = [name for name in layers if name.startswith("decoder.") or name == "decoder"]
        return inside[-1] if inside else None
    if e.pair is None:
        return None
    frames = [frame for name, frame in zip(e.pair.path, e.pair.frames, strict=False) if name == "layer"]
    if frames and frames[-1] in layers:
        return frames[-1]
    sites = output_activations(e)
    return before(e, sites[-1]) if sites else None


def before(e: Evidence, site: str) -> str | None:
    """The last layer with weights that is registered before an activation module."""
    names, last = dict(weighted(e.model)), None
    for name in modules_by_name(e.model):
        if name == site.partition("#")[0]:
            return last
        last = name if name in names else last
    return None


def entry(e: Evidence) -> tuple[str, int] | None:
    """The first layer with weights that reads the data, and how many features it reads; None if it is not known."""
    results = e.output.results()
    for name, is_norm in e.output.entries.items():
        found = results.get((f"entry/{name}", "x"))
        if not is_norm and found is not None:
            return name, len(found)
    return None


def recurrent_layers(e: Evidence) -> tuple[str, ...]:
    """Names of the recurrent layers."""
    return tuple(
        name for name, module in weighted(e.model) if any("weight_hh" in p for p, _ in module.named_parameters())
    )


def anew(e: Evidence, scheme: Scheme) -> Remedy:
    """New weights for all layers: by a scheme for hidden ones, as torch draws them for the last one.

    No activation follows the last layer that the gain of the scheme would make up for: with it, predictions begin far
    from the targets.
    """
    everywhere, last = Reinitialize(scheme, bias=None), last_layer(e)
    if last is None or len(list(weighted(e.model))) < 2:
        return everywhere
    return Together((everywhere, Reinitialize("default", (last,), bias=None)))
