"""The sweep finds the optima that theory gives, and treats every point alike."""

import os

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.decomposition import PCA
from torch import nn

from lightning_ae import (
    AlphaMix,
    Autoencoder,
    ConvAutoencoder,
    FeatureLoss,
    ImageGradients,
    LinearAutoencoder,
    MLPAutoencoder,
    SquaredError,
    TensorDataModule,
    linear_gaussian,
    sweep,
)

D, K = 6, 2
ALPHAS = [0.0, 0.2, 0.5, 0.8, 1.0]
LEAN = {"accelerator": "cpu", "precision": "64-true"}


class Matrix(nn.Module):
    """A linear Φ."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x):
        return x @ self.a.T


@pytest.fixture(scope="module")
def phi():
    # invertible and far from a rotation, so that the two losses want different subspaces
    generator = torch.Generator().manual_seed(0)
    return Matrix(torch.diag(torch.tensor([0.2, 0.4, 0.6, 1.5, 2.0, 3.0]).double()) + 0.1 * _noise(generator))


def _noise(generator):
    return torch.randn(D, D, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def x():
    spread = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.7, 0.5]).double()
    generator = torch.Generator().manual_seed(1)
    return 1 + torch.randn(200, D, generator=generator, dtype=torch.float64) * spread


class FullBatchLinear(LinearAutoencoder):
    """With L-BFGS, to get to the optimum itself."""

    def configure_optimizers(self):
        options = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16, "history_size": 50}
        return torch.optim.LBFGS(self.parameters(), max_iter=200, line_search_fn="strong_wolfe", **options)


def closed_form(x, a, alpha):
    """Both losses at the optimum, by PCA in the metric of M = αI + (1 − α)AᵀA, with NumPy and SciPy."""
    x, a = x.numpy(), a.detach().numpy()
    residual = x - x.mean(0)
    root = linalg.sqrtm(alpha * np.eye(D) + (1 - alpha) * a.T @ a).real
    u = linalg.eigh(root @ np.cov(x.T, bias=True) @ root)[1][:, -K:]
    residual = residual @ (np.eye(D) - np.linalg.inv(root) @ u @ u.T @ root).T
    return [np.square(residual).sum(1).mean(), np.square(residual @ a.T).sum(1).mean()]


@pytest.fixture(scope="module")
def linear_front(x, phi):
    def make_model(alpha):
        loss = AlphaMix(SquaredError(), FeatureLoss(phi), alpha)
        return FullBatchLinear(D, K, tied=False, loss=loss)

    data = TensorDataModule(x, batch_size=len(x), val_fraction=0)
    return sweep(make_model, ALPHAS, data, split="train", max_epochs=3, **LEAN)


def test_linear_models_reach_the_closed_form_of_the_front(linear_front, x, phi):
    expected = [closed_form(x, phi.a, alpha) for alpha in ALPHAS]
    np.testing.assert_allclose(linear_front.objectives.numpy(), expected, rtol=1e-5)


def test_the_front_is_monotone(linear_front):
    pixel, perceptual = linear_front.objectives.T
    assert (pixel.diff() < 0).all()
    assert (perceptual.diff() > 0).all()
    assert linear_front.non_dominated().all()


def test_its_ends_are_the_optima_of_the_pure_losses(linear_front, x, phi):
    def discarded(y):
        return PCA().fit(y.numpy()).explained_variance_[K:].sum() * (len(y) - 1) / len(y)

    assert linear_front.objectives[-1, 0].item() == pytest.approx(discarded(x), rel=1e-6)
    # in the coordinates that Φ sees, the perceptual loss is squared error
    assert linear_front.objectives[0, 1].item() == pytest.approx(discarded(phi(x).detach()), rel=1e-6)


def test_adamw_together_reaches_the_closed_form_too(x, phi):
    def make_model(alpha):
        loss = AlphaMix(SquaredError(), FeatureLoss(phi), alpha)
        return LinearAutoencoder(D, K, tied=False, loss=loss, lr=0.02)

    data = TensorDataModule(x, batch_size=len(x), val_fraction=0)
    front = sweep(make_model, ALPHAS, data, split="train", together=True, max_epochs=1000, **LEAN)
    weights = np.array([[alpha, 1 - alpha] for alpha in ALPHAS])
    reached = (weights * front.objectives.numpy()).sum(1)
    best = (weights * [closed_form(x, phi.a, alpha) for alpha in ALPHAS]).sum(1)
    np.testing.assert_allclose(reached, best, rtol=1e-3)
    assert (reached > best * (1 - 1e-9)).all()


@pytest.mark.parametrize("together", [True, False])
def test_alpha_of_one_and_zero_train_like_the_pure_losses(together, make_trainer):
    data = TensorDataModule(torch.rand(60, 1, 5, 5), batch_size=16)
    pure = {1.0: SquaredError(), 0.0: FeatureLoss(ImageGradients())}

    def make(loss):
        return MLPAutoencoder((1, 5, 5), 3, hidden=(8,), activation="tanh", loss=loss, lr=0.01)

    def make_model(alpha):
        return make(AlphaMix(SquaredError(), FeatureLoss(ImageGradients()), alpha))

    front = sweep(make_model, list(pure), data, together=together, seed=3, max_epochs=4, accelerator="cpu")
    for model, loss in zip(front.models, pure.values(), strict=True):
        torch.manual_seed(3)
        alone = make(loss)
        make_trainer(max_epochs=4, limit_val_batches=0).fit(alone, datamodule=data)
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def small_model(alpha):
    loss = AlphaMix(SquaredError(), FeatureLoss(ImageGradients()), alpha)
    return MLPAutoencoder((1, 4, 4), 2, hidden=(6,), loss=loss)


def conv_model(alpha):
    return ConvAutoencoder((1, 8, 8), 2, channels=(4,), loss=AlphaMix(SquaredError(), SquaredError(), alpha))


@pytest.fixture
def data():
    return TensorDataModule(torch.rand(40, 1, 4, 4), test=torch.rand(10, 1, 4, 4), batch_size=16, val_fraction=0.25)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_objectives_are_the_raw_losses_averaged_over_the_split(data, split):
    front = sweep(small_model, [0.25], data, split=split, max_epochs=1, accelerator="cpu")
    x = torch.cat(list(getattr(data, f"{split}_dataloader")()))
    with torch.no_grad():
        x_hat = front.models[0].reconstruct(x)
    error = x_hat - x
    pixel = error.square().sum((1, 2, 3)).mean()
    edges = (error.diff(dim=2).square().sum() + error.diff(dim=3).square().sum()) / len(x)
    torch.testing.assert_close(front.objectives[0], torch.stack([pixel, edges]).double(), rtol=1e-5, atol=0)
    assert len(x) == {"train": 30, "val": 10, "test": 10}[split]


def test_models_that_cannot_train_together_train_one_by_one():
    data = TensorDataModule(torch.rand(20, 1, 8, 8), batch_size=10)
    front = sweep(conv_model, [0.2, 0.9], data, max_epochs=1, accelerator="cpu")
    # the two losses are the same, so alpha changes nothing: the points saw the same batches from the same start
    assert front.objectives[0].equal(front.objectives[1])
    with pytest.raises(ValueError, match="cannot train together: ConvAutoencoder has a ConvEncoder"):
        sweep(conv_model, [0.2, 0.9], data, together=True, max_epochs=1, accelerator="cpu")


def test_a_sweep_can_be_repeated_and_leaves_the_random_state_alone(data):
    state = torch.get_rng_state()
    first, second, other = (
        sweep(small_model, [0.1, 0.9], data, seed=seed, max_epochs=2, accelerator="cpu") for seed in (5, 5, 6)
    )
    assert torch.get_rng_state().equal(state)
    assert first.objectives.equal(second.objectives)
    assert not first.objectives.equal(other.objectives)
    assert all(not model.training and model.device.type == "cpu" for model in first.models)


def test_a_sweep_leaves_the_seed_of_later_runs_alone(data, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")  # what Lightning's samplers and processes read
    sweep(small_model, [0.5], data, seed=7, max_epochs=1, accelerator="cpu")
    assert os.environ["PL_GLOBAL_SEED"] == "42"


@pytest.mark.parametrize("together", [True, False])
def test_objectives_are_those_of_the_batches_that_the_data_module_makes(together):
    class Bytes(TensorDataModule):
        """Scales on the device."""

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch / 255

    x = torch.rand(40, 1, 4, 4)
    options = {"together": together, "max_epochs": 2, "accelerator": "cpu"}
    fronts = [
        sweep(small_model, [0.2, 0.7], kind(scale * x, batch_size=16, val_fraction=0.25), **options)
        for kind, scale in ((Bytes, 255), (TensorDataModule, 1))
    ]
    torch.testing.assert_close(fronts[0].objectives, fronts[1].objectives, rtol=1e-4, atol=0)


def test_models_that_share_parts_are_refused(data):
    one = small_model(0.0)
    mix = AlphaMix(SquaredError(), FeatureLoss(ImageGradients()))

    def same_model(alpha):
        one.loss.alpha = alpha
        return one

    def same_loss(alpha):
        mix.alpha = alpha
        return MLPAutoencoder((1, 4, 4), 2, loss=mix)

    def same_encoder(alpha):
        other = small_model(alpha)
        return Autoencoder(one.encoder, other.decoder, other.loss)

    for make_model in (same_model, same_loss, same_encoder):
        with pytest.raises(ValueError, match="make_model: expected a new model and a new loss each time"):
            sweep(make_model, [0.1, 0.9], data, max_epochs=1, accelerator="cpu")


def test_an_empty_split_is_noticed_before_the_training(data):
    trained = []

    class Watched(MLPAutoencoder):
        def on_train_start(self):
            trained.append(True)

    def make_model(alpha):
        return Watched((1, 4, 4), 2, loss=AlphaMix(SquaredError(), FeatureLoss(ImageGradients()), alpha))

    with pytest.raises(ValueError, match="split: the data have no val examples"):
        sweep(make_model, [0.5], TensorDataModule(torch.rand(8, 1, 4, 4), val_fraction=0), accelerator="cpu")
    assert not trained


def test_each_point_has_the_callbacks_of_its_model(data):
    seen = []

    class Watched(MLPAutoencoder):
        def configure_callbacks(self):
            seen.append(self.loss.alpha)
            return super().configure_callbacks()

    def make_model(alpha):
        return Watched((1, 4, 4), 2, loss=AlphaMix(SquaredError(), FeatureLoss(ImageGradients()), alpha))

    sweep(make_model, [0.3, 0.6], data, max_epochs=1, accelerator="cpu")
    assert seen == [0.3, 0.6]


def test_bad_arguments_are_refused_at_the_door(data):
    with pytest.raises(ValueError, match="alphas: expected at least one"):
        sweep(small_model, [], data)
    with pytest.raises(ValueError, match=r"alphas: .* in \[0, 1\], got 1.5"):
        sweep(small_model, [1.5], data)
    with pytest.raises(TypeError, match="data: expected a LightningDataModule"):
        sweep(small_model, [0.5], torch.rand(4, 1, 4, 4))
    with pytest.raises(ValueError, match="split: expected"):
        sweep(small_model, [0.5], data, split="valid")
    with pytest.raises(ValueError, match="together: expected True, False or 'auto', got 'yes'"):
        sweep(small_model, [0.5], data, together="yes")
    with pytest.raises(ValueError, match="callbacks: they would carry"):
        sweep(small_model, [0.5], data, callbacks=[object()])
    with pytest.raises(TypeError, match="make_model: expected to get an Autoencoder, got a Linear"):
        sweep(lambda alpha: nn.Linear(2, 2), [0.5], data, accelerator="cpu")
    with pytest.raises(ValueError, match=r"alpha=0.5, got AlphaMix with alpha=0.1"):
        sweep(lambda alpha: small_model(0.1), [0.5], data, accelerator="cpu")
    with pytest.raises(ValueError, match=r"alpha=0.5, got SquaredError"):
        sweep(lambda alpha: MLPAutoencoder((1, 4, 4), 2), [0.5], data, accelerator="cpu")
    without_val = TensorDataModule(torch.rand(8, 1, 4, 4), val_fraction=0)
    with pytest.raises(ValueError, match="split: the data have no val examples"):
        sweep(small_model, [0.5], without_val, max_epochs=1, accelerator="cpu")
    with pytest.raises(ValueError, match="make_model: to use several devices it has to be picklable"):
        sweep(lambda alpha: small_model(alpha), [0.2, 0.5], data, devices=2, max_epochs=1, accelerator="cpu")


def gaussian_data():
    return TensorDataModule(linear_gaussian(64, 16, 2).x.view(-1, 1, 4, 4), batch_size=16)


@pytest.mark.slow
def test_points_spread_over_devices_are_those_of_one_device(monkeypatch):
    # the processes import this file by name, which pytest's import mode does not put on their path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    data = gaussian_data()
    alphas = [0.0, 0.3, 1.0]
    one = sweep(small_model, alphas, data, max_epochs=2, accelerator="cpu")
    two = sweep(small_model, alphas, data, max_epochs=2, accelerator="cpu", devices=2)
    torch.testing.assert_close(two.objectives, one.objectives, rtol=1e-6, atol=0)
    x = torch.rand(3, 1, 4, 4)
    for alpha, ours, theirs in zip(alphas, two.models, one.models, strict=True):
        assert ours.loss.alpha == alpha
        torch.testing.assert_close(ours.reconstruct(x), theirs.reconstruct(x), rtol=1e-5, atol=1e-6)
