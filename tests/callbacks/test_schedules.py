"""Schedules set any number of a model at its step, go on after a resume, and say what would go wrong in silence."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
import warnings
from typing import NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lightning_ae as ae
from lightning_ae.cli import main

# Lightning 2.6 reloads a checkpoint that was saved in the middle of an epoch for loaders without state, and says so
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")


class Part(nn.Module):
    """A module with a number of each kind."""

    def __init__(self):
        super().__init__()
        self.beta = 1.0
        self.count = 3
        self.unused = 1.0
        self.nothing = None
        self.flag = True
        self.name = "part"
        self.trained = nn.Parameter(torch.tensor(1.0))
        self._hidden = 1.0
        self.register_buffer("gamma", torch.tensor(1.0))
        self.register_buffer("vector", torch.ones(2))
        self.register_buffer("steps", torch.tensor(0))

    @property
    def fixed(self):
        return 1.0

    @property
    def settable(self):
        return self._hidden

    @settable.setter
    def settable(self, value):
        self._hidden = value


class Pair(NamedTuple):
    a: float


class Toy(L.LightningModule):
    """Reads all of its numbers and writes down what they were."""

    def __init__(self, read=None):
        super().__init__()
        self.part = Part()
        self.parts = nn.ModuleDict({"first": Part(), "second": Part()})
        self.layers = nn.ModuleList([Part()])
        self.weights = {"a": 1.0, "b": 1.0, 3: 1.0}
        self.nested = {"own": 1.0, "inner": {"a": 1.0, "b": 1.0}, "more": [1.0, 1.0]}
        self.levels = [1.0, 1.0]
        self.pair = Pair(1.0)
        self.fixed_levels = (1.0, 1.0)
        self.theta = nn.Parameter(torch.ones(2))
        self.read = read or (lambda model: model.part.beta)
        self.seen: list[tuple[int, float]] = []
        self.validated: list[tuple[int, float]] = []

    def training_step(self, batch, batch_idx):
        value = self.read(self)
        self.seen.append((self.trainer.global_step, float(value)))
        return (value * self.theta * batch.mean()).sum()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.global_step, float(self.read(self))))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(n: int = 12):
    return torch.utils.data.DataLoader(torch.ones(n, 2), batch_size=2)


def fit(make_trainer, schedules, model=None, n=12, val=None, **options):
    model = Toy() if model is None else model
    trainer = make_trainer(callbacks=schedules, **options)
    trainer.fit(model, loader(n), val)
    return model


def of_schedules(caught):
    """Our own of the warnings that were caught; some of Lightning's that are ignored elsewhere are there, too."""
    return [str(w.message) for w in caught if "Schedule(" in str(w.message)]


# -- the curves -----------------------------------------------------------------------------------------------


