"""Gradients at activations, output and weights, against closed forms, NumPy and autograd in double precision."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import lightning_ae as ae
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.watch import Watch
from lightning_ae.diagnostics.watch.activations import FUNCTIONS

RTOL = {"32-true": 1e-5, "64-true": 1e-11}


def sgd(parameters, lr=0.5):
    return torch.optim.SGD(parameters, lr=lr)


class Plain(L.LightningModule):
    """Somebody else's model: a network, a loss of (output, x), an optimizer."""

    def __init__(self, net, loss=functional.mse_loss, optimizer=sgd):
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch), batch)

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def watch(make_trainer, model, x, batch_size=8, options=None, **settings):
    """Train with a monitor that looks at every step."""
    monitor = GradientSaturationMonitor(**{"every_n_steps": 1, **(options or {})})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
        trainer = make_trainer(callbacks=monitor, **settings)
        trainer.fit(model, x if isinstance(x, DataLoader) else DataLoader(x, batch_size=batch_size))
    return monitor


# -- a network small enough to differentiate by hand ------------------------------------------------------------------

PHI = {
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda y: y * (1 - y)),
    "tanh": (np.tanh, lambda y: 1 - y * y),
    "relu": (lambda z: np.maximum(z, 0), lambda y: (y > 0).astype(float)),
}


class Hand:
    """Two layers with one activation, mean squared error and plain SGD, in NumPy and double precision."""

    def __init__(self, net, activation, lr, eps=0.01):
        self.w = [net[i].weight.detach().double().numpy().copy() for i in (0, 2)]
        self.b = [net[i].bias.detach().double().numpy().copy() for i in (0, 2)]
        (self.phi, self.slope), self.lr, self.eps = PHI[activation], lr, eps
        self.flat, self.count = np.zeros(2), np.zeros(2)
        self.grad_z, self.grad_y, self.norms, self.updates, self.weights = (np.zeros(2) for _ in range(5))
        self.steps = 0

    def step(self, batches):
        dw, db = [0.0, 0.0], [0.0, 0.0]
        for x in batches:
            y0 = self.phi(x @ self.w[0].T + self.b[0])
            y1 = self.phi(y0 @ self.w[1].T + self.b[1])
            g_y1 = 2 * (y1 - x) / x.size / len(batches)
            g_z1 = g_y1 * self.slope(y1)
            g_y0 = g_z1 @ self.w[1]
            g_z0 = g_y0 * self.slope(y0)
            for i, (y, g_z, g_y, before) in enumerate(((y0, g_z0, g_y0, x), (y1, g_z1, g_y1, y0))):
                self.flat[i] += (np.abs(self.slope(y)) < self.eps).sum()
                self.count[i] += y.size
                self.grad_z[i] += (g_z**2).sum()
                self.grad_y[i] += (g_y**2).sum()
                dw[i] = dw[i] + g_z.T @ before
                db[i] = db[i] + g_z.sum(0)
        self.steps += 1
        for i in range(2):
            norm = (dw[i] ** 2).sum() + (db[i] ** 2).sum()
            self.norms[i] += norm
            self.updates[i] += self.lr**2 * norm
            self.weights[i] += (self.w[i] ** 2).sum() + (self.b[i] ** 2).sum()
            self.w[i] -= self.lr * dw[i]
            self.b[i] -= self.lr * db[i]


def two_layers(activation, scale=3.0):
    module = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    net = nn.Sequential(nn.Linear(3, 4), module(), nn.Linear(4, 3), module())
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", RTOL)
@pytest.mark.parametrize("activation", PHI)
def test_all_figures_of_a_small_network_equal_those_worked_out_by_hand(activation, precision, accumulate, make_trainer):
    x = 2 * torch.randn(24, 3, dtype=torch.float64 if precision == "64-true" else torch.float32)
    net = two_layers(activation)
    hand = Hand(net, activation, lr=0.5)
    monitor = watch(make_trainer, Plain(net), x, batch_size=4, precision=precision, accumulate_grad_batches=accumulate)
    batches = [x[i : i + 4].double().numpy() for i in range(0, 24, 4)]
    for i in range(0, 6, accumulate):
        hand.step(batches[i : i + accumulate])
    near = lambda values: pytest.approx(values, rel=RTOL[precision])  # noqa: E731
    sites, layers = ["net.1", "net.3"], ["net.0", "net.2"]
    assert 0.05 < hand.flat[0] / hand.count[0] < 0.95  # the case is worth looking at
    assert monitor.saturated_fraction() == dict(zip(sites, hand.flat / hand.count, strict=True))
    assert monitor.transmission() == near(dict(zip(sites, np.sqrt(hand.grad_z / hand.grad_y), strict=True)))
    assert monitor.gradient_norm() == near(dict(zip(layers, np.sqrt(hand.norms / hand.steps), strict=True)))
    assert monitor.update_ratio() == near(dict(zip(layers, np.sqrt(hand.updates / hand.weights), strict=True)))


