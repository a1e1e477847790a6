from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ae.diagnostics.remedies import ScaleOutput, StandardizeInput


def test_what_the_first_layer_reads_is_standardised_and_the_checkpoint_loads_after_the_remedy():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    assert StandardizeInput("0", 3).apply(network)
    x = 500 + 20 * torch.randn(400, 3)
    network(x)
    again = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0.input_count"):
        again.load_state_dict(network.state_dict())
    assert StandardizeInput("0", 3).apply(again)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(x), network.eval()(x))
    z = (x - x.mean(0)) / x.var(0, correction=0).mean().sqrt()
    hidden = network[1](nn.functional.linear(z, network[0].weight, network[0].bias))
    torch.testing.assert_close(network(x), network[2](hidden), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_is_found_by_its_own_name():
    network = nn.Sequential(torch.compile(nn.Linear(3, 2), backend="eager"), nn.ReLU())
    assert StandardizeInput("0", 3).apply(network)
    network(5 + torch.randn(64, 3))
    assert network[0]._orig_mod.input_count == 64


@pytest.mark.parametrize(
    ("layer", "features", "why"),
    [
        (nn.Embedding(9, 3), 3, "reads something else"),
        (nn.MultiheadAttention(4, 2), 4, "reads something else"),
        (nn.Bilinear(3, 3, 1), 3, "reads something else"),
        (nn.Linear(3, 1), 5, "reads 3, got 5"),
        (nn.Linear(3, 1), 0, "expected a positive number"),
    ],
)
def test_what_cannot_be_standardised_says_why(layer, features, why):
    before = sorted(layer.state_dict())
    change = StandardizeInput("0", features).apply(nn.Sequential(layer))
    assert not change
    assert why in change.what
    assert sorted(layer.state_dict()) == before


def test_what_is_scaled_already_is_not_scaled_again():
    network = nn.Sequential(nn.Linear(3, 1))
    for remedy in (StandardizeInput("0", 3), ScaleOutput("0", 5.0, 2.0)):
        assert remedy.apply(network)
        change = remedy.apply(network)
        assert not change
        assert "already" in change.what
    x = torch.randn(4, 3)
    torch.testing.assert_close(network.eval()(x), 2 * nn.functional.linear(x, network[0].weight, network[0].bias) + 5)


@pytest.mark.parametrize("remedy", [StandardizeInput("9", 3), ScaleOutput("9", 0.0, 1.0)])
def test_a_layer_that_is_not_there_is_named(remedy):
    assert remedy.apply(nn.Sequential(nn.Linear(3, 1))) == (False, "there is no layer 9")


@pytest.mark.parametrize(
    ("layer", "std"), [(nn.LSTM(2, 1), 1.0), (nn.Linear(2, 1), 0.0), (nn.Linear(2, 1), float("nan"))]
)
def test_an_output_that_cannot_be_scaled_says_why(layer, std):
    change = ScaleOutput("0", 1.0, std).apply(nn.Sequential(layer))
    assert not change
    assert "more than one tensor" in change.what or "std: expected a positive number" in change.what
