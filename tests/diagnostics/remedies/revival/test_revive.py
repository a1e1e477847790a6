"""Dead units get a new start, and nothing else changes."""

from __future__ import annotations

import copy
import csv
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import lightning_ae as ae
from lightning_ae.diagnostics.remedies.revival.evidence import Evidence
from lightning_ae.diagnostics.remedies.revival.revive import DeadUnitReviver

N = 32


class Net(L.LightningModule):
    """Regresses on a fixed random function of x."""

    def __init__(self, net: nn.Module, optimizer="adam", lr=1e-2) -> None:
        super().__init__()
        self.net, self.optimizer, self.lr = net, optimizer, lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        y = self(batch)
        return (y - target(batch, y)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", (self(batch) - 1.0).square().mean())

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        return torch.optim.Adam(self.parameters(), self.lr, amsgrad=self.optimizer == "amsgrad")


def target(x, y):
    return x.flatten(1).sum(1).tanh().view(-1, *[1] * (y.ndim - 1)).expand_as(y)


class Snapshots(L.Callback):
    """Weights, optimizer state and outputs before and after the first repair; goes behind the reviver."""

    def __init__(self, x) -> None:
        self.x, self.before, self.after = x, None, None

    def take(self, trainer, model):
        training = model.training
        model.eval()
        with torch.no_grad():
            y = model(self.x).clone()
        model.train(training)
        state = {
            name: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
            for optimizer in trainer.optimizers
            for name, p in model.named_parameters()
            if p in optimizer.state
        }
        return SimpleNamespace(weights=copy.deepcopy(model.state_dict()), state=state, y=y)

    def on_validation_end(self, trainer, pl_module):
        if self.before is None and not trainer.sanity_checking:
            self.before = self.take(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.after is None and self.before is not None:
            self.after = self.take(trainer, pl_module)


def loader(x, batch_size=8):
    return DataLoader(x, batch_size)


def run(make_trainer, model, x, reviver, val=None, **options):
    """Two epochs; returns what was before and after the repair between them."""
    snapshots = Snapshots(x if val is None else val)
    trainer = make_trainer(**{"max_epochs": 2, "callbacks": [reviver, snapshots], **options})
    trainer.fit(model, loader(x), loader(x if val is None else val))
    return snapshots.before, snapshots.after, trainer


def kill(layer, units):
    """Make units of a layer, or of a normalisation, dead."""
    with torch.no_grad():
        layer.bias[units] = -50.0


def mlp():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.ones_(net[0].bias)
    kill(net[0], [2, 5])
    return net, (6,), {"net.0.weight": (0, [2, 5]), "net.0.bias": (0, [2, 5]), "net.2.weight": (1, [2, 5])}


def conv_bn():
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3))
    kill(net[1], [1, 4])
    names = ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.1.running_mean", "net.1.running_var"]
    return net, (1, 8, 8), {**{name: (0, [1, 4]) for name in names}, "net.3.weight": (1, [1, 4])}


def conv_flatten():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 3))
    kill(net[0], [1, 3])
    columns = [*range(9, 18), *range(27, 36)]
    return net, (1, 5, 5), {"net.0.weight": (0, [1, 3]), "net.0.bias": (0, [1, 3]), "net.3.weight": (1, columns)}


def transposed():
    layers = [nn.ConvTranspose2d(3, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 1, 3, stride=2)]
    net = nn.Sequential(*layers)
    kill(net[0], [0, 5])
    return net, (3, 3, 3), {"net.0.weight": (1, [0, 5]), "net.0.bias": (0, [0, 5]), "net.2.weight": (0, [0, 5])}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(functional.relu(self.a(x)))


def functional_relu():
    net = Functional()
    kill(net.a, [7])
    return net, (6,), {"net.a.weight": (0, [7]), "net.a.bias": (0, [7]), "net.b.weight": (1, [7])}


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Conv1d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(functional.relu(self.b(x)).mean(2))


def pooled():
    net = Pooled()
    kill(net.b, [1])
    return net, (1, 6), {"net.b.weight": (0, [1]), "net.b.bias": (0, [1]), "net.c.weight": (1, [1])}


