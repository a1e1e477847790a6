from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import lightning_ae as ae
from lightning_ae.diagnostics.remedies import ExchangeLoss, RestartCodebook, SetWeight, WarmUpWeight
from lightning_ae.networks import mlp_pair


def vae(beta=3.0):
    return ae.VariationalAutoencoder(*mlp_pair(4, 2, (8,), h_dim=4), code=ae.GaussianCode(beta=beta))


def objective(model, x):
    """The mean objective and the raw terms of a batch, with the same random numbers."""
    torch.manual_seed(4)
    terms = model.terms(x, model(x))
    return model.objective(terms).mean(), {name: term.mean() for name, term in terms.items()}


# -- weights -------------------------------------------------------------------------------------------------------

WEIGHED = {
    "l1": lambda: ae.MLPAutoencoder(4, 3, hidden=(), code=ae.L1Code(100.0)),
    "kl": vae,
    "prior": lambda: ae.MLPAutoencoder(4, 3, hidden=(), penalties={"prior": ae.WeightPrior(num_examples=50)}),
    "commitment": lambda: ae.VectorQuantizedAutoencoder(
        *mlp_pair(4, 2, ()), code=ae.VectorQuantizerCode(4, 2, kmeans=False)
    ),
}


@pytest.mark.parametrize("term", WEIGHED)
def test_a_term_counts_as_much_as_it_is_told(term):
    model, x = WEIGHED[term]().eval(), torch.randn(16, 4)
    before, terms = objective(model, x)
    weight = {**model.code.weights(), **{n: p.weight for n, p in model.penalties.items()}}[term]
    assert SetWeight(term, 0.25).apply(model)
    after, again = objective(model, x)
    assert again[term] == terms[term] > 0
    torch.testing.assert_close(before - after, (weight - 0.25) * terms[term], rtol=1e-4, atol=1e-5)


def test_a_weight_of_the_same_size_is_not_taken_for_another_terms():
    model = ae.SparseAutoencoder(*mlp_pair(4, 6, ()), ae.GatedCode(6, 1.0))
    weights = dict(model.code.weights())
    assert set(weights.values()) == {1.0}  # both
    assert not SetWeight("gate", 0.1).apply(model)
    assert model.code.weights() == weights
    other = next(name for name in weights if name != "gate")
    assert SetWeight(other, 0.1).apply(model)
    assert model.code.weights() == {other: 0.1, "gate": 1.0}


@pytest.mark.parametrize("remedy", [SetWeight("kl", 0.1), WarmUpWeight("kl", 1.0), ExchangeLoss("SquaredError")])
def test_models_of_others_are_left_alone(remedy, users):
    change = remedy.apply(users(), {})
    assert change == (False, "its loss is put together in training_step, which only its author can change")


@pytest.mark.parametrize("remedy", [SetWeight("l7", 0.1), WarmUpWeight("l7", 1.0)])
def test_a_term_that_is_not_there_is_named(remedy):
    options = {}
    assert remedy.apply(vae(), options) == (False, "the weight of 'l7' is no plain number of the model")
    assert options == {}


# -- warming up ----------------------------------------------------------------------------------------------------


class Weights(L.Callback):
    """The weight at each step, and a checkpoint in the middle."""

    def __init__(self, path=None):
        self.seen, self.path = [], path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.code.beta)
        if self.path is not None and trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


def test_a_weight_rises_in_a_line_over_a_share_of_the_run(fit, resumable):
    seen = Weights()
    fit(vae(), ae.ApplyRemedies([WarmUpWeight("kl", 2.0, share=0.5)]), seen, data=resumable())
    assert seen.seen == pytest.approx([2.0 * min(1, step / 8) for step in range(16)])


def test_a_run_that_is_resumed_in_the_middle_of_the_ramp_equals_an_uninterrupted_one(fit, resumable, tmp_path):
    change = [ae.ApplyRemedies([WarmUpWeight("kl", 2.0, share=0.75)])]
    whole, resumed, seen, after = vae(), vae(), Weights(tmp_path / "6.ckpt"), Weights()
    fit(whole, *change, seen, data=resumable())
    fit(resumed, *change, after, data=resumable(), ckpt_path=tmp_path / "6.ckpt")
    assert after.seen == seen.seen[6:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


# -- losses and codebooks ------------------------------------------------------------------------------------------


def test_the_new_loss_scores_the_same_pre_activations(fit, tmp_path):
    model = ae.MLPAutoencoder(4, 2, hidden=(8,), loss=ae.SquaredError("sigmoid"))
    assert ExchangeLoss("BernoulliNLL").apply(model)
    x = torch.rand(16, 4)
    params = model(x).params
    expected = nn.functional.binary_cross_entropy_with_logits(params, x, reduction="none").sum(1)
    torch.testing.assert_close(model.loss(params, x), expected)
    torch.testing.assert_close(model.reconstruct(x), params.sigmoid())
    fit(model, data={"train_dataloaders": torch.utils.data.DataLoader(x, 8)})
    assert ExchangeLoss("SquaredError").apply(model)
    torch.testing.assert_close(model.loss(params, x), (params - x).square().sum(1))


def test_the_loss_that_is_there_is_not_exchanged_for_itself():
    assert ExchangeLoss("SquaredError").apply(ae.MLPAutoencoder(4, 2)) == (
        False,
        "it scores with SquaredError() already",
    )
    assert ExchangeLoss("SquaredError").apply(ae.MLPAutoencoder(4, 2, loss=ae.SquaredError("sigmoid")))


def test_a_loss_of_another_number_of_parameters_is_refused():
    model = ae.MLPAutoencoder(4, 2, loss=ae.ZeroInflatedNegativeBinomialNLL(4))
    change = ExchangeLoss("SquaredError").apply(model)
    assert change == (False, "the decoder gives 2 numbers for each of the data's")


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"loss: expected one of .*, got 'Huber'"):
        ExchangeLoss("Huber")


def test_a_codebook_starts_again_from_the_data(fit):
    code = ae.VectorQuantizerCode(4, 2, kmeans=False, expire=0.0)
    model = ae.VectorQuantizedAutoencoder(*mlp_pair(4, 2, ()), code=code)
    with torch.no_grad():
        code.codebook.fill_(1e3)  # far from everything
    x = torch.randn(32, 4)
    assert RestartCodebook(0.05).apply(model)
    assert code.expire == 0.05
    assert not code.started
    for _ in range(2):
        model.train()(x)  # what the first has seen, the second begins with
    h = model.encoder(x).detach()
    assert code.started
    assert (code.codebook >= h.amin(0) - 0.1).all()
    assert (code.codebook <= h.amax(0) + 0.1).all()
    assert RestartCodebook().apply(vae()) == (False, "it has no codebook of this package's")
