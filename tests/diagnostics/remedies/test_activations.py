from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_ae as ae
from lightning_ae.diagnostics.remedies import InsertActivation, SwapActivation
from lightning_ae.diagnostics.remedies.activations import activation_modules
from lightning_ae.networks import mlp_pair
from lightning_ae.rebuildable import describe, rebuild

SHAPE = (1, 8, 8)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.sigmoid(self.first(x)))


class Shared(nn.Module):
    """One activation in three places, by two names."""

    def __init__(self):
        super().__init__()
        self.act = nn.Sigmoid()
        self.body = nn.Sequential(nn.Linear(3, 3), self.act, nn.Linear(3, 3))

    def forward(self, x):
        return self.act(self.body(self.act(x)))


# -- modules of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "function"),
    [
        ("relu", torch.relu),
        ("leaky_relu", nn.functional.leaky_relu),
        ("gelu", nn.functional.gelu),
        ("tanh", torch.tanh),
        ("softmax", lambda x: x.softmax(-1)),
        ("log_softmax", lambda x: x.log_softmax(-1)),
        ("identity", lambda x: x),
    ],
)
def test_the_new_function_is_computed_in_the_place_of_the_old(to, function):
    network = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = network[2](function(network[0](x)))
    assert SwapActivation(to, ("1",)).apply(network)
    torch.testing.assert_close(network(x), expected)


def test_a_shared_activation_is_swapped_everywhere():
    network = Shared()
    x = torch.randn(4, 3)
    expected = torch.tanh(network.body[2](torch.tanh(network.body[0](torch.tanh(x)))))
    assert SwapActivation("tanh", ("body.1",)).apply(network)
    assert network.act is network.body[1]
    torch.testing.assert_close(network(x), expected)


def test_only_sites_and_kinds_that_are_asked_for_are_swapped():
    network = nn.Sequential(nn.Sequential(nn.Tanh(), nn.Sigmoid()), nn.Tanh(), nn.LeakyReLU(), nn.Hardtanh())
    kinds = ["tanh", "sigmoid", "tanh", "leaky_relu", "hardtanh"]
    assert [kind for _, kind in activation_modules(network)] == kinds
    assert SwapActivation("relu", kinds=("tanh",)).apply(network)
    assert [kind for _, kind in activation_modules(network)] == ["relu", "sigmoid", "relu", "leaky_relu", "hardtanh"]
    assert SwapActivation("gelu", ("0.1", "2")).apply(network)
    assert [kind for _, kind in activation_modules(network)] == ["relu", "gelu", "relu", "gelu", "hardtanh"]


@torch.no_grad()
def test_inside_and_around_what_is_compiled():
    inner = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), backend="eager")
    network = nn.Sequential(inner, torch.compile(nn.Sigmoid(), backend="eager"))
    x = torch.randn(4, 3)
    expected = network[0]._orig_mod[0](x).relu().tanh()
    network(x)  # has been traced
    assert SwapActivation("relu", ("0.1",)).apply(network)
    assert SwapActivation("tanh", ("1",)).apply(network)
    torch.testing.assert_close(network(x), expected)


def test_the_new_module_is_in_the_mode_of_the_old():
    network = nn.Sequential(nn.Tanh()).eval()
    SwapActivation("relu").apply(network)
    assert not network[0].training


def test_a_function_called_in_forward_is_refused_with_the_reason():
    change = SwapActivation("relu", ("sigmoid#0",)).apply(Functional())
    assert not change
    assert change.what == "sigmoid#0 is called in forward() as a function, not a module"
    assert SwapActivation("relu").apply(Functional()) == (False, "there is no such activation module")
    assert SwapActivation("relu").apply(nn.Sequential(nn.ReLU())) == (False, "there is no such activation module")


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"to: expected one of .*, got 'swish'"):
        SwapActivation("swish")


