"""Perceptrons by hand, tied or not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_ae import MLPDecoder, MLPEncoder, mlp_pair


def draw_biases(*networks):
    """Biases start at zero, which would hide them."""
    for network in networks:
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)


def by_hand(h, layers):
    """``relu`` between affine maps given as (weight, bias)."""
    for i, (w, b) in enumerate(layers):
        h = h @ w.detach().double().numpy().T + b.detach().double().numpy()
        h = np.maximum(h, 0) if i < len(layers) - 1 else h
    return h


def test_encoder_and_decoder_are_affine_maps_with_relu_between():
    encoder, decoder = mlp_pair((2, 3), 4, hidden=(8, 5))
    draw_biases(encoder, decoder)
    x = torch.randn(7, 2, 3)
    z = by_hand(x.double().numpy().reshape(7, 6), [(m.weight, m.bias) for m in encoder.linears()])
    linears = [m for m in decoder.layers if isinstance(m, nn.Linear)]
    assert [m.out_features for m in encoder.linears()] == [8, 5, 4]
    assert [m.out_features for m in linears] == [5, 8, 6]
    np.testing.assert_allclose(encoder(x).detach(), z, rtol=1e-4, atol=1e-5)
    expected = by_hand(z, [(m.weight, m.bias) for m in linears]).reshape(7, 2, 3)
    np.testing.assert_allclose(decoder(encoder(x)).detach(), expected, rtol=1e-4, atol=1e-5)


def test_tied_decoder_is_the_transpose_layer_by_layer():
    encoder, decoder = mlp_pair(6, 4, hidden=(8, 5), tied=True)
    draw_biases(encoder, decoder)
    tied = [m for m in decoder.layers if hasattr(m, "weight")]
    sources = encoder.linears()[::-1]
    assert all(a.weight is b.weight for a, b in zip(tied, sources, strict=True))
    z = torch.randn(7, 4)
    expected = by_hand(z.double().numpy(), [(a.weight.t(), b.bias) for a, b in zip(sources, tied, strict=True)])
    np.testing.assert_allclose(decoder(z).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_counts(tied):
    networks = nn.ModuleList(mlp_pair(6, 4, hidden=(8, 5), tied=tied))
    weights = 6 * 8 + 8 * 5 + 5 * 4
    biases = (8 + 5 + 4) + (5 + 8 + 6)
    assert sum(p.numel() for p in networks.parameters()) == (1 if tied else 2) * weights + biases


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: model.double()], ids=["deepcopy", "double"])
def test_tied_weights_stay_tied(change):
    encoder, decoder = change(nn.ModuleList(mlp_pair(6, 4, hidden=(8,), tied=True)))
    for mine, theirs in zip((decoder.layers[0], decoder.layers[-1]), encoder.linears()[::-1], strict=True):
        assert mine.weight is theirs.weight


def test_an_encoder_that_is_no_mirror_image_cannot_be_tied():
    with pytest.raises(ValueError, match=r"tied_to: its mirror image has sizes \[4, 8, 6\], but .* \[4, 7, 6\]"):
        MLPDecoder(4, 6, hidden=(7,), tied_to=MLPEncoder(6, 4, hidden=(8,)))


@pytest.mark.parametrize("tied", [False, True])
def test_bias_init_is_where_the_hidden_biases_start(tied):
    encoder, decoder = mlp_pair(6, 4, hidden=(8, 5), bias_init=0.05, tied=tied)
    for network in (encoder, decoder):
        *hidden, last = [m for m in network.layers if hasattr(m, "bias")]
        assert len(hidden) == 2
        assert all(m.bias.eq(torch.tensor(0.05)).all() for m in hidden)
        assert last.bias.eq(0).all()


def test_latent_activation_is_on_the_output_of_the_encoder_only():
    encoder, decoder = mlp_pair(6, 4, hidden=(), latent_activation="sigmoid")
    x = torch.randn(7, 6)
    (linear,) = encoder.linears()
    a = x @ linear.weight.t() + linear.bias
    torch.testing.assert_close(encoder(x), 1 / (1 + torch.exp(-a)))
    assert len(decoder.layers) == 1


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm)])
@pytest.mark.parametrize("tied", [False, True])
def test_norm_stands_before_each_hidden_activation(norm, kind, tied):
    for network in mlp_pair(6, 4, hidden=(8, 5), norm=norm, tied=tied):
        layers = list(network.layers)
        after = [layers[i + 1] for i, layer in enumerate(layers) if isinstance(layer, kind)]
        assert len(after) == 2
        assert all(isinstance(layer, nn.ReLU) for layer in after)


@pytest.mark.parametrize("shape", [7, (7,), (2, 3), (1, 8, 8), (2, 3, 4, 5)])
def test_output_shape_is_the_input_shape(shape):
    encoder, decoder = mlp_pair(shape, 3, hidden=(5,))
    x = torch.randn(2, *((shape,) if isinstance(shape, int) else shape))
    assert encoder(x).shape == (2, 3)
    assert decoder(encoder(x)).shape == x.shape


def test_dropout_is_in_hidden_layers_in_training_only_and_none_by_default():
    encoder, decoder = mlp_pair(6, 2, (5, 4), dropout=0.5)
    for net in (encoder, decoder):
        assert [type(layer).__name__ for layer in net.layers] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    x = torch.randn(64, 6)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    assert not any("Dropout" in type(module).__name__ for module in mlp_pair(6, 2, (5,))[0].modules())
    with pytest.raises(ValueError, match=r"dropout: expected a number in \[0, 1\)"):
        mlp_pair(6, 2, (), dropout=1.0)
