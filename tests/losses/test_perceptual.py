"""Feature losses against their definition; frozen features stay out of optimizer, checkpoint and training mode."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torchvision
from scipy import ndimage
from torch import nn

import lightning_ae as ae


def network():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.5))


class Layers(nn.Module):
    def forward(self, x):
        return {"one": x, "two": 2 * x}


def test_the_loss_is_the_squared_distance_of_features():
    phi = network().eval()
    params, x = torch.randn(2, 1, 6, 6), torch.rand(2, 1, 6, 6)
    expected = (phi(params.sigmoid()) - phi(x)).square().sum((1, 2, 3))
    torch.testing.assert_close(ae.FeatureLoss(phi, activation="sigmoid")(params, x), expected)


def test_layers_are_added_up():
    x_hat, x = torch.rand(2, 5), torch.rand(2, 5)
    torch.testing.assert_close(ae.FeatureLoss(Layers())(x_hat, x), 5 * (x_hat - x).square().sum(1))


def test_the_gradient_is_that_of_the_definition():
    phi = network().double().eval()
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    loss = ae.FeatureLoss(phi)
    params = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: loss(p, x), params)


def test_features_are_neither_trained_nor_saved_nor_switched_to_training():
    phi = network()
    model = ae.ConvAutoencoder((1, 6, 6), 2, channels=(4,), loss=ae.FeatureLoss(phi))
    ours = {id(p) for p in phi.parameters()}
    assert not ours & {id(p) for p in model.parameters()}
    assert not any("feature" in key for key in model.state_dict())
    model.train()
    assert not any(module.training for module in phi.modules())
    mean = phi[1].running_mean.clone()
    model.training_step(torch.rand(4, 1, 6, 6), 0)["loss"].backward()
    assert torch.equal(phi[1].running_mean, mean)
    assert all(p.grad is None for p in phi.parameters())


def test_features_follow_the_model_and_its_copies():
    model = ae.ConvAutoencoder((1, 6, 6), 2, channels=(4,), loss=ae.FeatureLoss(network())).double()
    assert model.loss.features.module[0].weight.dtype is torch.float64
    copied = copy.deepcopy(model)
    assert copied.loss.features.module is not model.loss.features.module
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    params, x = (torch.rand(2, 1, 6, 6, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(again.loss(params, x), model.loss(params, x))


class Permuted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x):
        return self.scale * x[:, self.order]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_features_with_whole_numbers_follow_the_model_too(dtype, expected):
    loss = ae.FeatureLoss(Permuted()).to(dtype)
    phi = loss.features.module
    assert (phi.order.dtype, phi.scale.dtype) == (torch.int64, expected)
    x_hat, x = torch.rand(2, 3, dtype=dtype), torch.rand(2, 3, dtype=dtype)
    expected = 9 * (x_hat.to(expected) - x.to(expected)).square().sum(1)
    torch.testing.assert_close(loss(x_hat, x), expected)
    del phi.scale
    loss.to(dtype).to("cpu")
    assert phi.order.dtype is torch.int64


def test_sobel_is_scipys():
    x = torch.rand(1, 2, 7, 6, dtype=torch.float64)
    down, right = ae.ImageGradients("sobel").double()(x)
    for channel in range(2):
        for got, axis in ((down, 0), (right, 1)):
            expected = ndimage.sobel(x[0, channel].numpy(), axis=axis)[1:-1, 1:-1] / 8
            np.testing.assert_allclose(got[0, channel].numpy(), expected, atol=1e-12)


def test_differences_are_numpys():
    x = torch.rand(2, 3, 5, 4)
    down, right = ae.ImageGradients()(x)
    np.testing.assert_array_equal(down.numpy(), np.diff(x.numpy(), axis=2))
    np.testing.assert_array_equal(right.numpy(), np.diff(x.numpy(), axis=3))


def test_torchvision_features_are_the_networks_own_after_its_normalisation(tmp_path):
    network = torchvision.models.squeezenet1_1(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    phi = ae.TorchvisionFeatures("squeezenet1_1", ["features.1", "features.4"], tmp_path / "weights.pt").eval()
    x = torch.rand(2, 1, 33, 33)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    h = (x.repeat(1, 3, 1, 1) - mean[:, None, None]) / std[:, None, None]
    for i, layer in enumerate(network.features[:5]):
        h = layer(h)
        if i == 1:
            torch.testing.assert_close(phi(x)[0], h)
    torch.testing.assert_close(phi(x)[1], h)


def test_random_features_are_the_same_ones_after_loading(make_trainer, tmp_path):
    phi = ae.TorchvisionFeatures("squeezenet1_1", ["features.1"])
    model = ae.ConvAutoencoder((1, 16, 16), 2, channels=(4,), loss=ae.FeatureLoss(phi))
    trainer = make_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    torch.manual_seed(5)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(ae.load(tmp_path / "m.ckpt").loss(x.roll(1, 2), x), model.loss(x.roll(1, 2), x))


@pytest.mark.parametrize("build", [lambda: ae.TorchvisionFeatures("squeezenet1_1", ["features.1"]), ae.LPIPSLoss])
def test_random_features_leave_the_generators_of_all_devices_alone(build, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded


def test_layers_are_not_overwritten_by_the_activation_after_them():
    alone = ae.TorchvisionFeatures("vgg11", ["features.0"])
    both = ae.TorchvisionFeatures("vgg11", ["features.0", "features.3"])
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(both(x)[0], alone(x)[0])
    assert both(x)[0].min() < 0


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_features_stay_in_full_precision(precision, make_trainer):
    phi = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh())
    m = ae.ConvAutoencoder((1, 8, 8), 2, channels=(4,), loss=ae.FeatureLoss(phi))
    make_trainer(precision=precision, fast_dev_run=1).fit(m, ae.TensorDataModule(torch.rand(8, 1, 8, 8)))
    assert phi[0].weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ae.ImageGradients("prewitt"), "kernel: expected 'difference' or 'sobel'"),
        (lambda: ae.ImageGradients()(torch.rand(2, 5)), r"expected images \(B, C, H, W\), got \(2, 5\)"),
        (
            lambda: ae.TorchvisionFeatures("squeezenet1_1", ["features.1"])(torch.rand(1, 2, 32, 32)),
            r"expected images \(B, 1 or 3, H, W\)",
        ),
        (lambda: ae.TorchvisionFeatures("squeezenet1_1", ["nowhere"]), "nowhere"),
        (lambda: ae.TorchvisionFeatures("squeezenet1_1", [1]), "layers: expected a sequence of names"),
        (lambda: ae.TorchvisionFeatures("squeezenet1_1", []), r"layers: .* at least one, got \[\]"),
        (lambda: ae.FeatureLoss(nn.Identity(), activation="softmax"), "activation: expected one of"),
    ],
)
def test_errors_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_function_is_refused_as_features():
    with pytest.raises(TypeError, match="features: expected a Module, got a function"):
        ae.FeatureLoss(lambda x: x)
