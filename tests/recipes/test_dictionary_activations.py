"""The recipe on a dictionary of activations in a tiny form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_ae import load_saelens
from lightning_ae.data import ActivationShards

RECIPE = Path(__file__).parents[2] / "recipes" / "dictionary_activations.py"
TINY = ["--classifier-epochs", "6", "--channels", "16", "--latents", "64", "--k", "4", "--epochs", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("dictionary_activations")
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("dictionary_activations", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main([*TINY, "--threads", "1", "--out", str(out)])
    torch.set_num_threads(threads)
    return found, out


def test_it_writes_numbers_a_picture_shards_and_saelens_files(run):
    numbers, out = run
    assert json.loads((out / "numbers.json").read_text()) == numbers
    assert (out / "dictionary_activations.png").read_bytes().startswith(b"\x89PNG")
    shards = ActivationShards(out / "activations" / "train")
    assert len(shards) == numbers["rows"] == 1438 * 64
    assert len(shards.sizes) == numbers["shards"] == 6
    assert load_file(out / "saelens" / "sae_weights.safetensors")["W_enc"].shape == (16, 64)
    assert load_saelens(out / "saelens").code.k == 4


def test_the_dictionary_keeps_more_than_as_many_components_and_what_the_network_needs(run):
    numbers, _ = run
    assert numbers["accuracy"] > 0.85
    assert 0 < numbers["l0"] <= 4
    assert numbers["fvu"] < 0.8 * numbers["fvu_pca"] < numbers["fvu_pca"] < 0.5
    assert numbers["loss_clean"] < numbers["loss_splice"] < numbers["loss_mean"]
    for ablated in ("zero", "mean"):
        gap = numbers[f"loss_{ablated}"] - numbers["loss_clean"]
        share = (numbers[f"loss_{ablated}"] - numbers["loss_splice"]) / gap
        assert numbers[f"recovered_{ablated}"] == pytest.approx(share)
        assert share > 0.7
    assert numbers["relative_bias"] == pytest.approx(1, abs=0.05)
    assert numbers["norm_ratio"] < 1
