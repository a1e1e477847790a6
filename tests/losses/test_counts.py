"""Count likelihoods against SciPy, summation over all counts, and the closed forms of their equations."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from lightning_ae import NegativeBinomialNLL, PoissonNLL, ZeroInflatedNegativeBinomialNLL

MEANS = [0.01, 0.7, 5.0, 60.0]
DISPERSIONS = [0.2, 1.0, 30.0]
LOSSES = [PoissonNLL(), NegativeBinomialNLL(), ZeroInflatedNegativeBinomialNLL()]
COUNTS = torch.arange(6000, dtype=torch.float64)[:, None]


def negative_binomial(mean, theta):
    return stats.nbinom(theta, theta / (theta + mean))


def zero_inflated(params, x, theta):
    """Probabilities by the mixture's definition; ``params`` are the two blocks side by side."""
    log_mean, dropout = np.split(params, 2, axis=1)
    share = 1 / (1 + np.exp(-dropout))
    return share * (x == 0) + (1 - share) * negative_binomial(np.exp(log_mean), theta).pmf(x)


def probabilities(loss, params):
    return loss(torch.tensor([params], dtype=torch.float64).expand(len(COUNTS), -1), COUNTS).neg().exp()


@pytest.mark.parametrize("mean", MEANS)
class TestPoisson:
    def test_is_scipys_probability(self, mean):
        x = torch.arange(200, dtype=torch.float64)[:, None]
        value = PoissonNLL()(torch.full_like(x, math.log(mean)), x).numpy()
        np.testing.assert_allclose(value, -stats.poisson.logpmf(np.arange(200), mean), rtol=1e-9)

    def test_sums_to_one_with_the_stated_mean(self, mean):
        p = probabilities(PoissonNLL(), [math.log(mean)])
        stated = PoissonNLL().mean(torch.tensor([math.log(mean)], dtype=torch.float64)).item()
        assert p.sum().item() == pytest.approx(1, abs=1e-9)
        assert stated == pytest.approx((p * COUNTS[:, 0]).sum().item(), rel=1e-9)

    def test_gradient_is_the_error_of_the_mean(self, mean):
        a = torch.full((1, 4), math.log(mean), dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[0.0, 1.0, 7.0, 100.0]], dtype=torch.float64)
        PoissonNLL()(a, x).sum().backward()
        torch.testing.assert_close(a.grad, mean - x)


@pytest.mark.parametrize("theta", DISPERSIONS)
@pytest.mark.parametrize("mean", MEANS)
class TestNegativeBinomial:
    def loss(self, theta):
        loss = NegativeBinomialNLL().double()
        torch.nn.init.constant_(loss.log_inverse_dispersion, math.log(theta))
        return loss

    def test_is_scipys_probability(self, mean, theta):
        x = torch.arange(200, dtype=torch.float64)[:, None]
        value = self.loss(theta)(torch.full_like(x, math.log(mean)), x).detach().numpy()
        np.testing.assert_allclose(value, -negative_binomial(mean, theta).logpmf(np.arange(200)), rtol=1e-9)

    def test_is_torchs_distribution(self, mean, theta):
        x = torch.arange(50, dtype=torch.float64)[:, None]
        reference = torch.distributions.NegativeBinomial(theta, probs=torch.tensor(mean / (mean + theta)).double())
        value = self.loss(theta)(torch.full_like(x, math.log(mean)), x)
        torch.testing.assert_close(value.detach(), -reference.log_prob(x)[:, 0], rtol=1e-5, atol=1e-5)

    def test_sums_to_one_with_the_stated_mean_and_variance(self, mean, theta):
        p = probabilities(self.loss(theta), [math.log(mean)]).detach()
        x = COUNTS[:, 0]
        assert p.sum().item() == pytest.approx(1, abs=1e-9)
        assert (p * x).sum().item() == pytest.approx(mean, rel=1e-6)
        assert (p * (x - mean) ** 2).sum().item() == pytest.approx(mean + mean**2 / theta, rel=1e-6)
        stated = self.loss(theta).mean(torch.tensor([math.log(mean)], dtype=torch.float64))
        assert stated.item() == pytest.approx(mean)

    def test_gradient_is_that_of_the_docstring(self, mean, theta):
        a = torch.full((1, 4), math.log(mean), dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[0.0, 1.0, 7.0, 100.0]], dtype=torch.float64)
        self.loss(theta)(a, x).sum().backward()
        torch.testing.assert_close(a.grad, (mean - x) * theta / (theta + mean))

    @pytest.mark.parametrize("dropout", [-4.0, 0.3, 5.0])
    def test_zero_inflated_is_the_mixture_and_sums_to_one(self, mean, theta, dropout):
        loss = ZeroInflatedNegativeBinomialNLL().double()
        torch.nn.init.constant_(loss.log_inverse_dispersion, math.log(theta))
        params = [math.log(mean), dropout]
        p = probabilities(loss, params).detach()
        expected = zero_inflated(np.array([params]), COUNTS[:50].numpy(), theta)[:, 0]
        np.testing.assert_allclose(p[:50], expected, rtol=1e-8)
        assert p.sum().item() == pytest.approx(1, abs=1e-8)
        stated = loss.mean(torch.tensor([params], dtype=torch.float64)).item()
        assert stated == pytest.approx((p * COUNTS[:, 0]).sum().item(), rel=1e-6)