def test_the_threshold_of_flatness_is_the_users(make_trainer):
    x = torch.randn(16, 3)
    net = two_layers("sigmoid")
    y = net[:2](x).detach().double().numpy()
    model = Plain(net, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    monitor = watch(make_trainer, model, x, options={"eps": 0.1})
    assert monitor.saturated_fraction()["net.1"] == (y * (1 - y) < 0.1).mean() > 0


def test_the_loss_times_a_thousand_transmits_the_same(make_trainer):
    x = torch.randn(16, 3)
    net = two_layers("tanh")
    still = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    found = [
        watch(
            make_trainer,
            Plain(copy.deepcopy(net), lambda y, x, k=k: k * functional.mse_loss(y, x), still),
            x,
            batch_size=4,
            accumulate_grad_batches=accumulate,
        )
        for k, accumulate in ((1, 1), (1000, 1), (1, 4))
    ]
    first = found[0].transmission()
    assert 0.01 < min(first.values()) < max(first.values()) < 0.9
    for other in found[1:]:
        assert other.transmission() == pytest.approx(first, rel=1e-5)
        assert other.saturated_fraction() == found[0].saturated_fraction()
    assert found[1].gradient_norm()["net.0"] == pytest.approx(1000 * found[0].gradient_norm()["net.0"], rel=1e-5)


class Skip(nn.Module):
    """tanh(z) + 5 z, or the same in place."""

    def __init__(self, inplace=False):
        super().__init__()
        self.linear, self.inplace = nn.Linear(3, 3), inplace

    def forward(self, x):
        z = self.linear(x)
        skipped = 5 * z
        return (functional.relu(z, inplace=True) if self.inplace else torch.tanh(z)) + skipped


def test_a_skip_connection_around_an_activation_is_not_its_transmission(make_trainer):
    x = 2 * torch.randn(8, 3)
    net = Skip()
    z = net.linear(x).detach().double().requires_grad_()
    y = z.tanh().detach().requires_grad_()
    functional.mse_loss(y + 5 * z.detach(), x.double()).backward()
    slope = 1 - y.detach() ** 2
    monitor = watch(make_trainer, Plain(net), x)
    expected = ((y.grad * slope).norm() / y.grad.norm()).item()
    assert monitor.transmission() == pytest.approx({"net.tanh": expected}, rel=1e-5)
    assert expected < 1  # with the skip connection it would be above 5


def test_an_activation_in_place_is_judged_by_its_output(make_trainer):
    x = torch.randn(8, 3)
    net = Skip(inplace=True)
    z = net.linear(x).detach()
    grad = (z.relu() + 5 * z - x) * 2 / x.numel()
    monitor = watch(make_trainer, Plain(net), x)
    assert monitor.saturated_fraction() == {"net.relu": (z <= 0).double().mean().item()}
    expected = ((grad * (z > 0)).norm() / grad.norm()).item()
    assert monitor.transmission() == pytest.approx({"net.relu": expected}, rel=1e-5)


def test_padding_is_not_counted_as_saturated(make_trainer):
    x = torch.cat([torch.randn(4, 3), torch.full((4, 3), 50.0)])
    net = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())
    y = net(x[:4]).detach().double()
    model = Plain(net)
    monitor = watch(make_trainer, model, x, options={"mask_fn": lambda batch: batch[:, 0] != 50.0, "eps": 0.2})
    assert monitor.saturated_fraction() == {"net.1": (y * (1 - y) < 0.2).double().mean().item()}


# -- slopes -----------------------------------------------------------------------------------------------------------

