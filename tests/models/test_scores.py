"""The anomaly score of a prediction: what it is of each model, chosen by name, and that the choice comes back."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import lightning_ae as ae

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def images(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0))


def vae(loss: ae.ReconstructionLoss, **kwargs) -> ae.VariationalAutoencoder:
    torch.manual_seed(0)
    return ae.VariationalAutoencoder(*ae.mlp_pair(4, 2, (8,), h_dim=4), loss, **kwargs).eval()


class Copy(nn.Module):
    """A decoder, and an encoder, that lose nothing."""

    def __init__(self, of) -> None:
        super().__init__()
        self.of, self.one = of, nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of(x) * self.one


@torch.no_grad()
def test_a_perfect_reconstruction_scores_nothing_however_grey_the_image():
    x = torch.cat([torch.full((1, 64), 0.5), torch.rand(1, 64).round()])
    model = ae.Autoencoder(Copy(lambda x: x), Copy(lambda z: z.logit().clamp(-30, 30)), ae.BernoulliNLL())
    torch.testing.assert_close(model.predict_step(x, 0)["score"], torch.zeros(2), atol=1e-4, rtol=0)
    model.score = "loss"
    torch.testing.assert_close(model.predict_step(x, 0)["score"], torch.tensor([64 * 0.69314718, 0.0]))


@torch.no_grad()
@pytest.mark.parametrize("loss", [ae.BernoulliNLL(), ae.GaussianNLL(0.1), ae.SquaredError()])
def test_of_a_variational_one_it_is_reconstruction_and_kl(loss):
    model, x = vae(loss, code=ae.GaussianCode(beta=3.0)), rows().sigmoid()
    predicted = model.predict_step(x, 0)
    kl = torch.distributions.kl_divergence(
        model.posterior(x), torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5, 2), 1.0), 1)
    )
    weight = 3.0 if isinstance(loss, ae.SquaredError) else 1.0
    torch.testing.assert_close(predicted["score"], loss.excess(model.decoder(predicted["z"]), x) + weight * kl)
    model.score = "excess"
    torch.testing.assert_close(model.predict_step(x, 0)["score"], loss.excess(model.decoder(predicted["z"]), x))


@torch.no_grad()
def test_the_evidence_of_bits_is_the_log_likelihood_and_of_grey_values_less_by_their_entropy():
    model = vae(ae.BernoulliNLL(), score="evidence", score_samples=300)
    for x in (rows().sigmoid().round(), rows().sigmoid()):
        torch.manual_seed(1)
        score = model.predict_step(x, 0)["score"]
        torch.manual_seed(1)
        nats = -model.log_likelihood(x, 300)
        torch.testing.assert_close(score, nats - torch.distributions.Bernoulli(x).entropy().sum(1))


@torch.no_grad()
def test_the_evidence_of_a_linear_gaussian_model_is_its_closed_form():
    model = ae.VariationalAutoencoder(
        ae.LinearEncoder(4, 4), ae.LinearDecoder(2, 4), ae.GaussianNLL(0.7), score="evidence", score_samples=20_000
    )
    w, b = model.decoder.weight.detach(), model.decoder.layer.bias.detach()
    precision = torch.eye(2) + w.T @ w / 0.49
    covariance = torch.linalg.inv(precision)
    # the exact posterior's means; its marginal variances will do for a proposal
    model.encoder.weight.copy_(torch.cat([covariance @ w.T / 0.49, torch.zeros(2, 4)]))
    model.encoder.bias.copy_(torch.cat([-covariance @ w.T @ b / 0.49, covariance.diagonal().log()]))
    x = 2 * rows()
    normal = torch.distributions.MultivariateNormal(b, w @ w.T + 0.49 * torch.eye(4))
    best = ae.GaussianNLL(0.7)(x, x)
    torch.manual_seed(0)
    torch.testing.assert_close(model.predict_step(x, 0)["score"], -normal.log_prob(x) - best, atol=0.05, rtol=0)


@torch.no_grad()
def test_the_evidence_is_of_what_is_there():
    model = vae(ae.GaussianNLL(0.5), score="evidence", missing="mask")
    x = rows()
    holes = torch.where(torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.6, x, torch.nan)
    torch.manual_seed(0)
    score = model.predict_step(holes, 0)["score"]
    assert score.isfinite().all()
    torch.manual_seed(0)
    filled, mask = holes.nan_to_num(0), ~holes.isnan()
    with_all = -model._log_evidence(filled, filled, 100, excess=True)
    assert (score[~mask.all(1)] < with_all[~mask.all(1)]).all()


@torch.no_grad()
def test_of_a_dictionary_it_is_the_same_in_any_unit():
    x, scores = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), []
    for unit in (1.0, 1000.0):
        torch.manual_seed(0)
        model = ae.DictionaryAutoencoder(6, 12, ae.TopKCode(2), loss=ae.GaussianNLL(0.3))
        model.observe(unit * x)
        output = model.train(False)(unit * x)
        predicted = model.predict_step(unit * x, 0)["score"]
        torch.testing.assert_close(predicted, model.terms(unit * x, output)["reconstruction"] - model.loss(x, x))
        scores.append(predicted)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)


def test_it_is_asked_for_by_name():
    with pytest.raises(ValueError, match="score: expected 'excess' or 'loss', got 'evidence'"):
        ae.LinearAutoencoder(4, 2, score="evidence")
    with pytest.raises(TypeError, match="score='evidence' needs a Likelihood"):
        vae(ae.SquaredError(), score="evidence")
    assert ae.LinearAutoencoder(4, 2).score == "excess"
    assert vae(ae.GaussianNLL()).score == "bound"


def test_the_choice_comes_back(tmp_path):
    models = [
        vae(ae.GaussianNLL(), score="evidence", score_samples=7),
        ae.MLPAutoencoder(4, 2, loss=ae.GaussianNLL(), score="loss"),
        ae.StackedAutoencoder([ae.LinearAutoencoder(4, 3), ae.LinearAutoencoder(3, 2)], score="loss"),
        ae.DictionaryAutoencoder(4, 8, ae.TopKCode(2), score="loss"),
    ]
    for model in models:
        trainer = L.Trainer(**QUIET)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        again = ae.load(tmp_path / "model.ckpt")
        assert again.score == model.score
        assert getattr(again, "score_samples", None) == getattr(model, "score_samples", None)
    assert ae.load(tmp_path / "model.ckpt", score="excess").score == "excess"


def test_the_writer_writes_what_was_asked_for(tmp_path):
    x = rows(10).sigmoid()
    for score in ("loss", "excess"):
        model = ae.LinearAutoencoder(4, 2, loss=ae.BernoulliNLL(), score=score)
        trainer = L.Trainer(**QUIET, callbacks=ae.PredictionWriter(tmp_path / score))
        trainer.predict(model, ae.TensorDataModule(x, batch_size=4, val_fraction=0.0), return_predictions=False)
        with torch.no_grad():
            params = model.decoder(model.encode(x))
            expected = model.loss(params, x) if score == "loss" else model.loss.excess(params, x)
        torch.testing.assert_close(ae.load_predictions(tmp_path / score)["score"], expected)
