"""The way down and the way up, for every size."""

import pytest
import torch
from torch import nn

from lightning_ae import conv_pair

KINDS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


def spatial_sizes(dims):
    """Every size from 1 to 33 in one and two dimensions, the others mixed with them; a few in three."""
    if dims == 3:
        return [(1, 1, 1), (2, 3, 4), (5, 9, 1), (8, 7, 6), (9, 16, 3)]
    return [(n, 34 - n)[:dims] for n in range(1, 34)]


SIZES = [(dims, size) for dims in (1, 2, 3) for size in spatial_sizes(dims)]


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize(("dims", "size"), SIZES, ids=str)
def test_output_shape_is_the_input_shape(dims, size, kernel_size):
    shape = ((1, 2, 3, 5)[sum(size) % 4], *size)
    encoder, decoder = conv_pair(shape, 3, channels=(4, 6, 5), kernel_size=kernel_size)
    x = torch.randn(2, *shape)
    z = encoder(x)
    assert z.shape == (2, 3)
    assert decoder(z).shape == x.shape


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_any_channels_and_depth_return_to_the_input_shape(channels, depth):
    shape = (channels, 13, 22)
    encoder, decoder = conv_pair(shape, 3, channels=(4, 5, 6, 7)[:depth])
    assert decoder(encoder(torch.randn(2, *shape))).shape == (2, *shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_networks_are_made_of_the_layers_of_their_dimension(dims):
    encoder, decoder = conv_pair((2,) + (8,) * dims, 3, channels=(4, 6))
    down, up = KINDS[dims]
    assert [m.out_channels for m in encoder.modules() if isinstance(m, down)] == [4, 6]
    assert [m.out_channels for m in decoder.modules() if isinstance(m, up)] == [4, 2]
    assert [m.in_channels for m in decoder.modules() if isinstance(m, up)] == [6, 4]


def test_the_decoder_can_give_another_number_of_channels():
    encoder, decoder = conv_pair((1, 9, 9), 3, channels=(4,), out_shape=(2, 9, 9))
    assert decoder(encoder(torch.zeros(2, 1, 9, 9))).shape == (2, 2, 9, 9)


def test_every_output_depends_on_the_latent_and_every_latent_on_each_corner():
    shape = (1, 11, 6)
    encoder, decoder = conv_pair(shape, 4, channels=(8, 8), activation="tanh")
    down = torch.func.jacrev(encoder)(torch.randn(1, *shape))[0, :, 0, 0]
    up = torch.func.jacrev(decoder)(torch.randn(1, 4))[0, 0, :, :, 0]
    assert down.abs().gt(0).all()
    assert up.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_norm_stands_before_each_activation(norm):
    kinds = {"batch": nn.BatchNorm2d, "layer": nn.GroupNorm, None: type(None)}
    for network in conv_pair((1, 8, 8), 3, channels=(4, 6), norm=norm):
        layers = list(network.layers)
        normed = [layers[i + 1] for i, m in enumerate(layers) if isinstance(m, kinds[norm])]
        assert len([m for m in layers if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]) == len(normed)
        assert all(isinstance(m, nn.ReLU) for m in normed)
        assert len(normed) == (0 if norm is None else 2)


def test_the_last_layer_has_no_activation():
    encoder, decoder = conv_pair((1, 8, 8), 3)
    assert isinstance(encoder.layers[-1], nn.Linear)
    assert isinstance(decoder.layers[-1], nn.ConvTranspose2d)


def test_bias_init_is_where_the_hidden_biases_start():
    encoder, decoder = conv_pair((1, 8, 8), 3, channels=(4, 6), bias_init=0.05)
    hidden = [*encoder.layers[:-1], *decoder.layers[:-1]]
    assert all(m.bias.eq(0.05).all() for m in hidden if hasattr(m, "bias"))
    assert encoder.layers[-1].bias.eq(0).all()
    assert decoder.layers[-1].bias.eq(0).all()


@pytest.mark.parametrize(("dims", "size"), SIZES[::4], ids=str)
def test_a_map_has_the_size_halved_once_a_convolution_and_leads_back_to_the_input(dims, size):
    shape = (2, *size)
    encoder, decoder = conv_pair(shape, 3, channels=(4, 6), spatial=True, h_dim=5)
    places = tuple(-(-n // 4) for n in size)
    assert encoder(torch.randn(2, *shape)).shape == (2, 5, *places) == (2, *encoder.h_shape)
    assert decoder.latent_shape == (3, *places)
    assert decoder(torch.randn(2, 3, *places)).shape == (2, *shape)


def test_a_place_of_a_map_sees_its_own_part_of_the_input_only():
    encoder, decoder = conv_pair((1, 16, 16), 2, channels=(4, 6), activation="tanh", spatial=True)
    seen = torch.func.jacrev(encoder)(torch.randn(1, 1, 16, 16))[0, :, 0, 0, 0, 0].abs().sum(0)
    assert seen[:4, :4].gt(0).all()
    assert seen[4:].eq(0).all()
    assert seen[:, 4:].eq(0).all()
    drawn = torch.func.jacrev(decoder)(torch.randn(1, 2, 4, 4))[0, 0, :, :, 0, :, 0, 0].abs().sum(-1)
    assert drawn[:4, :4].gt(0).all()
    assert drawn[5:].eq(0).all()


def test_dropout_is_of_whole_channels_and_none_by_default():
    encoder, decoder = conv_pair((1, 8, 8), 2, (4, 8), dropout=0.5)
    for net in (encoder, decoder):
        assert sum(isinstance(module, torch.nn.Dropout2d) for module in net.modules()) == 2
    maps = encoder.layers[:3](torch.rand(16, 1, 8, 8)).abs().sum((2, 3))
    assert 0.2 < maps.eq(0).float().mean() < 0.8
    assert not any("Dropout" in type(module).__name__ for net in conv_pair((1, 8, 8), 2) for module in net.modules())