def test_dispersion_is_per_feature_of_the_last_dimension():
    loss = NegativeBinomialNLL(3).double()
    thetas = np.array([0.3, 2.0, 9.0])
    loss.load_state_dict({"log_inverse_dispersion": torch.from_numpy(np.log(thetas))})
    x = torch.tensor([[[0.0, 4.0, 7.0], [3.0, 1.0, 0.0]]], dtype=torch.float64)
    expected = -negative_binomial(np.exp(0.5), thetas).logpmf(x[0].numpy()).sum()
    assert loss(torch.full_like(x, 0.5), x).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(loss.inverse_dispersion.detach(), torch.from_numpy(thetas))


@pytest.mark.parametrize(("dtype", "theta"), [(torch.float64, 1e7), (torch.float32, 1e4), (torch.float32, 1e7)])
def test_large_inverse_dispersion_is_the_poisson(dtype, theta):
    x = torch.arange(10, dtype=dtype)[:, None]
    loss = NegativeBinomialNLL(inverse_dispersion=theta).to(dtype)
    value = loss(torch.full_like(x, math.log(3)), x).detach().numpy()
    expected = -negative_binomial(3, theta).logpmf(np.arange(10))
    np.testing.assert_allclose(value, expected, atol=1e-4)
    np.testing.assert_allclose(expected, -stats.poisson.logpmf(np.arange(10), 3), atol=30 / theta + 1e-6)


def test_zero_inflated_blocks_lie_along_the_first_event_dimension():
    loss = ZeroInflatedNegativeBinomialNLL(inverse_dispersion=1.0).double()
    params = torch.randn(2, 6, 4, dtype=torch.float64)
    x = torch.poisson(torch.ones(2, 3, 4, dtype=torch.float64))
    assert loss.params_shape((3, 4)) == (6, 4)
    expected = -np.log(zero_inflated(params.numpy(), x.numpy(), 1.0)).sum((1, 2))
    np.testing.assert_allclose(loss(params, x).detach(), expected, rtol=1e-9)


class TestLibrarySize:
    def test_mean_is_a_share_and_prediction_sums_to_the_total(self):
        loss = NegativeBinomialNLL(library_size=True)
        params, x = torch.randn(5, 2, 3), torch.poisson(torch.full((5, 2, 3), 4.0))
        torch.testing.assert_close(loss.mean(params).sum((1, 2)), torch.ones(5))
        torch.testing.assert_close(loss.prediction(params, x).sum((1, 2)), x.sum((1, 2)))

    def test_loss_is_that_of_the_scaled_shares(self):
        params = torch.randn(5, 6, dtype=torch.float64)
        x = torch.poisson(torch.full((5, 6), 4.0, dtype=torch.float64))
        share = np.exp(params.numpy()) / np.exp(params.numpy()).sum(1, keepdims=True)
        expected = -negative_binomial(share * x.sum(1, keepdim=True).numpy(), 1.0).logpmf(x.numpy()).sum(1)
        value = NegativeBinomialNLL(library_size=True).double()(params, x).detach()
        np.testing.assert_allclose(value, expected, rtol=1e-9)

    def test_zero_inflated_prediction_is_the_total_times_share_times_kept(self):
        loss = ZeroInflatedNegativeBinomialNLL(library_size=True)
        params, x = torch.randn(5, 6), torch.poisson(torch.full((5, 3), 4.0))
        share = np.exp(params[:, :3].numpy()) / np.exp(params[:, :3].numpy()).sum(1, keepdims=True)
        expected = x.sum(1, keepdim=True).numpy() * share / (1 + np.exp(params[:, 3:].numpy()))
        np.testing.assert_allclose(loss.prediction(params, x), expected, rtol=1e-5)

    @pytest.mark.parametrize("Loss", [NegativeBinomialNLL, ZeroInflatedNegativeBinomialNLL])
    def test_an_empty_example_costs_nothing_and_has_finite_gradients(self, Loss):
        loss = Loss(library_size=True)
        params = torch.randn(1, *loss.params_shape((3,))).requires_grad_()
        value = loss(params, torch.zeros(1, 3))
        value.sum().backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert params.grad.isfinite().all()

    def test_samples_have_the_given_totals_on_average(self):
        totals = torch.tensor([10.0, 200.0]).repeat(20_000)
        samples = NegativeBinomialNLL(inverse_dispersion=5.0, library_size=True).sample(
            torch.zeros(40_000, 4), library=totals
        )
        for row, total in enumerate((10.0, 200.0)):
            std = math.sqrt(4 * (total / 4 + (total / 4) ** 2 / 5))
            assert samples[row::2].sum(1).mean().item() == pytest.approx(total, abs=5 * std / math.sqrt(20_000))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