class Products(nn.Module):
    """Without layers, as sparse autoencoders are often written."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.ones(8))
        self.d, self.c = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return torch.relu((x - self.c) @ self.w + self.b) @ self.d + self.c


def products():
    net = Products()
    with torch.no_grad():
        net.b[3] = -80
    return net, (6,), {"net.w": (1, [3]), "net.b": (0, [3]), "net.d": (0, [3])}


def layer_norm():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    kill(net[1], [3])
    # other incoming weights would move the statistics of the units that are alive
    return net, (6,), {"net.1.weight": (0, [3]), "net.1.bias": (0, [3]), "net.3.weight": (1, [3])}


def unflattened():
    layers = [nn.Linear(6, 4 * 9), nn.Unflatten(1, (4, 3, 3)), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3, stride=2)]
    net = nn.Sequential(*layers)
    rows = [*range(9, 18), *range(27, 36)]
    kill(net[0], rows)
    net.units = [1, 3]
    return net, (6,), {"net.0.weight": (0, rows), "net.0.bias": (0, rows), "net.3.weight": (0, [1, 3])}


def unflattened_signal():
    layers = [nn.Linear(6, 4 * 5), nn.Unflatten(1, (4, 5)), nn.ReLU(), nn.ConvTranspose1d(4, 1, 3)]
    net = nn.Sequential(*layers)
    rows = [*range(5, 10), *range(15, 20)]
    kill(net[0], rows)
    net.units = [1, 3]
    return net, (6,), {"net.0.weight": (0, rows), "net.0.bias": (0, rows), "net.3.weight": (0, [1, 3])}


def unflattened_bn():
    layers = [nn.Linear(6, 4 * 9), nn.Unflatten(1, (4, 3, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)]
    net = nn.Sequential(*layers)
    kill(net[2], [1, 3])
    rows = [*range(9, 18), *range(27, 36)]
    net.units = [1, 3]
    names = ["net.2.weight", "net.2.bias", "net.2.running_mean", "net.2.running_var"]
    linear = {"net.0.weight": (0, rows), "net.0.bias": (0, rows)}
    return net, (6,), {**linear, **{name: (0, [1, 3]) for name in names}, "net.4.weight": (1, [1, 3])}


ORACLES = [mlp, conv_bn, conv_flatten, transposed, functional_relu, pooled, products, layer_norm]
ORACLES += [unflattened, unflattened_signal, unflattened_bn]


def mask_of(tensor, dim, index):
    mask = torch.zeros(tensor.shape[dim], dtype=torch.bool)
    mask[index] = True
    return mask.view([-1 if d == dim else 1 for d in range(tensor.ndim)]).expand(tensor.shape)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "amsgrad"])
@pytest.mark.parametrize("make", ORACLES)
def test_redo_renews_exactly_the_dead_units_and_their_moments_and_keeps_the_function(make_trainer, make, optimizer):
    net, shape, changed = make()
    model = Net(net, optimizer)
    if make is not layer_norm:  # something to forget
        for p in model.parameters():
            p.register_hook(lambda g: g + 0.01)
    x = torch.randn(N, *shape)
    reviver = DeadUnitReviver()
    before, after, _ = run(make_trainer, model, x, reviver)

    assert torch.equal(before.y, after.y)
    readers = list(changed)[-1]
    for name, old in before.weights.items():
        new = after.weights[name]
        if name not in changed:
            assert torch.equal(old, new), name
            continue
        mask = mask_of(new, *changed[name])
        assert torch.equal(old[~mask], new[~mask]), name
        if name == readers or name.endswith(("bias", "running_mean", ".b")):
            assert (new[mask] == 0).all(), name
        elif new.ndim == 1:
            assert (new[mask] == 1).all(), name
        else:
            assert (old[mask] != new[mask]).all(), name
    moments = {"adam": 2, "sgd": 1, "amsgrad": 3}[optimizer]
    for name, kept in after.state.items():
        tensors = {k: v for k, v in kept.items() if v.shape == after.weights[name].shape and k != "step"}
        assert len(tensors) == moments
        for k, new in tensors.items():
            mask = mask_of(new, *changed.get(name, (0, [])))
            assert (new[mask] == 0).all()
            assert torch.equal(new[~mask], before.state[name][k][~mask])
            if name == readers and make is not layer_norm:
                assert (before.state[name][k][mask] != 0).any()  # there was something to forget


@pytest.mark.parametrize("make", ORACLES)
def test_renewed_units_fire_and_are_used_again(make_trainer, make):
    net, shape, changed = make()
    reviver = DeadUnitReviver()
    x = torch.randn(N, *shape)
    model = Net(net)
    run(make_trainer, model, x, reviver, max_epochs=4)
    found = [units for epoch, _, units in reviver.history if epoch == 0]
    dead = getattr(net, "units", changed[next(iter(changed))][1])
    assert found == [dead]
    assert all(epoch == 0 for epoch, _, _ in reviver.history), "they were still dead later"
    name, (dim, index) = list(changed.items())[-1]
    assert (model.state_dict()[name].index_select(dim, torch.tensor(index)) != 0).any()


def test_new_incoming_weights_have_the_deviation_of_he(make_trainer):
    net = nn.Sequential(nn.Linear(200, 400), nn.ReLU(), nn.Linear(400, 1))
    kill(net[0], list(range(200)))
    _, after, _ = run(make_trainer, Net(net), torch.randn(N, 200), DeadUnitReviver())
    drawn = after.weights["net.0.weight"][:200]
    assert abs(drawn.std() / (2 / 200) ** 0.5 - 1) < 0.02
    assert abs(drawn.mean()) < 0.002

    net = nn.Sequential(nn.ConvTranspose2d(32, 80, 4, stride=2), nn.ReLU(), nn.Conv2d(80, 1, 1))
    kill(net[0], list(range(40)))
    _, after, _ = run(make_trainer, Net(net), torch.randn(N, 32, 2, 2), DeadUnitReviver())
    # of the 4 × 4 kernel, an output is reached by 2 × 2
    assert abs(after.weights["net.0.weight"][:, :40].std() / (2 / (32 * 4)) ** 0.5 - 1) < 0.02


def test_a_unit_that_dies_again_gets_other_weights_and_seeds_differ(make_trainer):
    drawn = []

    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0 and trainer.current_epoch > 0:
                drawn.append(pl_module.net[0].weight[2].detach().clone())
                kill(pl_module.net[0], [2])

    for seed in (0, 0, 1):
        net, shape, _ = mlp()
        x = torch.randn(N, *shape)
        make_trainer(max_epochs=3, callbacks=[DeadUnitReviver(seed=seed), Kill()]).fit(Net(net), loader(x), loader(x))
    assert torch.equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).all()
    assert (drawn[0] != drawn[4]).all()


def test_a_model_whose_layers_are_dead_altogether_comes_back_to_life(make_trainer):
    code = nn.Linear(8, 2)  # linear, so a path of zeros to it would keep the decoder dead
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), code, nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(code.bias)
    kill(net[0], list(range(8)))
    kill(net[3], list(range(8)))
    x = torch.randn(N, 6)
    before, after, _ = run(make_trainer, Net(net), x, DeadUnitReviver(), max_epochs=4)
    assert torch.equal(before.y, after.y)  # the last dead layer is read by zeros
    assert torch.equal(before.weights["net.2.weight"], after.weights["net.2.weight"])
    assert (net(x).std(0) > 0.01).all()


@pytest.mark.parametrize(
    ("make", "shift"),
    [(mlp, "net.0.bias"), (conv_bn, "net.1.bias"), (transposed, "net.0.bias"), (unflattened, "net.0.bias")],
)
def test_bias_moves_only_the_bias_or_shift_of_dead_units(make_trainer, make, shift):
    net, shape, changed = make()
    model = Net(net)
    before, after, _ = run(make_trainer, model, torch.randn(N, *shape), DeadUnitReviver("bias", bias=0.25))
    for name, old in before.weights.items():
        expected = old.clone()
        if name == shift:
            expected[changed[shift][1]] += 0.25
        assert torch.equal(after.weights[name], expected), name


def test_all_sites_of_our_convolutional_autoencoder_can_be_revived(make_trainer):
    model, x = ae.ConvAutoencoder((1, 8, 8), 3, channels=(4, 6)), torch.rand(N, 1, 8, 8)
    kill(model.encoder.layers[2], [1])
    kill(model.decoder.layers[0], list(range(2 * 4, 3 * 4)))
    kill(model.decoder.layers[3], [3])
    reviver = DeadUnitReviver()
    make_trainer(max_epochs=2, callbacks=reviver).fit(model, loader(x), loader(x))
    revived = {site: units for epoch, site, units in reviver.history if epoch == 0}
    assert 1 in revived["encoder.layers.3"]
    assert 2 in revived["decoder.layers.2"]
    assert 3 in revived["decoder.layers.4"]


def test_bias_goes_on_until_the_unit_fires(make_trainer):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].bias[2] = -2 - net[0].weight[2].abs().sum()
    reviver = DeadUnitReviver("bias", bias=1.0)
    run(make_trainer, Net(net, lr=1e-4), torch.rand(N, 6) * 2 - 1, reviver, max_epochs=8)
    epochs = [epoch for epoch, _, units in reviver.history if units == [2]]
    assert 2 <= len(epochs) < 7
    assert epochs == list(range(len(epochs)))


@pytest.mark.parametrize("method", ["redo", "bias"])
def test_weights_are_bit_identical_when_nothing_is_dead(make_trainer, method):
    x = torch.randn(N, 6)

    def train(callbacks):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        for layer in (net[0], net[3]):
            nn.init.ones_(layer.bias)
        model = Net(net, lr=1e-3)
        make_trainer(max_epochs=3, callbacks=callbacks).fit(model, loader(x), loader(x))
        return model.state_dict(), torch.rand(3)

    reviver = DeadUnitReviver(method)
    (plain, random), (watched, random_too) = train([]), train([reviver])
    assert reviver.history == []
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(random, random_too)


def test_random_numbers_of_training_are_not_disturbed_by_a_revival(make_trainer):
    net, shape, _ = mlp()
    drawn = []

    class Draw(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            drawn.append(torch.rand(1).item())

    x = torch.randn(N, *shape)
    for callbacks in ([Draw()], [DeadUnitReviver(), Draw()]):
        torch.manual_seed(3)
        make_trainer(max_epochs=2, callbacks=callbacks).fit(Net(copy.deepcopy(net)), loader(x), loader(x))
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]


def test_a_unit_that_fires_on_one_validation_example_is_left_alone(make_trainer):
    net, _, _ = mlp()
    x = torch.rand(N, 6)
    val = x.clone()
    with torch.no_grad():
        net[0].weight[2] = 0.0
        net[0].weight[2, 0] = 1.0  # fires where the first number is above 50
        net[0].weight[5] = 0.0
    val[17, 0] = 100.0
    reviver = DeadUnitReviver()
    run(make_trainer, Net(net, lr=1e-6), x, reviver, val=val)
    assert reviver.history == [(0, "net.1", [5])]


def test_units_with_nan_are_not_dead(make_trainer):
    net, shape, _ = mlp()
    with torch.no_grad():
        net[0].bias[5] = float("nan")
    reviver = DeadUnitReviver("bias")
    model = Net(net, lr=0.0)
    model.training_step = lambda batch, batch_idx: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training_step returned None
        run(make_trainer, model, torch.randn(N, *shape), reviver)
    assert reviver.history == [(0, "net.1", [2])]


def test_the_sanity_check_other_loops_and_skipped_validations_do_not_count(make_trainer):
    net, shape, _ = mlp()
    reviver = DeadUnitReviver(every_n_validations=3)
    x = torch.randn(N, *shape)
    model = Net(net)
    trainer = make_trainer(max_epochs=5, num_sanity_val_steps=2, callbacks=[reviver])
    trainer.fit(model, loader(x), loader(x))
    assert reviver.history == [(2, "net.1", [2, 5])]
    trainer.validate(model, loader(x), verbose=False)
    assert reviver._validations == 5


def test_validation_within_an_epoch_counts_and_gradients_so_far_are_forgotten(make_trainer):
    net, shape, _ = mlp()
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(None if net[2].weight.grad is None else net[2].weight.grad.clone())

    reviver = DeadUnitReviver()
    model = Net(net)
    model.net[2].weight.register_hook(lambda g: g + 1.0)
    x = torch.randn(N, *shape)
    trainer = make_trainer(max_epochs=1, callbacks=[reviver, Look()], val_check_interval=2, accumulate_grad_batches=4)
    trainer.fit(model, loader(x), loader(x))
    assert reviver.history == [(0, "net.1", [2, 5])]
    assert (seen[1][:, [2, 5]] != 0).all()
    assert (seen[2][:, [2, 5]] == 0).all()
    assert (seen[2][:, [0, 1, 3]] != 0).all()


def test_nothing_is_changed_after_the_last_validation_nor_after_stop_after(make_trainer):
    net, shape, _ = mlp()
    x = torch.randn(N, *shape)
    reviver = DeadUnitReviver()
    trainer = make_trainer(max_epochs=1, callbacks=[reviver])
    trainer.fit(Net(net), loader(x), loader(x))
    assert net[0].bias[2] < -40
    assert reviver.history == []

    reviver = DeadUnitReviver("bias", stop_after=1)
    make_trainer(max_epochs=5, callbacks=[reviver]).fit(Net(net), loader(x), loader(x))
    assert [epoch for epoch, _, _ in reviver.history] == [0, 1]


def test_include_keeps_to_named_modules(make_trainer):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
            self.decoder = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 6))

        def forward(self, x):
            return self.decoder(self.encoder(x))

    net = Two()
    kill(net.encoder[0], [1])
    kill(net.decoder[0], [2])
    reviver = DeadUnitReviver(include=["net.decoder"])
    run(make_trainer, Net(net, lr=1e-4), torch.randn(N, 6), reviver)
    assert reviver.history == [(0, "net.decoder.1", [2])]


def test_numbers_are_logged_and_in_callback_metrics(make_trainer, tmp_path):
    net, shape, _ = mlp()
    logger = CSVLogger(tmp_path)
    _, _, trainer = run(make_trainer, Net(net), torch.randn(N, *shape), DeadUnitReviver(), logger=logger, max_epochs=3)
    assert trainer.callback_metrics["revive/units"] == 0  # the second time
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["revive/units"]]
    assert [float(row["revive/units"]) for row in rows] == [2.0, 0.0]
    assert [float(row["revive/samples"]) for row in rows] == [N, N]
    assert float(rows[0]["revive/net.1/units"]) == 2.0
    assert [int(row["step"]) for row in rows] == [4, 8]


def test_resumed_equals_uninterrupted(make_trainer, tmp_path):
    x = torch.randn(N, 6)

    def train(epochs, folder, ckpt=None):
        torch.manual_seed(1)
        net, _, _ = mlp()
        kill(net[0], [0, 1])
        model, reviver = Net(net, lr=0.05), DeadUnitReviver()
        kill_again = KillAgain()
        save = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[reviver, kill_again, save])
        trainer.fit(model, loader(x), loader(x), ckpt_path=ckpt)
        return model.state_dict(), reviver

    whole, reviver = train(5, "whole")
    train(2, "half")
    resumed, reviver_too = train(5, "rest", tmp_path / "half" / "epoch=1.ckpt")
    assert [epoch for epoch, _, _ in reviver.history] == [0, 1, 3]
    assert reviver.history == reviver_too.history
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class KillAgain(L.Callback):
    """Units die in the epochs 1 and 3."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in (1, 3):
            kill(pl_module.net[0], [4])


