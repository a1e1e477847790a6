"""The Gaussian code against torch.distributions, NumPy and values by hand."""

import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from lightning_ae import GaussianCode, conv_pair
from lightning_ae.rebuildable import describe, rebuild

D = 4
FULL = GaussianCode(covariance="full").h_shape((D,))[0]


def diagonal(h):
    """The posterior that the layout of ``h`` states, event dimensions all but the first."""
    mean, log_variance = h.double().chunk(2, dim=1)
    return Independent(Normal(mean, (log_variance / 2).exp()), mean.ndim - 1)


def full(h, size=D):
    """The posterior for full covariance, entry by entry."""
    h = h.double()
    factor = torch.zeros(len(h), size, size, dtype=torch.float64)
    for i in range(size):
        factor[:, i, i] = h[:, size + i].exp()
        for j in range(i):
            factor[:, i, j] = h[:, 2 * size + i * (i - 1) // 2 + j]
    return MultivariateNormal(h[:, :size], scale_tril=factor)


def standard(posterior):
    zeros = torch.zeros(posterior.event_shape, dtype=torch.float64)
    if isinstance(posterior, MultivariateNormal):
        return MultivariateNormal(zeros, torch.eye(len(zeros), dtype=torch.float64))
    return Independent(Normal(zeros, torch.ones_like(zeros)), zeros.ndim)


CASES = [
    ("diagonal", (2 * D,), diagonal),
    ("diagonal", (2 * D, 5), diagonal),
    ("diagonal", (2 * D, 2, 3), diagonal),
    ("full", (FULL,), full),
]


# -- what it charges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("covariance", "shape", "reference"), CASES)
def test_the_charge_is_the_divergence_of_torch_distributions(covariance, shape, reference):
    h = torch.randn(7, *shape, dtype=torch.float64, requires_grad=True)
    output = GaussianCode(covariance=covariance)(h)
    posterior = reference(h)
    expected = kl_divergence(posterior, standard(posterior))
    torch.testing.assert_close(output.penalties["kl"], expected)
    assert output.z.shape == (7, *posterior.event_shape)
    (ours,) = torch.autograd.grad(output.penalties["kl"].sum(), h)
    (theirs,) = torch.autograd.grad(expected.sum(), h)
    torch.testing.assert_close(ours, theirs)


def test_nats_of_a_latent_with_full_covariance_are_those_given_the_latents_before_it():
    code, h = GaussianCode(covariance="full"), torch.randn(5, FULL, dtype=torch.float64)
    each, whole = code.statistics(h)["kl"], full(h)
    for first in range(1, D + 1):
        leading = MultivariateNormal(whole.loc[:, :first], whole.covariance_matrix[:, :first, :first])
        torch.testing.assert_close(each[:, :first].sum(1), kl_divergence(leading, standard(leading)))
    assert (each >= 0).all()


@pytest.mark.parametrize(("covariance", "shape", "reference"), CASES)
def test_statistics_are_means_marginal_variances_and_nats(covariance, shape, reference):
    h = torch.randn(5, *shape)
    found, posterior = GaussianCode(covariance=covariance).statistics(h), reference(h)
    torch.testing.assert_close(found["mean"], posterior.mean.float())
    torch.testing.assert_close(found["log_variance"], posterior.variance.log().float())
    torch.testing.assert_close(
        found["kl"].flatten(1).sum(1), kl_divergence(posterior, standard(posterior)).float(), rtol=1e-5, atol=1e-5
    )


def test_near_the_prior_single_precision_keeps_the_charge():
    h = torch.tensor([[0.0, 3e-4], [2e-4, 0.0]])
    exact = kl_divergence(diagonal(h), standard(diagonal(h)))
    torch.testing.assert_close(GaussianCode()(h).penalties["kl"].double(), exact, rtol=1e-3, atol=0)


def test_below_the_free_bits_a_latent_costs_them_and_has_no_gradient():
    # 0.5 μ² is 2, 0.02 and 0.18 nats
    h = torch.tensor([[2.0, 0.2, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0]], requires_grad=True)
    code = GaussianCode(beta=3.0, free_bits=0.1)
    penalties = code(h).penalties
    torch.testing.assert_close(penalties["kl"], torch.tensor([2.02, 0.18]))
    torch.testing.assert_close(penalties["kl_charge"], torch.tensor([2.1, 0.28]))
    assert code.weights() == {"kl": 0.0, "kl_charge": 3.0}
    penalties["kl_charge"].sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0]]))