CALLS = {
    "relu": [functional.relu, lambda z: functional.relu(z, inplace=True), torch.relu, torch.relu_],
    "relu6": [functional.relu6, lambda z: functional.relu6(z, True)],
    "hardtanh": [
        functional.hardtanh,
        lambda z: functional.hardtanh(z, -0.7, 2.0),
        lambda z: functional.hardtanh(z, min_val=0.3, max_val=0.9, inplace=True),
        nn.Hardtanh(-3.0, 0.5),
    ],
    "leaky_relu": [
        functional.leaky_relu,
        lambda z: functional.leaky_relu(z, 0.3),
        lambda z: functional.leaky_relu(z, -0.3),
        nn.LeakyReLU(0.2, inplace=True),
    ],
    "elu": [functional.elu, lambda z: functional.elu(z, alpha=1.7), nn.ELU(0.4, inplace=True)],
    "selu": [functional.selu, lambda z: functional.selu(z, inplace=True), torch.selu_],
    "celu": [functional.celu, lambda z: functional.celu(z, 2.5), nn.CELU(0.3, inplace=True)],
    "sigmoid": [torch.sigmoid, torch.Tensor.sigmoid_, nn.Sigmoid()],
    "tanh": [torch.tanh, torch.tanh_, functional.tanh],
    "gelu": [functional.gelu, lambda z: functional.gelu(z, approximate="tanh"), nn.GELU("tanh")],
    "silu": [functional.silu, nn.SiLU()],
    "mish": [functional.mish],
    "softplus": [
        functional.softplus,
        lambda z: functional.softplus(z, 3.0),
        lambda z: functional.softplus(z, beta=0.5, threshold=30),
        lambda z: functional.softplus(z, beta=1.0, threshold=1.0),
    ],
    "logsigmoid": [functional.logsigmoid],
    "softsign": [functional.softsign],
    "hardsigmoid": [functional.hardsigmoid, lambda z: functional.hardsigmoid(z, inplace=True)],
    "hardswish": [functional.hardswish],
}


class Catch:
    """Keeps the events of a watch."""

    def __init__(self):
        self.events = []

    def on_activation(self, event):
        self.events.append(event)

    def on_gradient(self, site, grad_z, grad_y):
        pass

    def on_module(self, name, module, inputs, output):
        pass


def slope_and_derivative(call, z):
    """The slope that the monitor takes, and autograd's gradient of the sum."""
    z = z.clone().requires_grad_()
    catch = Catch()
    with Watch().open(call if isinstance(call, nn.Module) else nn.Module(), [catch]):
        y = call(z * 1.0)
        (event,) = catch.events
        slope = event.site.activation.slope(event.z, event.y.clone(), event.options)
    (derivative,) = torch.autograd.grad(y.sum(), z)
    return slope, derivative