class TestEveryCount:
    def test_samples_are_counts_that_average_to_the_mean(self, loss):
        means = np.array([0.5, 3.0])
        params = torch.tensor([*np.log(means), 0.4, -0.4][: 2 * loss.params_per_feature]).float().repeat(50_000, 1)
        if loss.params_per_feature == 2:
            means = means / (1 + np.exp([0.4, -0.4]))
        samples = loss.sample(params)
        assert samples.shape == (50_000, 2)
        assert samples.eq(samples.round()).all()
        assert samples.min() >= 0
        # no variance here exceeds μ + μ² of the uninflated with θ = 1
        np.testing.assert_allclose(samples.mean(0), means, atol=5 * math.sqrt(12 / 50_000))

    @pytest.mark.parametrize("bad", [-1.0, 0.5])
    def test_targets_that_are_no_counts_are_an_error_that_says_so(self, loss, bad):
        with pytest.raises(ValueError, match=r"targets must be counts 0, 1, 2.*Pass raw counts"):
            loss.check(torch.tensor([[0.0, bad]]))

    @pytest.mark.parametrize("x", [0.0, 1.0, 1e4])
    @pytest.mark.parametrize("extreme", [-100.0, -20.0, 20.0, 80.0, 100.0])
    @pytest.mark.parametrize("which", [0, 1])
    def test_single_precision_holds_at_extreme_params(self, loss, which, extreme, x):
        if which >= loss.params_per_feature:
            which = 0
        params = torch.zeros(1, loss.params_per_feature)
        params[0, which] = min(extreme, 80.0) if isinstance(loss, PoissonNLL) else extreme  # e^100 is no float32
        params.requires_grad_()
        value = loss(params, torch.tensor([[x]]))
        value.sum().backward()
        wide = params.detach().double().requires_grad_()
        expected = reference(loss, wide, x)
        expected.sum().backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
        torch.testing.assert_close(params.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def reference(loss, params, x):
    """By the textbook's logarithms in double precision, which reaches 1e308 and so needs no care up to e^100."""
    log_mean = params[:, :1]
    mean, x = log_mean.exp(), torch.tensor([[x]], dtype=torch.float64)
    if isinstance(loss, PoissonNLL):
        return mean - x * log_mean + torch.lgamma(x + 1)
    # θ = 1: NB(x) = mean^x / (1 + mean)^(x + 1)
    nll = (x + 1) * torch.log1p(mean) - x * log_mean
    if loss.params_per_feature == 1:
        return nll
    kept = torch.log1p(params[:, 1:].exp()) + nll
    at_zero = torch.log1p(params[:, 1:].exp()) - torch.log(params[:, 1:].exp() + (-nll).exp())
    return at_zero if x.item() == 0 else kept


@pytest.mark.parametrize("Loss", [NegativeBinomialNLL, ZeroInflatedNegativeBinomialNLL])
@pytest.mark.parametrize("theta", [0.0, -1.0, math.nan])
def test_inverse_dispersion_that_is_not_positive_is_an_error(Loss, theta):
    with pytest.raises(ValueError, match="inverse_dispersion: expected a positive number, got"):
        Loss(inverse_dispersion=theta)


@pytest.mark.parametrize("theta", [1e2, 1e4, 1e6])
def test_the_gradient_of_the_dispersion_is_right_in_float32_however_large_it_is(theta):
    x, a = torch.poisson(torch.full((64, 5), 20.0)), torch.full((64, 5), math.log(20.0))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        loss = NegativeBinomialNLL(5, inverse_dispersion=theta).to(dtype)
        loss(a.to(dtype), x.to(dtype)).sum().backward()
        gradients.append(loss.log_inverse_dispersion.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def exact_nb(x, mean, theta):
    """Minus the log-probability in 60 digits, the Poisson's for an infinite θ."""
    with mpmath.workdps(60):
        x, mean = mpmath.mpf(x), mpmath.mpf(mean)
        if theta == math.inf:
            return mean - x * mpmath.log(mean) + mpmath.loggamma(x + 1)
        theta = mpmath.mpf(theta)
        gammas = mpmath.loggamma(theta) + mpmath.loggamma(x + 1) - mpmath.loggamma(x + theta)
        return gammas + theta * mpmath.log1p(mean / theta) + x * mpmath.log1p(theta / mean)


RATES = [(0, 1e-6), (0, 3.0), (3, 2.5), (40, 1000.0), (10**4, 10**4 + 50.0), (10**7, 1e7), (10**7, 1.0003e7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "mean"), RATES)
def test_poisson_does_not_cancel(count, mean, dtype):
    a = torch.tensor([[math.log(mean)]], dtype=dtype, requires_grad=True)
    x = torch.tensor([[float(count)]], dtype=dtype)
    value = PoissonNLL()(a, x)
    with mpmath.workdps(60):
        expected = float(exact_nb(count, mpmath.exp(mpmath.mpf(a.item())), math.inf))
        slope = float(mpmath.exp(mpmath.mpf(a.item())) - count)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    assert value.item() == pytest.approx(expected, rel=tolerance, abs=1e-7)
    assert torch.autograd.grad(value.sum(), a)[0].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("log_theta", [-20.0, -3.0, 0.0, 3.4, 3.5, 10.0, 20.0, 30.0, 39.0])
@pytest.mark.parametrize(("count", "mean"), RATES)
def test_negative_binomial_is_exact_for_any_dispersion(count, mean, log_theta):
    loss = NegativeBinomialNLL().double()
    with torch.no_grad():
        loss.log_inverse_dispersion.fill_(log_theta)
    a = torch.tensor([[math.log(mean)]], dtype=torch.float64, requires_grad=True)
    value = loss(a, torch.tensor([[float(count)]], dtype=torch.float64))
    to_a, to_theta = torch.autograd.grad(value.sum(), (a, loss.log_inverse_dispersion))
    with mpmath.workdps(60):
        m, t = mpmath.exp(mpmath.mpf(a.item())), mpmath.exp(mpmath.mpf(log_theta))
        expected = float(exact_nb(count, m, t))
        slope = float((m - count) * t / (t + m))
        digamma = mpmath.digamma(t) - mpmath.digamma(t + count)
        by_theta = float(t * (digamma + mpmath.log1p(m / t) + (count - m) / (t + m)))
    # absolute: of counts of ten million with sixteen digits
    rounding = 1e-9 + 2e-14 * max(count, mean)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=rounding)
    assert to_a.item() == pytest.approx(slope, rel=1e-9, abs=rounding)
    assert to_theta.item() == pytest.approx(by_theta, rel=1e-6, abs=rounding)


@pytest.mark.parametrize("loss", [NegativeBinomialNLL(), ZeroInflatedNegativeBinomialNLL()])
@pytest.mark.parametrize("log_theta", [50.0, 1e3, 1e30])
def test_without_overdispersion_it_ends_in_the_poisson(loss, log_theta):
    with torch.no_grad():
        loss.log_inverse_dispersion.fill_(log_theta)
    x = torch.tensor([[0.0, 5.0, 1e4, 1e7]])
    a = torch.tensor([[0.0, 1.5, 9.2, 16.118]])
    zero_inflated = isinstance(loss, ZeroInflatedNegativeBinomialNLL)
    params = torch.cat([a, torch.full_like(a, -40.0)], 1) if zero_inflated else a
    params.requires_grad_()
    value = loss(params, x)
    torch.testing.assert_close(value, PoissonNLL()(a, x), rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(value.sum(), (params, loss.log_inverse_dispersion)):
        assert gradient.isfinite().all()
    # and to the other side: finite, whatever it means
    with torch.no_grad():
        loss.log_inverse_dispersion.fill_(-log_theta)
    value = loss(params, x)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (params, loss.log_inverse_dispersion)))
