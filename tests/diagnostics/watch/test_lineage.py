"""Which tensors of a step are data, and through which functions others have come."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_ae.diagnostics.watch import Watch
from lightning_ae.diagnostics.watch.lineage import Lineage


class Deaf:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def opened():
    """Opens a watch on a network and a batch; its lineage is alive meanwhile."""
    still_open = []

    def open_watch(network, batch):
        still_open.append(Watch().open(network, [Deaf()], None, batch))
        return still_open[-1].lineage

    yield open_watch
    for watching in still_open:
        watching.close()


class TestIsData:
    @pytest.mark.parametrize(
        "wrap", [lambda x, y: (x, y), lambda x, y: {"a": [x], "b": {"c": y}}, lambda x, y: [x, (y,)]]
    )
    def test_what_is_of_the_batch_or_made_of_it(self, opened, wrap):
        x, y = torch.randn(4, 6), torch.randn(4, 2)
        lineage = opened(nn.Linear(6, 2), wrap(x, y))
        scaled, part, halves = (x - 1) / 2, x[:, :3], x.chunk(2, 1)
        noisy, joined, flat = x + torch.randn_like(x), torch.cat([x, x], 1), x.flatten()
        for tensor in (x, y, scaled, part, *halves, noisy, joined, flat, x.view(2, 12), y.float(), y.argmax(1)):
            assert lineage.is_data(tensor)

    def test_what_is_not(self, opened):
        network, x = nn.Linear(6, 2), torch.randn(4, 6)
        lineage = opened(network, (x,))
        made, own = network(x), torch.ones(4, 6)
        with torch.no_grad():
            bare = network.weight * 2
        for tensor in (made, made + x[:, :2], own, network.weight, bare, 3.0, None):
            assert not lineage.is_data(tensor)

    def test_what_is_drawn_or_filled_in_its_shape_is_not(self, opened):
        x = torch.randn(4, 6)
        lineage = opened(nn.Linear(6, 2), (x,))
        for like in (
            torch.randn_like(x),
            torch.rand_like(x),
            torch.randint_like(x, 3),
            torch.zeros_like(x),
            torch.ones_like(x),
            torch.full_like(x, 2.0),
        ):
            assert not lineage.is_data(like)
            assert lineage.is_data(x + like)

    def test_sparse_tensors(self, opened):
        x, graph = torch.randn(4, 6), torch.eye(4).to_sparse()
        lineage = opened(nn.Linear(6, 2), (x,))
        assert not lineage.is_data(graph)
        assert lineage.is_data(torch.sparse.mm(graph, x))
        assert lineage.of(graph) == []

    def test_nothing_after_it_is_closed(self):
        x = torch.randn(4, 6)
        watching = Watch().open(nn.Linear(6, 2), [Deaf()], None, (x,))
        assert watching.lineage.is_data(x)
        watching.close()
        assert not watching.lineage.is_data(x)


def names(path):
    return [made.name for made in path]


class TestPath:
    def test_back_to_the_last_layer(self, opened):
        network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        x = torch.randn(8, 6)
        lineage = opened(network, (x,))
        y = network(x).softmax(1)
        path = lineage.of(y)
        assert names(path) == ["softmax", "dropout", "batch_norm", "layer"]
        assert (path[0].width, path[1].rate, path[3].frame) == (4, 0.3, "2")
        assert torch.equal(path[3].weight, network[2].weight)
        assert names(lineage.of(path[3].source)) == ["relu", "layer"]

    def test_another_shape_is_the_same_tensor(self, opened):
        network, x = nn.Linear(6, 4), torch.randn(8, 6)
        lineage = opened(network, (x,))
        y = network(x).sigmoid().view(8, 2, 2).flatten(1)
        assert names(lineage.of(y)) == ["sigmoid", "layer"]

    def test_a_gap(self, opened):
        network, x = nn.Linear(6, 4), torch.randn(8, 6)
        lineage = opened(network, (x,))
        assert names(lineage.of(network(x).sigmoid().cos().log())) == ["log"]
        assert lineage.of(torch.randn(3)) == []

    @pytest.mark.parametrize("dim", [0, 1])
    def test_over_how_many_a_softmax_normalises(self, opened, dim):
        x = torch.randn(8, 6)
        network = nn.Linear(6, 4)
        lineage = opened(network, (x,))
        for soft in (network(x).softmax(dim), functional.softmax(network(x), dim=dim), nn.Softmax(dim)(network(x))):
            assert lineage.of(soft)[0].width == (8, 4)[dim]

    def test_a_dropout_in_evaluation_drops_nothing(self, opened):
        network, x = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).eval(), torch.randn(8, 6)
        lineage = opened(network, (x,))
        assert lineage.of(network(x))[0].rate == 0

    def test_groups_of_a_convolution(self, opened):
        network, x = nn.Conv2d(4, 4, 3, groups=2), torch.randn(2, 4, 8, 8)
        lineage = opened(network, (x,))
        assert lineage.of(network(x))[0].groups == 2

    @pytest.mark.parametrize(
        ("layer", "name"),
        [
            (nn.BatchNorm1d(4), "batch_norm"),
            (nn.LayerNorm(4), "norm"),
            (nn.GroupNorm(2, 4), "norm"),
        ],
    )
    def test_normalisations_over_examples_and_within_one_are_told_apart(self, opened, layer, name):
        network, x = nn.Sequential(nn.Linear(6, 4), layer), torch.randn(8, 6)
        lineage = opened(network, (x,))
        assert names(lineage.of(network(x))) == [name, "layer"]

    @pytest.mark.parametrize("memory", [2, 8])
    def test_as_far_back_as_it_remembers(self, memory):
        network, x = nn.Sequential(nn.Linear(6, 6), *[nn.Tanh() for _ in range(5)]), torch.randn(8, 6)
        lineage, at = Lineage((x,), memory=memory), x
        for module in network:
            source, at = at, module(at)
            func = functional.linear if module is network[0] else torch.tanh
            lineage.called(func, (source, network[0].weight) if module is network[0] else (source,), {}, at, "")
        assert names(lineage.of(at)) == (["tanh"] * 5 + ["layer"])[:memory]


class TestProbability:
    def test_what_a_logarithm_is_of(self, opened):
        network, x = nn.Linear(6, 4), torch.randn(8, 6)
        lineage = opened(network, (x,))
        p = network(x).softmax(1)
        for log in (p.log(), torch.log(p), torch.log(p + 1e-9), p.clamp(1e-9, 1).log(), (p / 1.0).log()):
            found = lineage.probability(log)
            assert found is not None
            torch.testing.assert_close(found, p.detach())

    def test_no_logarithm(self, opened):
        network, x = nn.Linear(6, 4), torch.randn(8, 6)
        lineage = opened(network, (x,))
        assert lineage.probability(network(x)) is None
        assert lineage.probability(network(x).softmax(1)) is None


class TestSister:
    def test_the_other_of_two_layers_on_one_input(self, opened):
        one, two, x = nn.Linear(6, 3), nn.Linear(6, 3), torch.randn(8, 6)
        lineage = opened(nn.ModuleList([one, two]), (x,))
        a, b = one(x), two(x)
        assert torch.equal(lineage.sister(b), a)
        assert torch.equal(lineage.sister(a), b)

    def test_the_other_half_of_one(self, opened):
        network, x = nn.Linear(6, 8), torch.randn(8, 6)
        lineage = opened(network, (x,))
        a, b = network(x).chunk(2, 1)
        assert torch.equal(lineage.sister(b), a)
        assert torch.equal(lineage.sister(a), b)

    def test_none(self, opened):
        one, two, x = nn.Linear(6, 3), nn.Linear(6, 4), torch.randn(8, 6)
        lineage = opened(nn.ModuleList([one, two]), (x,))
        a, _ = one(x), two(x)
        assert lineage.sister(a) is None
        assert lineage.sister(torch.randn(8, 3)) is None
