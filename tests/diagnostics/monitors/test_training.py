"""What trains, seen from outside: planted faults in the wiring of optimizers, and healthy runs."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_ae.diagnostics.monitors.training import Held, TrainingMonitor


class Parts(L.LightningModule):
    """Two parts in a row, and one that never runs."""

    def __init__(self, detach=False, optimizer=None):
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(2, 2)
        self.detach = detach
        self.optimizer = optimizer or (lambda module: torch.optim.SGD(module.parameters(), 0.1))

    def loss(self, batch):
        h = self.first(batch[0]).tanh()
        return functional.mse_loss(self.second(h.detach() if self.detach else h), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.optimizer(self)


class Forgetful(Parts):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


class Manual(Parts):
    """Optimizes by hand; gradients are zeroed before every ``zero``-th step, 0 for never."""

    def __init__(self, zero):
        super().__init__()
        self.zero, self.automatic_optimization = zero, False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if self.zero and batch_idx % self.zero == 0:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Adversarial(L.LightningModule):
    """Two parts, each with an optimizer of its own, which take turns."""

    def __init__(self, zero=True, toggle=True):
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(2, 4), nn.Linear(4, 1)
        self.zero, self.toggle = zero, toggle

    def turn(self, optimizer, loss):
        if self.toggle:
            self.toggle_optimizer(optimizer)
        if self.zero:
            optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch, batch_idx):
        makes, judges = self.optimizers()
        x = batch[0]
        one, loss = torch.ones(len(x), 1), functional.binary_cross_entropy_with_logits

        def judged():
            made = self.maker(torch.randn(len(x), 2)).detach()
            return loss(self.judge(x), one) + loss(self.judge(made), 0 * one)

        self.turn(judges, judged)
        self.turn(makes, lambda: loss(self.judge(self.maker(torch.randn(len(x), 2))), one))

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.maker, self.judge)]


@pytest.fixture
def fit(make_trainer):
    def run(module, steps=20, every=1, **options):
        x = torch.randn(8 * steps, 4)
        data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        monitor = TrainingMonitor(every)
        trainer = make_trainer(callbacks=monitor, **options)
        trainer.fit(module, torch.utils.data.DataLoader(data, 8))
        return monitor

    return run


class TestWhoIsHeld:
    def test_all_parts(self, fit):
        monitor = fit(Parts())
        names = {f"{part}.{kind}" for part in ("first", "second", "spare") for kind in ("weight", "bias")}
        assert monitor.held == names == set(monitor.sizes)
        assert monitor.sizes["first.weight"] == 32
        assert monitor.frozen == set()
        assert monitor.ran == {"first", "second"}
        assert monitor.unchanged == {"spare.weight", "spare.bias"}
        assert monitor.total_steps == 20
        # what never runs gets no gradient, in any step
        assert {n for n, k in monitor.without_gradient.items() if k == monitor.steps_of[n]} == monitor.unchanged

    def test_one_that_is_frozen(self, fit):
        module = Parts()
        module.first.requires_grad_(False)
        monitor = fit(module)
        assert monitor.frozen == {"first.weight", "first.bias"}
        assert monitor.unchanged >= monitor.frozen

    def test_one_that_was_forgotten(self, fit):
        monitor = fit(Parts(optimizer=lambda module: torch.optim.SGD(module.second.parameters(), 0.1)))
        assert monitor.held == {"second.weight", "second.bias"}
        assert not monitor.unchanged & monitor.held
        assert not monitor.piles_up()  # of gradients that nobody holds

    def test_one_that_is_detached(self, fit):
        monitor = fit(Parts(detach=True))
        for name in ("first.weight", "first.bias"):
            assert monitor.without_gradient[name] == monitor.steps_of[name] == 20
        assert "second.weight" not in monitor.without_gradient

    def test_one_that_rests_in_evaluation_mode(self, fit):
        class Resting(Parts):
            def on_train_epoch_start(self):
                self.first.eval()

        assert fit(Resting()).resting == {"first"}


class TestPilesUp:
    @pytest.mark.parametrize("make", [Forgetful, lambda: Manual(0), lambda: Adversarial(zero=False)])
    def test_gradients_that_are_never_zeroed(self, fit, make):
        assert fit(make()).piles_up()
        assert fit(make(), steps=60, every=3).piles_up()

    @pytest.mark.parametrize("make", [Parts, lambda: Manual(1), lambda: Manual(4)])
    def test_gradients_that_are(self, fit, make):
        assert not fit(make()).piles_up()

    @pytest.mark.parametrize("toggle", [True, False])
    def test_two_optimizers_that_take_turns(self, fit, toggle):
        monitor = fit(Adversarial(toggle=toggle))
        assert monitor.results()["leftover", "looks"].tolist() == [20, 20]
        assert monitor.results()["leftover", "found"].tolist() == [0, 0]
        assert not monitor.piles_up()

    def test_an_optimizer_is_counted_where_it_steps(self, fit):
        """A judge that steps in each batch, and a maker in every fourth: it may gather gradients meanwhile."""

        class Seldom(Adversarial):
            def turn(self, optimizer, loss):
                if optimizer is self.optimizers()[1] or self.at % 4 == 3:
                    super().turn(optimizer, loss)

            def training_step(self, batch, batch_idx):
                self.at = batch_idx
                super().training_step(batch, batch_idx)

        for zero in (True, False):
            monitor = fit(Seldom(zero))
            looks, found = (monitor.results()["leftover", name].tolist() for name in ("looks", "found"))
            assert looks == [5, 20]
            assert found == ([0, 0] if zero else [4, 19])  # at the first there is nothing that could be left
            assert monitor.piles_up() == (not zero)

    def test_only_one_of_two_is_never_zeroed(self, fit):
        class Half(Adversarial):
            def turn(self, optimizer, loss):
                self.zero = optimizer is self.optimizers()[0]
                super().turn(optimizer, loss)

        monitor = fit(Half())
        assert monitor.results()["leftover", "looks"].tolist() == [20, 20]
        assert monitor.results()["leftover", "found"].tolist() == [0, 19]
        assert monitor.piles_up()

    def test_accumulation_on_purpose(self, fit):
        monitor = fit(Parts(), steps=80, accumulate_grad_batches=4)
        assert monitor.total_steps == 20
        assert not monitor.piles_up()

    def test_a_short_run_says_nothing(self, fit):
        assert not fit(Forgetful(), steps=3).piles_up()


class TestState:
    def test_what_is_known_goes_round(self, fit):
        monitor = fit(Parts(detach=True))
        other = TrainingMonitor(1)
        other.load_state_dict(copy.deepcopy(monitor.state_dict()))
        for name in ("held", "ran", "resting", "without_gradient", "steps_of", "settings"):
            assert getattr(other, name) == getattr(monitor, name)
        assert other.held
        assert other.settings == [Held("SGD", 0.1, 0.0, 0.0, False, False)]
        assert other.without_gradient["first.weight"] == 20
        assert other.results()["leftover", "looks"].tolist() == [20]

    def test_a_teacher_that_runs_without_gradients_has_not_run(self, fit):
        class Student(Parts):
            def loss(self, batch):
                with torch.no_grad():
                    target = self.spare(batch[0][:, :2])
                return functional.mse_loss(self.second(self.first(batch[0]).tanh()), target[:, :1])

        assert fit(Student()).ran == {"first", "second"}


class TestSettings:
    @pytest.mark.parametrize(
        ("make", "expected", "share"),
        [
            (
                lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
                Held("SGD", 0.1, 0.9, 0.01, False, False),
                0.1 * 0.01 / (1 - 0.9),
            ),
            (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01), Held("SGD", 0.1, 0.0, 0.01, False, False), 1e-3),
            (
                lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.5),
                Held("AdamW", 1e-3, 0.0, 0.5, True, True),
                5e-4,
            ),
            (lambda p: torch.optim.Adam(p, 1e-3), Held("Adam", 1e-3, 0.0, 0.0, False, True), 0.0),
            (
                lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], 1e-2, weight_decay=0.1, momentum=0.9),
                Held("Muon", 1e-2, 0.9, 0.1, True, False),
                1e-3,
            ),
        ],
    )
    def test_of_an_optimizer(self, fit, make, expected, share):
        monitor = fit(Parts(optimizer=lambda module: make(module.parameters())), steps=4)
        assert monitor.settings == [expected]
        assert monitor.shrinkage[0] == pytest.approx(share)
        assert monitor.shrinkage[1] == expected.weight_decay
        assert monitor.lr == expected.lr

    def test_a_schedule_is_seen_by_its_largest_rate(self, fit):
        def optimizer(module):
            sgd = torch.optim.SGD(module.parameters(), 1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.01 * (step + 1) if step < 5 else 0.001)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        monitor = fit(Parts(optimizer=optimizer))
        assert len(monitor.settings) == 1
        assert monitor.lr == pytest.approx(0.05)

    @pytest.mark.parametrize("decoupled", ["AdamW", "Muon", False])
    def test_share_of_a_weight_that_the_decay_takes_in_a_step(self, decoupled):
        weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
        if decoupled == "Muon":
            optimizer, held = (
                torch.optim.Muon([weight], 1e-3, weight_decay=0.1),
                Held("Muon", 1e-3, 0.95, 0.1, True, False),
            )
        elif decoupled:
            optimizer, held = (
                torch.optim.AdamW([weight], 1e-3, weight_decay=0.1),
                Held("AdamW", 1e-3, 0.0, 0.1, True, True),
            )
        else:
            optimizer = torch.optim.SGD([weight], 1e-3, momentum=0.9, weight_decay=0.1)
            held = Held("SGD", 1e-3, 0.9, 0.1, False, False)
        for _ in range(1000):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        assert held.shrinkage == pytest.approx(1 - weight.item() ** 1e-3, rel=0.05)