def test_a_line_is_torchs_linear_schedule():
    theirs = torch.optim.lr_scheduler.LinearLR(
        optimizer := torch.optim.SGD([torch.zeros(1)], 2.0), start_factor=0.25, end_factor=1.0, total_iters=7
    )
    ours = ae.LinearSchedule("beta", 0.5, 2.0, duration=7)
    for step in range(12):
        assert ours.value(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_half_a_cosine_is_torchs_annealing():
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer := torch.optim.SGD([torch.zeros(1)], 2.0), T_max=7, eta_min=0.5
    )
    ours = ae.CosineSchedule("beta", 2.0, 0.5, begin=3, duration=7)
    assert [ours.value(step) for step in range(4)] == [2.0] * 4
    for step in range(3, 11):
        assert ours.value(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert ours.value(100) == 0.5


def frange_cycle_linear(n_iter, start=0.0, stop=1.0, n_cycle=4, ratio=0.5):
    """As https://github.com/haofuml/cyclical_annealing publishes it."""
    curve = np.ones(n_iter) * stop
    period = n_iter / n_cycle
    step = (stop - start) / (period * ratio)
    for c in range(n_cycle):
        v, i = start, 0
        while v <= stop and (int(i + c * period) < n_iter):
            curve[int(i + c * period)] = v
            v += step
            i += 1
    return curve


@pytest.mark.parametrize(("total", "cycles", "ramp"), [(40, 4, 0.5), (64, 2, 0.25), (24, 3, 1.0), (16, 1, 0.5)])
def test_cycles_are_those_that_their_authors_publish(total, cycles, ramp):
    ours = ae.CyclicalSchedule("beta", 0.0, 1.0, duration=total, cycles=cycles, ramp=ramp)
    theirs = frange_cycle_linear(total, n_cycle=cycles, ratio=ramp)
    np.testing.assert_allclose([ours.value(step) for step in range(total)], theirs, atol=1e-12)
    assert ours.value(total) == ours.value(total + 99) == 1.0


def test_cycles_that_do_not_divide_the_duration_follow_the_papers_equation():
    ours = ae.CyclicalSchedule("beta", 1.0, 3.0, begin=5, duration=10, cycles=3, ramp=0.5)
    tau = [(t % 4) / (10 / 3) for t in range(10)]
    expected = [1 + 2 * min(x / 0.5, 1) for x in tau]
    np.testing.assert_allclose([ours.value(5 + t) for t in range(10)], expected)


def test_whole_numbers_are_rounded():
    ours = ae.LinearSchedule("k", 32, 8, duration=5, whole=True)
    assert [ours.value(t) for t in range(6)] == [32, 27, 22, 18, 13, 8]
    assert all(isinstance(ours.value(t), int) for t in range(6))
    assert all(isinstance(ae.LinearSchedule("k", 32, 8, duration=5).value(t), float) for t in range(6))


def test_fractions_are_of_the_run():
    assert ae.LinearSchedule("b", 0, 1).span(80) == (0, 80)
    assert ae.LinearSchedule("b", 0, 1, begin=0.25, duration=0.5).span(80) == (20, 60)
    assert ae.LinearSchedule("b", 0, 1, begin=10, duration=0.5).span(80) == (10, 50)
    assert ae.LinearSchedule("b", 0, 1, begin=0.5, duration=3).span(80) == (40, 43)
    assert ae.LinearSchedule("b", 0, 1, begin=0.3, duration=0.7).span(5) == (2, 5)  # not 2 + 4
    assert ae.LinearSchedule("b", 0, 1, duration=0.01).span(5) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attribute": 3}, TypeError, "attribute: expected a str, got a int"),
        ({"attribute": "a..b"}, ValueError, "attribute: expected a dotted path, got 'a..b'"),
        ({"start": None}, TypeError, "start: expected a finite number, got None"),
        ({"end": True}, TypeError, "end: expected a finite number, got True"),
        ({"end": math.inf}, ValueError, "end: expected a finite number"),
        ({"begin": -1}, ValueError, "begin: expected steps >= 0"),
        ({"begin": 1.0}, ValueError, r"begin: expected steps >= 0 .* got 1\.0"),
        ({"duration": 0}, ValueError, "duration: expected steps >= 1"),
        ({"duration": 1.5}, ValueError, r"fraction in \(0, 1\].* got 1\.5"),
        ({"cycles": 0}, ValueError, "cycles: expected a positive whole number, got 0"),
        ({"ramp": 0.0}, ValueError, r"ramp: expected a number in \(0, 1\], got 0\.0"),
    ],
)
def test_errors_at_the_door(arguments, error, message):
    with pytest.raises(error, match=message):
        ae.CyclicalSchedule(**{"attribute": "beta", "start": 0.0, "end": 1.0, **arguments})


# -- when -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_step_has_its_value_from_its_first_batch_on(make_trainer, accumulate):
    schedule = ae.LinearSchedule("part.beta", 0.0, 1.0, begin=1, duration=4)
    model = fit(make_trainer, schedule, max_epochs=2, accumulate_grad_batches=accumulate)
    steps = 12 // accumulate
    curve = np.interp(np.arange(steps), [1, 5], [0.0, 1.0])
    assert model.seen == [(t, pytest.approx(curve[t])) for t in range(steps) for _ in range(accumulate)]
    assert model.part.beta == 1.0


def test_a_fraction_knows_of_epochs_accumulation_and_limits(make_trainer):
    schedule = ae.LinearSchedule("part.beta", 0.0, 1.0)
    model = fit(make_trainer, schedule, max_epochs=3, accumulate_grad_batches=2, limit_train_batches=5)
    assert [value for _, value in model.seen] == pytest.approx(
        [t / 9 for t in [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8]]
    )


