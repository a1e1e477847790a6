"""Wrong sizes and names are stopped at the door, with the argument's name."""

import pytest
import torch

from lightning_ae import (
    Autoencoder,
    Code,
    CodeOutput,
    ConvDecoder,
    ConvEncoder,
    LinearDecoder,
    LinearEncoder,
    MLPDecoder,
    MLPEncoder,
    conv_pair,
    mlp_pair,
)
from lightning_ae.networks.shapes import check_shape

ENCODERS = [
    pytest.param(lambda shape, k: LinearEncoder(shape, k), id="linear"),
    pytest.param(lambda shape, k: MLPEncoder(shape, k, hidden=(5,)), id="mlp"),
    pytest.param(lambda shape, k: ConvEncoder(shape, k, channels=(4,)), id="conv"),
]
DECODERS = [
    pytest.param(lambda k, shape: LinearDecoder(k, shape), id="linear"),
    pytest.param(lambda k, shape: MLPDecoder(k, shape, hidden=(5,)), id="mlp"),
    pytest.param(lambda k, shape: ConvDecoder(k, shape, channels=(4,)), id="conv"),
]


@pytest.mark.parametrize("latent_dim", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("make", ENCODERS)
def test_encoders_refuse_a_latent_that_is_no_positive_number(make, latent_dim):
    error = ValueError if type(latent_dim) is int else TypeError
    with pytest.raises(error, match=r"^latent_dim: expected a positive whole number, got"):
        make((1, 6, 6), latent_dim)


@pytest.mark.parametrize("latent_dim", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("make", DECODERS)
def test_decoders_refuse_a_latent_that_is_no_positive_number(make, latent_dim):
    error = ValueError if type(latent_dim) is int else TypeError
    with pytest.raises(error, match=r"^latent_dim: expected a positive whole number, got"):
        make(latent_dim, (1, 6, 6))


@pytest.mark.parametrize("shape", [(), (1, 0, 6), (1, -6, 6), (1, 6.0, 6)])
@pytest.mark.parametrize("make", ENCODERS)
def test_encoders_refuse_a_shape_with_sizes_that_are_not_positive(make, shape):
    error = ValueError if all(type(size) is int for size in shape) else TypeError
    with pytest.raises(error, match=r"^in_shape: expected a positive number or a sequence of them, got"):
        make(shape, 2)


@pytest.mark.parametrize("shape", [(), (1, 0, 6), (1, -6, 6), (1, 6.0, 6)])
@pytest.mark.parametrize("make", DECODERS)
def test_decoders_refuse_a_shape_with_sizes_that_are_not_positive(make, shape):
    error = ValueError if all(type(size) is int for size in shape) else TypeError
    with pytest.raises(error, match=r"^out_shape: expected a positive number or a sequence of them, got"):
        make(2, shape)


@pytest.mark.parametrize("batch", [(2, 1, 6, 7), (2, 3, 6, 6), (2, 36), (1, 6, 6)])
@pytest.mark.parametrize("make", ENCODERS)
def test_encoders_refuse_a_batch_of_another_shape(make, batch):
    # 36 numbers would pass through a flatten without a word
    with pytest.raises(ValueError, match=r"Encoder: expected a batch \(B, 1, 6, 6\), got"):
        make((1, 6, 6), 2)(torch.zeros(batch))


@pytest.mark.parametrize("kernel_size", [0, 1, 2, 4])
@pytest.mark.parametrize("Network", [lambda **k: ConvEncoder((1, 6), 2, **k), lambda **k: ConvDecoder(2, (1, 6), **k)])
def test_a_kernel_must_be_odd_and_at_least_three(Network, kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size: expected an odd number >= 3, got {kernel_size}"):
        Network(kernel_size=kernel_size)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3, 4, 5)])
def test_convolutions_have_one_to_three_spatial_dimensions(shape):
    with pytest.raises(ValueError, match=r"in_shape: expected .* with 1 to 3 spatial dimensions, got"):
        ConvEncoder(shape, 2)
    with pytest.raises(ValueError, match=r"out_shape: expected .* with 1 to 3 spatial dimensions, got"):
        ConvDecoder(2, shape)


@pytest.mark.parametrize("channels", [(), (0,), (4, -1)])
def test_channels_must_be_positive_numbers(channels):
    with pytest.raises(ValueError, match="channels: expected"):
        conv_pair((1, 6), 2, channels)


@pytest.mark.parametrize("hidden", [(0,), (4, -1), (2.5,)])
def test_hidden_sizes_must_be_positive_numbers(hidden):
    error = ValueError if all(type(size) is int for size in hidden) else TypeError
    with pytest.raises(error, match="hidden: expected a positive whole number, got"):
        mlp_pair(6, 2, hidden)


@pytest.mark.parametrize("pair", [lambda **k: mlp_pair((1, 6), 2, **k), lambda **k: conv_pair((1, 6), 2, **k)])
def test_unknown_names_are_an_error_that_lists_the_known(pair):
    with pytest.raises(ValueError, match=r"activation: expected one of .*'relu'.*, got 'swish'"):
        pair(activation="swish")
    with pytest.raises(ValueError, match="norm: expected 'batch', 'layer' or None, got 'instance'"):
        pair(norm="instance")


def test_a_number_is_the_flat_shape():
    assert check_shape(64) == (64,)
    assert check_shape([1, 8, 8]) == (1, 8, 8)
    assert LinearEncoder(5, 2)(torch.zeros(3, 5)).shape == (3, 2)
    assert LinearDecoder(2, 5)(torch.zeros(3, 2)).shape == (3, 5)


class Halves(Code):
    """Takes twice what it gives."""

    def forward(self, h):
        return CodeOutput(h[:, ::2], {})

    def h_shape(self, latent_shape):
        return (2 * latent_shape[0], *latent_shape[1:])


@pytest.mark.parametrize(
    "pair",
    [lambda h: mlp_pair(6, 2, (5,), h_dim=h), lambda h: conv_pair((1, 6), 2, (4,), h_dim=h, spatial=True)],
)
def test_an_encoder_that_gives_another_size_than_the_code_takes_is_refused(pair):
    with pytest.raises(ValueError, match=r"encoder: for Halves and .* latents \(2,.*must give \(4,.*got \(2,"):
        Autoencoder(*pair(None), code=Halves())
    with pytest.raises(ValueError, match=r"encoder: for Identity .*must give \(2,.*got \(4,"):
        Autoencoder(*pair(4))
    encoder, decoder = pair(4)
    x = torch.zeros(3, *encoder.in_shape)
    assert Autoencoder(encoder, decoder, code=Halves()).reconstruct(x).shape == x.shape
