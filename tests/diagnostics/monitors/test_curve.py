"""Figures of each look, by step."""

from __future__ import annotations

import pytest
import torch

from lightning_ae.diagnostics.monitors.curve import Curve


@pytest.fixture
def curve():
    curve = Curve()
    for step in range(1000):
        curve.add("loss", 3 * step, torch.tensor(float(step)))
    curve.add("other", 5, torch.tensor([[2.0]]))
    return curve


def test_reads_what_was_added(curve):
    steps, values = curve.read("loss")
    assert steps == list(range(0, 3000, 3))
    assert values == [float(step) for step in range(1000)]
    assert curve.read("other") == ([5], [2.0])
    assert curve.read("nothing") == ([], [])


def test_few_tensors_however_long_the_run():
    curve, most = Curve(), 0
    for step in range(5000):
        curve.add("loss", step, torch.tensor(1.0))
        most = max(most, len(curve._values["loss"]))
    assert most < 250
    assert len(curve.read("loss")[1]) == 5000


def test_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    curve = Curve()
    curve.add("loss", 0, 2 * weight)
    assert not any(value.requires_grad for value in curve._values["loss"])


def test_state_goes_round(curve):
    state = curve.state()
    assert all(isinstance(row["values"], torch.Tensor) for row in state.values())
    again = Curve()
    again.add("gone", 0, torch.tensor(1.0))
    again.load(state)
    for name in ("loss", "other", "gone"):
        assert again.read(name) == (curve.read(name) if name != "gone" else ([], []))
    again.add("loss", 3000, torch.tensor(7.0))
    assert again.read("loss")[1][-1] == 7
    assert len(curve.read("loss")[1]) == 1000  # neither changes with the other


def test_what_is_not_finite_stays_so():
    curve = Curve()
    for value in (float("nan"), float("inf"), 1.0):
        curve.add("loss", 0, torch.tensor(value))
    first, second, third = curve.read("loss")[1]
    assert first != first
    assert (second, third) == (float("inf"), 1.0)


def test_mean_over_ranks_replaces_each_number(curve):
    curve.reduce(["loss"], lambda values: values + 1)
    assert curve.read("loss")[1] == [step + 1.0 for step in range(1000)]
    assert curve.read("other") == ([5], [2.0])
    assert curve.read("loss")[0] == list(range(0, 3000, 3))


def test_clear(curve):
    curve.clear()
    assert curve.read("loss") == ([], [])
    assert curve.state() == {}
