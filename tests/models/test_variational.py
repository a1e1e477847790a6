"""The variational autoencoder against probabilistic PCA, torch.distributions and exact linear-Gaussian likelihoods."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_ae as ae
from lightning_ae import (
    BernoulliNLL,
    GaussianCode,
    GaussianNLL,
    LinearDecoder,
    LinearEncoder,
    SquaredError,
    VariationalAutoencoder,
    conv_pair,
    load,
    mlp_pair,
    subspace_angles,
)

# -- a linear model whose evidence is known ---------------------------------------------------------------------------


def correlated(n, d, seed=0):
    """Data with the eigenvalues of a steep spectrum and a mean."""
    rng = np.random.default_rng(seed)
    spectrum = np.linspace(3.0, 0.3, d) ** 2
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return torch.from_numpy(rng.normal(size=(n, d)) * np.sqrt(spectrum) @ basis.T + rng.normal(size=d))


def ppca(x, k, beta=1.0, scale=None):
    """Tipping and Bishop's maximum in closed form: mean, W, σ²; with σ and β given, W for a noise variance of βσ²."""
    x = x.numpy()
    mean = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    variance = values[k:].mean() if scale is None else beta * scale**2
    loadings = vectors[:, :k] * np.sqrt(np.clip(values[:k] - variance, 0, None))
    return torch.from_numpy(mean), torch.from_numpy(loadings.copy()), float(variance)


def linear_vae(d, k, code=None, loss=None):
    code = GaussianCode() if code is None else code
    loss = GaussianNLL(learn_scale=True) if loss is None else loss
    encoder = LinearEncoder(d, code.h_shape((k,))[0])
    return VariationalAutoencoder(encoder, LinearDecoder(k, d), loss, code=code).double()


@torch.no_grad()
def set_linear(model, mean, loadings, variance, posterior_variance=None):
    """Put a linear Gaussian model in, and its exact posterior (for another noise variance if stated)."""
    k = loadings.shape[1]
    noise = variance if posterior_variance is None else posterior_variance
    covariance = noise * torch.linalg.inv(loadings.T @ loadings + noise * torch.eye(k, dtype=torch.float64))
    weight = covariance @ loadings.T / noise
    model.encoder.weight.zero_()
    model.encoder.bias.zero_()
    model.encoder.weight[:k] = weight
    model.encoder.bias[:k] = -weight @ mean
    if model.code.covariance == "diagonal":
        model.encoder.bias[k:] = covariance.diagonal().log()
    else:
        factor = torch.linalg.cholesky(covariance)
        model.encoder.bias[k : 2 * k] = factor.diagonal().log()
        model.encoder.bias[2 * k :] = torch.stack([factor[i, j] for i in range(k) for j in range(i)])
    model.decoder.weight.copy_(loadings)
    model.decoder.layer.bias.copy_(mean)
    model.loss.log_scale.fill_(0.5 * math.log(variance))


def evidence(x, mean, loadings, variance):
    """Exact log-likelihood, by scipy."""
    covariance = loadings @ loadings.T + variance * torch.eye(len(loadings), dtype=torch.float64)
    return torch.from_numpy(multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(x.numpy()))


def rotated(loadings):
    """The same model: latents turned."""
    return loadings @ torch.linalg.qr(torch.randn(loadings.shape[1], loadings.shape[1], dtype=torch.float64)).Q


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_with_the_exact_posterior_every_single_draw_gives_the_evidence(covariance):
    x = correlated(50, 6)
    mean, loadings, variance = ppca(x, 3)
    # the posterior of turned latents is correlated
    loadings = loadings if covariance == "diagonal" else rotated(loadings)
    model = linear_vae(6, 3, GaussianCode(covariance=covariance))
    set_linear(model, mean, loadings, variance)
    exact = evidence(x, mean, loadings, variance)
    for samples in (1, 1, 7):
        torch.testing.assert_close(model.iwae_bound(x, samples), exact)
    torch.testing.assert_close(model.log_likelihood(x, 3), exact)
    # reconstruction and KL each scatter; the bound is tight on average
    losses = torch.stack([model.training_step(x, 0)["loss"].detach() for _ in range(400)])
    assert (losses.mean() + exact.mean()).abs() < 4.5 * losses.std() / 20
    assert losses.std() > 1e-3


