"""Dictionaries in the format of SAELens 6, for its dashboards and evaluations, and dictionaries that it trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ae.checks import check_type
from lightning_ae.codes import BatchTopKCode, Code, GatedCode, JumpReLUCode, L1Code, TopKCode
from lightning_ae.files import read_json
from lightning_ae.models.dictionary import DictionaryAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_WEIGHTS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}


@torch.no_grad()
def save_saelens(model: DictionaryAutoencoder, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
    r"""Write a dictionary as ``cfg.json`` and ``sae_weights.safetensors``, which ``SAE.load_from_disk(path)`` reads.

    There :math:`z = \mathrm{act}((x - b_{dec}) W_{enc} + b_{enc})` and :math:`\hat x = z W_{dec} + b_{dec}`. The
    normalisation :math:`s` is folded into the weights: :math:`W_{enc} = (sW)^\top`, :math:`b_{enc} = c`,
    :math:`W_{dec} = D^\top\!/s`, :math:`b_{dec} = b/s`, so that it takes data as they are, latents are the
    same numbers as here, and no factor can get lost.

    ================== ============ ====================================================================
    code               architecture
    ================== ============ ====================================================================
    ``L1Code`` (ReLU)  standard
    ``TopKCode``       topk
    ``BatchTopKCode``  jumprelu     its learned threshold; the same while no example wants more than ``width``
    ``JumpReLUCode``   jumprelu
    ``GatedCode``      gated
    ================== ============ ====================================================================

    Args:
        model: a dictionary with one of these codes; it is not changed.
        path: a folder; made if need be.
        metadata: what SAELens' tools should know: ``{"model_name": "gpt2", "hook_name": "blocks.6.hook_resid_pre"}``.

    Raises:
        TypeError: if the model is no :class:`DictionaryAutoencoder`.
        ValueError: if SAELens has no such code, or the threshold of a :class:`BatchTopKCode` is not learned yet.
        ModuleNotFoundError: if safetensors is not installed (``pip install "lightning-ae[activations]"``).

    Source: SAELens 6, https://github.com/jbloomAus/SAELens (``SAE.save_model``).

    Example:
        >>> import tempfile
        >>> model = DictionaryAutoencoder(8, 32, TopKCode(4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_saelens(model, folder)
        ...     again = load_saelens(folder)
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(again.reconstruct(x), model.reconstruct(x), atol=1e-6)
        True
    """
    check_type("model", model, DictionaryAutoencoder)
    check_type("metadata", metadata, Mapping, None)
    from safetensors.torch import save_file

    scale, atoms, bias = model.input_scale, model.decoder.atoms, model.encoder.bias
    norms = torch.ones_like(bias) if model.unit_norm else torch.linalg.vector_norm(atoms, dim=1)
    architecture, own, weights = _of_code(model.code, bias, norms)
    weights |= {"W_enc": (model.encoder.weight * scale).t(), "W_dec": atoms / scale, "b_dec": model.pre_bias / scale}
    config = {
        "architecture": architecture,
        "d_in": atoms.shape[1],
        "d_sae": atoms.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **own,
        "metadata": {"sae_lens_version": "6.0.0", "created_by": "lightning_ae", **(metadata or {})},
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}
    save_file(whole, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _of_code(code: Code, bias: Tensor, norms: Tensor) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, further settings, and the weights that depend on the code."""
    if isinstance(code, L1Code) and code.activation == "relu":
        return "standard", {}, {"b_enc": bias}
    if isinstance(code, TopKCode):
        return "topk", {"k": code.k, "rescale_acts_by_decoder_norm": False}, {"b_enc": bias}
    if isinstance(code, BatchTopKCode):
        if code.threshold < 0:
            raise ValueError("model: the threshold of its BatchTopKCode is not learned yet; train it first.")
        # here a latent at the threshold is on, there it has to exceed it
        below = torch.nextafter(code.threshold.float(), torch.tensor(-1.0, device=code.threshold.device))
        return "jumprelu", {}, {"b_enc": bias, "threshold": below.clamp(min=0).expand_as(bias)}
    # codes that charge see each latent times its atom's norm, where that is not 1
    if isinstance(code, JumpReLUCode):
        return "jumprelu", {}, {"b_enc": bias, "threshold": code.threshold / norms}
    if isinstance(code, GatedCode):
        magnitude = code.bias / norms + code.log_gain.exp() * bias
        return "gated", {}, {"b_gate": bias, "r_mag": code.log_gain, "b_mag": magnitude}
    raise ValueError(
        f"model: SAELens has no architecture for {code}; expected L1Code(activation='relu'), TopKCode, BatchTopKCode, "
        "JumpReLUCode or GatedCode."
    )


@torch.no_grad()
def load_saelens(path: str | Path) -> DictionaryAutoencoder:
    r"""Read a dictionary that SAELens 6, or :func:`save_saelens`, has written.

    The model takes data as they are (``input_scale`` is 1). Atoms keep their norms; if these are not 1, ``unit_norm``
    is off. Coefficients are not in the file: of a code that charges, ``model.code.weight`` is 0 until it is set.

    Args:
        path: the folder with ``cfg.json`` and ``sae_weights.safetensors``.

    Returns:
        The model, with ``L1Code``, ``TopKCode``, ``JumpReLUCode`` or ``GatedCode``, in float32.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the architecture is another one, activations have to be normalised in a way that is not
            folded into the weights, or there are weights or settings that the model here would leave out.
        ModuleNotFoundError: if safetensors is not installed (``pip install "lightning-ae[activations]"``).

    Source: SAELens 6, https://github.com/jbloomAus/SAELens (``SAE.load_from_disk``).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_saelens(DictionaryAutoencoder(8, 32, TopKCode(4)), folder)
        ...     load_saelens(folder).code
        TopKCode()
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(f"path: expected {CONFIG} and {WEIGHTS}, found no {folder / name}")
    config = read_json(folder / CONFIG, "a configuration of SAELens")
    if (normalize := config.get("normalize_activations", "none")) != "none":
        raise ValueError(
            f"path: expected normalize_activations 'none' in {folder / CONFIG}, got {normalize!r}: fold it"
        )
    try:
        weights = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    except SafetensorError as error:
        raise ValueError(f"path: {folder / WEIGHTS} is not a file of weights: {error}") from error
    if fault := _fault(config, weights):
        raise ValueError(f"path: {fault} in {folder}, which SAELens did not write so.")
    encoder, atoms, pre_bias = weights["W_enc"].t(), weights["W_dec"], weights["b_dec"]
    norms = torch.linalg.vector_norm(atoms, dim=1)
    if config.get("rescale_acts_by_decoder_norm"):
        # latents are chosen by, and are in units of, what they contribute
        encoder, atoms = encoder * norms[:, None], atoms / norms[:, None].clamp_min(1e-30)
        weights["b_enc"] = weights["b_enc"] * norms
        norms = torch.ones_like(norms)
    unit_norm = torch.allclose(norms, torch.ones_like(norms), atol=1e-4)
    if unit_norm:
        norms = torch.ones_like(norms)
    if not config.get("apply_b_dec_to_input", True):
        # there is no pre-bias there: W(x - b) + (c + Wb) is what Wx + c was
        shift = encoder @ pre_bias
        for name in ("b_enc", "b_gate"):
            if name in weights:
                weights[name] = weights[name] + shift
        if "b_mag" in weights:
            weights["b_mag"] = weights["b_mag"] + weights["r_mag"].exp() * shift
    code, bias = _to_code(config, weights, norms)
    if unknown := sorted(set(weights) - {"W_enc", "W_dec", "b_dec", *_WEIGHTS[config["architecture"]]}):
        raise ValueError(f"path: {folder / WEIGHTS} has {unknown}, which the model here would leave out: fold it")
    model = DictionaryAutoencoder(atoms.shape[1], atoms.shape[0], code, unit_norm=unit_norm, normalize=False)
    model.encoder.weight.copy_(encoder)
    model.encoder.bias.copy_(bias)
    model.decoder.atoms.copy_(atoms)
    model.pre_bias.copy_(pre_bias)
    model.norm_batches.fill_(1)  # training on starts from this pre-bias and not from the data's mean
    return model


def _fault(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str | None:
    """What is missing or does not fit among settings and weights of a known architecture."""
    dictionary = weights.get("W_dec")
    if dictionary is None or dictionary.ndim != 2:
        return "there is no matrix W_dec"
    n, d = dictionary.shape
    architecture = config.get("architecture")
    own = _WEIGHTS.get(architecture, ()) if isinstance(architecture, str) else ()
    for name, shape in {"W_enc": (d, n), "b_dec": (d,), **dict.fromkeys(own, (n,))}.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            got = f"is {tuple(weights[name].shape)}" if name in weights else "is missing"
            return f"{name} {got}, expected {shape} for W_dec {(n, d)}"
    k = config.get("k")
    if architecture == "topk" and "k" in config and (type(k) is not int or not 0 < k <= n):
        return f"k is {k!r}, expected a whole number from 1 to {n}"
    return None


def _to_code(config: Mapping[str, Any], weights: Mapping[str, Tensor], norms: Tensor) -> tuple[Code, Tensor]:
    """The code, and the encoder's bias."""
    architecture = config.get("architecture")
    # SAELens before 6 wrote codes beside the architecture
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation not in ("relu", architecture) or (architecture == "topk" and "k" not in config):
        raise ValueError(
            f"path: expected a file of SAELens 6, got one with architecture {architecture!r} and activation_fn "
            f"{activation!r}: load it there and save it again."
        )
    if architecture == "standard":
        return L1Code(0.0, "relu"), weights["b_enc"]
    if architecture == "topk":
        return TopKCode(int(config["k"])), weights["b_enc"]
    if architecture == "jumprelu":
        jump = JumpReLUCode(len(norms), 0.0)
        # a threshold of 0, or less, leaves ReLU; here it has to be positive
        jump.set_threshold((weights["threshold"] * norms).clamp_min(1e-20))
        return jump, weights["b_enc"]
    if architecture == "gated":
        gated = GatedCode(len(norms), 0.0)
        gated.log_gain.copy_(weights["r_mag"])
        gated.bias.copy_((weights["b_mag"] - weights["r_mag"].exp() * weights["b_gate"]) * norms)
        return gated, weights["b_gate"]
    raise ValueError(f"path: expected architecture standard, topk, jumprelu or gated, got {architecture!r}.")
