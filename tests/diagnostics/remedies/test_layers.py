from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lightning_ae as ae
from lightning_ae.diagnostics.remedies import Reinitialize, RequireGradients, SetBias, SetDropout, SetNormMomentum

#: Standard errors by which a variance of so many draws may be off.
OFF = 5


def variance(weight):
    """Of the draws, with what OFF standard errors of it are (normal draws: 2/n)."""
    return float(weight.detach().double().var()), OFF * (2 / weight.numel()) ** 0.5


# -- drawing weights -----------------------------------------------------------------------------------------------

LINEAR = {
    "linear": (lambda: nn.Linear(300, 200), 300, 200),
    "conv": (lambda: nn.Conv2d(20, 50, 5), 20 * 25, 50 * 25),
    "conv1d": (lambda: nn.Conv1d(60, 80, 7), 60 * 7, 80 * 7),
    "transposed": (lambda: nn.ConvTranspose2d(50, 20, 5), 50 * 25, 20 * 25),
}


@pytest.mark.parametrize("name", LINEAR)
def test_variances_are_those_of_the_papers(name):
    make, fan_in, fan_out = LINEAR[name]
    expected = {
        "he": 2 / fan_in,
        "xavier": 2 * (5 / 3) ** 2 / (fan_in + fan_out),
        "default": 1 / 3 / (fan_out if name == "transposed" else fan_in),  # torch's uniform; it takes axis 1 for in
    }
    for scheme, wanted in expected.items():
        network = nn.Sequential(make())
        assert Reinitialize(scheme, bias=0.25).apply(network)
        found, off = variance(network[0].weight)
        assert found == pytest.approx(wanted, rel=off)
        assert network[0].bias.unique().tolist() == [0.25]


def test_biases_are_drawn_where_none_is_asked_for():
    network = nn.Sequential(nn.Linear(300, 200))
    Reinitialize("he", bias=None).apply(network)
    assert 0 < network[0].bias.abs().max() <= 300**-0.5


@pytest.mark.parametrize("make", [lambda: nn.Linear(30, 20), lambda: nn.Conv2d(4, 9, 3)])
def test_orthogonal_weights_have_orthonormal_rows(make):
    network = nn.Sequential(make())
    Reinitialize("orthogonal").apply(network)
    rows = network[0].weight.detach().flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, "projected"])
def test_recurrent_layers_become_orthogonal_from_state_to_state(kind):
    layer = nn.LSTM(5, 8, proj_size=3) if kind == "projected" else kind(5, 8)
    network = nn.ModuleDict({"cell": layer})
    before = copy.deepcopy(layer.state_dict())
    assert Reinitialize("orthogonal", ("cell",)).apply(network)
    for name, p in layer.named_parameters():
        assert not torch.equal(p, before[name])
        if "weight_hh" in name:
            for block in p.detach().split(8):
                torch.testing.assert_close(block.T @ block, torch.eye(block.shape[1]), atol=1e-5, rtol=0)
        else:
            assert p.abs().max() <= 8**-0.5


def test_normalisations_and_embeddings_get_their_own():
    torch.manual_seed(3)
    norms = [nn.BatchNorm2d(3), nn.LayerNorm((4, 5)), nn.GroupNorm(2, 4), nn.PReLU(3)]
    network = nn.Sequential(*norms, nn.Embedding(500, 20, padding_idx=7))
    network[0](torch.randn(9, 3, 2, 2) + 5)
    fresh = {name: value.clone() for name, value in copy.deepcopy(network).state_dict().items()}
    for module, clean in zip(
        norms, (nn.BatchNorm2d(3), nn.LayerNorm((4, 5)), nn.GroupNorm(2, 4), nn.PReLU(3)), strict=True
    ):
        with torch.no_grad():
            module.weight.fill_(9.0)
        fresh.update({f"{norms.index(module)}.{n}": v for n, v in clean.state_dict().items()})
    assert Reinitialize("he", bias=0.3).apply(network)
    for name, value in network.state_dict().items():
        if not name.startswith("4"):
            assert torch.equal(value, fresh[name]), name
    assert variance(network[4].weight[:7])[0] == pytest.approx(1, rel=OFF * (2 / 140) ** 0.5)
    assert network[4].weight[7].eq(0).all()


def test_attention_is_drawn_whole():
    network = nn.Sequential(nn.MultiheadAttention(64, 4))
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert Reinitialize("he").apply(network)
    layer = network[0]
    assert variance(layer.in_proj_weight)[0] == pytest.approx(2 / (64 + 192), rel=0.1)  # torch's own, Xavier's
    assert variance(layer.out_proj.weight)[0] == pytest.approx(2 / 64, rel=0.15)