def test_validation_takes_the_value_of_the_step_before_it(make_trainer):
    schedule = ae.LinearSchedule("part.beta", 0.0, 1.0, duration=12)
    model = fit(make_trainer, schedule, max_epochs=2, val=loader(2), val_check_interval=3)
    assert model.validated == [(3, 2 / 12), (6, 5 / 12), (9, 8 / 12), (12, 11 / 12)]


def test_the_sanity_check_has_the_first_value(make_trainer):
    class Sanity(Toy):
        checked = ()

        def validation_step(self, batch, batch_idx):
            self.checked += (self.part.beta,)

    schedule = ae.LinearSchedule("part.beta", 0.25, 1.0)
    model = fit(make_trainer, schedule, Sanity(), max_steps=2, val=loader(2))
    assert model.checked[0] == 0.25


def test_with_manual_optimization_batches_count(make_trainer):
    class Manual(Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(loss, retain_graph=True)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD([self.theta], 0.0) for _ in range(2)]

    model = fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0), Manual())
    assert [value for _, value in model.seen] == pytest.approx([t / 6 for t in range(6)])


def test_what_another_callback_puts_back_is_set_again(make_trainer):
    class Swap(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            pl_module.part.beta = 99.0

    schedule = ae.LinearSchedule("part.beta", 0.0, 1.0, duration=2)
    model = fit(make_trainer, [schedule, Swap()], max_epochs=2, val=loader(2), val_check_interval=3)
    assert [value for _, value in model.seen] == [0.0, 0.5] + [1.0] * 10


@pytest.mark.parametrize("path", ["levels.0", "weights.a", "parts.first.beta"])
def test_other_containers_of_a_checkpoint_are_found(make_trainer, path):
    class Reload(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.levels, pl_module.weights = list(pl_module.levels), dict(pl_module.weights)
            pl_module.parts["first"] = Part()

    model = Toy(lambda m: {"levels.0": m.levels[0], "weights.a": m.weights["a"]}.get(path, m.parts["first"].beta))
    fit(make_trainer, [ae.LinearSchedule(path, 0.0, 1.0), Reload()], model, max_epochs=2)
    assert [value for _, value in model.seen] == pytest.approx([t / 12 for t in range(12)])


def test_a_fraction_of_an_endless_run_is_an_error(make_trainer):
    message = r"LinearSchedule\('part.beta'\) is in fractions of the run \(1.0\), whose length is unknown"
    with pytest.raises(ValueError, match=message):
        fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0), max_epochs=-1)


def test_the_same_schedule_serves_a_second_run(make_trainer):
    schedule = ae.LinearSchedule("part.beta", 0.0, 1.0)
    first, second = (fit(make_trainer, schedule, max_epochs=epochs) for epochs in (1, 2))
    assert [value for _, value in first.seen] == [t / 6 for t in range(6)]
    assert [value for _, value in second.seen] == [t / 12 for t in range(12)]


def test_a_run_without_a_batch_is_no_error(make_trainer):
    schedule = ae.LinearSchedule("part.beta", 0.0, 1.0)
    assert fit(make_trainer, schedule, limit_train_batches=0, max_epochs=1).seen == []


# -- what -----------------------------------------------------------------------------------------------------

PLACES = {
    "part.beta": lambda m: m.part.beta,
    "model.part.beta": lambda m: m.part.beta,
    "parts.first.beta": lambda m: m.parts["first"].beta,
    "parts.second.beta": lambda m: m.parts["second"].beta,
    "layers.0.beta": lambda m: m.layers[0].beta,
    "weights.a": lambda m: m.weights["a"],
    "weights.3": lambda m: m.weights[3],
    "nested.inner.a": lambda m: m.nested["inner"]["a"],
    "nested.more.1": lambda m: m.nested["more"][1],
    "levels.0": lambda m: sum(m.levels) - 1,
    "part.gamma": lambda m: m.part.gamma,
    "part.settable": lambda m: m.part._hidden,
}


@pytest.mark.parametrize("path", PLACES)
def test_numbers_are_set_wherever_they_are(make_trainer, path):
    model = fit(make_trainer, ae.LinearSchedule(path, 0.0, 1.0, duration=4), Toy(PLACES[path]))
    assert [value for _, value in model.seen] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert type(model.weights) is type(model.nested["inner"]) is dict
    assert type(model.levels) is list


