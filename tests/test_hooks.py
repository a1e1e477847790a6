"""Reading and replacing what a layer puts out."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from lightning_ae.hooks import activation, find_layer, first_tensor, from_rows, to_rows, undisturbed, with_first_tensor

Pair = namedtuple("Pair", ["hidden", "other"])


@pytest.mark.parametrize(
    ("name", "near"),
    [("atention", "'encoder.0.attention'"), ("attention", "'encoder.0.attention'"), ("encoder.1", "'encoder.0'")],
)
def test_a_layer_that_is_not_there_is_an_error_with_near_names(name, near):
    model = nn.ModuleDict({"encoder": nn.ModuleList([nn.ModuleDict({"attention": nn.Linear(2, 2)})])})
    with pytest.raises(ValueError, match=f"layer: ModuleDict has no '{name}'; near it are .*{near}"):
        find_layer(model, name)


def test_a_layer_is_found_by_each_of_its_names_and_the_model_by_none():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert find_layer(model, "b") is shared
    assert find_layer(model, "") is model


@pytest.mark.parametrize("feature_dim", [-1, 1, 2, 3, -2])
def test_rows_and_back(feature_dim):
    output = torch.randn(2, 3, 4, 5)
    rows = to_rows(output, feature_dim)
    features = output.shape[feature_dim]
    assert rows.shape == (120 // features, features)
    by_hand = [output.movedim(feature_dim, -1)[i] for i in torch.cartesian_prod(torch.arange(2))]
    assert torch.equal(rows, torch.cat([part.reshape(-1, features) for part in by_hand]))
    assert torch.equal(from_rows(rows, output, feature_dim), output)


@pytest.mark.parametrize(("shape", "feature_dim"), [((3,), -1), ((2, 3), 0), ((2, 3), 2), ((2, 3), -2)])
def test_a_dimension_that_is_not_there_is_an_error(shape, feature_dim):
    with pytest.raises(ValueError, match="feature_dim: expected a dimension"):
        to_rows(torch.zeros(shape), feature_dim)


def test_the_first_tensor_is_replaced_in_whatever_holds_it():
    a, b, new = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    assert first_tensor(Pair(None, b)) is b
    replaced = with_first_tensor(Pair(a, b), new)
    assert (type(replaced), replaced.hidden, replaced.other) == (Pair, new, b)
    assert with_first_tensor((None, a), new) == (None, new)
    assert with_first_tensor(OrderedDict(x=a, y=b), new)["x"] is new
    assert with_first_tensor(a, new) is new
    with pytest.raises(TypeError, match="expected it to return a tensor or a tuple with one, got a int"):
        first_tensor(3)


class Later(nn.Module):
    """Fails when run."""

    def forward(self, x):
        raise AssertionError("the forward pass went on")


class Catches(nn.Module):
    """A model that catches every exception of its parts."""

    def __init__(self):
        super().__init__()
        self.first, self.then = nn.Linear(3, 2), Later()

    def forward(self, x):
        try:
            return self.then(self.first(x))
        except Exception:
            return None


def test_the_forward_pass_ends_at_the_layer_and_leaves_no_hook():
    model, x = Catches(), torch.randn(4, 3)
    found = activation(model, model.first, x)
    assert torch.equal(found, x @ model.first.weight.T + model.first.bias)
    assert not model.first._forward_hooks


def test_a_layer_that_is_never_called_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model's forward pass never called it"):
        activation(model, nn.Linear(2, 2), torch.zeros(1, 2))


def test_undisturbed_gives_each_module_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    inside = []

    def fails():
        with undisturbed(model):
            inside.extend((model[0].training, torch.is_grad_enabled()))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside == [False, False]
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.is_grad_enabled()