def test_tied_weights_stay_tied():
    network = nn.ModuleDict({"encoder": nn.Linear(6, 6), "decoder": nn.Linear(6, 6)})
    network["decoder"].weight = network["encoder"].weight
    before = network["encoder"].weight.detach().clone()
    assert Reinitialize("xavier").apply(network)
    assert network["decoder"].weight is network["encoder"].weight
    assert not torch.equal(network["encoder"].weight, before)


def test_weights_that_a_parametrization_computes_are_drawn():
    network = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(200, 100)), parametrizations.orthogonal(nn.Linear(9, 9, bias=False))
    )
    before = network[1].weight.detach().clone()
    assert Reinitialize("he", bias=0.5).apply(network).what.endswith("biases of 0.5.")
    found, off = variance(network[0].weight)
    assert found == pytest.approx(2 / 200, rel=off)
    assert network[0].bias.unique().tolist() == [0.5]
    weight = network[1].weight.detach()
    assert not torch.equal(weight, before)
    torch.testing.assert_close(weight @ weight.T, torch.eye(9), atol=1e-5, rtol=0)


def test_weights_that_hooks_compute_or_that_are_not_there_yet_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(3, 2))
    for layer in (old, nn.utils.spectral_norm(nn.Linear(3, 2)), nn.LazyLinear(3), nn.LazyConv2d(3, 3)):
        change = Reinitialize("he").apply(nn.Sequential(layer))
        assert not change
        assert "the weights of 0 are computed, or not there yet" in change.what
        part = Reinitialize("he").apply(nn.Sequential(layer, nn.Linear(2, 2)))
        assert part
        assert part.what.endswith("Not those of 0, which are computed.")


def test_only_the_layers_that_are_named_are_drawn():
    network = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Linear(3, 3), backend="eager"), nn.ReLU())
    first, second = network[0].weight.detach().clone(), network[1].weight.detach().clone()
    assert Reinitialize("he", ("1",)).apply(network)
    assert torch.equal(network[0].weight, first)
    assert not torch.equal(network[1].weight, second)
    change = Reinitialize("he", ("2", "9")).apply(network)
    assert not change
    assert "2, 9" in change.what


def test_the_same_seed_draws_the_same_weights():
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        network = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
        Reinitialize("orthogonal").apply(network)
        drawn.append(network.state_dict())
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match=r"scheme: expected one of .*'he'.*, got 'best'"):
        Reinitialize("best")


# -- biases, frozen layers, dropout, batch normalisation -------------------------------------------------------------


def test_biases_are_set_where_there_are_some():
    network = nn.ModuleDict({"a": nn.Conv2d(2, 3, 1), "b": nn.Linear(2, 3, bias=False), "c": nn.LSTM(2, 3)})
    rest = copy.deepcopy(network["c"].state_dict())
    assert SetBias(("a", "b", "c", "d"), 0.1).apply(network)
    assert network["a"].bias.tolist() == pytest.approx([0.1] * 3)
    assert all(torch.equal(value, rest[name]) for name, value in network["c"].state_dict().items())
    assert SetBias(("b", "c"), 0.1).apply(network) == (False, "b, c: no such layer with a bias")


def test_frozen_layers_ask_for_gradients_again_and_others_are_left():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    network.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    assert RequireGradients(("1",)).apply(network)
    assert [p.requires_grad for p in network.parameters()] == [False, False, False, True, True]
    assert RequireGradients().apply(network)
    assert [p.requires_grad for p in network.parameters()] == [False, True, True, True, True]
    assert RequireGradients().apply(network) == (False, "no parameter was frozen")


def test_the_network_of_a_perceptual_loss_stays_frozen():
    features = nn.Sequential(nn.Conv2d(1, 2, 3)).requires_grad_(False)
    model = ae.ConvAutoencoder((1, 8, 8), 2, channels=(2,), loss=ae.FeatureLoss(features))
    model.encoder.requires_grad_(False)
    assert RequireGradients().apply(model)
    assert all(p.requires_grad for p in model.encoder.parameters())
    assert not any(p.requires_grad for p in features.parameters())


def test_dropouts_drop_as_much_as_they_are_told():
    network = nn.Sequential(nn.Dropout(0.9), nn.Dropout2d(0.5), nn.LSTM(2, 2, 2, dropout=0.5))
    assert SetDropout(("0",)).apply(network)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(network[0](x), x)
    assert network[1].p == 0.5
    assert SetDropout(("2", "9")).apply(network) == (False, "it is called in forward() as a function")


def test_running_statistics_follow_at_the_pace_they_are_told():
    network = nn.Sequential(nn.BatchNorm1d(2, momentum=1e-5))
    assert SetNormMomentum(0.5).apply(network)
    network(torch.full((4, 2), 8.0))
    assert network[0].running_mean.tolist() == [4, 4]
    assert not SetNormMomentum().apply(nn.Sequential(nn.LayerNorm(2)))