# -- what it refuses, and leaves alone ------------------------------------------------------------------------------


class Residual(nn.Module):
    """What reads the branch with a dead unit 1 reads another, in which it is alive."""

    def __init__(self, swap=False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.swap = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), swap

    def forward(self, x):
        h = functional.relu(self.a(x))
        g = functional.relu(self.b(h))
        return self.c(h + g if self.swap else g + h)


class Concatenated(nn.Module):
    """A skip connection, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x):
        h = functional.relu(self.a(x))
        return self.c(torch.cat([h, self.b(h)], 1))


class Transposed(nn.Module):
    """Tied by hand, with a code that is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        z = self.c(functional.relu(self.b(x)))
        return functional.linear(functional.relu(functional.linear(z, self.c.weight.t())), self.b.weight.t())


class ConvTransposed(nn.Module):
    """Convolutions tied by hand: each weight reads what it makes in the other direction."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Conv1d(1, 3, 2), nn.Conv1d(3, 2, 2)

    def forward(self, x):
        h = functional.relu(self.c(functional.relu(self.b(x[:, None]))))
        g = functional.relu(functional.conv_transpose1d(h, self.c.weight))
        return functional.conv_transpose1d(g, self.b.weight)


class Shared(nn.Module):
    """Two layers have one weight, one of them without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c, self.e = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.e.weight = self.b.weight

    def forward(self, x):
        return self.c(functional.relu(self.b(x))) + self.e(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(3):
            x = functional.relu(self.b(x))
        return self.c(x)


class NormalisedAfter(nn.Module):
    """The dead unit reaches its reader as the shift of a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.norm, self.c = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.norm(functional.relu(self.b(x))))


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(functional.hardtanh(self.b(x)))


class AtTheOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        return functional.relu(self.b(x))


class Gated(nn.Module):
    """The same pre-activation is read where it has no hard zero."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c, self.e = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        nn.init.ones_(self.b.bias)

    def forward(self, x):
        z = self.b(x)
        return self.c(functional.relu(z)) + self.e(functional.silu(z))


CASES = [
    (Residual, "not all that reads it"),
    (lambda: Residual(swap=True), "not all that reads it"),
    (Concatenated, "not all that reads it"),
    (Transposed, "tied"),
    (ConvTransposed, "tied"),
    (Shared, "tied"),
    (Recurrent, "reads what it has made"),
    (NormalisedAfter, "something else than 0"),
    (Clipped, "something else than 0"),
    (AtTheOutput, "not all that reads it"),
]


@pytest.mark.parametrize(("build", "reason"), CASES)
def test_redo_leaves_a_site_alone_where_it_would_harm_others_and_says_why(make_trainer, build, reason):
    net = build()
    kill(net.a if isinstance(net, Concatenated) else net.b, [1])
    reviver = DeadUnitReviver()
    with pytest.warns(UserWarning, match=rf"leaves dead units of net\.(relu|hardtanh)(#\d)? alone: .*({reason})"):
        before, after, _ = run(make_trainer, Net(net, lr=1e-4), torch.randn(N, 4), reviver)
    assert [row for row in reviver.history if 1 in row[2]] == []
    assert torch.equal(before.y, after.y)


def test_a_unit_that_is_alive_at_another_activation_of_the_same_layer_is_alive(make_trainer):
    net = Gated()
    kill(net.b, [1])
    reviver = DeadUnitReviver()
    before, after, _ = run(make_trainer, Net(net, lr=1e-4), torch.randn(N, 4), reviver)
    assert reviver.history == []
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)


