"""Sums of the later part of a run, against an oracle that keeps every look."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ae.callbacks import DeadReLUMonitor, GradientSaturationMonitor
from lightning_ae.diagnostics import DiagnosticsReport
from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.watch.part import part_of


class Chosen(Monitor):
    """Adds numbers that the test chooses, one for each look."""

    prefix = "chosen"

    def __init__(self, numbers, horizon=10**9):
        super().__init__(1, horizon)
        self.numbers = numbers

    def scalars(self):
        return {}

    def look(self, number, samples=1):
        value = self.numbers[number]
        self.counters.add("a", "sum", torch.tensor(value), torch.float64)
        self.counters.add("a", "vector", torch.tensor([value, -value]), torch.float64)
        self.counters.add("a", "count", 1)
        self.counters.add("", "samples", samples)
        self.counters.flush()
        self.after_look()

    def log(self):
        self.take(self.results(), keep=False)


def numbers(n):
    return [float(v) for v in torch.randint(-1000, 1000, (n,))]


def spans_that_end(values, total):
    """All sums of the last looks, by how many they are."""
    return {k: sum(values[total - k : total]) for k in range(1, total + 1)}


class TestLateResults:
    @pytest.mark.parametrize("looks", [1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 100, 191])
    def test_are_the_sums_of_the_last_third_to_two_thirds(self, looks):
        values = numbers(looks)
        monitor = Chosen(values)
        for number in range(looks):
            monitor.look(number)
        found = monitor.late_results()
        last = int(found["a", "count"])
        assert float(found["a", "sum"]) == pytest.approx(spans_that_end(values, looks)[last])
        assert found["a", "vector"].tolist() == pytest.approx(
            [sum(values[looks - last :]), -sum(values[looks - last :])]
        )
        assert int(found["", "samples"]) == last
        if looks >= 6:
            assert looks / 3 <= last <= 2 * looks / 3 + 1
        else:
            assert last >= min(looks, 2)

    @pytest.mark.parametrize("horizon", [5, 8, 20])
    @pytest.mark.parametrize("every", [1, 3, 7])
    def test_across_the_rotation_of_the_horizon(self, horizon, every):
        """At any time they are the sum of the last looks, of some number of them."""
        values = numbers(120)
        monitor = Chosen(values, horizon)
        for number in range(120):
            monitor.look(number)
            if number % every == every - 1:
                monitor.log()
            found = monitor.late_results()
            last = int(found["a", "count"])
            assert 1 <= last <= number + 1
            assert last <= int(monitor.counters.totals()["a", "count"])
            assert float(found["a", "sum"]) == pytest.approx(spans_that_end(values, number + 1)[last])
            assert int(found["", "samples"]) == last

    def test_are_read_anew_after_another_look(self):
        monitor = Chosen([1.0] * 8)
        for number in range(7):
            monitor.look(number)
        before = int(monitor.late_results()["a", "count"])
        monitor.look(7)
        after = int(monitor.late_results()["a", "count"])
        assert (before, after) == (3, 4)

    @pytest.mark.parametrize("horizon", [10, 10**6])
    @pytest.mark.parametrize("at", [5, 17, 40])
    def test_go_on_after_a_checkpoint(self, horizon, at):
        values = numbers(60)
        whole, part = Chosen(values, horizon), Chosen(values, horizon)
        for number in range(60):
            whole.look(number)
            part.look(number)
            for monitor in (whole, part):
                if number % 4 == 3:
                    monitor.log()
            if number == at:
                state = part.state_dict()
                part = Chosen(values, horizon)
                part.load_state_dict(state)
        a, b = whole.late_results(), part.late_results()
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key].tolist() == pytest.approx(value.tolist())
        first = {key: value.tolist() for key, value in part.first_results().items()}
        assert first["a", "sum"] == values[0]

    def test_a_view_rests_on_them_and_leaves_the_monitor_alone(self):
        values = numbers(30)
        monitor = Chosen(values)
        for number in range(30):
            monitor.look(number)
        assert int(monitor.late().results()["a", "count"]) == int(monitor.late_results()["a", "count"]) < 30
        assert int(monitor.results()["a", "count"]) == 30


class TestFirstResults:
    def test_are_those_of_the_first_look(self):
        values = numbers(50)
        monitor = Chosen(values, horizon=5)
        for number in range(50):
            monitor.look(number)
            monitor.log()
            assert float(monitor.first_results()["a", "sum"]) == values[0]
            assert int(monitor.first_results()["a", "count"]) == 1

    def test_there_are_none_before_it(self):
        assert Chosen([]).first_results() == {}
        assert Chosen([]).late_results() == {}


class TestUnderATrainer:
    def test_counts_looks_and_begins_anew_with_each_fit(self, make_trainer):
        class Counted(Chosen):
            def on_batch(self, trainer, module, outputs, batch):
                self.counters.add("a", "step", torch.tensor(float(trainer.global_step)), torch.float64)
                self.counters.add("a", "count", 1)

        monitor = Counted([])
        for _ in range(2):
            trainer = make_trainer(callbacks=monitor, limit_train_batches=20, limit_val_batches=0)
            trainer.fit(BoringModel())
            found = monitor.late_results()
            last = int(found["a", "count"])
            assert 20 / 3 <= last <= 40 / 3
            # on_batch comes after the step, whose number then is one higher
            assert float(found["a", "step"]) == sum(range(21 - last, 21))
            assert float(monitor.first_results()["a", "step"]) == 1

    def test_batches_that_accumulate_are_one_look(self, make_trainer):
        class Counted(Chosen):
            looks = 0

            def after_look(self):
                super().after_look()
                self.looks += 1

        monitor = Counted([])
        trainer = make_trainer(
            callbacks=monitor, limit_train_batches=12, limit_val_batches=0, accumulate_grad_batches=4
        )
        trainer.fit(BoringModel())
        assert monitor.looks == 3
        assert int(monitor.results()["", "samples"]) == 12


class Wide(L.LightningModule):
    """A layer so wide that a part of the batch is counted; keeps what it gave and the gradients there."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 2048), nn.ReLU(), nn.Linear(2048, 2))
        with torch.no_grad():
            self.net[0].bias[5] = -1000.0  # never fires
        self.kept = []

    def training_step(self, batch):
        z = self.net[0](batch[0])
        y = self.net[1](z)
        z.retain_grad()
        y.retain_grad()
        self.kept.append((z, y))
        return self.net[2](y).square().mean()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(5 * 128, 3, generator=generator)), batch_size=128)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class TestOfALargeBatch:
    def test_a_part_is_counted_and_that_is_what_is_said(self, make_trainer):
        torch.manual_seed(0)
        model, dead, saturation = Wide(), DeadReLUMonitor(1), GradientSaturationMonitor(1)
        make_trainer(callbacks=[dead, saturation]).fit(model)
        parts = [part_of(y.shape, step) for step, (_, y) in enumerate(model.kept)]
        assert len(parts) == 5
        seen = torch.cat([y.detach()[part] for part, (_, y) in zip(parts, model.kept, strict=True)])
        assert dead.num_samples() == {"net.1": len(seen)} == {"net.1": 160}
        fired = seen.gt(0).sum(0)
        assert torch.equal((dead.firing_frequency()["net.1"] * len(seen)).round().long(), fired)
        assert torch.equal(dead.dead_units()["net.1"], fired.eq(0).nonzero().flatten())
        assert 5 in dead.dead_units()["net.1"]
        squares = [
            sum(t.grad[part].double().square().sum() for part, t in zip(parts, kept, strict=True))
            for kept in zip(*model.kept, strict=True)
        ]
        want = (squares[0] / squares[1]).sqrt().item()
        assert saturation.transmission()["net.1"] == pytest.approx(want, rel=1e-5)
        assert saturation.saturated_fraction()["net.1"] == 1 - fired.sum().item() / seen.numel()

    def test_weights_are_the_same_to_the_bit(self, make_trainer):
        weights = []
        for callbacks in ([], [DiagnosticsReport(every_n_steps=1, quiet=True)]):
            torch.manual_seed(0)
            model = Wide()
            make_trainer(callbacks=callbacks).fit(model)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(*weights)


class TestTheName:
    def test_under_which_it_is_saved_follows_its_settings_until_a_fit_begins(self, make_trainer):
        monitor = DeadReLUMonitor(3)
        assert monitor.state_key == DeadReLUMonitor(3).state_key
        monitor.every_n_steps = 2
        assert monitor.state_key == DeadReLUMonitor(2).state_key
        make_trainer(callbacks=monitor).fit(Wide())
        monitor.every_n_steps = 1
        make_trainer(callbacks=monitor).fit(Wide())
        assert monitor.state_key == DeadReLUMonitor(1).state_key
