from __future__ import annotations

import copy
import io
import pickle
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_ae import ContractiveAutoencoder
from lightning_ae.callbacks import DeadReLUMonitor
from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.watch import Event, Site, Watch
from lightning_ae.diagnostics.watch.activations import FUNCTIONS, MODULES
from lightning_ae.diagnostics.watch.counters import Counters, reduce_and_read
from lightning_ae.losses.perceptual import FrozenModule


@pytest.fixture
def look(oracle):
    """Run a model once under a watch, forward and backward, and tell what was heard."""

    def run(model, *inputs, call=None, mask=None, backward=True, **options):
        heard = oracle.Heard()
        watch = Watch(**options)
        with watch.open(model, [heard], mask):
            y = (call or model)(*inputs)
            if backward:
                y.sum().backward()
        heard.watch = watch
        return heard

    return run


@pytest.fixture(autouse=True)
def nothing_left(oracle):
    """Every test must leave torch as it was."""
    assert oracle.traces() == []
    yield
    assert oracle.traces() == []


class Counting(Monitor):
    """Which steps and calls a monitor has heard."""

    prefix = "counting"

    def __init__(self, every_n_steps=1, **options):
        super().__init__(every_n_steps, 10_000, **options)
        self.heard = []

    def on_activation(self, event):
        self.heard.append(("activation", event.site.name, event.z is None))

    def on_gradient(self, site, grad_z, grad_y):
        self.heard.append(("gradient", site.name))

    def on_module(self, name, module, inputs, output):
        self.heard.append(("module", name))

    def on_batch(self, trainer, module, outputs, batch):
        self.heard.append(("batch", outputs is None))

    def on_step(self, trainer, module, optimizer):
        self.heard.append(("step", trainer.global_step))

    def scalars(self):
        return {"calls": float(len(self.heard))}

    def count(self, *what):
        return sum(item[: len(what)] == what for item in self.heard)


# -- what is a site, and what it is called ----------------------------------------------------------------------