def test_the_free_bits_of_an_example_do_not_depend_on_its_batch():
    code, h = GaussianCode(free_bits=0.5), torch.randn(6, 8)
    together = code(h).penalties["kl_charge"]
    apart = torch.cat([code(row[None]).penalties["kl_charge"] for row in h])
    torch.testing.assert_close(together, apart)
    # Kingma et al. take the batch's mean first: never more
    batchwise = code.statistics(h)["kl"].mean(0).clamp_min(0.5).sum()
    assert together.mean() > batchwise


def test_capacity_charges_the_distance_to_it():
    h = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    code = GaussianCode(beta=10.0, capacity=1.5)
    penalties = code(h).penalties
    torch.testing.assert_close(penalties["kl"], torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(penalties["kl_charge"], torch.tensor([0.5, 1.0]))
    assert code.weights() == {"kl": 0.0, "kl_charge": 10.0}
    penalties["kl_charge"].sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[2.0, 0, 0, 0], [-1.0, 0, 0, 0]]))


def test_without_either_the_divergence_itself_is_charged():
    code = GaussianCode(beta=0.3)
    assert set(code(torch.zeros(1, 2)).penalties) == {"kl"}
    assert code.weights() == {"kl": 0.3}


# -- the draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("covariance", "size", "reference"), [("diagonal", 2 * D, diagonal), ("full", FULL, full)])
def test_draws_have_the_moments_of_the_posterior(covariance, size, reference, training):
    n, h = 200_000, 0.7 * torch.randn(1, size)
    code = GaussianCode(covariance=covariance).train(training)
    z = code(h.expand(n, -1)).z.double()
    posterior = reference(h)
    mean, variance = posterior.mean[0], posterior.variance[0]
    assert ((z.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
    expected = posterior.covariance_matrix[0] if covariance == "full" else variance.diag()
    # the standard error of a sample covariance is at most this
    error = (2 * variance[:, None] * variance / n).sqrt()
    assert ((torch.from_numpy(np.cov(z.T.numpy())) - expected).abs() < 4.5 * error).all()


def test_the_gradient_is_pathwise():
    h = torch.randn(3, 2 * D, dtype=torch.float64, requires_grad=True)
    mean, log_variance = h.detach().chunk(2, dim=1)
    z = GaussianCode()(h).z
    weight = torch.randn_like(z)
    (weight * z).sum().backward()
    expected = torch.cat([weight, weight * 0.5 * (z.detach() - mean)], 1)
    torch.testing.assert_close(h.grad, expected)
    # and on average that of the expectation: of Σ z², 2μ and σ²
    wide = h.detach()[:1].expand(400_000, -1).clone().requires_grad_()
    GaussianCode()(wide).z.square().sum().backward()
    exact = torch.cat([2 * mean[0], log_variance[0].exp()])
    error = wide.grad.std(0) / len(wide) ** 0.5
    assert ((wide.grad.mean(0) - exact).abs() < 4.5 * error).all()


def test_the_gradient_of_a_full_covariance_is_that_of_the_distributions_draw():
    h = torch.randn(3, FULL, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, D, dtype=torch.float64)
    gradients = []
    for draw in (lambda: GaussianCode(covariance="full")(h).z, lambda: full(h).rsample()):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad((weight * draw()).sum(), h)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("covariance", "shape", "reference"), CASES)
def test_the_latent_without_randomness_is_the_mean(covariance, shape, reference):
    h = torch.randn(3, *shape)
    code = GaussianCode(covariance=covariance)
    assert torch.equal(code.encode(h), reference(h).mean.float())
    assert not torch.equal(code(h).z, code.eval()(h).z)


@pytest.mark.parametrize(("covariance", "shape", "reference"), CASES)
def test_density_and_ratio_are_those_of_torch_distributions(covariance, shape, reference):
    h = torch.randn(3, *shape, dtype=torch.float64)
    code, theirs = GaussianCode(covariance=covariance), reference(h)
    ours = code.posterior(h)
    z, ratio = code.draw(h, torch.randn(6, 3, *theirs.event_shape, dtype=torch.float64))
    assert ours.batch_shape == (3,)
    assert ours.event_shape == theirs.event_shape
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z))
    torch.testing.assert_close(ratio, standard(theirs).log_prob(z) - theirs.log_prob(z))
    single, same = code.draw(h, torch.zeros_like(theirs.mean))
    torch.testing.assert_close(single, theirs.mean)
    torch.testing.assert_close(same, standard(theirs).log_prob(single) - theirs.log_prob(single))