def test_a_buffer_stays_the_buffer_it_was(make_trainer):
    model = Toy(PLACES["part.gamma"])
    buffer = model.part.gamma
    fit(make_trainer, ae.LinearSchedule("part.gamma", 0.0, 3.0, duration=4), model)
    assert model.part.gamma is buffer
    assert model.state_dict()["part.gamma"] == 3.0


def test_compiled_parts_and_models_that_are_called_model_are_found(make_trainer):
    model = Toy(lambda m: m.part.beta)
    part = model.part
    model.part = torch.compile(part, backend="eager")
    fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0, duration=4), model)
    assert part.beta == 1.0
    assert [value for _, value in model.seen][1] == 0.25
    model.part = checkpoint_wrapper(part)  # sets attributes on itself
    fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 2.0, duration=4), model)
    assert part.beta == 2.0
    model = Toy(lambda m: m.model.beta)
    model.model = Part()
    fit(make_trainer, ae.LinearSchedule("model.beta", 0.0, 1.0, duration=4), model)
    assert [value for _, value in model.seen][1] == 0.25


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("beta", ValueError, "Toy has no 'beta'; near it are 'part.beta', 'parts.first.beta', 'parts.second.beta'"),
        ("part.bta", ValueError, "Toy has no 'part.bta'; near it are 'part.beta'"),
        ("weights.c", ValueError, "Toy has no 'weights.c'.*'weights.a'"),
        ("levels.2", ValueError, "Toy has no 'levels.2'.*'levels.0'"),
        ("part.beta.more", ValueError, "Toy has no 'part.beta.more'"),
        ("part.nothing", ValueError, "'part.nothing' of Part is None: give it a number first"),
        ("part.flag", TypeError, "'part.flag' of Part: expected a number, got True of type bool"),
        ("part.name", TypeError, "'part.name' of Part: expected a number, got 'part' of type str"),
        ("part.trained", TypeError, "'part.trained' of Part is trained: a schedule would fight the optimizer"),
        ("part.vector", TypeError, r"expected a number or a tensor without dimensions, got a tensor \(2,\)"),
        ("part.steps", TypeError, "expected a floating-point tensor, got torch.int64; or take whole=True"),
        ("part.fixed", TypeError, "'part.fixed' of Part cannot be set"),
        ("pair.a", TypeError, "'pair.a' of Pair cannot be set"),
        ("fixed_levels.0", TypeError, "'fixed_levels.0' of tuple cannot be set"),
        ("part", TypeError, "'part' of Toy: expected a number, got Part"),
    ],
)
def test_what_cannot_be_scheduled_is_an_error_before_training(make_trainer, path, error, message):
    model = Toy()
    with pytest.raises(error, match=message):
        fit(make_trainer, ae.LinearSchedule(path, 0.0, 1.0, duration=4), model)
    assert not model.seen


def test_two_schedules_of_one_number_are_an_error(make_trainer):
    schedules = [
        ae.LinearSchedule("part.beta", 0.0, 1.0, duration=4),
        ae.CosineSchedule("model.part.beta", 0.0, 1.0, duration=4),
    ]
    message = r"'model.part.beta' has two schedules, LinearSchedule\('part.beta'\) and CosineSchedule"
    with pytest.raises(ValueError, match=message):
        fit(make_trainer, schedules)


def test_state_keys_are_distinct():
    keys = {ae.LinearSchedule(path, 0.0, 1.0).state_key for path in ("a", "b")}
    assert len(keys | {ae.CosineSchedule("a", 0.0, 1.0).state_key}) == 3


# -- what goes wrong in silence -------------------------------------------------------------------------------


def test_a_run_that_ends_too_early_is_warned_of(make_trainer):
    message = r"the run ends at step 6, before the schedule does at 10: it will reach 0\.5 instead of 1"
    with pytest.warns(UserWarning, match=message) as caught:
        model = fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0, duration=10))
    assert model.part.beta == 0.5
    assert len(of_schedules(caught)) == 1


def test_a_fraction_that_overshoots_the_run_is_warned_of(make_trainer):
    with pytest.warns(UserWarning, match="the run ends at step 6, before the schedule does at 9"):
        fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0, begin=0.5, duration=1.0))


def test_a_run_that_stops_by_itself_is_warned_of(make_trainer):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 2

    message = r"the run has ended at step 3, before the schedule did at 12: it has reached 0\.16.* instead of 1"
    with pytest.warns(UserWarning, match=message):
        fit(make_trainer, [ae.LinearSchedule("part.beta", 0.0, 1.0), Stop()], max_epochs=2)


