"""What of a loss is the reconstruction's: the deviance, against scikit-learn, closed forms and minimisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.metrics import mean_poisson_deviance

import lightning_ae as ae


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def counts(*shape):
    return torch.poisson(8 * uniform(*shape), generator=torch.Generator().manual_seed(2))


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


#: a loss, its data, and the decoder's output for a perfect reconstruction
PERFECT = {
    "squared": (ae.SquaredError(), normal, lambda x: x),
    "squared-sigmoid": (ae.SquaredError("sigmoid"), uniform, torch.logit),
    "gaussian": (ae.GaussianNLL(0.1), normal, lambda x: x),
    "gaussian-learned": (ae.GaussianNLL(3.0, learn_scale=True), normal, lambda x: x),
    "laplace": (ae.LaplaceNLL(0.1), normal, lambda x: x),
    "bernoulli-grey": (ae.BernoulliNLL(), uniform, torch.logit),
    "bernoulli-bits": (ae.BernoulliNLL(), lambda *s: uniform(*s).round(), lambda x: 200 * x - 100),
    "poisson": (ae.PoissonNLL(), counts, lambda x: x.log().clamp(min=-50)),
    "negative-binomial": (ae.NegativeBinomialNLL(6, 2.0), counts, lambda x: x.log().clamp(min=-50)),
    "negative-binomial-library": (
        ae.NegativeBinomialNLL(library_size=True), counts, lambda x: x.log().clamp(min=-50),
    ),
    "zero-inflated": (
        ae.ZeroInflatedNegativeBinomialNLL(6), counts,
        lambda x: torch.cat([x.log().clamp(min=-50), torch.full_like(x, -50)], 1),
    ),
    "ssim": (ae.SSIMLoss(window_size=3), lambda n, d: uniform(n, 1, 6, 6), lambda x: x),
    "edges": (ae.FeatureLoss(ae.ImageGradients()), lambda n, d: uniform(n, 1, 6, 6), lambda x: x),
    "sum": (
        ae.WeightedLoss({"a": ae.BernoulliNLL(), "b": ae.SquaredError()}, {"a": 0.5, "b": 2.0}), uniform, torch.logit,
    ),
    "mix": (ae.AlphaMix(ae.GaussianNLL(0.1), ae.SquaredError(), 0.3), normal, lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("name", PERFECT)
def test_a_perfect_reconstruction_has_none_and_any_other_some(name: str):
    loss, draw, perfect = PERFECT[name]
    x = draw(5, 6)
    best = perfect(x)
    torch.testing.assert_close(loss.excess(best, x), torch.zeros(5), atol=2e-5, rtol=0)
    worse = loss.excess(best.clamp(-3, 3) + 0.5 * normal(*best.shape), x)
    assert (worse > 1e-3).all()
    # it is the loss but for what does not depend on the reconstruction
    torch.testing.assert_close(
        worse, loss(best.clamp(-3, 3) + 0.5 * normal(*best.shape), x) - loss(best, x), atol=1e-3, rtol=1e-4
    )


def test_of_poisson_is_half_the_deviance_of_scikit_learn():
    x, log_rate = counts(4, 7), normal(4, 7)
    found = ae.PoissonNLL().excess(log_rate, x)
    for i in range(4):
        expected = 7 / 2 * mean_poisson_deviance(x[i].double().numpy(), log_rate[i].double().exp().numpy())
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


def test_of_large_counts_is_exact_beside_the_data():
    x = torch.full((1, 1), 1e7)
    log_rate = x.log() + 1e-4
    # x (e^d - 1 - d), which the difference of two losses in single precision loses
    d = float(log_rate.double() - x.double().log())
    assert float(ae.PoissonNLL().excess(log_rate, x)) == pytest.approx(1e7 * (math.expm1(d) - d), rel=1e-5)
    many = ae.NegativeBinomialNLL(inverse_dispersion=1e17)
    assert float(many.excess(log_rate, x).detach()) == pytest.approx(1e7 * (math.expm1(d) - d), rel=1e-4)


@pytest.mark.parametrize("theta", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("far", [-30.0, 0.3, 4.0, 60.0, 900.0])
def test_of_the_negative_binomial_is_that_of_its_unit_deviance(theta: float, far: float):
    loss, x = ae.NegativeBinomialNLL(inverse_dispersion=theta), torch.tensor([[0.0, 1.0, 12.0]])
    log_mean = torch.full((1, 3), far)
    theta = float(loss.inverse_dispersion.detach().double())
    expected = 0.0
    for k in (0.0, 1.0, 12.0):
        log_total = np.logaddexp(far, math.log(theta))
        some = k * (math.log(k) - far) if k else 0.0
        expected += some - (k + theta) * (math.log(k + theta) - log_total)
    assert float(loss.excess(log_mean, x).detach()) == pytest.approx(expected, rel=1e-5)


def test_of_grey_bernoulli_is_the_divergence():
    x, logits = uniform(3, 5), normal(3, 5)
    p, q = torch.distributions.Bernoulli(x.double()), torch.distributions.Bernoulli(logits=logits.double())
    expected = torch.distributions.kl_divergence(p, q).sum(1).float()
    torch.testing.assert_close(ae.BernoulliNLL().excess(logits, x), expected)
    half = torch.full((1, 784), 0.5)
    assert float(ae.BernoulliNLL()(torch.zeros(1, 784), half)) == pytest.approx(784 * math.log(2), rel=1e-5)
    assert float(ae.BernoulliNLL().excess(torch.zeros(1, 784), half)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("value", [0.01, 0.2, 0.5, 0.50001, 0.77, 0.99])
def test_of_the_continuous_bernoulli_is_over_the_numerical_minimum(value: float):
    loss, x = ae.ContinuousBernoulliNLL(), torch.full((1, 1), value, dtype=torch.float64)

    def nats(eta: float) -> float:
        return float(loss(torch.full((1, 1), eta, dtype=torch.float64), x))

    best = optimize.minimize_scalar(nats, bounds=(-250, 250), method="bounded", options={"xatol": 1e-9})
    for eta in (-3.0, 0.0, 1.5, 40.0):
        found = float(loss.excess(torch.full((1, 1), eta, dtype=torch.float64), x))
        assert found == pytest.approx(nats(eta) - best.fun, abs=1e-7)


def test_of_the_continuous_bernoulli_is_finite_where_the_density_has_no_limit():
    loss, ends = ae.ContinuousBernoulliNLL(), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(loss.excess(torch.tensor([[-256.0, 300.0]]), ends), torch.zeros(1))
    found = float(loss.excess(torch.tensor([[-20.0, 20.0]]), ends))
    assert found == pytest.approx(2 * math.log(256 / 20), rel=1e-5)  # densities η at the end
    assert math.isfinite(float(loss.excess(torch.tensor([[1e6, -1e6]]), ends)))


def test_of_zero_inflation_is_over_the_numerical_minimum():
    loss, x = ae.ZeroInflatedNegativeBinomialNLL(inverse_dispersion=2.0), torch.tensor([[3.0], [0.0]])

    def nats(params, i):
        return float(loss(torch.tensor([list(params)], dtype=torch.float64), x[i : i + 1].double()).detach())

    params = torch.tensor([[0.4, -0.2]])
    for i in range(2):
        best = min(optimize.minimize(nats, start, args=(i,)).fun for start in ([1.0, -3.0], [-3.0, 3.0]))
        found = float(loss.excess(params, x[i : i + 1]).detach())
        assert found == pytest.approx(nats(params[0].tolist(), i) - best, abs=1e-3)


@pytest.mark.parametrize("name", ["gaussian", "bernoulli-grey", "poisson", "sum"])
def test_is_over_what_is_there(name: str):
    loss, draw, _ = PERFECT[name]
    x, params = draw(4, 6), normal(4, 6)
    mask = uniform(4, 6) > 0.3
    found = loss.excess(params, torch.where(mask, x, torch.nan), mask)
    each = torch.stack([loss.excess(params[:, [j]], x[:, [j]]) for j in range(6)], 1)
    torch.testing.assert_close(found, (each * mask).sum(1))
    torch.testing.assert_close(loss.excess(params, x, torch.ones_like(mask)), loss.excess(params, x))


def test_of_a_mixture_on_bins_is_the_loss_whose_best_is_zero():
    loss, x = ae.DiscretizedLogisticMixtureNLL(num_components=1), torch.tensor([[128 / 255, 0.0, 1.0]])
    best = torch.cat([2 * x - 1, torch.zeros(1, 3)], 1)
    params = torch.cat([torch.zeros(1, 3), 2 * x - 1, torch.full((1, 3), -10.0)], 1)
    assert float(loss.excess(params, x)) == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(loss.excess(params + best.new_tensor(0.5), x), loss(params + 0.5, x))


def test_a_scale_that_is_learned_stays_as_it_is():
    x, params = normal(3, 4), normal(3, 4).roll(1, 0)
    small, large = ae.GaussianNLL(0.5, learn_scale=True), ae.GaussianNLL(1.0, learn_scale=True)
    torch.testing.assert_close(small.excess(params, x), 4 * large.excess(params, x))
    torch.testing.assert_close(large.excess(params, x), (x - params).square().sum(1) / 2)
