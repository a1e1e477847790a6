"""What every loss promises, and squared error."""

import pytest
import torch

from lightning_ae import (
    BernoulliNLL,
    ContinuousBernoulliNLL,
    GaussianNLL,
    LaplaceNLL,
    NegativeBinomialNLL,
    PoissonNLL,
    SquaredError,
    ZeroInflatedNegativeBinomialNLL,
)


def real(*shape):
    return torch.randn(*shape)


def unit(*shape):
    return torch.rand(*shape)


def counts(*shape):
    return torch.poisson(torch.full(shape, 2.0))


LOSSES = [
    pytest.param(SquaredError(), real, id="squared"),
    pytest.param(SquaredError("sigmoid"), unit, id="squared-sigmoid"),
    pytest.param(SquaredError("tanh"), real, id="squared-tanh"),
    pytest.param(SquaredError("relu"), real, id="squared-relu"),
    pytest.param(GaussianNLL(0.3), real, id="gaussian"),
    pytest.param(GaussianNLL(0.3, learn_scale=True), real, id="gaussian-learned"),
    pytest.param(LaplaceNLL(0.3), real, id="laplace"),
    pytest.param(BernoulliNLL(), unit, id="bernoulli"),
    pytest.param(ContinuousBernoulliNLL(), unit, id="continuous-bernoulli"),
    pytest.param(PoissonNLL(), counts, id="poisson"),
    pytest.param(NegativeBinomialNLL(4, 2.0), counts, id="negative-binomial"),
    pytest.param(NegativeBinomialNLL(library_size=True), counts, id="negative-binomial-library"),
    pytest.param(ZeroInflatedNegativeBinomialNLL(4), counts, id="zero-inflated"),
    pytest.param(ZeroInflatedNegativeBinomialNLL(library_size=True), counts, id="zero-inflated-library"),
]
EVENT = (3, 4)


def example(loss, draw, batch=6):
    torch.manual_seed(0)
    return torch.randn(batch, *loss.params_shape(EVENT)), draw(batch, *EVENT)


@pytest.mark.parametrize(("loss", "draw"), LOSSES)
class TestEveryLoss:
    def test_is_one_number_per_example(self, loss, draw):
        params, x = example(loss, draw)
        assert loss(params, x).shape == (6,)

    def test_of_an_example_does_not_depend_on_the_batch(self, loss, draw):
        params, x = example(loss, draw)
        alone = torch.cat([loss(params[i : i + 1], x[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(loss(params, x), alone)

    def test_gradient_stays_within_the_example(self, loss, draw):
        params, x = example(loss, draw)
        params.requires_grad_()
        loss(params, x)[2].backward()
        others = torch.arange(6) != 2
        assert params.grad[others].eq(0).all()
        assert params.grad[2].ne(0).any()

    def test_gradient_is_that_of_finite_differences(self, loss, draw):
        params, x = example(loss, draw, batch=2)
        params = params.double().requires_grad_()
        learned = [(name, p.detach().double().requires_grad_()) for name, p in loss.named_parameters()]

        def value(params, *learned_values):
            named = {name: value for (name, _), value in zip(learned, learned_values, strict=True)}
            return torch.func.functional_call(loss, named, (params, x.double()))

        assert torch.autograd.gradcheck(value, (params, *(p for _, p in learned)))

    def test_mean_has_the_shape_of_the_data_and_lies_in_the_range(self, loss, draw):
        params, x = example(loss, draw)
        low, high = loss.output_range
        mean = loss.mean(5 * params)
        assert mean.shape == x.shape
        assert mean.min() >= low
        assert mean.max() <= high

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_half_precision_is_that_of_the_same_numbers_in_single(self, loss, draw, dtype):
        params, x = example(loss, draw)
        params, x = params.to(dtype), x.to(dtype)
        value = loss(params, x)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(params.float(), x.float()), rtol=0, atol=0)

    def test_under_autocast_is_that_without(self, loss, draw):
        params, x = example(loss, draw)
        expected = loss(params.bfloat16().float(), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(params.bfloat16(), x)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0, atol=0)

    def test_params_of_another_shape_are_an_error_that_names_both(self, loss, draw):
        params, x = example(loss, draw)
        # (6, 1, 4) would broadcast against the data without a word
        with pytest.raises(ValueError, match=r"targets of shape \(6, 3, 4\).*must give .*, got \(6, 1, 4\)"):
            loss(params[:, :1], x)

    def test_its_own_support_passes_the_check(self, loss, draw):
        _, x = example(loss, draw)
        loss.check(x)
        assert torch.isfinite(loss(torch.zeros(6, *loss.params_shape(EVENT)), x)).all()


DERIVATIVES = {
    "identity": lambda a: torch.ones_like(a),
    "sigmoid": lambda a: torch.exp(-a) / (1 + torch.exp(-a)) ** 2,
    "tanh": lambda a: 1 / torch.cosh(a) ** 2,
    "relu": lambda a: (a > 0).to(a.dtype),
}
VALUES = {
    "identity": lambda a: a,
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
    "tanh": lambda a: 1 - 2 / (1 + torch.exp(2 * a)),
    "relu": lambda a: a.clamp(min=0),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_squared_error_and_its_gradient_are_the_closed_forms(name):
    a = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    x = torch.rand(5, 7, dtype=torch.float64)
    loss = SquaredError(name)(a, x)
    loss.sum().backward()
    x_hat = VALUES[name](a.detach())
    torch.testing.assert_close(loss.detach(), torch.stack([r @ r for r in x - x_hat]))
    torch.testing.assert_close(a.grad, 2 * (x_hat - x) * DERIVATIVES[name](a.detach()))


def test_squared_error_through_a_sigmoid_learns_5000_times_slower_from_a_confidently_wrong_output():
    x_hat = 1e-4
    x = torch.ones(1, 1, dtype=torch.float64)
    gradients = {}
    for loss in (SquaredError("sigmoid"), BernoulliNLL()):
        a = torch.full((1, 1), x_hat, dtype=torch.float64).logit().requires_grad_()
        loss(a, x).sum().backward()
        gradients[type(loss)] = a.grad.item()
    assert gradients[SquaredError] == pytest.approx(2 * (x_hat - 1) * x_hat * (1 - x_hat), rel=1e-9)
    assert gradients[BernoulliNLL] == pytest.approx(x_hat - 1, rel=1e-9)
    assert gradients[BernoulliNLL] / gradients[SquaredError] == pytest.approx(5000.5, rel=1e-6)


def test_unknown_activation_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"activation: expected one of .*'sigmoid'.*, got 'swish'"):
        SquaredError("swish")
