"""Penalties against NumPy, scikit-learn and float64 autograd."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.autograd.functional import jacobian
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_ae import (
    Autoencoder,
    BatchTopKCode,
    ConstraintPenalty,
    ContractiveAutoencoder,
    ConvAutoencoder,
    DictionaryAutoencoder,
    Divergence,
    FiniteScalarQuantizerCode,
    GatedCode,
    GaussianNLL,
    JacobianPenalty,
    JumpReLUCode,
    LinearAutoencoder,
    LinearDecoder,
    LinearEncoder,
    MLPAutoencoder,
    OrthogonalityPenalty,
    Penalty,
    PoissonNLL,
    StackedAutoencoder,
    TensorDataModule,
    TopKCode,
    Total,
    VectorQuantizerCode,
    WeightPrior,
)


def penalty_of(penalty, model, x):
    return penalty(x, model(x), model)


def objective(model, x):
    return model.objective(model.terms(x, model(x))).mean()


class Features(nn.Module):
    """Fixed features, so that fitting the decoder is a regression."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return torch.tanh(x @ self.weight)


def regression(k=3, n=40, repeated=False, loss=None, **prior):
    """A linear decoder on fixed features of n examples; with ``repeated`` the features come twice."""
    torch.manual_seed(0)
    weight = torch.randn(5, k, dtype=torch.float64)
    features = Features(torch.cat([weight, weight], 1) if repeated else weight)
    penalties = {"prior": WeightPrior(**prior)} if prior else None
    decoder = LinearDecoder(features.weight.shape[1], 5)
    model = Autoencoder(features, decoder, loss, penalties=penalties).double()
    x = torch.randn(n, 5, dtype=torch.float64) + 1
    return model, x


def derivatives(model, x):
    """Hessian and gradient of the objective in the decoder's weights, and these."""
    name, weight = next((n, p) for n, p in model.named_parameters() if p.ndim == 2)

    def value(flat):
        with nn.utils.stateless._reparametrize_module(model, {name: flat.view_as(weight)}):
            return objective(model, x)

    flat = weight.detach().flatten()
    return torch.autograd.functional.hessian(value, flat), torch.func.grad(value)(flat).detach(), weight


