"""Continuous and binary likelihoods against SciPy, quadrature and the closed forms of their equations."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from lightning_ae import BernoulliNLL, ContinuousBernoulliNLL, GaussianNLL, LaplaceNLL

LOGITS = [-30.0, -3.0, -0.5, -1e-3, 0.0, 1e-3, 0.49, 0.51, 3.0, 30.0, 80.0]


def double(value):
    return torch.tensor([[value]], dtype=torch.float64)


def density(loss, params):
    return lambda x: loss(double(params), double(x)).neg().exp().item()


@pytest.mark.parametrize("scale", [0.05, 1.0, 7.0])
@pytest.mark.parametrize(("Loss", "reference"), [(GaussianNLL, stats.norm), (LaplaceNLL, stats.laplace)])
class TestLocationFamily:
    def test_is_scipys_density(self, Loss, reference, scale):
        a, x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
        expected = -reference.logpdf(x.numpy(), loc=a.numpy(), scale=scale).sum((1, 2))
        # the scale is kept in single precision
        np.testing.assert_allclose(Loss(scale)(a, x).numpy(), expected, rtol=1e-5)

    def test_integrates_to_one(self, Loss, reference, scale):
        a = 0.3
        total = sum(
            integrate.quad(density(Loss(scale), a), *ends)[0]
            for ends in ((a - 40 * scale, a), (a, a + 40 * scale))  # Laplace has a kink at a
        )
        assert total == pytest.approx(1, abs=1e-6)

    def test_samples_have_its_mean_and_deviation(self, Loss, reference, scale):
        params = torch.tensor([-1.0, 2.0]).repeat(50_000, 1)
        samples = Loss(scale).sample(params)
        std = reference(scale=scale).std()
        assert samples.shape == params.shape
        assert (samples.mean(0) - params[0]).abs().max() < 5 * std / math.sqrt(50_000)
        np.testing.assert_allclose(samples.std(0), std, rtol=0.03)

    def test_mean_is_the_decoders_output(self, Loss, reference, scale):
        params = torch.randn(3, 2)
        assert torch.equal(Loss(scale).mean(params), params)


def test_gaussian_is_its_closed_form_and_torchs_distribution():
    a, x = torch.randn(2, 6, 10, dtype=torch.float64)
    sigma = 0.25  # exact as a power of two
    value = GaussianNLL(sigma)(a, x)
    closed = (x - a).square().sum(1) / (2 * sigma**2) + 10 / 2 * math.log(2 * math.pi * sigma**2)
    torch.testing.assert_close(value, closed, rtol=1e-6, atol=0)
    torch.testing.assert_close(value, -torch.distributions.Normal(a, sigma).log_prob(x).sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("Loss", "gradient"),
    [
        (GaussianNLL, lambda a, x, scale: (a - x) / scale**2),
        (LaplaceNLL, lambda a, x, scale: torch.sign(a - x) / scale),
    ],
)
def test_gradient_is_that_of_the_docstring(Loss, gradient):
    a, x = torch.randn(2, 6, 10)
    a.requires_grad_()
    Loss(0.5)(a, x).sum().backward()
    torch.testing.assert_close(a.grad, gradient(a.detach(), x, 0.5))


@pytest.mark.parametrize(
    ("loss", "statistic"),
    [(GaussianNLL(0.2), np.mean), (LaplaceNLL(0.2), np.median)],
    ids=["gaussian-mean", "laplace-median"],
)
def test_minimiser_is_the_statistic(loss, statistic):
    data = np.random.default_rng(0).exponential(size=101)  # skewed, so that mean and median differ
    x = torch.from_numpy(data)[:, None]
    found = optimize.minimize_scalar(
        lambda a: loss(torch.full_like(x, a), x).sum().item(), bounds=(0, 5), method="bounded", options={"xatol": 1e-8}
    )
    assert found.x == pytest.approx(statistic(data), abs=1e-6)


@pytest.mark.parametrize(
    ("Loss", "optimum"),
    [
        pytest.param(GaussianNLL, lambda r: np.sqrt(np.mean(r**2)), id="gaussian-root-mean-square"),
        pytest.param(LaplaceNLL, lambda r: np.mean(np.abs(r)), id="laplace-mean-absolute"),
    ],
)
def test_learned_scale_becomes_that_of_the_residuals(Loss, optimum):
    a, x = torch.randn(2, 50, 8, dtype=torch.float64) * torch.tensor([[[1.0]], [[3.0]]])
    loss = Loss(scale=0.1, learn_scale=True).double()
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(a, x).mean()
        value.backward()
        return value

    optimizer.step(closure)
    assert loss.scale.item() == pytest.approx(optimum((x - a).numpy()), rel=1e-5)


@pytest.mark.parametrize("Loss", [GaussianNLL, LaplaceNLL])
def test_scale_is_a_parameter_only_if_learned(Loss):
    assert [name for name, _ in Loss(learn_scale=True).named_parameters()] == ["log_scale"]
    assert list(Loss(2.0).parameters()) == []
    assert Loss(2.0).state_dict()["log_scale"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("Loss", [GaussianNLL, LaplaceNLL])
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scale_that_is_not_positive_is_an_error(Loss, scale):
    with pytest.raises(ValueError, match="scale: expected a positive number, got"):
        Loss(scale)


class TestBernoulli:
    @pytest.mark.parametrize("logit", LOGITS)
    def test_probabilities_sum_to_one(self, logit):
        assert density(BernoulliNLL(), logit)(0.0) + density(BernoulliNLL(), logit)(1.0) == pytest.approx(1, abs=1e-8)

    def test_is_scipys_probability(self):
        a = 3 * torch.randn(6, 10, dtype=torch.float64)
        x = torch.bernoulli(torch.full_like(a, 0.5))
        expected = -stats.bernoulli.logpmf(x.numpy(), 1 / (1 + np.exp(-a.numpy()))).sum(1)
        np.testing.assert_allclose(BernoulliNLL()(a, x).numpy(), expected)

    def test_of_soft_targets_is_the_cross_entropy(self):
        a, x = 3 * torch.randn(6, 10, dtype=torch.float64), torch.rand(6, 10, dtype=torch.float64)
        x_hat = 1 / (1 + torch.exp(-a))
        expected = -(x * x_hat.log() + (1 - x) * (1 - x_hat).log()).sum(1)
        torch.testing.assert_close(BernoulliNLL()(a, x), expected)

    def test_samples_average_to_the_mean(self):
        params = torch.tensor([-2.0, 0.0, 1.5]).repeat(50_000, 1)
        samples = BernoulliNLL().sample(params)
        expected = 1 / (1 + np.exp([2.0, 0.0, -1.5]))
        assert set(samples.unique().tolist()) == {0.0, 1.0}
        np.testing.assert_allclose(BernoulliNLL().mean(params)[0], expected, rtol=1e-6)
        np.testing.assert_allclose(samples.mean(0), expected, atol=5 * 0.5 / math.sqrt(50_000))


class TestContinuousBernoulli:
    @pytest.mark.parametrize("logit", LOGITS)
    def test_integrates_to_one_with_the_stated_mean(self, logit):
        p = density(ContinuousBernoulliNLL(), logit)
        options = {"points": [0.02, 0.1, 0.9, 0.98], "epsabs": 1e-11, "epsrel": 1e-11}
        assert integrate.quad(p, 0, 1, **options)[0] == pytest.approx(1, abs=1e-9)
        mean = integrate.quad(lambda x: x * p(x), 0, 1, **options)[0]
        assert ContinuousBernoulliNLL().mean(double(logit)).item() == pytest.approx(mean, abs=1e-9)

    @pytest.mark.parametrize("logit", [0.02, 0.3, 0.499, 0.501, 2.0, 10.0, -0.3, -10.0])
    def test_is_the_density_of_its_docstring(self, logit):
        x = np.linspace(0, 1, 5)
        expected = -np.log(logit * np.exp(logit * x) / np.expm1(logit))
        value = ContinuousBernoulliNLL()(torch.full((5, 1), logit, dtype=torch.float64), torch.from_numpy(x)[:, None])
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-13)

    def test_is_torchs_distribution(self):
        a, x = 3 * torch.randn(6, 10, dtype=torch.float64), torch.rand(6, 10, dtype=torch.float64)
        reference = torch.distributions.ContinuousBernoulli(logits=a, lims=(0.4999, 0.5001))
        torch.testing.assert_close(ContinuousBernoulliNLL()(a, x), -reference.log_prob(x).sum(1), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("logit", [*LOGITS, -100.0, 100.0])
    def test_samples_average_to_the_mean(self, logit):
        loss = ContinuousBernoulliNLL()
        samples = loss.sample(torch.full((40_000, 1), logit))
        mean = 0.5 if logit == 0 else 1 / -math.expm1(-logit) - 1 / logit
        deviation = 1 / max(math.sqrt(12), abs(logit))
        assert samples.min() >= 0
        assert samples.max() <= 1
        # 1/(1 - e^-η) - 1/η loses digits near zero, which 1e-9 allows for
        assert samples.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(40_000) + 1e-9)


@pytest.mark.parametrize("loss", [BernoulliNLL(), ContinuousBernoulliNLL()], ids=["bernoulli", "continuous"])
class TestUnitInterval:
    @pytest.mark.parametrize("logit", LOGITS)
    def test_gradient_is_the_error_of_the_mean(self, loss, logit):
        x = torch.tensor([[0.0, 0.2, 1.0]], dtype=torch.float64)
        a = torch.full_like(x, logit).requires_grad_()
        loss(a, x).sum().backward()
        torch.testing.assert_close(a.grad, loss.mean(a.detach()) - x, rtol=0, atol=3e-9)  # softplus is linear from 20

    @pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("logit", [-100.0, -88.0, -17.0, 17.0, 88.0, 100.0])
    def test_single_precision_holds_at_extreme_logits(self, loss, logit, x):
        def exact(a):
            if isinstance(loss, BernoulliNLL):
                return np.logaddexp(0, a) - a * x
            return np.log(np.expm1(a) / a) - a * x

        a = torch.tensor([[logit]], requires_grad=True)
        value = loss(a, torch.tensor([[x]]))
        value.sum().backward()
        assert value.item() == pytest.approx(exact(logit), rel=1e-5, abs=1e-5)
        slope = (exact(logit + 1e-4) - exact(logit - 1e-4)) / 2e-4
        assert a.grad.item() == pytest.approx(slope, abs=1e-5)

    @pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0])
    def test_targets_outside_the_range_are_an_error_that_names_it(self, loss, bad):
        with pytest.raises(ValueError, match=r"targets must lie in \[0, 1\], got values from"):
            loss.check(torch.tensor([[0.5, bad]]))


@pytest.mark.parametrize("resolution", [1.0, 1 / 255])
def test_description_length_is_the_bits_of_the_rounded_value(resolution):
    # a cell of width δ has probability ∫p; with σ = 40 δ the density is flat over one cell
    sigma = 40 * resolution
    x = torch.tensor([[3.0, -7.0]], dtype=torch.float64) * resolution
    edges = stats.norm.cdf((x[0, :, None].numpy() + resolution * np.array([-0.5, 0.5])) / sigma)
    bits = -np.log2(edges[:, 1] - edges[:, 0]).sum()
    length = GaussianNLL(sigma).description_length(torch.zeros_like(x), x, resolution)
    assert length.shape == (1,)
    assert length.item() == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize(("Loss", "reference"), [(GaussianNLL, stats.norm), (LaplaceNLL, stats.laplace)])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 1.0, 30.0])
def test_description_length_is_a_length_at_any_scale(Loss, reference, sigma):
    """Kraft: over all recorded values 2^-length sums to one; none is negative; each is the mass of its cell."""
    loss, delta = Loss(sigma), 0.5
    x = (torch.arange(-4000, 4001, dtype=torch.float64) * delta)[:, None]
    length = loss.description_length(torch.full_like(x, 0.1), x, delta)
    assert (length >= 0).all()
    assert torch.exp2(-length).sum().item() == pytest.approx(1, abs=1e-6)
    # on the side where SciPy's distribution function is small, so that its difference is not rounded
    middle = (-(x[:, 0] - 0.1).abs()).numpy()
    mass = reference.cdf((middle + delta / 2) / sigma) - reference.cdf((middle - delta / 2) / sigma)
    keep = mass > 1e-200
    # the scale is kept in single precision
    np.testing.assert_allclose(length.numpy()[keep], -np.log2(mass[keep]), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("logit", [-40.0, -1e-4, 0.0, 2.0, 500.0])
def test_cells_of_the_continuous_bernoulli_fill_the_unit_interval(logit):
    x = (torch.arange(256, dtype=torch.float64) / 255)[:, None]
    length = ContinuousBernoulliNLL().description_length(torch.full_like(x, logit), x, 1 / 255)
    assert (length >= -1e-9).all()
    assert torch.exp2(-length).sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("Loss", [GaussianNLL, LaplaceNLL])
@pytest.mark.parametrize("log_scale", [-30.0, -88.0, -1e4, -1e9])
def test_a_learned_scale_that_runs_away_is_neither_nan_nor_lost(Loss, log_scale):
    """With exact reconstructions nothing holds it; with others the gradient leads back."""
    loss = Loss(learn_scale=True)
    with torch.no_grad():
        loss.log_scale.fill_(log_scale)
    x = torch.randn(4, 8)
    for params in (x.clone().requires_grad_(), (x + 0.1).requires_grad_()):
        value = loss(params, x).mean()
        to_params, to_scale = torch.autograd.grad(value, (params, loss.log_scale))
        assert value.isfinite()
        assert to_params.isfinite().all()
        assert to_scale.isfinite()
        assert (to_scale > 0) == bool((params == x).all())
    assert 0 < loss.scale < 1e-6


def test_a_learned_scale_is_held_back_where_it_was_asked_to():
    loss = GaussianNLL(0.1, learn_scale=True, min_scale=1 / 256)
    for log_scale, expected in (
        (-3.0, math.exp(-3)),
        (math.log(1 / 256), 1 / 256),
        (-9.0, 1 / 256 / (10 - math.log(256))),
    ):
        with torch.no_grad():
            loss.log_scale.fill_(log_scale)
        assert loss.scale.item() == pytest.approx(expected, rel=1e-5)
    # a fixed scale is what it was set to, and a learned one is as before for all that data in single precision can show
    assert GaussianNLL(1e-20).scale.item() == pytest.approx(1e-20)
    free = GaussianNLL(3.0, learn_scale=True)
    with torch.no_grad():
        free.log_scale.fill_(math.log(1e-5))
    assert free.scale.item() == pytest.approx(1e-5)
    for wrong in (0.0, 0.2, math.nan):
        with pytest.raises(ValueError, match="min_scale: expected a positive number"):
            GaussianNLL(0.1, learn_scale=True, min_scale=wrong)
