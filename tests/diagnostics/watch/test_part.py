"""Which examples of a large batch are counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ae.diagnostics.watch import Watch
from lightning_ae.diagnostics.watch.activations import FUNCTIONS
from lightning_ae.diagnostics.watch.part import ALL, LEAST_EXAMPLES, MOST_ELEMENTS, part_of
from lightning_ae.diagnostics.watch.site import Event, Site


class TestThePart:
    @pytest.mark.parametrize("shape", [(100, 512), (63, 4096), (31, 10**6), (5,), ()])
    def test_is_all_of_what_is_small_or_has_few_examples(self, shape):
        assert all(part_of(shape, number) is ALL for number in range(50))

    def test_is_all_outside_a_fit(self):
        assert part_of((10**4, 10**4), None) is ALL

    @pytest.mark.parametrize("shape", [(64, 2048), (128, 32, 14, 14), (1000, 700), (999, 10**4)])
    def test_is_no_smaller_than_is_said(self, shape):
        whole = torch.zeros(shape[0])
        for number in range(200):
            counted = len(whole[part_of(shape, number)])
            numbers = counted * torch.Size(shape[1:]).numel()
            assert LEAST_EXAMPLES <= counted < shape[0]
            # half of what is asked for, where k = 2 is the least that leaves anything out
            assert counted <= 2 * LEAST_EXAMPLES + 1 or numbers >= MOST_ELEMENTS / 2

    @pytest.mark.parametrize("every", [1, 2, 4, 5, 8, 25, 50, 64])
    def test_comes_to_every_example_whatever_the_period_of_the_looks(self, every):
        seen = torch.zeros(128)
        for look in range(200):
            seen[part_of((128, 32, 14, 14), every * look)] += 1
        assert seen.min() > 0.5 * seen.mean()

    def test_depends_on_the_step_alone(self):
        state = torch.get_rng_state()
        assert part_of((128, 10**4), 7) == part_of((128, 10**4), 7)
        assert torch.equal(state, torch.get_rng_state())


def _site(name, units, dim, interval=(0.0, float("inf"))):
    return Site(name, FUNCTIONS[getattr(torch, name)], units, dim, None, interval)


class TestAnEvent:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("masked", [False, True])
    def test_counts_the_part_as_a_loop_over_it_does(self, layout, masked):
        y = torch.randn(128, 3, 15, 16).relu().to(memory_format=layout)
        mask = torch.rand(128, 1, 15, 16).gt(0.3).float() if masked else None
        event = Event(_site("relu", 3, -3), None, y, {}, mask, {}, 11)
        chosen = list(range(128))[event.part]
        assert len(chosen) == 64
        counted = torch.ones_like(y) if mask is None else mask.expand_as(y)
        assert event.live().tolist() == [int((y[chosen, u] * counted[chosen, u]).gt(0).sum()) for u in range(3)]
        assert int(event.positions()) == int(counted[chosen, 0].sum())
        assert int(event.examples()) == 64
        want = (y.double() * counted)[chosen].sum((0, 2, 3))
        torch.testing.assert_close(event.magnitude().double(), want, rtol=1e-5, atol=0.0)

    def test_of_units_on_the_first_axis_is_whole(self):
        event = Event(_site("relu", 128, -2), None, torch.ones(128, 2000), {}, None, {}, 3)
        assert event.part is ALL
        assert event.live().tolist() == [2000] * 128


class Ears:
    """Hears of some events alone."""

    def __init__(self, *wanted):
        self.wanted, self.heard = wanted, []

    def hears(self, event):
        return event in self.wanted

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args: self.heard.append(name)


def _step(network, x, *listeners):
    with Watch().open(network, listeners, None, (x,)) as watching:
        nn.functional.mse_loss(network(x), x).backward()
        return list(watching.lineage._made)


class TestAListener:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))

    @pytest.mark.parametrize("event", ["on_activation", "on_gradient", "on_module", "on_loss", "on_entry"])
    def test_is_told_of_what_it_hears_and_of_nothing_else(self, event):
        some = Ears(event)
        _step(self.network, torch.randn(5, 4), some)
        assert set(some.heard) == {event}

    def test_that_does_not_hear_of_losses_has_nothing_followed(self):
        x = torch.randn(5, 4)
        assert _step(self.network, x, Ears("on_activation", "on_gradient", "on_module")) == []
        assert len(_step(self.network, x, Ears("on_activation"), Ears("on_loss"))) == 3