@pytest.mark.parametrize(
    ("name", "call"),
    [(name, call) for name, calls in CALLS.items() for call in calls],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_slopes_are_autograds_derivatives(name, call):
    z = torch.linspace(-7, 7, 1000, dtype=torch.float64).view(100, 10)  # an even number: no kink among them
    slope, derivative = slope_and_derivative(call, z)
    torch.testing.assert_close(slope, derivative, rtol=1e-7, atol=1e-9)


def test_every_activation_with_a_slope_is_compared_with_autograd():
    assert {a.name for a in FUNCTIONS.values() if a.slope is not None} == set(CALLS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_sigmoid_is_flat_where_training_sees_it_flat(dtype):
    z = torch.tensor([[-10.0, 0.0, 5.0, 10.0, 12.0]], dtype=dtype)
    slope, derivative = slope_and_derivative(torch.sigmoid, z)
    torch.testing.assert_close(slope, derivative)
    assert slope[0, -2:].tolist() == [0.0, 0.0]
    in_full, _ = slope_and_derivative(torch.sigmoid, z.double())
    assert in_full[0, -2] > 4e-5


def test_activations_without_a_known_slope_have_a_transmission_and_no_saturation(make_trainer):
    monitor = watch(make_trainer, Plain(nn.Sequential(nn.Linear(3, 3), nn.PReLU())), torch.randn(8, 3))
    assert monitor.saturated_fraction() == {}
    assert 0.25 <= monitor.transmission()["net.1"] <= 1


# -- the decoder's output ---------------------------------------------------------------------------------------------


def autoencoder(loss, bias=0.0, **options):
    model = ae.MLPAutoencoder(6, 2, hidden=(5,), loss=loss, lr=0.0, **options)
    nn.init.constant_(model.decoder.layers[-1].bias, bias)
    return model


def weighted_slope(model, x):
    """2 x̂ (1 − x̂), an average with the errors as weights."""
    with torch.no_grad():
        x_hat = copy.deepcopy(model).double()(x.double()).params.sigmoid().numpy()
    error = np.abs(x_hat - x.double().numpy())
    return (2 * x_hat * (1 - x_hat) * error).sum() / error.sum()


@pytest.mark.parametrize(
    ("batch_size", "settings", "rtol"),
    [
        (32, {}, 1e-5),
        (4, {}, 1e-5),
        (7, {}, 1e-5),  # the last batch has 4
        (4, {"accumulate_grad_batches": 4}, 1e-5),
        (4, {"accumulate_grad_batches": 3}, 1e-5),  # the last window has 2
        (8, {"precision": "bf16-mixed"}, 2e-2),
    ],
)
@pytest.mark.parametrize("loss", ["bernoulli", "sigmoid", "identity", "gaussian"])
def test_the_output_ratio_is_the_closed_form_at_any_batch_size(loss, batch_size, settings, rtol, make_trainer):
    x = torch.rand(32, 6)
    losses = {
        "bernoulli": ae.BernoulliNLL(),
        "sigmoid": ae.SquaredError("sigmoid"),
        "identity": ae.SquaredError(),
        "gaussian": ae.GaussianNLL(scale=0.5),
    }
    model = autoencoder(losses[loss], bias=-2.0)
    expected = {"bernoulli": 1.0, "sigmoid": weighted_slope(model, x), "identity": 2.0, "gaussian": 4.0}[loss]
    monitor = watch(make_trainer, model, x, batch_size=batch_size, **settings)
    assert monitor.output_ratio() == pytest.approx(expected, rel=rtol)
    assert monitor.starved_fraction() == 0.0


def test_a_confidently_wrong_sigmoid_is_starved_by_squared_error_and_not_by_bernoulli(make_trainer):
    x = torch.ones(16, 6)
    found = {}
    for name, loss in (("squared", ae.SquaredError("sigmoid")), ("bernoulli", ae.BernoulliNLL())):
        model = autoencoder(loss, bias=-12.0)
        with torch.no_grad():  # half of the pixels start where they can learn
            model.decoder.layers[-1].bias[:3] = 0.0
            model.decoder.layers[-1].weight.zero_()
        found[name] = watch(make_trainer, model, x)
    assert found["squared"].starved_fraction() == 0.5
    assert found["bernoulli"].starved_fraction() == 0.0
    low = 1 / (1 + math.exp(12.0))
    expected = (2 * 0.25 * 0.5 + 2 * low * (1 - low) ** 2) / (0.5 + 1 - low)
    assert found["squared"].output_ratio() == pytest.approx(expected, rel=1e-5)
    assert found["bernoulli"].output_ratio() == pytest.approx(1, rel=1e-5)
    assert found["squared"].saturated_fraction()["loss.sigmoid"] == 0.5


def test_an_output_is_starved_below_a_hundredth_of_its_error(make_trainer):
    model = autoencoder(ae.SquaredError("sigmoid"))
    x_hat = torch.tensor([0.5, 0.02, 0.0051, 0.0049, 0.001, 1e-5])  # 2 x̂ (1 − x̂) is 0.01 at 0.00503
    with torch.no_grad():
        model.decoder.layers[-1].bias.copy_(x_hat.logit())
        model.decoder.layers[-1].weight.zero_()
    assert watch(make_trainer, model, torch.ones(8, 6)).starved_fraction() == 0.5
    # what is wrong by less than 0.01 is right
    right = x_hat.expand(8, 6).clone()
    right[:, 0] = 0.4
    assert watch(make_trainer, model, right).starved_fraction() == 0.0


class Foreign(L.LightningModule):
    """Encoder and decoder of somebody else, with the sigmoid inside the decoder or after it."""

    def __init__(self, reduction, inside, flat=True):
        super().__init__()
        self.reduction, self.inside, self.flat = reduction, inside, flat
        self.encoder = nn.Linear(6, 2)
        layers = [nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 6)]
        self.decoder = nn.Sequential(*layers, nn.Sigmoid()) if inside == "module" else nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        a = self.decoder(self.encoder(x))
        x_hat = {"module": lambda a: a, "call": torch.sigmoid, "none": lambda a: a}[self.inside](a)
        with torch.no_grad():
            self.decoder(self.encoder(x))  # to look at pictures, say
        total = functional.mse_loss(x_hat, x, reduction="sum")
        return {"elements": total / x.numel(), "batch": total / len(x), "sum": total}[self.reduction]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("reduction", ["elements", "batch", "sum"])
@pytest.mark.parametrize(("inside", "output"), [("module", "decoder.3"), ("call", "sigmoid"), ("none", "decoder")])
def test_a_model_that_is_not_ours_names_its_output(inside, output, reduction, accumulate, make_trainer):
    x = torch.rand(32, 2, 3)
    model = Foreign(reduction, inside)
    with torch.no_grad():
        x_hat = model.decoder(model.encoder(x.flatten(1)))
        x_hat = (x_hat.sigmoid() if inside == "call" else x_hat).double().numpy()
    error = np.abs(x_hat - x.flatten(1).double().numpy())
    expected = 2.0 if inside == "none" else (2 * x_hat * (1 - x_hat) * error).sum() / error.sum()
    monitor = watch(
        make_trainer,
        model,
        DataLoader(torch.utils.data.TensorDataset(x), batch_size=4),
        options={"output": output, "reduction": reduction, "include": ["encoder"]},
        accumulate_grad_batches=accumulate,
    )
    assert monitor.output_ratio() == pytest.approx(expected, rel=1e-5)
    assert monitor.saturated_fraction() == {}  # all of the decoder was left out


def test_an_output_that_is_called_as_a_part_of_another_module_is_found_by_either_name(make_trainer):
    class Chain(Foreign):
        def __init__(self):
            super().__init__("elements", "none")
            self.chain = nn.Sequential(self.encoder, self.decoder)

        def training_step(self, batch, batch_idx):
            return functional.mse_loss(self.chain(batch), batch)

    for output in ("decoder", "chain.1"):
        monitor = watch(make_trainer, Chain(), torch.rand(8, 6), options={"output": output})
        assert monitor.output_ratio() == pytest.approx(2, rel=1e-5)


def test_without_a_name_the_output_of_a_foreign_model_is_not_guessed(make_trainer):
    monitor = watch(make_trainer, Foreign("elements", "module"), [torch.rand(4, 6)][0][:, None])
    assert math.isnan(monitor.output_ratio())
    assert math.isnan(monitor.starved_fraction())


def test_a_name_that_fits_nothing_and_an_output_of_another_size_are_errors(make_trainer):
    with pytest.raises(ValueError, match=r"nothing called 'decoder.9' has given .* activations are \['net.1'\]"):
        watch(
            make_trainer,
            Plain(nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
            torch.rand(4, 3),
            options={"output": "decoder.9"},
        )
    with pytest.raises(ValueError, match=r"'net.0' gives \(4, 5\), but the batch begins with one of shape \(4, 3\)"):
        watch(
            make_trainer,
            Plain(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))),
            torch.rand(4, 3),
            options={"output": "net.0"},
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
        ({"eps": math.nan}, "eps: expected a positive number, got nan"),
        ({"reduction": "mean"}, "reduction: expected 'elements', 'batch' or 'sum', got 'mean'"),
        ({"every_n_steps": 0}, "every_n_steps: expected a positive whole number, got 0"),
        ({"horizon": -1}, "horizon: expected a positive whole number, got -1"),
    ],
)
def test_errors_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        GradientSaturationMonitor(**options)