class Functions(nn.Module):
    """The same four numbers through a ReLU in every way there is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.layer.weight)
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x):
        ways = [
            functional.relu,
            torch.relu,
            lambda z: functional.relu(z, inplace=True),
            lambda z: z.relu(),
            lambda z: z.relu_(),
            lambda z: torch.relu_(z),
            lambda z: functional.relu(input=z),
            self.inplace,
        ]
        return sum(way(self.layer(x)) for way in ways)


def test_every_way_to_call_a_relu_is_a_site_of_its_own(look):
    x = torch.tensor([[1.0, -1.0], [2.0, -1.0], [-1.0, -3.0]])
    heard = look(Functions(), x)
    assert list(heard.fired) == ["relu", *(f"relu#{i}" for i in range(1, 7)), "inplace"]
    assert all(fired == [2, 0] for fired in heard.fired.values())
    for name, site in heard.sites.items():
        ((grad_z, grad_y),) = heard.gradients[name]
        assert torch.equal(grad_y, torch.ones(3, 2)), name
        assert torch.equal(grad_z, (x > 0).float()), name
        assert (site.units, site.unit_dim, site.origin.weight) == (2, -1, "layer.weight")


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = act = nn.ReLU()
        self.a = nn.Sequential(nn.Linear(1, 1), act, nn.Linear(1, 2), act)
        self.b = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 3), act)})
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        return self.act(self.act(self.last(self.b["inner"](self.a(x)))))


def test_one_relu_in_several_places_is_several_sites_named_by_where_it_is(look):
    heard = look(Shared(), torch.ones(5, 1))
    assert {name: site.units for name, site in heard.sites.items()} == {
        "a.1": 1,
        "a.3": 2,
        "b.inner.1": 3,
        "act": 4,
        "act#1": 4,
    }
    assert heard.calls == dict.fromkeys(heard.sites, 1)


def test_a_block_called_twice_in_a_step_is_counted_together(look):
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.ModuleDict({"block": block})
    heard = look(model, call=lambda: block(torch.ones(3, 2)) + block(torch.ones(4, 2))[:3], backward=False)
    assert heard.calls == {"block.1": 2}
    assert heard.examples == {"block.1": 7}


@pytest.mark.parametrize("module", MODULES)
def test_every_activation_module_is_seen_under_its_own_name(look, module):
    net = nn.Sequential(nn.Linear(3, 3), module())
    net.eval()  # RReLU
    heard = look(net, torch.randn(4, 3))
    assert list(heard.sites) == ["1"]
    assert len(heard.gradients["1"]) == 1
    assert heard.watch.silent(net) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_slopes_are_what_autograd_says(look, function):
    name = FUNCTIONS[function].name
    slope = FUNCTIONS[function].slope
    if slope is None:
        return
    z = torch.linspace(-4, 7, 45).double()
    heard = []

    class Keep:
        def on_activation(self, event):
            heard.append((event.z, event.y, event.options))

        def on_gradient(self, site, grad_z, grad_y):
            heard.append(grad_z / grad_y)

        def on_module(self, *_):
            pass

        on_loss = on_entry = on_pattern = on_module

    model = nn.Linear(1, 1, dtype=torch.float64)
    with Watch().open(model, [Keep()]):
        x = (z * 1.0).requires_grad_()
        y = function((x + 0).view(-1, 1))
        y.sum().backward()
    (overwritten, y, options), ratio = heard
    assert (overwritten is None) == getattr(function, "__name__", "").endswith("_")
    want = x.grad.view(-1, 1)
    got = slope(None if overwritten is None else z.view(-1, 1), y, options)
    kinks = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 6.0])
    smooth = ~torch.isin(z.float().round(decimals=6), kinks).view(-1, 1)
    if name == "softplus":
        smooth &= z.view(-1, 1) < 20
    torch.testing.assert_close(got[smooth], want[smooth], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ratio[smooth], want[smooth], rtol=1e-6, atol=1e-7)


def test_names_are_free_of_what_compilers_and_wrappers_put_into_them(look):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = checkpoint_wrapper(nn.ReLU())
            self.layers = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager")

        def forward(self, x):
            return self.act(self.act(self.layers(x)))

    model = Net()
    with torch.compiler.set_stance("force_eager"):
        heard = look(model, torch.randn(3, 2))
    assert list(heard.sites) == ["layers.1", "act", "act#1"]
    assert heard.sites["layers.1"].origin.weight == "layers.0.weight"
    # a wrapper and what it wraps are one module
    assert sorted(heard.modules) == ["", "act", "act", "layers", "layers.0", "layers.1"]


def test_a_wrapped_model_keeps_its_names(look):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    around = nn.ModuleList([nn.Identity(), model])  # what DDP looks like from inside
    around.forward = lambda x: model(x)
    heard = look(model, torch.randn(3, 2), call=lambda x: around(x))
    assert list(heard.sites) == ["1"]


def test_a_module_made_on_the_spot_is_a_function(look):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(nn.ReLU()(self.layer(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))(x))))

    heard = look(nn.ModuleDict({"net": (net := Net())}), torch.ones(4, 2), call=net)
    assert list(heard.sites) == ["net.relu", "net.relu#1", "net.act"]
    assert heard.sites["net.relu#1"].origin.weight == "net.layer.weight"


def test_an_activation_of_a_weight_is_no_unit(look):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))
            self.gate = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            return torch.relu(x) * functional.softplus(self.scale) * torch.sigmoid(self.gate)

    assert list(look(Net(), torch.ones(2, 3)).sites) == ["relu"]


def test_what_has_lost_its_last_axis_is_one_unit_of_many_examples(look):
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
        layer.bias.zero_()
    model = nn.ModuleList([layer])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    heard = look(model, x, call=lambda x: torch.relu(layer(x).squeeze(-1)))
    assert heard.sites["relu"].units == 1
    assert (heard.fired, heard.examples) == ({"relu": [2]}, {"relu": 3})
    ((grad_z, grad_y),) = heard.gradients["relu"]
    assert grad_z.flatten().tolist() == [1, 0, 1]
    assert grad_z.shape == grad_y.shape == (3, 1)
    # and a number alone is one unit of one example
    assert look(model, x, call=lambda x: torch.relu(layer(x).sum())).examples == {"relu": 1}
    # but a vector that a layer has made has units
    assert look(model, x[0], call=lambda x: torch.relu(layer(x))).sites["relu"].units == 1
    wide = nn.Linear(2, 3)
    heard = look(wide, x[0], call=lambda x: torch.relu(wide(x)))
    assert (heard.sites["relu"].units, heard.examples["relu"]) == (3, 1)


def test_an_unbatched_image_is_one_example(look):
    conv = nn.Conv2d(1, 3, 1)
    heard = look(conv, torch.ones(1, 4, 4), call=lambda x: torch.relu(conv(x)))
    assert (heard.sites["relu"].units, heard.examples["relu"]) == (3, 1)


def test_another_width_in_the_same_place_is_left_out(look):
    act = nn.ReLU()
    model = nn.Sequential(act)
    heard = look(model, call=lambda: model(torch.ones(2, 3)).sum() + model(torch.ones(2, 4)).sum(), backward=False)
    assert heard.fired == {"0": [2, 2, 2]}


# -- which axis ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "between", "dim"),
    [
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h, -1),
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h.transpose(1, 2), -2),
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h.mT, -2),
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h.permute(2, 0, 1), -3),
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h.permute((0, 2, 1)), -2),
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h.reshape(25, 5), -1),
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h.unsqueeze(-1), -2),
        (nn.Linear(5, 5), (5, 5, 5), lambda h: h.mean(1), -1),
        (nn.Linear(5, 5), (5, 5), lambda h: h.view(5, 5, 1, 1), -3),
        (nn.Conv1d(5, 5, 1), (5, 5, 5), lambda h: h, -2),
        (nn.Conv1d(5, 5, 1), (5, 5, 5), lambda h: 0.5 + torch.ones(5, 5) * h, -2),
        (nn.Conv1d(5, 5, 1), (5, 5, 5), lambda h: torch.ones(5, 1) + h.clone().float().contiguous(), -2),
        (nn.Conv1d(5, 5, 1), (5, 5, 5), lambda h: h.transpose(1, 2), -1),
        (nn.Conv1d(5, 5, 1), (5, 5, 5), lambda h: nn.Dropout()(functional.instance_norm(h)), -2),
        (nn.Conv2d(5, 5, 1), (5, 5, 5, 5), lambda h: h, -3),
        (nn.Conv2d(5, 5, 1), (5, 5, 5, 5), lambda h: functional.interpolate(functional.max_pool2d(h, 2), (5, 5)), -3),
        (nn.Conv2d(5, 5, 1), (5, 5, 5, 5), lambda h: h.mean((2, 3)), -1),
        (nn.Conv2d(5, 5, 1), (5, 5, 5, 5), lambda h: functional.adaptive_avg_pool2d(h, 1).flatten(1), -1),
        (nn.Conv2d(5, 5, 1), (5, 5, 5, 5), lambda h: h.permute(0, 2, 3, 1), -1),
        (nn.ConvTranspose2d(5, 5, 1), (5, 5, 5, 5), lambda h: h, -3),
        (nn.Conv3d(5, 5, 1), (5, 5, 5, 5, 5), lambda h: h, -4),
        (nn.Identity(), (5, 5, 5), lambda h: h, -1),
        (nn.Identity(), (5, 5, 5, 5), lambda h: h, -3),
    ],
)  # fmt: skip
def test_the_axis_of_the_units_follows_them(look, layer, shape, between, dim):
    model = nn.ModuleList([layer])
    x = torch.randn(shape, requires_grad=True)
    heard = look(model, x, call=lambda x: torch.relu(between(layer(x))))
    assert heard.sites["relu"].unit_dim == dim


def test_an_axis_that_is_not_there_is_an_error(look, oracle):
    with pytest.raises(ValueError, match="relu has 2 axes, got -3"):
        look(nn.ReLU(), torch.ones(2, 2), call=torch.relu, unit_dim=-3)


# -- what made a site and what reads it ---------------------------------------------------------------------------


def _origin(site):
    return site.origin.weight, site.origin.weight_dim, site.origin.bias, site.origin.norm


def _readers(site):
    return {(r.weight, r.repeat, r.dim) for r in site.readers}, site.unknown_readers


def test_origin_and_readers_of_an_mlp(look):
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(0.1), nn.Linear(3, 4, bias=False), nn.Tanh())
    sites = look(net, torch.randn(5, 2)).sites
    assert _origin(sites["1"]) == ("0.weight", 0, "0.bias", ())
    assert _readers(sites["1"]) == ({("3.weight", 1, 1)}, False)
    assert _origin(sites["4"]) == ("3.weight", 0, None, ())
    assert _readers(sites["4"]) == (set(), False)


def test_origin_and_readers_through_batch_norm(look):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1))
    site = look(net, torch.randn(2, 1, 8, 8)).sites["2"]
    assert _origin(site) == ("0.weight", 0, "0.bias", ("1.weight", "1.bias"))
    assert _readers(site) == ({("4.weight", 1, 1)}, False)


def test_a_flattened_map_is_read_once_for_each_position(look):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, 2))
    assert _readers(look(net, torch.randn(2, 1, 8, 8)).sites["1"]) == ({("3.weight", 36, 1)}, False)


def test_origin_and_readers_of_transposed_convolutions(look):
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.ReLU(), nn.ConvTranspose2d(3, 1, 2))
    site = look(net, torch.randn(2, 2, 4, 4)).sites["1"]
    assert _origin(site) == ("0.weight", 1, "0.bias", ())
    assert _readers(site) == ({("2.weight", 1, 0)}, False)


def test_weights_multiplied_by_hand_are_known(look):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(2, 3))
            self.second = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return torch.relu(x @ self.first + 1) @ self.second

    site = look(Net(), torch.randn(4, 2)).sites["relu"]
    assert _origin(site) == ("first", 1, None, ())
    assert _readers(site) == ({("second", 1, 0)}, False)


def test_two_readers_are_two(look):
    net = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)])

    def call(x):
        h = torch.relu(net[0](x))
        return net[1](h) + net[2](h)

    site = look(net, torch.randn(4, 2), call=call).sites["relu"]
    assert _readers(site) == ({("1.weight", 1, 1), ("2.weight", 1, 1)}, False)


@pytest.mark.parametrize(
    "read",
    [
        lambda h, net: net[1](torch.cat([h, h], 1)[:, :3]),
        lambda h, net: net[1](h + net[0](torch.ones(4, 2))),
        lambda h, net: net[1](net[0](torch.ones(4, 2)) * h),
        lambda h, net: h @ h.T,
        lambda h, net: functional.linear(h, net[1].weight * 2),
        lambda h, net: net[1](h.softmax(1)),
        lambda h, net: net[1](functional.layer_norm(h, (3,))),
        lambda h, net: net[2](h.unsqueeze(1)),  # reads along the units, not across them
        lambda h, net: net[3](h.unsqueeze(-1)),  # in groups
        lambda h, net: net[4](h.unsqueeze(-1)),
        lambda h, net: net[5](h.unsqueeze(-1).expand(4, 3, 3)),  # along the axis beside the units
        lambda h, net: h.view(4, 3, 1).expand(4, 3, 2).reshape(2, 12),
    ],
)
def test_a_reader_that_is_not_understood_is_said_to_be(look, read):
    net = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 1), nn.Conv1d(1, 1, 1), nn.Conv1d(3, 3, 1, groups=3)])
    net.extend([nn.ConvTranspose1d(3, 3, 1, groups=3), nn.Linear(3, 2)])
    site = look(net, torch.randn(4, 2), call=lambda x: read(torch.relu(net[0](x)), net)).sites["relu"]
    assert site.unknown_readers
    assert all(reader.weight == "1.weight" for reader in site.readers)


def test_a_sum_of_two_branches_is_not_put_down_to_one(look):
    net = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)])
    site = look(net, torch.randn(4, 2), call=lambda x: torch.relu(net[0](x) + net[1](x))).sites["relu"]
    assert (site.unit_dim, site.origin.weight, site.origin.bias) == (-1, None, None)


# -- counting -----------------------------------------------------------------------------------------------------


def _relu_site(units, unit_dim):
    return Site("relu", FUNCTIONS[torch.relu], units, unit_dim, None, (0.0, float("inf")))


def test_counts_beyond_what_float32_holds_are_exact():
    counters = Counters()
    fired = torch.tensor([2**24, 2**24 + 1])
    for _ in range(3):
        counters.add("relu", "fired", fired)
    counters.add("relu", "fired", torch.tensor([1, 1]))
    totals = counters.totals()
    want = [3 * 2**24 + 1, 3 * 2**24 + 4]
    assert totals["relu", "fired"].tolist() == want
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in totals.items()}
    for reduce in (None, lambda flat: 3 * flat):  # as if of three ranks
        read = reduce_and_read(totals, shapes, torch.device("cpu"), reduce)["relu", "fired"]
        assert read.dtype == torch.int64
        assert read.tolist() == [w * (1 if reduce is None else 3) for w in want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, -2])
def test_one_call_with_more_positions_than_float32_counts_is_exact(dtype, dim):
    # 2²⁴ + 3 positions would be 2²⁴ + 4 in float32, and 256 in bfloat16; one that does not fire
    y = torch.ones(1, dtype=dtype).expand(2, 2**23 + 2).clone()
    y[1, 5] = 0
    y = y.unsqueeze(dim)
    event = Event(_relu_site(1, dim), None, y, {}, None)
    assert event.live().tolist() == [2**24 + 3]
    assert event.live().dtype == torch.int64
    assert event.positions() == 2**24 + 4


@pytest.mark.parametrize(
    ("shape", "unit_dim"), [((4, 3), -1), ((4, 5, 3), -1), ((4, 3, 5), -2), ((4, 3, 2, 2), -3), ((3, 7), -2)]
)
def test_an_event_counts_as_a_loop_does(shape, unit_dim):
    y = torch.randn(shape).relu()
    event = Event(_relu_site(3, unit_dim), None, y, {}, None)
    units = y.movedim(unit_dim, 0)
    assert event.live().tolist() == [sum(v > 0 for v in units[u].flatten().tolist()) for u in range(3)]
    assert event.positions() == units[0].numel()
    assert event.examples() == (shape[0] if unit_dim + len(shape) > 0 else 1)


def test_sums_roll():
    counters = Counters()
    for value in (1, 10, 100):
        counters.add("a", "n", value)
        assert counters.totals()["a", "n"].item() == value + (value // 10)
        counters.rotate()
    counters.rotate()
    assert counters.totals() == {}


def test_numbers_and_tensors_that_wait_are_in_what_is_read_and_in_no_span_twice():
    counters = Counters()
    for value in (1, 10, 100):
        counters.add("a", "n", value)
        counters.add("b", "n", torch.tensor([value]))
        counters.flush()
    assert counters.spans()[0]["a", "n"].item() == 111
    assert counters.totals()["b", "n"].tolist() == [111]
    counters.add("a", "n", 1000)
    counters.rotate()
    assert counters.spans()[1]["a", "n"].item() == 1111
    assert counters.totals()["a", "n"].item() == 1111


def test_what_is_read_on_the_host_is_a_copy_and_equals_what_goes_through_a_buffer():
    sums = {("a", "n"): torch.tensor([3, 2**40 + 1]), ("a", "x"): torch.tensor(0.1, dtype=torch.float64)}
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in sums.items()}
    plain, buffered = (reduce_and_read(sums, shapes, torch.device("cpu"), how) for how in (None, lambda flat: flat))
    for key in sums:
        assert torch.equal(plain[key], buffered[key])
        assert plain[key].dtype == buffered[key].dtype
    plain["a", "n"] += 1
    assert sums["a", "n"].tolist() == [3, 2**40 + 1]


def test_a_sum_whose_shape_has_changed_begins_again():
    counters = Counters()
    counters.add("a", "n", torch.ones(2, dtype=torch.int64))
    counters.rotate()
    counters.add("a", "n", torch.ones(3, dtype=torch.int64))
    assert counters.totals()["a", "n"].tolist() == [1, 1, 1]
    counters.add("a", "n", torch.ones(2, dtype=torch.int64))
    assert counters.totals()["a", "n"].tolist() == [1, 1]


def test_saved_sums_are_copies():
    counters, saved = Counters(), {("a", "n"): torch.tensor([1])}
    counters.load(saved, {})
    counters.add("a", "n", torch.tensor([5]))
    assert saved["a", "n"].tolist() == [1]
    assert counters.totals()["a", "n"].tolist() == [6]


# -- when it looks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_whole_windows_are_looked_at_and_nothing_in_between(oracle, make_trainer, accumulate):
    inside = []

    class See(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            inside.append((trainer.global_step, module.seen, sorted(set(oracle.traces()))))

    class Model(oracle.Oracle):
        seen = 0

        def training_step(self, batch, batch_idx):
            self.seen = sorted(set(oracle.traces()))
            steps.append((self.trainer.global_step, self.seen))
            return super().training_step(batch, batch_idx)

    steps = []
    monitor = Counting(2)
    make_trainer(callbacks=[monitor, See()], accumulate_grad_batches=accumulate).fit(Model())
    everything = [
        "_global_forward_hooks",
        "_global_forward_hooks_always_called",
        "_global_forward_pre_hooks",
        "mode",
        "stance force_eager",
    ]
    assert [number for number, _ in steps] == [i // accumulate for i in range(8)]
    for number, seen in steps:
        assert seen == (everything if number % 2 == 0 else [])
    looked = sum(number % 2 == 0 for number, _ in steps)
    assert monitor.count("batch") == monitor.count("activation", "encoder.act") == looked
    assert monitor.count("gradient", "encoder.relu") == looked
    windows = -(-8 // accumulate)
    assert [item[1] for item in monitor.heard if item[0] == "step"] == list(range(0, windows, 2))


def test_monitors_with_different_periods_share_a_probe(oracle, make_trainer):
    monitors = [Counting(4), Counting(2), DeadReLUMonitor(3)]
    make_trainer(callbacks=monitors).fit(oracle.Oracle())
    assert [m.count("batch") for m in monitors[:2]] == [2, 4]
    assert monitors[2].num_samples() == dict.fromkeys(oracle.FIRED, 24)


def test_validation_and_sanity_check_are_not_counted(oracle, make_trainer):
    class Model(oracle.Oracle):
        def validation_step(self, batch, batch_idx):
            assert oracle.traces() == []
            self(batch[0])

        def val_dataloader(self):
            return self.train_dataloader()

    monitor = DeadReLUMonitor(1)
    model = Model()
    trainer = make_trainer(callbacks=monitor, num_sanity_val_steps=2, val_check_interval=2)
    trainer.fit(model)
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 64)
    trainer.validate(model, verbose=False)
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 64)


def test_a_second_fit_begins_anew_and_callbacks_may_have_changed(oracle, make_trainer):
    first, second = DeadReLUMonitor(1), DeadReLUMonitor(2)
    trainer = make_trainer(callbacks=[first])
    trainer.fit(oracle.Oracle())
    trainer.fit_loop.epoch_progress.reset()
    trainer.callbacks = [second]
    trainer.fit_loop.max_epochs = 1
    trainer.fit(oracle.Oracle())
    assert first.num_samples() == dict.fromkeys(oracle.FIRED, 64)
    assert second.num_samples() == dict.fromkeys(oracle.FIRED, 32)
    other = make_trainer(callbacks=[first])
    other.fit(oracle.Oracle())
    assert first.num_samples() == dict.fromkeys(oracle.FIRED, 64)


def test_monitors_of_one_trainer_agree_on_axis_and_mask(oracle, make_trainer):
    trainer = make_trainer(callbacks=[DeadReLUMonitor(1, unit_dim=-1), DeadReLUMonitor(2, unit_dim=-2)])
    with pytest.raises(ValueError, match="unit_dim: the monitors of one Trainer share it"):
        trainer.fit(oracle.Oracle())


def test_what_is_never_seen_is_named(oracle, make_trainer):
    model = oracle.Oracle()
    model.unused = nn.Sequential(nn.ReLU())
    with pytest.warns(UserWarning, match=r"The monitors never saw unused\.0 at work"):
        make_trainer(callbacks=DeadReLUMonitor(1)).fit(model)


# -- nothing is left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["training_step", "forward", "backward"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("monitors", [1, 2])
def test_an_exception_leaves_nothing_behind(oracle, make_trainer, where, error, monitors):
    model = oracle.Oracle(raises=(where, 2), error=error)
    callbacks = [Counting(i + 1) for i in range(monitors)]
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, ArithmeticError)):
            make_trainer(callbacks=callbacks).fit(model)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from now on
    assert callbacks[0].count("batch") == 2
    assert oracle.traces() == []
    # and the same monitors and model work again
    model.raises = ("", -1)
    for module in model.modules():
        module._forward_hooks.clear()
    make_trainer(callbacks=callbacks).fit(model)
    assert callbacks[0].count("batch") == 2 + 8


def test_an_exception_that_the_model_catches_does_no_harm(oracle, make_trainer):
    class Model(oracle.Oracle):
        def training_step(self, batch, batch_idx):
            with pytest.raises(RuntimeError):
                self(batch[0][:, :2])
            return super().training_step(batch, batch_idx)

    monitor = Counting()
    make_trainer(callbacks=[monitor, dead := DeadReLUMonitor(1)]).fit(Model())
    assert {site: units.tolist() for site, units in dead.dead_units().items()} == oracle.DEAD
    # what has raised has not returned
    assert monitor.count("module", "encoder") == 8
    assert monitor.count("module", "stem") == 8


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # on purpose
def test_a_step_without_a_loss_and_a_skipped_epoch_are_no_trouble(oracle, make_trainer):
    class Model(oracle.Oracle):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx % 2 else None

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 5 else None

        def on_train_epoch_end(self):
            ends.append(oracle.traces())

    class End(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            ends.append(oracle.traces())

    ends = []
    monitor = Counting()
    make_trainer(callbacks=[monitor, End()], max_epochs=2).fit(Model())
    assert ends == [[]] * 4
    assert monitor.count("batch") == 10
    assert monitor.count("gradient", "encoder.act") == 4


def test_a_mode_that_someone_else_has_entered_stays(oracle):
    class Other(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.ReLU())
    one = torch.ones(1)
    watching = Watch().open(model, [oracle.Heard()])
    with Other() as other:
        watching.close()
        watching.close()
        assert oracle.traces() == ["mode"]
        torch.relu(one)
    assert other.calls == 1


# -- it is not felt -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_are_the_same_to_the_bit_with_and_without_monitors(oracle, make_trainer, precision):
    def fit(callbacks):
        L.seed_everything(3, verbose=False)
        model = oracle.Noisy()
        make_trainer(callbacks=callbacks, precision=precision, max_epochs=3, log_every_n_steps=2).fit(model)
        return model.state_dict()

    without = fit([])
    initial = oracle.Noisy().state_dict()
    assert not torch.equal(initial["head.weight"], without["head.weight"])
    for monitors in ([DeadReLUMonitor(1)], [DeadReLUMonitor(3), Counting(1)]):
        for name, value in fit(monitors).items():
            assert torch.equal(value, without[name]), name


def test_nothing_is_read_from_the_device_while_looking(oracle):
    class Guard(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            assert not (func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool)
            return func(*args, **(kwargs or {}))

    net = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, momentum=0.1), nn.ReLU(), nn.GELU(), nn.Conv1d(3, 2, 1), nn.Hardtanh()
    )
    net[1].num_batches_tracked = None
    monitor = DeadReLUMonitor(1)
    with Guard(), Watch().open(net, [monitor], torch.ones(4, 6)):
        net(torch.randn(4, 2, 6)).sum().backward()
        monitor.on_batch(None, net, None, None)
    assert set(monitor.dead_units()) == {"2", "5"}


class Copying(L.Callback):
    """Copies and saves the model in the middle of a step that is looked at."""

    def __init__(self):
        self.copies = []

    def on_after_backward(self, trainer, module):
        assert torch._C._len_torch_function_stack() == 1
        module_copy = copy.deepcopy(module)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        self.copies += [module_copy, torch.load(file, weights_only=False)]


def test_models_and_monitors_can_be_copied_and_saved_in_the_middle_of_a_step(oracle, make_trainer):
    monitor, copying = DeadReLUMonitor(1), Copying()
    model = oracle.Oracle()
    make_trainer(callbacks=[monitor, copying]).fit(model)
    for copied in (copying.copies[0], copying.copies[1], copy.deepcopy(model)):
        for module in copied.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
        assert torch.equal(copied(oracle.examples()), model(oracle.examples()))
    # a copy that runs is not counted
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 64)
    for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert twin.num_samples() == monitor.num_samples()
        assert {site: units.tolist() for site, units in twin.dead_units().items()} == oracle.DEAD
        twin.counters.clear()
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 64)


def test_a_copy_that_runs_in_a_step_is_not_counted(oracle, make_trainer):
    class Model(oracle.Oracle):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                copy.deepcopy(self.encoder)(batch[0])
            return super().training_step(batch, batch_idx)

    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(Model())
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 64)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")  # what StochasticWeightAveraging is there for
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_works_beside_monitors(oracle, make_trainer, first):
    def fit(averaging, monitors):
        L.seed_everything(3, verbose=False)
        model = oracle.Noisy()
        callbacks = [*monitors, averaging] if first else [averaging, *monitors]
        make_trainer(callbacks=callbacks, max_epochs=4).fit(model)
        return model.state_dict()

    for make in (lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2), lambda: EMAWeightAveraging()):
        plain = fit(make(), [])
        monitor = DeadReLUMonitor(1)
        for name, value in fit(make(), [monitor]).items():
            assert torch.equal(value, plain[name]), name
        assert monitor.num_samples()["net.2"] >= 4 * 64


# -- what is not a pass through the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"num_projections": 2}, {"num_projections": None}, {"hidden": (6,)}])
def test_the_jacobian_penalty_is_not_counted(make_trainer, options):
    monitor = Counting()
    model = ContractiveAutoencoder(4, 3, activation="relu", latent_activation="relu", **options)
    make_trainer(callbacks=[monitor]).fit(model, DataLoader(torch.rand(16, 4), batch_size=8))
    sites = {item[1] for item in monitor.heard if item[0] == "activation"}
    assert len(sites) == 1 + len(options.get("hidden", ())) + (1 if "hidden" in options else 0)
    for site in sites:
        assert monitor.count("activation", site) == 2
        assert monitor.count("gradient", site) == 2
    assert monitor.count("module", "encoder") == 2


def test_derivatives_by_torch_func_are_not_counted(oracle, make_trainer):
    class Model(oracle.Oracle):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            jacobian = torch.func.vmap(torch.func.jacrev(self.encoder))(x)
            _, tangent = torch.func.jvp(self.encoder, (x,), (torch.ones_like(x),))
            return super().training_step(batch, batch_idx) + jacobian.sum() + tangent.sum()

    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(Model())
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 64)


def test_a_gradient_penalty_is_not_taken_for_the_backward_pass(oracle, make_trainer):
    class Model(oracle.Oracle):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            y = self(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return y.square().mean() + slope.square().sum()

    monitor = Counting()
    make_trainer(callbacks=[monitor]).fit(Model())
    assert monitor.count("activation", "encoder.relu") == 8
    # the node of the forward pass hears the loss's gradient; the penalty's goes through the node of its own
    assert monitor.count("gradient", "encoder.relu") == 8


class Score(Metric):
    """A metric with a network inside."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, x):
        self.total += self.network(x).sum().detach()

    def compute(self):
        return self.total