def expected_gradient(model, x, monkeypatch):
    """Gradient of the objective's expectation: quadratic in the noise, so 2D points at √D integrate it exactly."""
    (k,) = model.decoder.latent_shape
    points = math.sqrt(k) * torch.cat([torch.eye(k), -torch.eye(k)]).double()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: points.repeat_interleave(len(like) // (2 * k), 0))
        model.zero_grad()
        model.training_step(x.repeat(2 * k, 1), 0)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_closed_form_of_probabilistic_pca_is_stationary(covariance, monkeypatch):
    x = correlated(200, 6)
    mean, loadings, variance = ppca(x, 3)
    loadings = loadings if covariance == "diagonal" else rotated(loadings)
    model = linear_vae(6, 3, GaussianCode(covariance=covariance))
    set_linear(model, mean, loadings, variance)
    assert expected_gradient(model, x, monkeypatch).abs().max() < 1e-9
    # so it is nowhere beside it
    for other in (0.9 * variance, 1.1 * variance):
        set_linear(model, mean, loadings, other)
        assert expected_gradient(model, x, monkeypatch).abs().max() > 0.1
    set_linear(model, mean, loadings * 1.2, variance)
    assert expected_gradient(model, x, monkeypatch).abs().max() > 0.05


@pytest.mark.parametrize("beta", [0.5, 2.0, 8.0])
def test_beta_is_a_factor_of_the_noise_variance(beta, monkeypatch):
    # dividing by β, the optimum for a fixed σ is that for βσ²: eigenvalues below it collapse
    x = correlated(200, 6)
    mean, loadings, variance = ppca(x, 3, beta, scale=0.9)
    collapsed = (loadings.norm(dim=0) == 0).sum()
    assert collapsed == (2 if beta == 8.0 else 0)
    model = linear_vae(6, 3, GaussianCode(beta), GaussianNLL(0.9))
    set_linear(model, mean, loadings, 0.81, posterior_variance=variance)
    assert expected_gradient(model, x, monkeypatch).abs().max() < 1e-9
    kl = model(x).penalties["kl"].mean()
    set_linear(model, mean, loadings, 0.81)
    assert expected_gradient(model, x, monkeypatch).abs().max() > 0.1
    assert kl > 0


def test_training_finds_the_subspace_and_the_noise_of_probabilistic_pca():
    x = correlated(2000, 6)
    mean, loadings, variance = ppca(x, 2)
    model = linear_vae(6, 2).float()
    data = x.float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    steps = 1500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.training_step(data, 0)["loss"].backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model.decoder.weight.double()
        assert float(torch.rad2deg(subspace_angles(found, loadings)).max()) < 1.5
        assert float(model.loss.scale.detach()) ** 2 == pytest.approx(variance, rel=0.02)
        # W is known up to a turn
        torch.testing.assert_close(found @ found.T, loadings @ loadings.T, rtol=0, atol=0.2)
        assert (loadings @ loadings.T).abs().max() > 3
        torch.testing.assert_close(model.decoder.layer.bias.double(), mean, rtol=0, atol=0.05)
        exact = float(evidence(x, mean, loadings, variance).mean())
        assert float(model.log_likelihood(data, 100).mean()) == pytest.approx(exact, abs=0.01)


# -- the evidence by importance samples -------------------------------------------------------------------------------


def mistaken(x, k=2):
    """A linear model with a posterior that is off: moved and too wide."""
    mean, loadings, variance = ppca(x, k)
    model = linear_vae(x.shape[1], k)
    set_linear(model, mean, loadings, variance)
    with torch.no_grad():
        model.encoder.bias[:k] += torch.linspace(0.5, 0.8, k)
        model.encoder.bias[k:] += 0.8
    return model, evidence(x, mean, loadings, variance), (mean, loadings, variance)


def test_importance_samples_converge_to_the_exact_likelihood():
    x = correlated(40, 6)
    model, exact, _ = mistaken(x)
    error = {n: (model.log_likelihood(x, n, chunk_size=20_000) - exact).abs().mean() for n in (1, 30, 1000, 30_000)}
    assert error[1] > 0.8
    assert error[1] > 3 * error[30] > 9 * error[1000] > 27 * error[30_000]
    assert error[30_000] < 0.02


def test_the_bound_rises_with_the_number_of_samples_from_the_evidence_bound():
    x = correlated(40, 6)
    model, exact, (mean, loadings, variance) = mistaken(x)
    with torch.no_grad():
        many = x.repeat(500, 1)
        draws = {n: model.iwae_bound(many, n).view(500, -1).mean(1) for n in (1, 2, 5, 25)}
    # for one sample, the evidence less the posterior's divergence from the true one
    precision = loadings.T @ loadings / variance + torch.eye(2, dtype=torch.float64)
    true = MultivariateNormal(
        (x - mean) @ loadings @ torch.linalg.inv(precision).T / variance, precision_matrix=precision
    )
    posterior = model.posterior(x)
    given = MultivariateNormal(posterior.mean, posterior.variance.diag_embed())
    bound = (exact - kl_divergence(given, true)).mean()
    assert (draws[1].mean() - bound).abs() < 4.5 * draws[1].std() / 500**0.5
    means = [draws[n].mean() for n in (1, 2, 5, 25)]
    errors = [draws[n].std() / 500**0.5 for n in (1, 2, 5, 25)]
    for low, high, error in zip(means, [*means[1:], exact.mean()], errors, strict=True):
        assert high - low > 4.5 * error


def test_the_bound_is_that_of_torch_distributions_and_so_is_its_gradient():
    model = VariationalAutoencoder(*mlp_pair(5, 2, hidden=(4,), activation="tanh", h_dim=4), BernoulliNLL()).double()
    x = torch.bernoulli(torch.rand(3, 5)).double()
    torch.manual_seed(1)
    ours = model.iwae_bound(x, 6)
    gradient = torch.autograd.grad(ours.sum(), list(model.parameters()))
    torch.manual_seed(1)
    noise = torch.stack([torch.randn(3, 2, dtype=torch.float64) for _ in range(6)])
    mean, log_variance = model.encoder(x).chunk(2, 1)
    posterior = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    z = mean + (log_variance / 2).exp() * noise
    prior = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    likelihood = Independent(Bernoulli(logits=torch.stack([model.decoder(one) for one in z])), 1)
    theirs = (likelihood.log_prob(x) + prior.log_prob(z) - posterior.log_prob(z)).logsumexp(0) - math.log(6)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), list(model.parameters())))


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 20, 1000])
def test_how_samples_are_put_together_does_not_matter(chunk_size, spatial):
    pair = conv_pair((1, 6, 6), 2, channels=(3,), h_dim=4, spatial=spatial)
    model = VariationalAutoencoder(*pair, BernoulliNLL()).double()
    x = torch.bernoulli(torch.rand(4, 1, 6, 6)).double()
    torch.manual_seed(2)
    expected = model.iwae_bound(x, 11)
    torch.manual_seed(2)
    found = model.log_likelihood(x, 11, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected.detach())
    assert expected.requires_grad
    assert not found.requires_grad