# -- layers -----------------------------------------------------------------------------------------------------------


class Tape(L.Callback):
    """Weights before and after each step and the gradients between, in double precision; it comes after the monitor."""

    def __init__(self):
        self.grads, self.before, self.after = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(n, p) for n, p in pl_module.named_parameters() if id(p) in mine and p.grad is not None]
        self.grads.append({n: p.grad.double().clone() for n, p in named})
        self.before.append({n: p.detach().double().clone() for n, p in named})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {n: p.detach().double().clone() for n, p in pl_module.named_parameters()}
        self.after += [now] * (len(self.before) - len(self.after))

    def squares(self, values):
        total = {}
        for step in values:
            for name, value in step.items():
                layer = name.rpartition(".")[0]
                total[layer] = total.get(layer, 0.0) + float(value.square().sum())
        return total

    def gradient_norm(self):
        steps = {}
        for step in self.grads:
            for layer in {name.rpartition(".")[0] for name in step}:
                steps[layer] = steps.get(layer, 0) + 1
        return {layer: math.sqrt(s / steps[layer]) for layer, s in self.squares(self.grads).items()}

    def update_ratio(self):
        updates = self.squares(
            [{n: after[n] - before[n] for n in before} for before, after in zip(self.before, self.after, strict=True)]
        )
        weights = self.squares(self.before)
        return {layer: math.sqrt(updates[layer] / weights[layer]) for layer in updates if weights[layer]}