def test_the_prior_is_standard_normal():
    z = GaussianCode().sample_prior(100_000, (2, 3), torch.zeros(1, dtype=torch.float64))
    assert z.shape == (100_000, 2, 3)
    assert z.dtype == torch.float64
    assert z.mean((0, 1, 2)).abs() < 4.5 / 600_000**0.5
    assert (z.var() - 1).abs() < 4.5 * (2 / 600_000) ** 0.5


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("covariance", "shape", "reference"), CASES)
def test_half_precision_is_computed_in_single(covariance, shape, reference, dtype):
    h = torch.randn(9, *shape).to(dtype)
    code, posterior = GaussianCode(covariance=covariance), reference(h)
    z, penalties = code(h)
    assert z.dtype == code.encode(h).dtype == dtype
    assert penalties["kl"].dtype == torch.float32
    torch.testing.assert_close(
        penalties["kl"].double(), kl_divergence(posterior, standard(posterior)), rtol=1e-5, atol=0
    )
    assert code.draw(h, torch.zeros_like(z))[1].dtype == torch.float32


@pytest.mark.parametrize(("covariance", "shape", "reference"), CASES)
def test_autocast_changes_nothing(covariance, shape, reference):
    h, code = torch.randn(9, *shape), GaussianCode(covariance=covariance)
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(code(h))
    assert torch.equal(outputs[0].z, outputs[1].z)
    assert torch.equal(outputs[0].penalties["kl"], outputs[1].penalties["kl"])


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.5}, {"capacity": 2.0}, {"covariance": "full"}])
def test_it_compiles_without_a_graph_break(options):
    code = GaussianCode(beta=2.0, **options)
    weight = torch.randn(FULL, FULL)
    size = FULL if "covariance" in options else 2 * D

    def loss(weight):
        z, penalties = code(torch.ones(3, FULL) @ weight[:, :size])
        return z.square().sum() + sum(code.weights()[name] * term.sum() for name, term in penalties.items())

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        w = weight.clone().requires_grad_()
        torch.manual_seed(0)
        value = function(w)
        value.backward()
        results.append((value.detach(), w.grad))
    torch.testing.assert_close(results[1], results[0])