@pytest.mark.parametrize("call", ["forward", "update"])
def test_frozen_networks_and_metrics_are_not_counted(oracle, make_trainer, call):
    class Model(oracle.Oracle):
        def __init__(self):
            super().__init__()
            self.frozen = FrozenModule(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
            self.score = Score(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

        def training_step(self, batch, batch_idx):
            (x,) = batch
            self.score(x) if call == "forward" else self.score.update(x)
            return super().training_step(batch, batch_idx) + self.frozen(x).sum()

    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(Model())  # and nothing is said to be silent
    assert set(monitor.sites) == set(oracle.FIRED)


# -- activation checkpointing ---------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A function and a module, the function twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)
        self.act = nn.ReLU()

    def forward(self, x):
        return torch.sigmoid(torch.sigmoid(self.act(self.second(functional.relu(self.first(x))))))


class Checkpointed(nn.Module):
    """Two blocks, the one checkpointed as it is, the other as a function."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.block, self.last = Inner(), nn.Linear(3, 2)
        self.out = nn.ReLU()

    def end(self, h):
        return functional.relu(self.out(self.last(h)))

    def forward(self, x):
        if self.reentrant is None:
            return self.end(self.block(x))
        return checkpoint(
            self.end, checkpoint(self.block, x, use_reentrant=self.reentrant), use_reentrant=self.reentrant
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_run_again_is_counted_once_and_its_gradients_are_heard(look, reentrant):
    model = nn.ModuleDict({"part": Checkpointed(reentrant)})
    plain = nn.ModuleDict({"part": Checkpointed(None)})
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 2, requires_grad=True)
    # twice in one step: what is run again in the first must not change the names in the second
    heard, want = (look(m, x, call=lambda x, m=m: _twice(m["part"], x), backward=False) for m in (model, plain))
    assert heard.fired == want.fired
    assert heard.calls == want.calls == dict.fromkeys(want.calls, 2)
    # a function that is run again without a module around it is not heard
    unheard = {"part.relu"} if reentrant else set()
    assert heard.gradients.keys() == want.gradients.keys() - unheard
    for site, pairs in heard.gradients.items():
        for (a, b), (c, d) in zip(pairs, want.gradients[site], strict=True):
            torch.testing.assert_close(a, c)
            torch.testing.assert_close(b, d)


def _twice(part, x):
    part(x).sum().backward()
    part(x).sum().backward()


def test_blocks_that_run_again_last_first_are_told_apart(look):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
            self.act = nn.ReLU()

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(lambda h, layer=layer: self.act(layer(h)), x, use_reentrant=True)
            return x

    net = nn.Sequential(Net())
    with torch.no_grad():
        for layer in net[0].layers:
            nn.init.eye_(layer.weight)
            layer.weight.mul_(2)
            layer.bias.fill_(0.25)
    heard = look(net, torch.rand(4, 3, requires_grad=True))
    # weights of 2 make the gradient double with each layer
    sizes = {site: pairs[0][1].unique().tolist() for site, pairs in heard.gradients.items()}
    assert sizes == {"0.act": [4.0], "0.act#1": [2.0], "0.act#2": [1.0]}


def test_an_interrupt_while_running_again_leaves_nothing(oracle):
    def fail(*_):
        if torch._C._current_graph_task_id() != -1:
            raise KeyboardInterrupt

    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net[1].register_forward_hook(fail)
    x = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(KeyboardInterrupt), Watch().open(net, [oracle.Heard()]):
        checkpoint(net, x, use_reentrant=True).sum().backward()
    assert oracle.traces() == []