def test_a_dry_run_is_not_warned_of(make_trainer):
    model = fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0, duration=10), fast_dev_run=True)
    assert len(model.seen) == 1


UNREAD = {
    "part.unused": "Part",
    "parts.second.beta": "Part",
    "weights.b": "dict",
    "nested.inner.b": "dict",
    "levels.1": "list",
    "nested.more.0": "list",
    "part.gamma": "Part",
}


@pytest.mark.parametrize("path", UNREAD)
def test_a_number_that_nothing_reads_is_warned_of(make_trainer, path):
    # another number of the same kind is read: nested.inner.a, weights.a
    model = Toy(lambda m: m.part.beta * m.weights["a"] * m.nested["inner"]["a"] * m.parts["first"].beta)
    with pytest.warns(UserWarning, match=f"nothing read it in 6 steps of training.*{UNREAD[path]}") as caught:
        fit(make_trainer, ae.LinearSchedule(path, 0.0, 1.0, duration=4), model)
    assert len(of_schedules(caught)) == 1
    assert type(model.weights) is type(model.nested["inner"]) is dict
    assert Part.__getattribute__ is nn.Module.__getattribute__


@pytest.mark.parametrize(
    "read",
    [
        lambda m: dict(m.weights)["a"],
        lambda m: {**m.weights}["a"],
        lambda m: m.weights.copy()["a"],
        lambda m: m.weights.get("a"),
        lambda m: sum(m.weights.values()) / 3,
        lambda m: next(iter(m.weights.items()))[1],
        lambda m: ({"a": 7.0} | m.weights)["a"],
        lambda m: (m.weights | {"b": 7.0})["a"],
        lambda m: next(m.weights[name] for name in m.weights),
        lambda m: 0.0 if m.weights["a"] == 0 else m.weights["a"],
    ],
)
def test_however_a_dict_is_read_it_is_seen(make_trainer, read):
    model = Toy(read)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_trainer, ae.LinearSchedule("weights.a", 0.0, 1.0, duration=4), model)
    assert of_schedules(caught) == []
    assert model.weights["a"] == 1.0


def test_each_model_is_looked_at(make_trainer):
    schedule = ae.LinearSchedule("part.unused", 0.0, 1.0, duration=4)
    fit(make_trainer, schedule, Toy(lambda m: m.part.unused))
    with pytest.warns(UserWarning, match="nothing read it"):
        fit(make_trainer, schedule)


def test_several_schedules_are_watched_together(make_trainer):
    schedules = [
        ae.LinearSchedule(path, 0.0, 1.0, duration=4)
        for path in ("weights.a", "weights.b", "part.beta", "part.unused", "nested.own", "nested.inner.a", "levels.0")
    ]
    model = Toy(lambda m: m.weights["a"] + m.part.beta + m.nested["inner"]["a"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_trainer, schedules, model)
    unread = [message.partition(":")[0] for message in of_schedules(caught) if "nothing read it" in message]
    assert unread == [f"LinearSchedule({path!r})" for path in ("weights.b", "part.unused", "nested.own", "levels.0")]
    assert [value for _, value in model.seen][:3] == [0.0, 0.75, 1.5]
    assert model.weights == {"a": 1.0, "b": 1.0, 3: 1.0}
    assert model.nested == {"own": 1.0, "inner": {"a": 1.0, "b": 1.0}, "more": [1.0, 1.0]}


def test_it_is_looked_at_when_the_schedule_begins(make_trainer):
    late = Toy(lambda m: m.part.beta if m.trainer.global_step >= 3 else 1.0)
    fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0, begin=3, duration=2), late)
    early = Toy(lambda m: m.part.beta if m.trainer.global_step < 3 else 1.0)
    with pytest.warns(UserWarning, match="nothing read it"):
        fit(make_trainer, ae.LinearSchedule("part.beta", 0.0, 1.0, begin=3, duration=2), early)


