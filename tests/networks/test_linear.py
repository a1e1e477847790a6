"""Linear maps, and weights tied by construction."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_ae import LinearDecoder, LinearEncoder
from lightning_ae.networks import TiedLinear


def pair(tied=True, bias=True):
    torch.manual_seed(0)
    encoder = LinearEncoder((2, 3), 4, bias)
    decoder = LinearDecoder(4, (2, 3), bias, tied_to=encoder if tied else None)
    for module in (encoder, decoder):  # biases start at zero, which would hide them
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return nn.ModuleList([encoder, decoder])


def numbers(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_maps_are_matrix_products(tied, bias):
    encoder, decoder = pair(tied, bias)
    x = torch.randn(5, 2, 3)
    w, d = encoder.weight.detach().numpy(), decoder.weight.detach().numpy()
    b = encoder.bias.detach().numpy() if bias else 0.0
    c = decoder.layer.bias.detach().numpy() if bias else 0.0
    z = x.numpy().reshape(5, 6) @ w.T + b
    np.testing.assert_allclose(encoder(x).detach(), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(decoder(encoder(x)).detach(), (z @ d.T + c).reshape(5, 2, 3), rtol=1e-5, atol=1e-6)
    assert np.array_equal(d, w.T) == tied


def test_there_are_dk_weights_tied_and_2dk_untied():
    assert numbers(pair(tied=True, bias=False)) == 6 * 4
    assert numbers(pair(tied=False, bias=False)) == 2 * 6 * 4
    assert numbers(pair(tied=True)) == 6 * 4 + 4 + 6
    assert numbers(pair(tied=False)) == 2 * 6 * 4 + 4 + 6


def test_tied_gradient_is_the_sum_of_the_untied_ones():
    tied, untied = pair(tied=True), pair(tied=False)
    with torch.no_grad():
        untied[0].load_state_dict(tied[0].state_dict())
        untied[1].layer.weight.copy_(tied[0].weight.t())
        untied[1].layer.bias.copy_(tied[1].layer.bias)
    x = torch.randn(5, 2, 3)
    for encoder, decoder in (tied, untied):
        decoder(encoder(x)).square().sum().backward()
    torch.testing.assert_close(tied[0].weight.grad, untied[0].weight.grad + untied[1].layer.weight.grad.t())


def step(model):
    """One step of an optimizer, which an untied copy would not survive in step."""
    encoder, decoder = model
    x = torch.randn(5, 2, 3, dtype=encoder.weight.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    decoder(encoder(x)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model, id="as-built"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: model.double(), id="double"),
        pytest.param(lambda model: model.to("cpu", torch.float32), id="to"),
        pytest.param(lambda model: (model.load_state_dict(pair().state_dict()), model)[1], id="load_state_dict"),
    ],
)
def test_tied_weights_stay_tied(change):
    model = change(pair())
    step(model)
    encoder, decoder = model
    assert torch.equal(decoder.weight, encoder.weight.t())
    assert decoder.layer.weight is encoder.weight
    assert len([p for p in model.parameters() if p.ndim == 2]) == 1


def test_an_encoder_of_other_sizes_cannot_be_tied():
    with pytest.raises(ValueError, match=r"tied_to: expected an encoder with weight \(4, 6\), got \(3, 6\)"):
        LinearDecoder(4, (2, 3), tied_to=LinearEncoder(6, 3))


def test_tied_linear_shows_its_own_sizes():
    assert repr(TiedLinear(nn.Linear(3, 2), bias=False)) == "TiedLinear(in_features=2, out_features=3, bias=False)"
