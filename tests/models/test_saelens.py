"""SAELens' format: its own code gives what we give, and its files load here."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_ae import load_saelens, save_saelens
from lightning_ae.codes import (
    BatchTopKCode,
    GatedCode,
    JumpReLUCode,
    KLSparsityCode,
    L1Code,
    TopKCode,
)
from lightning_ae.models import DictionaryAutoencoder, LinearAutoencoder

D, N = 8, 40


def data(n=200):
    return 5 * torch.randn(n, D, generator=torch.Generator().manual_seed(5)) + 2


CODES = {
    "standard": lambda: L1Code(0.1, "relu"),
    "topk": lambda: TopKCode(5),
    "batchtopk": lambda: BatchTopKCode(5, width=N),
    "jumprelu": lambda: JumpReLUCode(N, 0.1, init_threshold=0.3),
    "gated": lambda: GatedCode(N, 0.1),
}
EACH = pytest.mark.parametrize("name", CODES)
EITHER_NORM = pytest.mark.parametrize("unit_norm", [True, False])


def trained(name, unit_norm=True):
    """A model with nothing at its initial value, and an input scale."""
    torch.manual_seed(0)
    model = DictionaryAutoencoder(D, N, CODES[name](), unit_norm=unit_norm)
    model.observe(data())
    model(data())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.normalize_atoms()
        if not unit_norm:
            model.decoder.atoms.mul_(torch.rand(N, 1) + 0.5)
    assert model.input_scale.item() != pytest.approx(1, abs=0.1)
    return model.eval()


def dense(z):
    return z.to_dense()


def by_the_file(folder, x):
    """What SAELens computes from a file, in its documented equations."""
    config = json.loads((folder / "cfg.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    centred = x.double() - w["b_dec"]
    h = centred @ w["W_enc"]
    if config["architecture"] == "gated":
        z = ((h + w["b_gate"]) > 0) * (centred @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    else:
        h = h + w["b_enc"]
        if config["architecture"] == "topk":
            best = h.topk(config["k"])
            z = torch.zeros_like(h).scatter(1, best.indices, best.values.relu())
        else:
            z = h.relu() * (h > w["threshold"]) if config["architecture"] == "jumprelu" else h.relu()
    return z, z @ w["W_dec"] + w["b_dec"]


@EACH
@EITHER_NORM
def test_the_file_holds_the_same_function(tmp_path, name, unit_norm):
    model = trained(name, unit_norm)
    save_saelens(model, tmp_path)
    z, x_hat = by_the_file(tmp_path, data())
    with torch.no_grad():
        torch.testing.assert_close(dense(model.encode(data())).double(), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.reconstruct(data()).double(), x_hat, atol=1e-5, rtol=1e-5)
    assert 0 < (z != 0).double().mean() < 0.9


@EACH
@EITHER_NORM
def test_saelens_gives_the_same_outputs(tmp_path, name, unit_norm):
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (pip install sae-lens)")
    model = trained(name, unit_norm)
    save_saelens(model, tmp_path, metadata={"model_name": "ours", "hook_name": "blocks.0.hook_resid_pre"})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_pre"
    with torch.no_grad():
        z = theirs.encode(data())
        torch.testing.assert_close(dense(model.encode(data())), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.reconstruct(data()), theirs(data()), atol=1e-5, rtol=1e-5)
    assert (z != 0).any()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((kind, {}) for kind in ("standard", "topk", "jumprelu", "gated")),
        *((kind, {"apply_b_dec_to_input": False}) for kind in ("standard", "topk", "jumprelu", "gated")),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_what_saelens_saved_gives_the_same_here(tmp_path, architecture, options):
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (pip install sae-lens)")
    kinds = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU", "gated": "Gated"}
    config = getattr(sae_lens, f"{kinds[architecture]}SAEConfig")
    theirs = getattr(sae_lens, f"{kinds[architecture]}SAE")(
        config(d_in=D, d_sae=N, **({"k": 5} if architecture == "topk" else {}), **options)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if architecture == "jumprelu":
            theirs.threshold.abs_()
    theirs.save_model(tmp_path)
    model = load_saelens(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(dense(model.encode(data())), theirs.encode(data()), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(model.reconstruct(data()), theirs(data()), atol=1e-4, rtol=1e-5)


@EACH
@EITHER_NORM
def test_loading_gives_the_model_back(tmp_path, name, unit_norm):
    model = trained(name, unit_norm)
    before = copy.deepcopy(list(model.parameters()))
    save_saelens(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    again = load_saelens(tmp_path)
    assert again.input_scale.item() == 1
    with torch.no_grad():
        torch.testing.assert_close(dense(again.encode(data())), dense(model.encode(data())), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.reconstruct(data()), model.reconstruct(data()), atol=1e-5, rtol=1e-5)
    assert type(again.code) is (JumpReLUCode if name == "batchtopk" else type(model.code))


def test_norms_of_one_are_kept_at_one_and_others_are_left(tmp_path):
    model = trained("topk")
    model.input_scale.fill_(1.0)
    save_saelens(model, tmp_path)
    assert load_saelens(tmp_path).unit_norm
    save_saelens(trained("topk", unit_norm=False), tmp_path)
    assert not load_saelens(tmp_path).unit_norm


def test_training_goes_on_from_the_pre_bias_that_was_loaded(tmp_path):
    save_saelens(trained("topk"), tmp_path)
    model = load_saelens(tmp_path)
    before = model.pre_bias.clone()
    model.observe(data())
    assert torch.equal(model.pre_bias, before)
    assert model.input_scale.item() == 1


def test_codes_that_saelens_lacks_are_errors(tmp_path):
    for code in (L1Code(0.1), KLSparsityCode(0.1, 0.1)):
        with pytest.raises(ValueError, match="model: SAELens has no architecture for"):
            save_saelens(DictionaryAutoencoder(D, N, code), tmp_path)
    with pytest.raises(ValueError, match="the threshold of its BatchTopKCode is not learned yet"):
        save_saelens(DictionaryAutoencoder(D, N, BatchTopKCode(3)), tmp_path)
    with pytest.raises(TypeError, match="model: expected a DictionaryAutoencoder, got a LinearAutoencoder"):
        save_saelens(LinearAutoencoder(D, 2), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "transcoder"}, "expected architecture standard, topk, jumprelu or gated, got 'transcoder'"),
        ({"normalize_activations": "layer_norm"}, "expected normalize_activations 'none'"),
        ({"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 3}}, "of SAELens 6"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, "of SAELens 6"),
    ],
)
def test_files_that_cannot_be_the_same_function_are_errors(tmp_path, change, message):
    save_saelens(trained("topk"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | change
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_saelens(tmp_path)


def test_weights_that_would_be_left_out_are_an_error(tmp_path):
    save_saelens(trained("topk"), tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    save_file({**load_file(file), "scaling_factor": torch.full((N,), 2.0)}, file)
    with pytest.raises(ValueError, match=r"has \['scaling_factor'\]"):
        load_saelens(tmp_path)


def test_a_missing_file_is_an_error(tmp_path):
    save_file({"W_enc": torch.zeros(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"found no .*cfg.json"):
        load_saelens(tmp_path)