class TestWeightPrior:
    @pytest.mark.parametrize(("noise", "prior"), [(0.5, 1.0), (2.0, 0.25)])
    def test_optimum_of_squared_error_is_ridge_regression(self, noise, prior):
        model, x = regression(noise_variance=noise, prior_variance=prior, num_examples=40)
        ridge = Ridge(alpha=noise / prior, solver="svd").fit(model.encoder(x).numpy(), x.numpy())
        with torch.no_grad():
            model.decoder.layer.weight.copy_(torch.from_numpy(ridge.coef_))
            model.decoder.layer.bias.copy_(torch.from_numpy(ridge.intercept_))
        objective(model, x).backward()  # convex, so where the gradient vanishes is the optimum
        assert all(p.grad.abs().max() < 1e-12 for p in model.decoder.parameters())
        with torch.no_grad():
            model.decoder.layer.weight.mul_(1.001)
        model.zero_grad()
        objective(model, x).backward()
        assert all(p.grad.abs().max() > 1e-6 for p in model.decoder.parameters())

    def test_optimum_of_a_likelihood_in_nats_is_the_same_with_one_half_in_the_noise(self):
        sigma, prior = 0.5, 0.3
        model, x = regression(loss=GaussianNLL(sigma), prior_variance=prior, num_examples=40)
        ridge = Ridge(alpha=sigma**2 / prior, solver="svd").fit(model.encoder(x).numpy(), x.numpy())
        with torch.no_grad():
            model.decoder.layer.weight.copy_(torch.from_numpy(ridge.coef_))
            model.decoder.layer.bias.copy_(torch.from_numpy(ridge.intercept_))
        objective(model, x).backward()
        assert all(p.grad.abs().max() < 1e-7 for p in model.decoder.parameters())  # ln σ is kept in single precision

    def test_mean_of_batches_is_minus_the_log_posterior_of_the_whole_data(self):
        noise, prior = 0.7, 0.2
        model, x = regression(noise_variance=noise, prior_variance=prior, num_examples=40)
        likelihood = torch.distributions.Normal(model.reconstruct(x), math.sqrt(noise)).log_prob(x).sum()
        weight = model.decoder.layer.weight
        posterior = likelihood + torch.distributions.Normal(0, math.sqrt(prior)).log_prob(weight).sum()
        value = torch.stack([objective(model, batch) for batch in x.split(8)]).mean()
        constant = 100 * math.log(2 * math.pi * noise) + weight.numel() / 2 * math.log(2 * math.pi * prior)
        assert 40 * value.item() == pytest.approx(2 * noise * (-posterior.item() - constant), rel=1e-6)

    def test_hessian_of_the_sum_grows_by_twice_lambda(self):
        noise, prior = 0.7, 0.2
        with_prior, x = regression(noise_variance=noise, prior_variance=prior, num_examples=40)
        without, _ = regression()
        growth = 40 * (derivatives(with_prior, x)[0] - derivatives(without, x)[0])
        torch.testing.assert_close(growth, 2 * noise / prior * torch.eye(15, dtype=torch.float64))

    def test_of_equal_minima_it_takes_the_one_of_smallest_norm(self):
        # every feature comes twice, so only the sum of two weights matters to the error
        lam = 1e-7
        model, x = regression(repeated=True, noise_variance=lam, prior_variance=1.0, num_examples=40)
        x = x - x.mean(0)
        with torch.no_grad():
            model.decoder.layer.bias.zero_()
        features = model.encoder(x).numpy()
        assert np.linalg.matrix_rank(features) == 3
        second, first, weight = derivatives(model, x)
        optimum = weight.detach().flatten() - torch.linalg.solve(second, first)  # exact for a parabola
        smallest = np.linalg.lstsq(features, x.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(optimum.view_as(weight).numpy(), smallest, atol=1e-5)

    def test_biases_are_excluded_unless_asked(self):
        model = MLPAutoencoder(6, latent_dim=2, hidden=(4,), norm="layer", bias_init=0.3)
        x = torch.zeros(2, 6)
        for biases in (False, True):
            parameters = [p for p in model.parameters() if biases or p.ndim == 2]
            expected = sum(p.detach().double().square().sum().item() for p in parameters)
            raw = penalty_of(WeightPrior(num_examples=10, biases=biases), model, x)
            assert raw.item() == pytest.approx(expected / 10, rel=1e-6)

    def test_convolutions_have_a_prior_and_their_biases_do_not(self):
        model = ConvAutoencoder((1, 4, 4), latent_dim=2, channels=(3,), bias_init=0.3)
        expected = sum(p.detach().double().square().sum().item() for p in model.parameters() if p.ndim > 1)
        raw = penalty_of(WeightPrior(num_examples=1), model, torch.zeros(1, 1, 4, 4))
        assert raw.item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("Model", [LinearAutoencoder, MLPAutoencoder])
    def test_tied_weights_count_once(self, Model):
        model = Model(6, latent_dim=2, tied=True)
        expected = sum(p.detach().double().square().sum().item() for p in model.encoder.parameters() if p.ndim == 2)
        raw = penalty_of(WeightPrior(num_examples=1), model, torch.zeros(1, 6))
        assert raw.item() == pytest.approx(expected, rel=1e-6)

    def test_weight_is_the_ratio_of_the_variances(self):
        assert WeightPrior(noise_variance=0.3, prior_variance=1.5).weight == pytest.approx(0.2)

    @pytest.mark.parametrize(
        ("limit", "expected"), [(None, 22), (3, 12), (0.5, 12), (6, 22)], ids=["all", "three", "half", "six"]
    )
    @pytest.mark.parametrize("loader", ["DataLoader", "TensorDataModule"])
    def test_number_of_examples_is_that_of_the_trainers_data(self, make_trainer, loader, limit, expected):
        x, val = torch.randn(22, 5), torch.randn(3, 5)
        data = (
            {"train_dataloaders": DataLoader(TensorDataset(x), batch_size=4), "val_dataloaders": DataLoader(val)}
            if loader == "DataLoader"
            else {"datamodule": TensorDataModule(x, val, batch_size=4)}
        )
        model = LinearAutoencoder(5, latent_dim=2, penalties={"prior": WeightPrior()})
        make_trainer(limit_train_batches=limit).fit(model, **data)
        assert model.penalties["prior"].num_examples == expected

    def test_a_given_number_of_examples_is_kept(self, make_trainer):
        model = LinearAutoencoder(5, latent_dim=2, penalties={"prior": WeightPrior(num_examples=1000)})
        loader = DataLoader(torch.randn(8, 5), batch_size=4)
        make_trainer().fit(model, loader, loader)
        assert model.penalties["prior"].num_examples == 1000

    def test_data_without_a_length_need_the_number_of_examples(self, make_trainer):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(torch.randn(8, 5))

        model = LinearAutoencoder(5, latent_dim=2, penalties={"prior": WeightPrior()})
        loader = DataLoader(Stream(), batch_size=4)
        with pytest.raises(ValueError, match="num_examples: cannot be read off a DataLoader; pass it to WeightPrior"):
            make_trainer(num_sanity_val_steps=0).fit(model, loader, loader)

    def test_limited_batches_without_a_size_need_the_number_of_examples(self, make_trainer):
        x = torch.randn(8, 5)
        sampler = BatchSampler(SequentialSampler(x), batch_size=4, drop_last=False)
        loader = DataLoader(x, batch_sampler=sampler)
        model = LinearAutoencoder(5, latent_dim=2, penalties={"prior": WeightPrior()})
        with pytest.raises(ValueError, match=r"num_examples: .*; pass it to WeightPrior"):
            make_trainer(limit_train_batches=1, num_sanity_val_steps=0).fit(model, loader, loader)

    def test_before_training_the_number_of_examples_must_be_given(self):
        model = LinearAutoencoder(5, latent_dim=2)
        with pytest.raises(ValueError, match="num_examples: not known before training; pass it to WeightPrior"):
            penalty_of(WeightPrior(), model, torch.zeros(2, 5))

    @pytest.mark.parametrize("name", ["noise_variance", "prior_variance", "num_examples"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_numbers_that_are_not_positive_are_an_error(self, name, value):
        with pytest.raises(ValueError, match=f"{name}: expected a positive (whole )?number, got {value}"):
            WeightPrior(**{name: value})


def jacobian_norms(model, x):
    """By autograd's own Jacobian, one example after the other."""
    norms = []
    for example in x:
        jacobian = torch.autograd.functional.jacobian(lambda e: model.encode(e[None])[0], example)
        norms.append(jacobian.square().sum())
    return torch.stack(norms)


class Wave(LinearEncoder):
    """A linear encoder no more."""

    def forward(self, x):
        return super().forward(x).sin()


MODELS = [
    pytest.param(lambda: Autoencoder(Wave(6, 4), LinearDecoder(4, 6)), (6,), id="subclass-of-linear"),
    pytest.param(lambda: LinearAutoencoder((2, 3), latent_dim=4), (2, 3), id="linear"),
    pytest.param(lambda: MLPAutoencoder(6, 4, hidden=(), latent_activation="sigmoid"), (6,), id="one-layer-sigmoid"),
    pytest.param(lambda: MLPAutoencoder((2, 3), 4, hidden=(), latent_activation="tanh"), (2, 3), id="one-layer-tanh"),
    pytest.param(lambda: MLPAutoencoder(6, 4, hidden=(), latent_activation="silu"), (6,), id="one-layer-silu"),
    pytest.param(lambda: MLPAutoencoder(6, 4, hidden=(8,), latent_activation="sigmoid"), (6,), id="deep"),
    pytest.param(lambda: MLPAutoencoder(6, 4, hidden=(8, 7), activation="tanh", norm="layer"), (6,), id="normed"),
    pytest.param(lambda: ConvAutoencoder((2, 5, 4), 3, channels=(4, 3), activation="elu"), (2, 5, 4), id="conv"),
]


@pytest.mark.parametrize(("make", "shape"), MODELS)
class TestJacobianPenalty:
    def make(self, make, shape):
        torch.manual_seed(0)
        model = make().double()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        return model, torch.randn(3, *shape, dtype=torch.float64)

    def test_is_the_squared_norm_of_autograds_jacobian(self, make, shape):
        model, x = self.make(make, shape)
        raw = penalty_of(JacobianPenalty(), model, x)
        assert raw.shape == (3,)
        torch.testing.assert_close(raw.detach(), jacobian_norms(model, x))

    def test_gradient_in_the_weights_is_that_of_finite_differences(self, make, shape):
        model, x = self.make(make, shape)
        penalty_of(JacobianPenalty(), model, x).sum().backward()
        for parameter in model.encoder.parameters():
            direction = torch.randn_like(parameter)
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.add_(direction, alpha=step)
                    values.append(penalty_of(JacobianPenalty(), model, x).sum().item())
                    parameter.sub_(direction, alpha=step)
            slope = (values[0] - values[1]) / 2e-5
            assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7)

    def test_random_projections_are_right_on_average(self, make, shape):
        model, x = self.make(make, shape)
        penalty = JacobianPenalty(num_projections=1)
        many = x[:1].expand(3000, *shape)
        draws = penalty_of(penalty, model, many).detach()
        assert draws.std() > 0
        error = draws.mean() - jacobian_norms(model, x)[0]
        assert error.abs() < 4 * draws.std() / math.sqrt(3000)

    def test_more_projections_vary_less(self, make, shape):
        model, x = self.make(make, shape)
        many = x[:1].expand(1000, *shape)
        one, sixteen = (penalty_of(JacobianPenalty(num_projections=n), model, many).detach().var() for n in (1, 16))
        assert sixteen.item() == pytest.approx(one.item() / 16, rel=0.5)


@pytest.mark.parametrize("num_projections", [None, 2])
@pytest.mark.parametrize("norm", ["layer", None])
def test_jacobian_penalty_works_in_training_validation_and_test(make_trainer, norm, num_projections):
    penalties = {"jacobian": JacobianPenalty(num_projections=num_projections)}
    model = MLPAutoencoder(6, 2, hidden=(5,), norm=norm, activation="tanh", penalties=penalties)
    loader = DataLoader(torch.randn(8, 6), batch_size=4)
    trainer = make_trainer()
    trainer.fit(model, loader, loader)
    validated = trainer.validate(model, loader, verbose=False)[0]["val/jacobian"]
    trainer.test(model, loader, verbose=False)
    exact = jacobian_norms(model.eval(), loader.dataset).mean().item()
    assert validated == pytest.approx(exact, rel=1e-4 if num_projections is None else 1.5)
    assert trainer.callback_metrics["test/jacobian"] > 0


def test_jacobian_penalty_is_that_of_the_clean_data():
    model = ContractiveAutoencoder(6, 4, contraction=1.0, corruption=nn.Dropout(1.0))
    x = torch.randn(3, 6)
    terms = model.training_step(x, 0)["terms"]
    assert terms["contractive"].item() == pytest.approx(jacobian_norms(model, x).mean().item(), rel=1e-5)


def test_closed_form_under_autocast_is_that_without():
    model, x = ContractiveAutoencoder(20, 8), torch.randn(3, 20)
    output = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = JacobianPenalty()(x, output, model)
    assert raw.dtype == torch.float32
    torch.testing.assert_close(raw, JacobianPenalty()(x, output, model))


@pytest.mark.parametrize("num_projections", [None, 2])
def test_batch_normalisation_has_no_jacobian_of_an_example(num_projections):
    model = MLPAutoencoder(6, 2, hidden=(5,), norm="batch")
    with pytest.raises(ValueError, match="JacobianPenalty: the encoder has batch normalisation; use norm='layer'"):
        penalty_of(JacobianPenalty(num_projections=num_projections), model, torch.randn(3, 6))


@pytest.mark.parametrize("num_projections", [0, -1])
def test_the_number_of_projections_must_be_positive(num_projections):
    with pytest.raises(ValueError, match="num_projections: expected a positive whole number, got"):
        JacobianPenalty(num_projections=num_projections)


class TestOrthogonality:
    @pytest.mark.parametrize("box", ["encoder", "decoder"])
    @pytest.mark.parametrize("latent_dim", [2, 6, 9])
    def test_is_numpys_distance_from_the_identity(self, box, latent_dim):
        model = MLPAutoencoder(6, latent_dim, hidden=(4,))
        expected = 0.0
        for parameter in getattr(model, box).parameters():
            if parameter.ndim == 2:
                w = parameter.detach().double().numpy()
                gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
                expected += np.linalg.norm(gram - np.eye(len(gram))) ** 2
        raw = penalty_of(OrthogonalityPenalty(box=box), model, torch.zeros(2, 6))
        assert raw.item() == pytest.approx(expected, rel=1e-5)

    def test_is_zero_for_an_orthonormal_decoder_only(self):
        model = LinearAutoencoder(6, latent_dim=2, tied=False)
        nn.init.orthogonal_(model.decoder.layer.weight)
        assert penalty_of(OrthogonalityPenalty(), model, torch.zeros(2, 6)).item() == pytest.approx(0, abs=1e-10)
        with torch.no_grad():
            model.decoder.layer.weight.mul_(2)
        assert penalty_of(OrthogonalityPenalty(), model, torch.zeros(2, 6)).item() == pytest.approx(2 * 3**2, rel=1e-5)

    def test_gradient_is_the_closed_form(self):
        model = LinearAutoencoder(6, latent_dim=3, tied=False)
        w = model.decoder.layer.weight
        penalty_of(OrthogonalityPenalty(), model, torch.zeros(2, 6)).backward()
        expected = 4 * w.detach() @ (w.detach().t() @ w.detach() - torch.eye(3))
        torch.testing.assert_close(w.grad, expected)

    def test_under_autocast_is_that_without(self):
        model = LinearAutoencoder(64, latent_dim=8)
        nn.init.orthogonal_(model.encoder.weight)
        x = torch.zeros(2, 64)
        output = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            raw = OrthogonalityPenalty()(x, output, model)
        assert raw.item() == pytest.approx(0, abs=1e-9)

    def test_a_box_must_exist_and_have_a_matrix(self):
        with pytest.raises(ValueError, match="box: expected 'encoder' or 'decoder', got 'code'"):
            OrthogonalityPenalty(box="code")
        model = Autoencoder(nn.Identity(), nn.Identity())
        with pytest.raises(ValueError, match="box: the decoder has no weight matrix"):
            penalty_of(OrthogonalityPenalty(), model, torch.zeros(2, 6))


def grid(*sides, spacing=0.1):
    axes = [spacing * torch.arange(side, dtype=torch.float64) for side in sides]
    return torch.meshgrid(*axes, indexing="ij")


class TestDivergence:
    def test_of_a_curl_is_zero(self):
        # (∂ψ/∂x, −∂ψ/∂y) of the stream function ψ = 3x²/2 − 2xy − 5y²/2, on which central differences are exact
        y, x = grid(7, 9)
        field = torch.stack([3 * x - 2 * y, 2 * x + 5 * y])
        assert Divergence(0.1)(field[None]).abs().max() < 1e-12

    @pytest.mark.parametrize("sides", [(8,), (7, 9), (5, 6, 4)], ids=str)
    def test_of_a_linear_field_is_its_trace(self, sides):
        n = len(sides)
        matrix = torch.randn(n, n, dtype=torch.float64)
        position = torch.stack(grid(*sides))
        field = torch.tensordot(matrix, position, dims=1) + 3
        result = Divergence(0.1)(torch.stack([field, 2 * field]))
        assert result.shape == (2, *(side - 2 for side in sides))
        torch.testing.assert_close(result[0], torch.full_like(result[0], matrix.trace().item()))
        torch.testing.assert_close(result[1], 2 * result[0])

    def test_of_a_smooth_field_has_an_error_of_second_order(self):
        errors = []
        for n in (20, 40):
            h = 1 / n
            y, x = grid(n, n, spacing=h)
            field = torch.stack([torch.sin(3 * y) * torch.cos(x), torch.exp(y) * torch.sin(2 * x)])
            exact = 3 * torch.cos(3 * y) * torch.cos(x) + 2 * torch.exp(y) * torch.cos(2 * x)
            errors.append((Divergence(h)(field[None])[0] - exact[1:-1, 1:-1]).abs().max().item())
        assert errors[0] < 0.02
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)

    @pytest.mark.parametrize("shape", [(1, 3, 5, 5), (1, 1, 5, 5), (1, 2, 2, 5), (1, 2)])
    def test_a_field_of_another_shape_is_an_error(self, shape):
        with pytest.raises(ValueError, match=r"Divergence: expected \(B, n, \*spatial\) .* got"):
            Divergence()(torch.zeros(shape))


class TestConstraint:
    def test_total_is_the_sum_times_the_volume(self):
        x = torch.arange(12.0).view(2, 2, 3)
        assert Total(0.5)(x).tolist() == [[7.5], [25.5]]

    def test_is_the_squared_norm_of_the_residual_of_the_reconstruction(self):
        model = LinearAutoencoder((2, 5, 5), latent_dim=3)
        x = torch.randn(4, 2, 5, 5)
        raw = penalty_of(ConstraintPenalty(Divergence()), model, x)
        v = model.reconstruct(x).detach().double().numpy()
        divergence = (v[:, 0, 2:, 1:-1] - v[:, 0, :-2, 1:-1] + v[:, 1, 1:-1, 2:] - v[:, 1, 1:-1, :-2]) / 2
        assert raw.shape == (4,)
        np.testing.assert_allclose(raw.detach(), (divergence**2).sum((1, 2)), rtol=1e-4)

    @pytest.mark.parametrize("conserve", [True, False])
    def test_conserve_compares_with_the_residual_of_the_data(self, conserve):
        model = LinearAutoencoder(5, latent_dim=3)
        x = torch.randn(4, 5)
        raw = penalty_of(ConstraintPenalty(Total(), conserve=conserve), model, x)
        x_hat = model.reconstruct(x).detach()
        expected = (x_hat.sum(1) - (x.sum(1) if conserve else 0)) ** 2
        torch.testing.assert_close(raw.detach(), expected)

    def test_is_about_the_reconstruction_not_the_pre_activations(self):
        model = LinearAutoencoder(5, latent_dim=3, loss=PoissonNLL())
        x = torch.ones(2, 5)
        raw = penalty_of(ConstraintPenalty(lambda v: v), model, x)
        torch.testing.assert_close(raw, model(x).params.exp().square().sum(1))

    def test_gradient_drives_the_reconstruction_to_the_law(self):
        x = torch.randn(50, 5, dtype=torch.float64) + 2
        law = ConstraintPenalty(Total(), weight=0.0, conserve=True)
        violations = {}
        for weight in (0.0, 100.0):
            torch.manual_seed(1)
            law.weight = weight
            model = LinearAutoencoder(5, latent_dim=2, tied=False, penalties={"mass": law}).double()
            optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                value = objective(model, x)
                value.backward()
                return value

            optimizer.step(closure)
            violations[weight] = (model.reconstruct(x).sum(1) - x.sum(1)).square().mean().item()
        assert violations[100.0] < 0.01 * violations[0.0]


class Norm(Penalty):
    def forward(self, x, output, model):
        return output.z.square().sum(1)


def test_weights_are_plain_attributes_read_at_every_step():
    model = LinearAutoencoder(5, latent_dim=2, penalties={"norm": Norm(0.5), "prior": WeightPrior(num_examples=4)})
    x = torch.randn(4, 5)
    error = (model.reconstruct(x) - x).square().sum(1).mean().item()
    length = model.encode(x).square().sum(1).mean().item()
    for weight in (0.5, 2.0, 0.0):
        model.penalties["norm"].weight = weight
        model.penalties["prior"].weight = 0.0
        step = model.training_step(x, 0)
        assert step["loss"].item() == pytest.approx(error + weight * length, rel=1e-5)
        assert step["terms"]["norm"].item() == pytest.approx(length, rel=1e-5)  # logged raw


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MLPAutoencoder(6, 4, code=VectorQuantizerCode(8, 2)), "VectorQuantizerCode is constant almost everywhere"),
        (MLPAutoencoder(6, 4, code=FiniteScalarQuantizerCode([3, 3])), "FiniteScalarQuantizerCode is constant"),
        (
            StackedAutoencoder([MLPAutoencoder(6, 4, code=VectorQuantizerCode(8, 4)), MLPAutoencoder(4, 2)]),
            "VectorQuantizerCode is constant almost everywhere",
        ),
        (DictionaryAutoencoder(6, 12, TopKCode(2)), "DictionaryAutoencoder with TopKCode keeps only what it selects"),
        (DictionaryAutoencoder(6, 12, BatchTopKCode(2)), "DictionaryAutoencoder with BatchTopKCode"),
    ],
)
@pytest.mark.parametrize("num_projections", [None, 3])
def test_codes_without_a_jacobian_are_refused_by_name(model, message, num_projections):
    x = torch.randn(3, 6)
    with pytest.raises(TypeError, match=f"JacobianPenalty: {message}"):
        JacobianPenalty(num_projections=num_projections)(x, model(x), model)


@pytest.mark.parametrize(
    "model",
    [
        MLPAutoencoder(6, 8, hidden=(10,), code=TopKCode(3)),
        DictionaryAutoencoder(6, 12, JumpReLUCode(12, 0.1, init_threshold=0.5)),
        DictionaryAutoencoder(6, 12, GatedCode(12, 0.1)),
    ],
)
def test_sparse_codes_with_a_dense_latent_have_the_jacobian_of_what_is_on(model):
    x = torch.randn(3, 6)
    expected = [jacobian(lambda row: model.encode(row[None])[0], row).square().sum() for row in x]
    torch.testing.assert_close(penalty_of(JacobianPenalty(), model, x), torch.stack(expected))


@pytest.mark.parametrize("hidden", [(), (10,)])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_validation_it_is_what_it_is_in_training(hidden, mode):
    """torch 2.6 takes derivatives of inference tensors to be 0."""
    model = ContractiveAutoencoder(6, 3, hidden=hidden)
    x = torch.randn(4, 6)
    expected = penalty_of(JacobianPenalty(), model, x).detach()
    assert (expected > 0).all()
    with mode():
        raw = penalty_of(JacobianPenalty(), model, x.clone())
    assert not raw.requires_grad
    torch.testing.assert_close(raw, expected)