# -- sizes and state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", [(1,), (2,), (7,), (40,), (3, 4), (2, 5, 6)])
def test_sizes_of_output_and_latent_belong_together(latent):
    code = GaussianCode()
    assert code.h_shape(latent) == (2 * latent[0], *latent[1:])
    assert code.latent_shape(code.h_shape(latent)) == latent
    assert code(torch.zeros(2, *code.h_shape(latent))).z.shape == (2, *latent)
    if len(latent) == 1:
        whole = GaussianCode(covariance="full")
        d = latent[0]
        assert whole.h_shape(latent) == (d + d * (d + 1) // 2,)
        assert whole.latent_shape(whole.h_shape(latent)) == latent


def test_maps_of_a_convolutional_encoder_have_a_posterior_at_each_place():
    encoder, decoder = conv_pair((1, 8, 8), 3, channels=(4, 8), h_dim=6, spatial=True)
    h = encoder(torch.rand(2, 1, 8, 8))
    z = GaussianCode()(h).z
    assert z.shape == (2, *decoder.latent_shape)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 5), r"h: expected \(B, 2D, ...\), means and log-variances of D latents, got \(B, 5\)"),
        ({}, (2, 3, 4, 4), r"h: expected \(B, 2D, ...\), .* got \(B, 3, 4, 4\)"),
        ({}, (4,), r"h: expected a batch \(B, 2D, ...\), got \(4,\)"),
        ({"covariance": "full"}, (2, 8), r"h: expected \(B, 2D \+ D\(D-1\)/2\), .* got \(B, 8\)"),
        ({"covariance": "full"}, (2, 1), r"h: expected .* got \(B, 1\)"),
        ({"covariance": "full"}, (2, 14, 3), r"h: expected .* got \(B, 14, 3\)"),
    ],
)
def test_an_output_of_a_size_that_does_not_fit_is_an_error(options, shape, message):
    with pytest.raises(ValueError, match=message):
        GaussianCode(**options)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta: expected a finite number >= 0, got -1.0"),
        ({"beta": float("inf")}, "beta: expected a finite number >= 0, got inf"),
        ({"free_bits": -0.1}, "free_bits: expected a finite number >= 0, got -0.1"),
        ({"capacity": float("nan")}, "capacity: expected a finite number >= 0, got nan"),
        ({"free_bits": 0.1, "capacity": 1.0}, "free_bits, capacity: expected one at most, got 0.1 and 1.0"),
        ({"covariance": "banded"}, "covariance: expected 'diagonal' or 'full', got 'banded'"),
    ],
)
def test_arguments_are_checked_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianCode(**options)


def test_a_full_covariance_of_maps_is_an_error():
    with pytest.raises(ValueError, match=r"covariance: 'full' is for flat latents, got \(3, 2, 2\)"):
        GaussianCode(covariance="full").h_shape((3, 2, 2))


def test_what_a_schedule_has_set_is_kept():
    code = GaussianCode(beta=0.0, capacity=0.0)
    code.beta, code.capacity = 4.0, 12.5
    again = rebuild(describe(code))
    assert (again.beta, again.capacity) == (0.0, 0.0)
    again.load_state_dict(code.state_dict())
    assert (again.beta, again.free_bits, again.capacity) == (4.0, None, 12.5)
    torch.testing.assert_close(again(torch.zeros(1, 2)).penalties["kl_charge"], torch.tensor([12.5]))
    assert again.weights()["kl_charge"] == 4.0


def test_an_encoder_that_gives_mean_and_log_variance_apart_is_told_to_put_them_together():
    with pytest.raises(TypeError, match=r"one tensor from the encoder, .*cat\(\[mean, log_variance\], 1\).*a tuple"):
        GaussianCode()((torch.zeros(2, 3), torch.zeros(2, 3)))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("log_variance", [89.0, 1e4, -200.0, -1e6])
def test_absurd_variances_have_a_finite_cost_and_a_gradient_that_leads_back(covariance, log_variance):
    code = GaussianCode(covariance=covariance)
    h = torch.zeros(3, *code.h_shape((2,)))
    h[:, 2:4] = log_variance
    h.requires_grad_()
    z, penalties = code(h)
    (gradient,) = torch.autograd.grad(penalties["kl"].sum(), h)
    assert z.isfinite().all()
    assert penalties["kl"].isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[:, 2:4] * log_variance > 0).all()
    posterior = code.posterior(h.detach())
    assert posterior.log_prob(posterior.mean).isfinite().all()


def test_variances_that_occur_are_left_as_they_are():
    h = torch.cat([torch.zeros(1, 5), torch.tensor([[-59.0, -20.0, 0.0, 3.0, 19.9]])], 1)
    assert torch.equal(GaussianCode().statistics(h)["log_variance"], h[:, 5:])