def test_no_more_latents_than_asked_are_decoded_at_once():
    model = VariationalAutoencoder(*mlp_pair(5, 2, h_dim=4), BernoulliNLL())
    rows = []
    for module in (model.encoder, model.decoder):
        module.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    model.log_likelihood(torch.ones(7, 5), 9, chunk_size=5)
    assert max(rows) == 5
    rows.clear()
    model.log_likelihood(torch.ones(7, 5), 9, chunk_size=30)
    assert rows == [7, 28, 28, 7]


def test_weights_that_single_precision_cannot_hold_are_summed_as_logarithms(monkeypatch):
    model = VariationalAutoencoder(*mlp_pair(3000, 2, hidden=(4,), h_dim=4), GaussianNLL(0.05))
    x, noise = torch.randn(3, 3000), torch.randn(20, 3, 2)

    def found(model, x):
        each = iter(noise)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda like: next(each).to(like.dtype))
            return model.log_likelihood(x, 20, chunk_size=9).double()

    single, double = found(model, x), found(model.double(), x.double())
    assert (double < -1e5).all()
    torch.testing.assert_close(single, double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_left_as_it_is(training):
    pair = mlp_pair(5, 2, norm="batch", h_dim=4)
    model = VariationalAutoencoder(*pair, BernoulliNLL()).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    model.log_likelihood(torch.ones(4, 5), 3)
    model.sample(3)
    assert model.training == model.encoder.training == training
    same = all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert same != training  # statistics of batch normalisation move in training, as in any forward pass


# -- the objective ----------------------------------------------------------------------------------------------------


def test_the_objective_is_the_negative_evidence_bound():
    model = VariationalAutoencoder(*mlp_pair(5, 2, h_dim=4), GaussianNLL(0.7), code=GaussianCode(beta=0.25))
    x = torch.randn(4, 5)
    output = model(x)
    terms = model.terms(x, output)
    nll = -Independent(Normal(output.params, 0.7), 1).log_prob(x)
    kl = kl_divergence(model.posterior(x), Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    torch.testing.assert_close(terms["reconstruction"], nll)
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(model.objective(terms), nll + 0.25 * kl)
    assert set(terms) == {"reconstruction", "kl"}


def test_squared_error_exchanges_nats_at_twice_the_variance():
    pair, x = mlp_pair(5, 2, h_dim=4), torch.randn(4, 5)
    gradients = []
    for loss, beta in ((GaussianNLL(0.3), 2.0), (SquaredError(), 2.0 * 2 * 0.3**2)):
        model = VariationalAutoencoder(*pair, loss, code=GaussianCode(beta))
        torch.manual_seed(0)
        model.zero_grad()
        model.training_step(x, 0)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(2 * 0.3**2 * gradients[0], gradients[1])


@pytest.mark.parametrize("pixels", [4, 400])
def test_beta_does_not_depend_on_the_number_of_pixels(pixels):
    model = VariationalAutoencoder(*mlp_pair(pixels, 2, h_dim=4), BernoulliNLL(), code=GaussianCode(3.0))
    x = torch.ones(6, pixels)
    terms = model.terms(x, model(x))
    torch.testing.assert_close(model.objective(terms) - terms["reconstruction"], 3 * terms["kl"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"free_bits": 0.5}, {"capacity": 3.0}])
def test_the_bound_is_logged_also_where_something_else_is_charged(options, make_trainer):
    model = VariationalAutoencoder(*mlp_pair(5, 2, h_dim=4), code=GaussianCode(2.0, **options))
    x = torch.randn(64, 5)
    trainer = make_trainer()
    trainer.validate(model, DataLoader(x, batch_size=64), verbose=False)
    logged = trainer.callback_metrics
    kl = kl_divergence(model.posterior(x), Independent(Normal(torch.zeros(2), torch.ones(2)), 1)).detach()
    assert float(logged["val/kl"]) == pytest.approx(float(kl.mean()), rel=1e-5)
    expected = logged["val/reconstruction"] + 2 * logged["val/kl_charge"]
    assert float(logged["val/loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert logged["val/kl_charge"] != pytest.approx(float(kl.mean()), rel=1e-3)


def test_a_schedule_sets_beta_by_its_path():
    class WarmUp(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.code.beta = min(1.0, trainer.global_step / 4)

    class Watched(VariationalAutoencoder):
        def objective(self, terms):
            total = super().objective(terms)
            seen.append(float(((total - terms["reconstruction"]) / terms["kl"]).detach().mean()))
            return total

    seen = []
    model = Watched(*mlp_pair(5, 2, h_dim=4), code=GaussianCode(beta=0.0))
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, callbacks=WarmUp(), enable_model_summary=False, **options)
    trainer.fit(model, DataLoader(torch.randn(48, 5), batch_size=8))
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-4)


def test_the_default_loss_finds_its_scale(make_trainer):
    model = VariationalAutoencoder(*mlp_pair(6, 2, h_dim=4), lr=0.02)
    assert isinstance(model.loss, GaussianNLL)
    x = correlated(512, 6).float()
    make_trainer(max_epochs=40).fit(model, DataLoader(x, batch_size=64, shuffle=True))
    with torch.no_grad():
        residual = (x - model(x).params).square().mean()
    assert float(model.loss.scale.detach()) ** 2 == pytest.approx(float(residual), rel=0.15)
    assert abs(float(model.loss.scale.detach()) - 1) > 0.1


# -- samples and paths ------------------------------------------------------------------------------------------------


def two_kinds():
    flat = VariationalAutoencoder(*mlp_pair((1, 6, 6), 3, h_dim=6), BernoulliNLL())
    pair = conv_pair((1, 6, 6), 3, channels=(4,), h_dim=6, spatial=True)
    return {"flat": flat, "maps": VariationalAutoencoder(*pair, BernoulliNLL())}


@pytest.mark.parametrize("kind", ["flat", "maps"])
def test_a_path_begins_and_ends_at_reconstructions(kind):
    model = two_kinds()[kind]
    x, y = torch.rand(2, 4, 1, 6, 6)
    path = model.interpolate(x, y, 5)
    assert path.shape == (4, 5, 1, 6, 6)
    assert not path.requires_grad
    torch.testing.assert_close(path[:, 0], model.reconstruct(x))
    torch.testing.assert_close(path[:, -1], model.reconstruct(y))
    middle = model.decode((model.encode(x) + 3 * model.encode(y)) / 4)
    torch.testing.assert_close(path[:, 3], middle)


@pytest.mark.parametrize("kind", ["flat", "maps"])
def test_a_traversal_changes_one_latent(kind):
    model = two_kinds()[kind]
    x = torch.rand(4, 1, 6, 6)
    found = model.traverse(x, 1, [-2.0, 0.0, 1.5])
    assert found.shape == (4, 3, 1, 6, 6)
    for i, value in enumerate((-2.0, 0.0, 1.5)):
        z = model.encode(x).clone()
        z[:, 1] = value
        torch.testing.assert_close(found[:, i], model.decode(z))
    assert torch.equal(model.traverse(x, -2, torch.tensor([-2.0, 0.0, 1.5])), found)
    assert torch.equal(model.traverse(x, np.int64(1), np.array([-2.0, 0.0, 1.5])), found)
    assert model.encode(x).std() > 0


@pytest.mark.parametrize("kind", ["flat", "maps"])
def test_samples_are_decoded_from_the_prior(kind):
    model = two_kinds()[kind]
    torch.manual_seed(3)
    samples = model.sample(7)
    torch.manual_seed(3)
    z = torch.randn(7, *model.decoder.latent_shape)
    torch.testing.assert_close(samples, model.decode(z).detach())
    assert samples.shape == (7, 1, 6, 6)
    drawn = model.sample(7, draw=True)
    assert drawn.unique().tolist() == [0, 1]


def test_samples_of_a_linear_model_have_its_covariance():
    mean, loadings, variance = ppca(correlated(500, 4), 2)
    model = linear_vae(4, 2)
    set_linear(model, mean, loadings, variance)
    for draw, noise in ((False, 0.0), (True, variance)):
        found = torch.cov(model.sample(200_000, draw=draw).T)
        expected = loadings @ loadings.T + noise * torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.diagonal().max()))