def taped(make_trainer, model, x, batch_size=8, monitor=None, **settings):
    monitor = monitor or GradientSaturationMonitor(every_n_steps=1)
    tape = Tape()
    make_trainer(callbacks=[monitor, tape], **settings).fit(model, DataLoader(x, batch_size=batch_size))
    return monitor, tape


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1),
}


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 3}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradient_norms_are_those_before_clipping_and_updates_those_of_the_step(optimizer, settings, make_trainer):
    model = Plain(two_layers("tanh", scale=1.0), optimizer=OPTIMIZERS[optimizer])
    monitor, tape = taped(make_trainer, model, torch.randn(48, 3), **settings)
    assert monitor.gradient_norm() == pytest.approx(tape.gradient_norm(), rel=1e-5)
    assert monitor.update_ratio() == pytest.approx(tape.update_ratio(), rel=1e-3)
    assert min(monitor.gradient_norm().values()) > 1e-2  # clipped they would be below


def test_frozen_parameters_have_no_figures_and_spoil_none(make_trainer):
    net = two_layers("tanh", scale=1.0)
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    monitor, tape = taped(make_trainer, Plain(net), torch.randn(24, 3))
    assert set(monitor.gradient_norm()) == {"net.2"}
    assert monitor.gradient_norm() == pytest.approx(tape.gradient_norm(), rel=1e-5)
    assert monitor.update_ratio() == pytest.approx(tape.update_ratio(), rel=1e-3)


def test_a_layer_of_zeros_has_no_update_ratio(make_trainer):
    net = two_layers("tanh")
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    monitor = watch(make_trainer, Plain(net), torch.randn(8, 3), max_steps=1)
    assert set(monitor.update_ratio()) == {"net.0"}
    assert set(monitor.gradient_norm()) == {"net.0", "net.2"}


class Manual(L.LightningModule):
    """Two optimizers: a generator and a critic that steps twice, or weights and biases apart."""

    def __init__(self, split):
        super().__init__()
        self.automatic_optimization = False
        self.split = split
        self.generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.critic = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        if self.split == "kind":
            loss = (self.critic(self.generator(batch)) - 1).square().mean()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()
            return
        for _ in range(2):
            loss = self.critic(self.generator(batch).detach()).mean() - self.critic(batch).mean()
            second.zero_grad()
            self.manual_backward(loss)
            second.step()
        first.zero_grad()
        self.manual_backward(-self.critic(self.generator(batch)).mean())
        first.step()

    def configure_optimizers(self):
        if self.split == "kind":
            weights = [p for p in self.parameters() if p.ndim > 1]
            biases = [p for p in self.parameters() if p.ndim == 1]
            return torch.optim.SGD(weights, lr=0.1), torch.optim.Adam(biases, lr=0.01)
        return torch.optim.SGD(self.generator.parameters(), lr=0.1), torch.optim.Adam(self.critic.parameters(), 0.01)


def test_two_optimizers_by_hand_each_give_the_norms_of_their_layers(make_trainer):
    monitor, tape = taped(make_trainer, Manual("model"), torch.randn(24, 3))
    assert len(tape.grads) == 9
    assert monitor.gradient_norm() == pytest.approx(tape.gradient_norm(), rel=1e-5)
    assert set(monitor.gradient_norm()) == {"generator.0", "generator.2", "critic.0", "critic.2"}


