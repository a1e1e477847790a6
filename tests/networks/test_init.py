"""Weights are drawn so that signals keep their size."""

import math

import pytest
import torch
from torch import nn

from lightning_ae.networks import initialise, make_activation
from lightning_ae.networks.init import _ACTIVATIONS

CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def second_moments(layers, activation, x):
    """E[y²] of each layer's output, before its activation."""
    moments = []
    for layer in layers:
        initialise(layer, activation)
        x = layer(x)
        moments.append(x.square().mean().item())
        x = make_activation(activation)(x)
    return moments


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity"])
def test_second_moments_stay_the_same_through_deep_linear_layers(activation):
    moments = second_moments([nn.Linear(512, 512) for _ in range(15)], activation, torch.randn(64, 512))
    assert 1 / 3 < moments[-1] / moments[0] < 3  # a gain wrong by √2 gives 2^14


@torch.no_grad()
def test_tanh_layers_neither_die_nor_saturate():
    moments = second_moments([nn.Linear(256, 256) for _ in range(30)], "tanh", torch.randn(64, 256))
    assert 0.3 < moments[-1] < 3


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "silu", "elu"])
def test_smooth_relatives_of_relu_keep_a_signal_through_ten_layers(activation):
    # Kaiming's factor is that of ReLU, so these are near its balance, not at it
    moments = second_moments([nn.Linear(256, 256) for _ in range(10)], activation, torch.randn(64, 256))
    assert 1e-3 < moments[-1] / moments[0] < 1e3


@torch.no_grad()
@pytest.mark.parametrize(("dims", "side"), [(1, 1024), (2, 64)])
@pytest.mark.parametrize("stride", [1, 2])
def test_second_moments_stay_the_same_through_convolutions(dims, side, stride):
    layers = [CONVS[dims][0](64, 64, 3, stride, padding=1) for _ in range(4)]
    moments = second_moments(layers, "relu", torch.randn(1, 64, *(side,) * dims))
    assert 0.7 < (moments[-1] / moments[0]) ** (1 / 3) < 1.4  # a gain wrong by √2 gives a factor of 2 each


@torch.no_grad()
@pytest.mark.parametrize(("dims", "side"), [(1, 64), (2, 8), (3, 4)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_second_moments_stay_the_same_through_transposed_convolutions(dims, side, kernel_size):
    depth = 4 if dims < 3 else 2
    layers = [
        CONVS[dims][1](48, 48, kernel_size, stride=2, padding=kernel_size // 2, output_padding=1) for _ in range(depth)
    ]
    moments = second_moments(layers, "relu", torch.randn(4, 48, *(side,) * dims))
    # without the stride each layer would shrink it by 2^dims
    assert 0.6 < (moments[-1] / moments[0]) ** (1 / (depth - 1)) < 1.5


@pytest.mark.parametrize(
    ("activation", "variance"),
    [
        ("relu", 2 / 400),
        ("gelu", 2 / 400),
        ("leaky_relu", 2 / (1 + 0.01**2) / 400),
        ("identity", 2 / 1000),
        ("sigmoid", 2 / 1000),
        ("softplus", 2 / 1000),
        ("tanh", 2 * (5 / 3) ** 2 / 1000),
    ],
)
def test_variance_of_the_weights_is_that_of_the_docstring(activation, variance):
    layer = nn.Linear(400, 600)
    initialise(layer, activation)
    n = layer.weight.numel()
    assert layer.weight.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))
    assert layer.weight.mean().item() == pytest.approx(0, abs=5 * math.sqrt(variance / n))


def test_biases_start_at_the_given_value_and_a_layer_may_have_none():
    layer = nn.Linear(3, 2)
    initialise(layer, "relu", bias=0.01)
    assert layer.bias.eq(0.01).all()
    bare = nn.Linear(3, 2, bias=False)
    initialise(bare, "relu", bias=0.01)
    assert bare.bias is None
    assert bare.weight.isfinite().all()


REFERENCES = {
    "relu": lambda a: max(a, 0.0),
    "leaky_relu": lambda a: a if a > 0 else 0.01 * a,
    "elu": lambda a: a if a > 0 else math.expm1(a),
    "gelu": lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))),
    "silu": lambda a: a / (1 + math.exp(-a)),
    "softplus": lambda a: math.log1p(math.exp(a)),
    "tanh": math.tanh,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "identity": lambda a: a,
}


def test_the_references_are_of_all_activations():
    assert set(REFERENCES) == set(_ACTIVATIONS)


@pytest.mark.parametrize("name", REFERENCES)
def test_an_activation_is_the_function_of_its_name(name):
    a = torch.tensor([-2.0, -0.3, 0.0, 0.7, 3.0])
    expected = torch.tensor([REFERENCES[name](value) for value in a.tolist()])
    torch.testing.assert_close(make_activation(name)(a), expected)
    assert make_activation(name) is not make_activation(name)


def test_unknown_activation_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"activation: expected one of .*'relu'.*, got 'swish'"):
        make_activation("swish")