def test_a_number_that_is_read_after_the_step_or_only_from_a_later_one_on_is_read(make_trainer):
    pair = ae.mlp_pair(2, 2, (4,))
    model = ae.VectorQuantizedAutoencoder(*pair, code=ae.VectorQuantizerCode(8, 2))  # after two batches of 4
    schedules = [ae.LinearSchedule(f"code.{name}", 0.1, 0.9, duration=4) for name in ("decay", "expire", "commitment")]
    data = ae.TensorDataModule(torch.randn(24, 2), batch_size=4, val_fraction=0)
    make_trainer(callbacks=schedules).fit(model, data)  # a warning is an error
    assert model.code.started
    assert [model.code.decay, model.code.expire, model.code.commitment] == [0.9, 0.9, 0.9]
    assert ae.VectorQuantizerCode.__getattribute__ is nn.Module.__getattribute__


def test_with_accumulation_all_batches_of_a_step_are_watched(make_trainer):
    model = Toy(lambda m: m.part.beta if m.trainer.fit_loop.epoch_loop.batch_progress.current.ready % 3 == 0 else 1.0)
    trainer = make_trainer(accumulate_grad_batches=3, callbacks=ae.LinearSchedule("part.beta", 0.0, 1.0, duration=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(12))
    assert of_schedules(caught) == []
    assert [value for step, value in model.seen] == [1.0, 1.0, 0.0, 1.0, 1.0, 0.5]


def test_cycles_too_short_to_rise_are_warned_of(make_trainer):
    with pytest.warns(UserWarning, match="4 cycles in 6 steps have no time to rise from 0"):
        fit(make_trainer, ae.CyclicalSchedule("part.beta", 0.0, 1.0, duration=6), Toy(lambda m: m.part.beta))


def test_a_weight_that_a_target_replaces_is_warned_of(make_trainer):
    code = ae.L1Code(0.1, "relu", target_l0=3.0)
    model = ae.SparseAutoencoder(*ae.mlp_pair(2, 6), code=code)
    with pytest.warns(UserWarning, match="this attribute of L1Code that the loss depends on"):
        fit(make_trainer, ae.LinearSchedule("code.weight", 0.0, 1.0, duration=2), model, n=8)


class Spoil(L.Callback):
    """Looks at the model from within the batch that is watched."""

    def __init__(self, act):
        self.act = act

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 0:
            self.act(pl_module)


def test_watched_models_are_copied_and_saved_as_ever(make_trainer):
    found = {}

    def act(model):
        assert type(model.part) is Part
        found["copy"] = copy.deepcopy({"part": model.part, "weights": model.weights})
        found["pickle"] = pickle.loads(pickle.dumps(model.weights))
        torch.save({"weights": model.weights}, file := io.BytesIO())
        file.seek(0)
        found["file"] = torch.load(file, weights_only=True)["weights"]
        model.weights["b"] = 5.0  # a change in the middle stays

    schedules = [ae.LinearSchedule(path, 0.5, 1.0, duration=4) for path in ("weights.a", "part.beta")]
    model = Toy(lambda m: m.weights["a"] + m.part.beta)
    weights = model.weights
    fit(make_trainer, [*schedules, Spoil(act)], model)
    assert found["pickle"] == found["file"] == found["copy"]["weights"] == {"a": 0.5, "b": 1.0, 3: 1.0}
    assert model.weights is weights
    assert weights == {"a": 1.0, "b": 5.0, 3: 1.0}


def test_an_exception_leaves_nothing_behind(make_trainer, oracle):
    def act(model):
        raise RuntimeError("in the middle")

    class Own(Part):
        def __getattribute__(self, name):
            return 7.0 if name == "seven" else super().__getattribute__(name)

    own = Own.__getattribute__
    model = Toy(lambda m: m.weights["a"] + m.part.beta)
    model.part = Own()
    schedules = [ae.LinearSchedule(path, 0.5, 1.0, duration=4) for path in ("weights.a", "part.beta")]
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(make_trainer, [*schedules, Spoil(act)], model)
    assert type(model.weights) is dict
    assert Own.__getattribute__ is own
    assert model.part.seven == 7.0
    assert "__getattribute__" not in vars(Part)
    assert oracle.traces() == []


# -- logged ---------------------------------------------------------------------------------------------------


def test_values_are_logged_at_their_steps(make_trainer, tmp_path):
    schedules = [ae.LinearSchedule("part.beta", 0.0, 1.0, duration=4), ae.CosineSchedule("weights.a", 2.0, 0.0)]
    model = Toy(lambda m: m.part.beta + m.weights["a"])
    trainer = make_trainer(callbacks=schedules, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(model, loader())
    rows = np.genfromtxt(f"{trainer.logger.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
    assert rows["step"].tolist() == [1, 3, 5]
    np.testing.assert_allclose(rows["schedule/part.beta"], [0.25, 0.75, 1.0])
    np.testing.assert_allclose(rows["schedule/weights.a"], 1 + np.cos(np.pi * np.array([1, 3, 5]) / 6))
    assert trainer.callback_metrics["schedule/part.beta"] == 1.0


def test_checkpoints_can_be_named_and_chosen_by_it(make_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="schedule/part.beta", mode="max", filename="{schedule/part.beta:.2f}")
    schedule = ae.LinearSchedule("part.beta", 0.0, 1.0, duration=8)
    fit(make_trainer, [schedule, keep], max_epochs=2, val=loader(2), enable_checkpointing=True)
    assert keep.best_model_score == 1.0


# -- resumed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path, stop):
    """In the middle of an epoch, with two batches to a step: the same weights, bit by bit, and the same values."""

    def run(max_steps, path=None):
        L.seed_everything(0, verbose=False)
        code = ae.L1Code(0.7, "relu")
        model = ae.SparseAutoencoder(*ae.mlp_pair(8, 6, hidden=(7,)), code=code, lr=0.01)
        data = ae.TensorDataModule(torch.rand(40, 8), batch_size=4, val_fraction=0.0)
        seen = []

        class See(L.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                seen.append((trainer.global_step, pl_module.code.weight))

        trainer = make_trainer(
            max_epochs=-1,
            max_steps=max_steps,
            accumulate_grad_batches=2,
            callbacks=[
                ae.CosineSchedule("code.weight", 0.0, 2.0, begin=2, duration=7),
                See(),
                ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}"),
            ],
            enable_checkpointing=True,
        )
        trainer.fit(model, data, ckpt_path=path)
        return model, seen

    whole, seen = run(11)
    path = tmp_path / f"step={stop}.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]["code._extra_state"]["weight"]
    assert saved == seen[stop - 1][1]  # what the last step had, not what the next is to have
    resumed, seen_after = run(11, path)
    assert seen_after == seen[stop:]
    assert [step for step, _ in seen] == list(range(11))
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name])
    assert resumed.code.weight == whole.code.weight == 2.0


# -- compiled -------------------------------------------------------------------------------------------------


class Scaled(ae.SparseAutoencoder):
    """A list and an attribute of the model's own in the objective."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.levels = [1.0, 1.0]
        self.gain = 1.0
        self.register_buffer("temper", torch.tensor(1.0))

    def objective(self, terms):
        return super().objective(terms) * self.levels[0] * self.gain * self.temper


PATHS = ["code.weight", "loss.weights.a", "levels.0", "gain", "temper"]


def train(make_trainer, compiled, schedules, steps=12, model=None, **options):
    torch._dynamo.reset()
    counters.clear()
    L.seed_everything(0, verbose=False)
    loss = ae.WeightedLoss({"a": ae.SquaredError(), "b": ae.SquaredError()})
    model = Scaled(*ae.mlp_pair(8, 6), code=ae.L1Code(0.1, "relu"), loss=loss, lr=0.01) if model is None else model
    data = ae.TensorDataModule(torch.rand(4 * steps, 8), batch_size=4, val_fraction=0.0)
    trainer = make_trainer(callbacks=schedules, **options)
    trainer.fit(torch.compile(model, **compiled) if compiled else model, data)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_compiles_once_more_and_trains_the_same(make_trainer, backend, oracle):
    def schedules():
        return [
            ae.LinearSchedule(PATHS[0], 0.0, 1.0, begin=2, duration=6),
            ae.CosineSchedule(PATHS[1], 1.0, 3.0, duration=9),
            ae.CyclicalSchedule(PATHS[2], 0.0, 1.0, cycles=3),
            ae.LinearSchedule(PATHS[3], 0.5, 1.0),
            ae.LinearSchedule(PATHS[4], 1.0, 2.0),
        ]

    options = {"backend": backend, "fullgraph": True}
    eager = train(make_trainer, None, schedules())
    compiled = train(make_trainer, options, schedules())
    assert counters["stats"]["unique_graphs"] == 2
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6)
    constant = train(make_trainer, None, [])
    assert any(not torch.allclose(constant[name], value, atol=1e-3) for name, value in eager.items())
    assert oracle.traces() == []


@pytest.mark.parametrize("path", PATHS)
def test_a_number_that_changes_each_step_costs_one_compilation(make_trainer, path):
    train(make_trainer, {"backend": "aot_eager", "fullgraph": True}, ae.LinearSchedule(path, 0.1, 0.9), steps=16)
    # a buffer is an input of the graph to begin with
    assert counters["stats"]["unique_graphs"] == (1 if path == "temper" else 2)


@pytest.mark.parametrize("schedule_first", [True, False])
def test_schedules_and_monitors_share_the_eager_batch(make_trainer, schedule_first, oracle):
    callbacks = [ae.LinearSchedule("code.weight", 0.1, 0.9), ae.DeadReLUMonitor(every_n_steps=5)]
    train(make_trainer, {"backend": "aot_eager"}, callbacks if schedule_first else callbacks[::-1], steps=13)
    assert oracle.traces() == []
    assert counters["stats"]["unique_graphs"] >= 1


def test_a_batch_after_an_exception_is_compiled_again(make_trainer, oracle):
    class Boom(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            raise KeyError("boom")

    monitors = [ae.DeadReLUMonitor(every_n_steps=1), ae.LinearSchedule("code.weight", 0.1, 0.9), Boom()]
    with pytest.raises(KeyError, match="boom"):
        train(make_trainer, {"backend": "aot_eager"}, monitors)
    assert oracle.traces() == []


# -- elsewhere ------------------------------------------------------------------------------------------------


class _Write(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        seen = {"seen": self.seen, "metric": trainer.callback_metrics["schedule/code.weight"]}
        torch.save(seen, self.folder / f"{trainer.global_rank}.pt")

    def on_train_start(self, trainer, pl_module):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(pl_module.code.weight)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_all_ranks_have_the_same_value(make_trainer, tmp_path):
    model = ae.SparseAutoencoder(*ae.mlp_pair(8, 6), code=ae.L1Code(0.1, "relu"))
    data = ae.TensorDataModule(torch.rand(32, 8), batch_size=4, val_fraction=0.0)
    schedule = ae.LinearSchedule("code.weight", 0.0, 1.0)
    trainer = make_trainer(
        devices=2,
        strategy="ddp_spawn",
        accumulate_grad_batches=2,
        max_epochs=2,
        log_every_n_steps=1,
        callbacks=[schedule, _Write(tmp_path)],
    )
    trainer.fit(model, data)
    for rank in range(2):  # 4 batches to a rank, 2 steps an epoch
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["seen"] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
        assert result["metric"] == 0.75


CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 4
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_ae.LinearSchedule
      init_args: {attribute: code.weight, start: 0, end: 1.5, duration: 2}
    - class_path: lightning_ae.CyclicalSchedule
      init_args: {attribute: lr, start: 0.0, end: 1.0, begin: 0.5, duration: 0.5, cycles: 2}
model:
  class_path: SparseAutoencoder
  init_args:
    encoder: {class_path: lightning_ae.MLPEncoder, init_args: {in_shape: 64, latent_dim: 4}}
    decoder: {class_path: lightning_ae.MLPDecoder, init_args: {out_shape: 64, latent_dim: 4}}
    code: {class_path: lightning_ae.L1Code, init_args: {weight: 0.1}}
data:
  class_path: DigitsDataModule
  init_args: {flat: true}
"""


def test_schedules_come_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ae"])
    (tmp_path / "config.yaml").write_text(CONFIG)
    # the learning rate was read when the optimizer was made
    unread = pytest.warns(UserWarning, match=r"CyclicalSchedule\('lr'\): it was set and nothing read it")
    short = pytest.warns(
        UserWarning, match=r"CyclicalSchedule\('lr'\): 2 cycles in 2 steps have no time to rise from 0"
    )
    with unread, short:
        trained = main(["fit", "-c", "config.yaml"])
    linear, cyclical = (c for c in trained.trainer.callbacks if "Schedule" in type(c).__name__)
    assert (linear.duration, type(linear.duration)) == (2, int)
    assert (cyclical.begin, cyclical.duration) == (0.5, 0.5)
    assert trained.model.code.weight == 1.5