def test_a_layer_shared_out_between_two_optimizers_has_the_norm_of_the_whole(make_trainer):
    monitor, tape = taped(make_trainer, Manual("kind"), torch.randn(24, 3))
    squares = tape.squares(tape.grads)
    assert monitor.gradient_norm() == pytest.approx({n: math.sqrt(s / 3) for n, s in squares.items()}, rel=1e-5)
    assert monitor.update_ratio() == pytest.approx(tape.update_ratio(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_gradients_neither_overflow_nor_lose_digits(dtype, make_trainer):
    net = nn.Linear(64, 64, bias=False).to(dtype)
    x = torch.full((4, 64), 64.0, dtype=dtype)
    target = lambda y, x: (y.float() * 30).sum()  # noqa: E731
    still = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    monitor = watch(make_trainer, Plain(net, target, still), x)
    assert monitor.gradient_norm() == pytest.approx({"net": 4 * 64 * 30 * 64.0}, rel=1e-5)  # 491,520


# -- mixed precision's scale ------------------------------------------------------------------------------------------


class Bursting(ae.MLPAutoencoder):
    """Its third step has a loss that overflows."""

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        out["loss"] = out["loss"] * (1e36 if batch_idx == self.burst else 1.0)
        return out

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def scaled(make_trainer, scale, burst, optimizer, **scaler):
    torch.manual_seed(0)
    model = Bursting(6, 2, hidden=(5,), activation="tanh", loss=ae.SquaredError("sigmoid"))
    model.burst, model.optimizer = burst, optimizer
    x = torch.rand(8, 6).repeat(5, 1)
    settings = {}
    if scale is not None:
        grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale, **scaler)
        settings["plugins"] = FullPrecisionScaled("16-mixed", "cpu", grad_scaler)
    return watch(make_trainer, model, x, gradient_clip_val=None, **settings)


class FullPrecisionScaled(MixedPrecision):
    """The loss scale of 16-mixed without its half precision, so that figures can be compared."""

    def forward_context(self):
        return torch.enable_grad()


def figures(monitor):
    sites = {
        **{f"{k} transmission": v for k, v in monitor.transmission().items()},
        **{f"{k} saturated": v for k, v in monitor.saturated_fraction().items()},
        **{f"{k} norm": v for k, v in monitor.gradient_norm().items()},
        **{f"{k} update": v for k, v in monitor.update_ratio().items()},
    }
    return {**sites, "ratio": monitor.output_ratio(), "starved": monitor.starved_fraction()}


def fused(parameters, lr=0.5):
    return torch.optim.SGD(parameters, lr=lr, fused=True)


@pytest.mark.parametrize("optimizer", [sgd, fused])
@pytest.mark.parametrize("scaler", [{}, {"growth_interval": 1, "growth_factor": 4.0}])
def test_no_figure_depends_on_the_scale_of_the_loss(optimizer, scaler, make_trainer):
    plain = figures(scaled(make_trainer, None, None, sgd))
    assert len(plain) == 16
    assert figures(scaled(make_trainer, 1024.0, None, optimizer, **scaler)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("optimizer", [sgd, fused])
def test_a_step_that_is_skipped_for_infinite_gradients_is_left_out(optimizer, make_trainer):
    slow = lambda parameters: optimizer(parameters, 1e-3)  # noqa: E731 - so that all steps are much the same
    without = scaled(make_trainer, 1024.0, None, slow)
    with_burst = scaled(make_trainer, 1024.0, 2, slow)
    assert set(figures(with_burst)) == set(figures(without))
    assert all(math.isfinite(value) for value in figures(with_burst).values())
    assert figures(with_burst) == pytest.approx(figures(without), rel=2e-2)
    steps = with_burst.results()["layers", "grad_steps"]
    assert steps.tolist() == [4.0] * len(with_burst.layers)
    assert int(with_burst.results()["output", "wrong"]) <= 4 * 8 * 6


# -- what is not a step's gradient ------------------------------------------------------------------------------------


class GradientPenalty(Plain):
    def training_step(self, batch, batch_idx):
        x = batch.clone().requires_grad_()
        y = self.net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return functional.mse_loss(y, batch) + self.weight * slope.square().mean()


def test_gradients_that_are_differentiated_again_are_not_the_steps(make_trainer):
    net = two_layers("tanh", scale=1.0)
    still = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    x = torch.randn(8, 3)
    plain = watch(make_trainer, Plain(copy.deepcopy(net), optimizer=still), x)
    penalised = GradientPenalty(copy.deepcopy(net), optimizer=still)
    penalised.weight = 0.0
    assert watch(make_trainer, penalised, x).transmission() == pytest.approx(plain.transmission(), rel=1e-5)
    penalised.net = nn.Linear(3, 3)
    monitor = watch(make_trainer, penalised, x, options={"output": "net"})
    assert monitor.output_ratio() == pytest.approx(2, rel=1e-5)


def test_weights_are_the_same_with_and_without_the_monitor(make_trainer):
    x = torch.rand(32, 6)
    found = []
    for callbacks in ([], [GradientSaturationMonitor(every_n_steps=2)]):
        torch.manual_seed(3)
        model = ae.MLPAutoencoder(6, 2, hidden=(5,), loss=ae.SquaredError("sigmoid"))
        make_trainer(callbacks=callbacks, max_epochs=2).fit(model, DataLoader(x, batch_size=4))
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


# -- over steps, runs and ranks ---------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_figures_of_an_uninterrupted_one(make_trainer, tmp_path):
    x = torch.rand(40, 6)

    def fit(epochs, path=None):
        torch.manual_seed(1)
        model = ae.MLPAutoencoder(6, 2, hidden=(5,), loss=ae.SquaredError("sigmoid"), lr=0.01)
        monitor = GradientSaturationMonitor(every_n_steps=3, horizon=16)
        trainer = make_trainer(max_epochs=epochs, callbacks=monitor, log_every_n_steps=4)
        trainer.fit(model, DataLoader(x, batch_size=8), ckpt_path=path)
        return trainer, monitor

    trainer, half = fit(3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(6, tmp_path / "half.ckpt")
    _, whole = fit(6)
    assert figures(resumed) == pytest.approx(figures(whole), rel=1e-6)
    assert figures(half) != pytest.approx(figures(whole), rel=1e-6)


def test_a_monitor_can_be_used_again_after_an_error_in_the_middle_of_a_step(make_trainer):
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            raise RuntimeError("full disk")

    monitor = GradientSaturationMonitor(every_n_steps=1)
    broken = Plain(two_layers("tanh"), optimizer=lambda p: Fails(p, lr=0.1))
    with pytest.raises(RuntimeError, match="full disk"):
        make_trainer(callbacks=monitor).fit(broken, DataLoader(torch.randn(8, 3), batch_size=4))
    monitor, tape = taped(make_trainer, Plain(two_layers("relu")), torch.randn(8, 3), monitor=monitor)
    assert monitor.gradient_norm() == pytest.approx(tape.gradient_norm(), rel=1e-5)


def test_a_used_monitor_can_be_copied_and_pickled(make_trainer):
    monitor = watch(make_trainer, Plain(two_layers("tanh")), torch.randn(8, 3))
    assert figures(copy.deepcopy(monitor)) == pytest.approx(figures(monitor), nan_ok=True)
    assert figures(pickle.loads(pickle.dumps(monitor))) == pytest.approx(figures(monitor), nan_ok=True)


def test_scalars_are_logged_and_can_be_watched(make_trainer, tmp_path):
    monitor = GradientSaturationMonitor(every_n_steps=1)
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(callbacks=monitor, logger=logger, log_every_n_steps=2)
    trainer.fit(autoencoder(ae.SquaredError("sigmoid")), DataLoader(torch.rand(32, 6), batch_size=8))
    rows = np.genfromtxt(
        tmp_path / "lightning_logs" / "version_0" / "metrics.csv", delimiter=",", names=True, deletechars=""
    )
    last = rows[~np.isnan(rows["saturation/output_ratio"])][-1]
    metrics = trainer.callback_metrics
    elements = 32 * np.array([5, 5, 6])
    flat = np.array([monitor.saturated_fraction()[s] for s in ("encoder.layers.1", "decoder.layers.1", "loss.sigmoid")])
    expected = {
        "output_ratio": monitor.output_ratio(),
        "starved_fraction": monitor.starved_fraction(),
        "lowest_transmission": min(monitor.transmission().values()),
        "gradient_norm": math.sqrt(sum(norm**2 for norm in monitor.gradient_norm().values())),
        "saturated_fraction": (flat * elements).sum() / elements.sum(),
    }
    for name, value in expected.items():
        assert float(metrics[f"saturation/{name}"]) == pytest.approx(value, rel=1e-6)
        assert float(last[f"saturation/{name}"]) == pytest.approx(value, rel=1e-6)
    assert last["saturation/loss.sigmoid/transmission"] == pytest.approx(monitor.transmission()["loss.sigmoid"])
    assert last["saturation/encoder.layers.0/update_ratio"] == 0.0
    assert "saturation/loss.sigmoid/transmission" not in metrics


class Write(L.Callback):
    """Writes what rank 0 has."""

    def __init__(self, monitor, path):
        self.monitor, self.path = monitor, path

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(figures(self.monitor), self.path)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_two_ranks_have_the_figures_of_one(make_trainer, tmp_path):
    x = torch.rand(32, 6)
    start = ae.MLPAutoencoder(6, 2, hidden=(5,), loss=ae.SquaredError("sigmoid"), lr=0.01)
    seen = {}
    for ranks in (1, 2):
        monitor = GradientSaturationMonitor(every_n_steps=1)
        options = {"strategy": "ddp_spawn"} if ranks > 1 else {}
        trainer = make_trainer(
            devices=ranks, callbacks=[monitor, Write(monitor, tmp_path / f"{ranks}.pt")], log_every_n_steps=2, **options
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
            trainer.fit(copy.deepcopy(start), ae.TensorDataModule(x, batch_size=8 // ranks, val_fraction=0.0, seed=0))
        seen[ranks] = torch.load(tmp_path / f"{ranks}.pt")
    assert len(seen[1]) == 16
    assert seen[2] == pytest.approx(seen[1], rel=1e-4)