def test_a_decoder_of_ones_own_is_told_the_shape_of_the_latent():
    encoder, decoder = nn.Linear(5, 4), nn.Linear(2, 5)
    model = VariationalAutoencoder(encoder, decoder)
    assert model.sample(3, latent_shape=(2,)).shape == (3, 5)
    with pytest.raises(ValueError, match="latent_shape: expected the shape of one latent, as Linear does not tell it"):
        model.sample(3)


def test_reconstructions_and_predictions_have_no_randomness():
    model = VariationalAutoencoder(*mlp_pair(5, 2, h_dim=4))
    x = torch.randn(3, 5)
    assert torch.equal(model.encode(x), model.encoder(x)[:, :2])
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    assert torch.equal(model.predict_step(x, 0)["score"], model.predict_step(x, 0)["score"])
    assert not torch.equal(model(x).z, model(x).z)


# -- under the Trainer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_monitor_shows_nats_and_active_units(precision, make_trainer):
    encoder, decoder = mlp_pair(6, 4, h_dim=8)
    with torch.no_grad():
        for rows in (slice(0, 1), slice(4, 5)):
            encoder.linears()[-1].weight[rows] = 0.0  # one latent has collapsed onto the prior
    model = VariationalAutoencoder(encoder, decoder, lr=0.0)
    x = torch.randn(64, 6)
    monitor = ae.LatentSparsityMonitor(every_n_steps=1)
    make_trainer(callbacks=monitor, precision=precision).fit(model, DataLoader(x, batch_size=16))
    mean, log_variance = encoder(x).detach().chunk(2, 1)
    each = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean(0)
    rel = 1e-5 if precision == "32-true" else 0.03
    torch.testing.assert_close(monitor.kl_per_dimension(), each.double(), rtol=rel, atol=1e-6)
    assert monitor.summary()["kl"] == pytest.approx(float(each.sum()), rel=rel)
    assert monitor.summary()["active_units"] == 3
    assert each[0] == 0


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.3}, {"capacity": 2.0}, {"covariance": "full"}])
def test_a_step_compiles_without_a_graph_break(options):
    code = GaussianCode(**options)
    torch._dynamo.reset()
    model = VariationalAutoencoder(*mlp_pair(6, 3, h_dim=code.h_shape((3,))[0]), code=code)
    x = torch.randn(4, 6)
    results = []
    for step in (model.training_step, torch.compile(model.training_step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        model.zero_grad()
        output = step(x, 0)
        output["loss"].backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((output["terms"], gradient))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["beta", "free_bits", "capacity"])
def test_a_schedule_does_not_compile_anew_at_each_value(name):
    torch._dynamo.reset()
    model = VariationalAutoencoder(*mlp_pair(6, 3, hidden=(), h_dim=6), code=GaussianCode(**{name: 0.1}))
    x = torch.randn(4, 6)
    compiled = torch.compile(model.training_step, fullgraph=True, backend="aot_eager")
    for value in torch.linspace(0.15, 2.5, 12).tolist():  # more than torch compiles one function for
        setattr(model.code, name, value)
        losses = []
        for step in (model.training_step, compiled):
            torch.manual_seed(0)
            losses.append(step(x, 0)["loss"])
        torch.testing.assert_close(*losses)


class ReadsFromDevice(TorchDispatchMode):
    """Raises where a number is read from a tensor, which waits for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert "_local_scalar_dense" not in name, name
        assert "nonzero" not in name, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.3}, {"capacity": 2.0}, {"covariance": "full"}])
def test_nothing_is_read_from_the_device(options):
    code = GaussianCode(**options)
    model = VariationalAutoencoder(*mlp_pair(6, 3, h_dim=code.h_shape((3,))[0]), code=code)
    x = torch.randn(4, 6)
    with ReadsFromDevice():
        model.training_step(x, 0)["loss"].backward()
        model.iwae_bound(x, 3).sum().backward()
        model.log_likelihood(x, 3)
        model.posterior(x).rsample()
        model.sample(2, draw=True)
    with pytest.raises(AssertionError, match="local_scalar"), ReadsFromDevice():
        x.sum().item()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_mixed_precision_has_the_same_terms_and_gradient(covariance, make_trainer):
    class Watched(VariationalAutoencoder):
        def on_before_optimizer_step(self, optimizer):
            self.seen = torch.cat([p.grad.flatten() for p in self.parameters()])

    code = GaussianCode(covariance=covariance)
    pair = mlp_pair(6, 3, h_dim=code.h_shape((3,))[0])
    x = 0.3 * torch.randn(512, 6)
    model = Watched(*pair, GaussianNLL(0.5), code=code, lr=0.0)
    terms, gradients = [], []
    for precision in ("32-true", "bf16-mixed"):
        L.seed_everything(0, verbose=False)
        trainer = make_trainer(precision=precision)
        trainer.fit(model, ae.TensorDataModule(x, batch_size=512, val_fraction=0))
        terms.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        gradients.append(model.seen.float())
    assert terms[1] == pytest.approx(terms[0], rel=0.01)
    assert terms[0] != pytest.approx(terms[1], rel=1e-7)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_checkpoint_rebuilds_it(covariance, make_trainer, tmp_path):
    code = GaussianCode(beta=0.5, capacity=1.0, covariance=covariance)
    pair = mlp_pair(6, 2, h_dim=code.h_shape((2,))[0])
    model = VariationalAutoencoder(*pair, code=code)
    x = torch.randn(16, 6)
    trainer = make_trainer()
    trainer.fit(model, DataLoader(x, batch_size=8))
    model.code.capacity = 4.0
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = load(tmp_path / "model.ckpt")
    assert isinstance(again, VariationalAutoencoder)
    assert isinstance(again.loss, GaussianNLL)
    assert (again.code.beta, again.code.capacity, again.code.covariance) == (0.5, 4.0, covariance)
    values = []
    for one in (model, again):
        torch.manual_seed(4)
        values.append(one.log_likelihood(x, 5))
    assert torch.equal(*values)


# -- errors at the door -----------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"encoder: for GaussianCode .* \(3,\) it must give \(6,\), got \(3,\)"):
        VariationalAutoencoder(*mlp_pair(5, 3))
    with pytest.raises(ValueError, match=r"it must give \(9,\), got \(6,\)"):
        VariationalAutoencoder(*mlp_pair(5, 3, h_dim=6), code=GaussianCode(covariance="full"))
    pair = conv_pair((1, 6, 6), 3, h_dim=6, spatial=True)
    with pytest.raises(ValueError, match=r"covariance: 'full' is for flat latents"):
        VariationalAutoencoder(*pair, code=GaussianCode(covariance="full"))


def test_another_code_is_an_error():
    with pytest.raises(TypeError, match="code: expected a GaussianCode, got a Identity"):
        VariationalAutoencoder(*mlp_pair(5, 3), code=ae.Identity())


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: model.iwae_bound(x, 3),
        lambda model, x: model.log_likelihood(x),
        lambda model, x: model.sample(3, draw=True),
    ],
)
def test_a_loss_that_is_no_density_has_no_evidence(call):
    model = VariationalAutoencoder(*mlp_pair(5, 2, h_dim=4), SquaredError())
    assert model.sample(2).shape == (2, 5)
    with pytest.raises(TypeError, match=r"loss: .* needs a Likelihood, .* got SquaredError, which is no density of x"):
        call(model, torch.randn(4, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, x: model.sample(0), "n: expected a positive whole number, got 0"),
        (lambda model, x: model.iwae_bound(x, 0), "num_samples: expected a positive whole number, got 0"),
        (lambda model, x: model.log_likelihood(x, -1), "num_samples: expected a positive whole number, got -1"),
        (lambda model, x: model.log_likelihood(x, 5, chunk_size=0), "chunk_size: expected a positive whole number"),
        (lambda model, x: model.interpolate(x, x[:2]), r"y: expected the shape of x, \(4, 5\), got \(2, 5\)"),
        (lambda model, x: model.interpolate(x, x, 1), "steps: expected at least 2, the ends, got 1"),
        (lambda model, x: model.traverse(x, 2, [0.0]), "dim: expected a latent from 0 to 1, got 2"),
        (lambda model, x: model.traverse(x, -3, [0.0]), "dim: expected a latent from 0 to 1, got -3"),
        (lambda model, x: model.traverse(x, 0, []), r"values: expected a sequence of finite numbers, got \[\]"),
        (lambda model, x: model.traverse(x, 0, [float("nan")]), "values: expected a finite number, got nan"),
    ],
)
def test_arguments_are_checked(call, message):
    model = VariationalAutoencoder(*mlp_pair(5, 2, h_dim=4))
    with pytest.raises(ValueError, match=message):
        call(model, torch.randn(4, 5))


def test_free_bits_are_no_dead_units_of_the_network(make_trainer):
    pair = ae.mlp_pair(16, 3, hidden=(8,), h_dim=6)
    model, monitor = (
        VariationalAutoencoder(*pair, code=GaussianCode(free_bits=1.0)),
        ae.DeadReLUMonitor(every_n_steps=1),
    )
    make_trainer(callbacks=monitor).fit(model, DataLoader(torch.randn(32, 16), batch_size=8))
    assert set(monitor.firing_frequency()) == {"encoder.layers.1", "decoder.layers.1"}
