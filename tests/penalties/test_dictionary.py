"""Auxiliary-k against the equation, dense, with the bias done right."""

from __future__ import annotations

import pytest
import torch

import lightning_ae as ae
from lightning_ae import AuxiliaryK, DictionaryAutoencoder, PrefixReconstruction, TopKCode

DEAD = [1, 4, 6, 7, 11]


@pytest.fixture
def model():
    model = DictionaryAutoencoder(5, 16, TopKCode(3), penalties={"auxiliary": AuxiliaryK(k=2)}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.input_scale.fill_(0.7)
    model.since_fired[DEAD] = 10_000_000
    model.find_dead()
    return model


@pytest.fixture
def x():
    return torch.randn(8, 5, dtype=torch.float64)


def by_hand(model, x, k):
    """Residual of the whole against a decode of dead latents without a bias, in units of the variance."""
    s, b, dead = model.input_scale, model.pre_bias, DEAD
    e = (s * (x - model(x).params)).detach()
    h = (s * x - b) @ model.encoder.weight[dead].t() + model.encoder.bias[dead]
    on = h >= h.sort(1, descending=True).values[:, k - 1 : k]
    e_hat = torch.where(on, h.relu(), 0.0) @ model.decoder.atoms[dead]
    return (e - e_hat).square().sum(1) * (s * x).var(0, correction=0).sum() / e.var(0, correction=0).sum()


@pytest.mark.parametrize(("k", "used"), [(2, 2), (None, 2), (4, 4), (99, 5)])
def test_the_dead_explain_the_residual_without_the_bias(model, x, k, used):
    model.penalties["auxiliary"].k = k
    term, expected = model.terms(x, model(x))["auxiliary"], by_hand(model, x, used)
    torch.testing.assert_close(term, expected)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(term.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_living_latents_hear_nothing_of_it(model, x):
    model.terms(x, model(x))["auxiliary"].sum().backward()
    living = [i for i in range(16) if i not in DEAD]
    assert model.decoder.atoms.grad[living].abs().sum() == 0
    assert model.encoder.weight.grad[living].abs().sum() == 0
    assert model.decoder.atoms.grad[DEAD].abs().sum() > 0


def test_relative_to_the_reconstruction_it_has_no_unit(model, x):
    base = model.terms(x, model(x))
    model.input_scale.div_(100)
    scaled = model.terms(100 * x, model(100 * x))
    torch.testing.assert_close(scaled["auxiliary"], base["auxiliary"])
    torch.testing.assert_close(scaled["reconstruction"], base["reconstruction"])


def test_an_explanation_as_good_as_the_mean_costs_the_variance_of_the_data(model, x):
    with torch.no_grad():
        model.encoder.bias[DEAD] = -100.0  # nothing is explained
    e = 0.7 * (x - model(x).params)
    expected = e.square().sum(1).mean() / e.var(0, correction=0).sum() * (0.7 * x).var(0, correction=0).sum()
    torch.testing.assert_close(model.terms(x, model(x))["auxiliary"].mean(), expected)


def test_nothing_dead_is_zero_and_no_nan(model, x):
    model.since_fired.zero_()
    model.find_dead()
    term = model.terms(x, model(x))["auxiliary"]
    assert term.tolist() == [0.0] * 8
    loss = model.objective(model.terms(x, model(x))).mean()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("rows", [1, 8])
def test_nothing_left_to_explain_is_zero_and_no_nan(model, rows):
    # all examples the same: residual and data have no variance
    x = torch.ones(rows, 5, dtype=torch.float64)
    term = model.terms(x, model(x))["auxiliary"]
    assert term.tolist() == [0.0] * rows
    loss = model.objective(model.terms(x, model(x))).mean()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_all_dead_is_handled(model, x):
    model.since_fired.fill_(10_000_000)
    assert model.find_dead().tolist() == list(range(16))
    assert model.terms(x, model(x))["auxiliary"].isfinite().all()


def test_the_default_weight_is_that_of_gao_et_al():
    assert AuxiliaryK().weight == 1 / 32


def test_numbers_out_of_range_are_an_error():
    with pytest.raises(ValueError, match="k: expected a positive whole number, got 0"):
        AuxiliaryK(k=0)
    with pytest.raises(ValueError, match="prefixes: expected rising numbers of latents"):
        PrefixReconstruction([])
    model = DictionaryAutoencoder(5, 16, TopKCode(3), penalties={"p": PrefixReconstruction([16])})
    output = model(torch.randn(2, 5))
    with pytest.raises(ValueError, match="prefixes: expected less than the 16 latents"):
        model.terms(torch.randn(2, 5), output)


@pytest.mark.parametrize("penalty", [AuxiliaryK(), PrefixReconstruction([1])])
def test_another_model_is_an_error(penalty):
    model = ae.LinearAutoencoder(5, 2, penalties={"penalty": penalty})
    output = model(torch.randn(2, 5))
    with pytest.raises(TypeError, match="expected a DictionaryAutoencoder, got a LinearAutoencoder"):
        model.terms(torch.randn(2, 5), output)


def test_prefixes_of_a_dense_code_are_prefixes_too():
    model = DictionaryAutoencoder(5, 16, ae.Identity(), prefixes=[4])
    x = torch.randn(3, 5)
    expected = (model(x).z[:, :4] @ model.decoder.atoms[:4] + model.pre_bias - x).square().sum(1)
    torch.testing.assert_close(model.terms(x, model(x))["prefixes"], expected)