@torch.no_grad()
def test_an_activation_is_put_after_a_layer():
    network = nn.Sequential(nn.Linear(3, 4), torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = network[2](network[1](network[0](x).tanh()).tanh())
    names = {id(p) for p in network.parameters()}
    assert InsertActivation(("0", "1"), "tanh").apply(network)
    torch.testing.assert_close(network(x), expected)
    assert {id(p) for p in network.parameters()} == names
    assert InsertActivation(("7",)).apply(network) == (False, "there is no layer 7")
    assert not InsertActivation(("encoder.layers.0",)).apply(ae.MLPAutoencoder(4, 2))


# -- models of ours --------------------------------------------------------------------------------------------------

OURS = {
    "mlp": lambda: ae.MLPAutoencoder(SHAPE, 4, hidden=(16,)),
    "with an activation on the latent": lambda: ae.MLPAutoencoder(SHAPE, 4, hidden=(16,), latent_activation="sigmoid"),
    "tied": lambda: ae.MLPAutoencoder(SHAPE, 4, hidden=(16,), tied=True, norm="batch"),
    "denoising": lambda: ae.DenoisingAutoencoder(SHAPE, 4, hidden=(16,)),
    "contractive": lambda: ae.ContractiveAutoencoder(SHAPE, 4, hidden=(16,)),
    "conv": lambda: ae.ConvAutoencoder(SHAPE, 4, channels=(4, 8)),
    "sparse": lambda: ae.SparseAutoencoder(*mlp_pair(SHAPE, 4, (16,)), ae.L1Code(1.0)),
    "variational": lambda: ae.VariationalAutoencoder(*mlp_pair(SHAPE, 4, (16,), h_dim=8)),
    "stacked": lambda: ae.StackedAutoencoder(
        [ae.MLPAutoencoder(SHAPE, 16, hidden=(32,)), ae.MLPAutoencoder(16, 4, hidden=(8,))]
    ),
}


def kinds(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_is_described_as_it_is_after_the_swap(name):
    model = OURS[name]()
    before = kinds(model)
    assert SwapActivation("tanh").apply(model).what == "activation = 'tanh'"
    swapped = {n: (before[n], kind) for n, kind in kinds(model).items() if kind != before[n]}
    assert set(swapped.values()) == {("ReLU", "Tanh")}
    assert len(swapped) == list(before.values()).count("ReLU")
    assert {key: value for key, value in model.hparams.items() if key != "settings"} == describe(model)
    again = rebuild(describe(model))
    assert kinds(again) == kinds(model)
    again.load_state_dict(model.state_dict())
    x = torch.rand(3, *SHAPE)
    assert torch.equal(again.eval().reconstruct(x), model.eval().reconstruct(x))


def test_a_network_of_ours_in_a_model_with_parts_of_others_is_swapped_and_theirs_is_not():
    encoder = mlp_pair(SHAPE, 4, (16,))[0]
    theirs = nn.Sequential(nn.Linear(4, 64), nn.Sigmoid(), nn.Unflatten(1, SHAPE))
    model = ae.Autoencoder(encoder, theirs)
    assert SwapActivation("tanh").apply(model)
    assert isinstance(encoder.layers[1], nn.Tanh)
    assert isinstance(theirs[1], nn.Sigmoid)
    assert describe(model)["init_args"]["encoder"] == describe(encoder)
    assert describe(encoder)["init_args"]["activation"] == "tanh"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ae.ContractiveAutoencoder(SHAPE, 4),  # nothing but an activation on the latent
        lambda: ae.Autoencoder(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU()), mlp_pair(SHAPE, 4, ())[1]),
    ],
)
def test_a_model_of_ours_whose_activations_are_no_argument_is_left_as_it_is(make):
    model = make()
    before, tree = kinds(model), copy.deepcopy(describe(model))
    change = SwapActivation("tanh").apply(model)
    assert not change
    assert "no activations of this package's" in change.what
    assert kinds(model) == before
    assert describe(model) == tree


def test_the_output_activation_of_a_model_of_ours_is_the_losss():
    change = SwapActivation("softmax").apply(ae.MLPAutoencoder(8, 4))
    assert not change
    assert "the loss owns the output activation" in change.what


def test_no_random_number_is_drawn_by_a_swap():
    model = OURS["mlp"]()
    state = torch.get_rng_state()
    SwapActivation("gelu").apply(model)
    assert torch.equal(torch.get_rng_state(), state)