def test_tied_weights_are_skipped_with_one_warning_and_their_biases_can_be_nudged(make_trainer):
    x = torch.rand(N, 1, 4, 4)

    def build():
        model = ae.MLPAutoencoder((1, 4, 4), 3, hidden=(8,), activation="relu", tied=True, lr=1e-4, bias_init=2.0)
        kill(model.encoder.layers[0], [3])
        return model

    reviver = DeadUnitReviver(include=["encoder"])
    with pytest.warns(UserWarning, match=r"leaves dead units of encoder\.layers\.1 alone: .* tied") as caught:
        run_autoencoder(make_trainer, build(), x, reviver)
    assert len([w for w in caught if "leaves dead units" in str(w.message)]) == 1
    assert reviver.history == []
    reviver = DeadUnitReviver("bias", include=["encoder"])
    run_autoencoder(make_trainer, build(), x, reviver)
    assert [row[1:] for row in reviver.history] == [("encoder.layers.1", [3])] * 2


def run_autoencoder(make_trainer, model, x, reviver, epochs=3):
    make_trainer(max_epochs=epochs, callbacks=[reviver]).fit(model, loader(x), loader(x))


def test_frozen_and_grouped_and_computed_weights_are_left_alone(make_trainer):
    frozen, _, _ = mlp()
    frozen[0].requires_grad_(False)
    grouped = nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv1d(4, 1, 2))
    kill(grouped[0], [1])
    read_by_groups = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 2, groups=2))
    kill(read_by_groups[0], [1])
    computed, _, _ = mlp()
    nn.utils.parametrizations.weight_norm(computed[0])
    cases = [
        (frozen, (6,), "frozen"),
        (grouped, (2, 5), "grouped"),
        (read_by_groups, (2, 5), "not all that reads it"),
        (computed, (6,), "computed"),
    ]
    for net, shape, reason in cases:
        reviver = DeadUnitReviver()
        with pytest.warns(UserWarning, match=rf"dead units of net\.1 alone: .*{reason}"):
            run(make_trainer, Net(net), torch.randn(N, *shape), reviver)
        assert reviver.history == []


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_parameters_are_refused(strategy):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(ValueError, match=rf"expected a strategy with whole parameters .* got {strategy.__name__}"):
        DeadUnitReviver().setup(trainer, Net(mlp()[0]), "fit")


def test_a_fit_without_validation_is_warned_of(make_trainer):
    net, shape, _ = mlp()
    with pytest.warns(UserWarning, match="this fit has none"):
        make_trainer(callbacks=[DeadUnitReviver()], limit_val_batches=0).fit(Net(net), loader(torch.randn(N, *shape)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method: expected one of"),
        ({"every_n_validations": 0}, "every_n_validations: expected a positive"),
        ({"bias": 0.0}, "bias: expected a positive"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeadUnitReviver(**options)
    with pytest.raises(TypeError, match="include: expected a list"):
        DeadUnitReviver(include="encoder")


def test_an_exception_in_validation_leaves_no_mode_and_no_hook_behind(make_trainer):
    net, shape, _ = mlp()

    class Broken(Net):
        def validation_step(self, batch, batch_idx):
            self(batch)
            raise RuntimeError("broken")

    reviver = DeadUnitReviver()
    x = torch.randn(N, *shape)
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(callbacks=[reviver], num_sanity_val_steps=0).fit(Broken(net), loader(x), loader(x))
    assert reviver._evidence is None
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch._dynamo.eval_frame._stance.stance == "default"


# -- other ways to train --------------------------------------------------------------------------------------------


class Adversarial(L.LightningModule):
    """Manual optimization with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.d = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.d(self.g(x))

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        for optimizer, sign in ((g, 1.0), (d, -1.0)):
            self.toggle_optimizer(optimizer)
            loss = sign * self(batch).tanh().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch, batch_idx):
        self(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.g.parameters()), torch.optim.SGD(self.d.parameters(), 1e-2, momentum=0.9)


def test_manual_optimization_with_two_optimizers(make_trainer):
    model = Adversarial()
    for layer in (model.g[0], model.d[0]):
        nn.init.constant_(layer.bias, 2.0)
    kill(model.g[0], [1])
    kill(model.d[0], [6])
    for p in (model.g[2].weight, model.d[2].weight):
        p.register_hook(lambda g: g + 0.1)
    reviver = DeadUnitReviver()
    before, after, _ = run(make_trainer, model, torch.randn(N, 6), reviver)
    assert reviver.history[:2] == [(0, "g.1", [1]), (0, "d.1", [6])]
    assert torch.equal(before.y, after.y)
    for name, unit, moment in (("g.2.weight", 1, "exp_avg"), ("d.2.weight", 6, "momentum_buffer")):
        assert (after.weights[name][:, unit] == 0).all()
        old, new = (snapshot.state[name][moment] for snapshot in (before, after))
        assert (old[:, unit] != 0).all()
        assert (new[:, unit] == 0).all()
        assert torch.equal(new[:, 0], old[:, 0])


def test_bf16_mixed_and_a_compiled_model_are_repaired_alike(make_trainer):
    net, shape, _ = mlp()
    x = torch.randn(N, *shape)
    results = []
    for precision, compiled in (("32-true", False), ("bf16-mixed", False), ("32-true", True)):
        model = Net(copy.deepcopy(net), lr=1e-4)
        if compiled:
            model.net = torch.compile(model.net, backend="eager")
        reviver = DeadUnitReviver()
        run(make_trainer, model, x, reviver, precision=precision)
        results.append((reviver.history, model.state_dict()["net._orig_mod.0.weight" if compiled else "net.0.weight"]))
    assert [history for history, _ in results] == [[(0, "net.1", [2, 5])]] * 3
    for _, weight in results[1:]:
        assert torch.allclose(weight[[2, 5]], results[0][1][[2, 5]], atol=1e-2)


def test_half_the_units_dead_come_back_and_the_loss_is_lower(make_trainer):
    x = torch.rand(256, 1, 4, 4)
    final = {}
    for name in ("without", "with"):
        torch.manual_seed(0)
        model = ae.MLPAutoencoder((1, 4, 4), 8, hidden=(16,), activation="relu", lr=5e-3, loss=ae.SquaredError())
        kill(model.encoder.layers[0], list(range(12)))
        kill(model.decoder.layers[0], list(range(4, 16)))
        reviver = DeadUnitReviver()
        trainer = make_trainer(max_epochs=25, callbacks=[reviver] if name == "with" else [])
        trainer.fit(model, loader(x, 32), loader(x, 64))
        h = model.encoder.layers[:2](x.flatten(1)), model.decoder.layers[:2](model.encode(x))
        dead = torch.cat([(a <= 0).all(0) for a in h]).float().mean().item()
        final[name] = (dead, float(trainer.callback_metrics["val/loss"]))
    assert final["without"][0] >= 0.7
    assert final["with"][0] < 0.1
    assert final["with"][1] < 0.8 * final["without"][1]


def test_what_one_rank_alone_has_seen_counts_on_all():
    """Two ranks take different branches; a stub plays the other one."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.c, self.e = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, branch):
            h = functional.relu(self.b(x))
            return self.c(h) if branch else self.e(functional.relu(torch.cat([h, h])))

    model, sent = Branch(), []

    def broadcast(mine, src):
        if src == len(sent):
            sent.append(copy.deepcopy(mine))
        return copy.deepcopy(sent[src])

    strategy = SimpleNamespace(
        broadcast=broadcast, reduce=lambda flat, reduce_op: flat, root_device=torch.device("cpu")
    )
    for branch in (False, True):  # the second one to gather is rank 1 of two, and hears of both
        evidence = Evidence()
        evidence.open(model)
        model(torch.randn(5, 4), branch)
        evidence.close()
        sums = evidence.gather(SimpleNamespace(world_size=2 if branch else 1, strategy=strategy))
        if not branch:
            shapes = {key: (tuple(value.shape), value.dtype) for key, value in evidence.counters.totals().items()}
            sent.append((evidence.facts, evidence.reused, evidence.mixing, shapes))
    assert {reader.weight for reader in evidence.facts["relu"].readers} == {"c.weight"}
    assert evidence.facts["relu"].unknown_readers
    assert set(evidence.facts) == {"relu", "relu#1"}
    assert {("relu", "fired"), ("relu#1", "fired"), ("c.weight", "active"), ("e.weight", "active")} <= set(sums)


class _Write(L.Callback):
    """Writes what each rank has at the end."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(trainer.global_rank)  # random numbers that differ by rank must not matter

    def on_fit_end(self, trainer, pl_module):
        reviver = next(c for c in trainer.callbacks if isinstance(c, DeadUnitReviver))
        found = {"weights": pl_module.state_dict(), "history": reviver.history, "samples": reviver._samples}
        torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_a_unit_alive_on_one_rank_only_is_alive_and_ranks_stay_equal(make_trainer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # where the spawned processes find this module
    net, _, _ = mlp()
    x = torch.rand(N, 6)
    with torch.no_grad():
        net[0].weight[2] = 0.0
        net[0].weight[2, 0] = 1.0
    val = x.clone()
    val[1::2, 0] = 100.0  # examples of the second rank, on which unit 2 fires
    reviver = DeadUnitReviver()
    trainer = make_trainer(devices=2, strategy="ddp_spawn", max_epochs=2, callbacks=[reviver, _Write(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
        trainer.fit(Net(net, lr=1e-4), loader(x), loader(val))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["history"] == second["history"] == [(0, "net.1", [5])]
    assert first["samples"] == second["samples"] == N
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert first["weights"]["net.0.bias"][5] > -1
    assert first["weights"]["net.0.bias"][2] < -40
