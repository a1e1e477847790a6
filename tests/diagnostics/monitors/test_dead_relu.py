from __future__ import annotations

import csv
import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_ae.callbacks import DeadReLUMonitor
from lightning_ae.data.loader import TensorLoader
from lightning_ae.data.order import EpochOrder

COMPILED = {
    "off": lambda model: model,
    "whole": lambda model: torch.compile(model, backend="eager"),
    "submodule": lambda model: _with(model, encoder=torch.compile(model.encoder, backend="eager")),
    "in place": lambda model: _compiled_in_place(model),
}


def _with(model, **parts):
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def _compiled_in_place(model):
    model.encoder.compile(backend="eager")
    return model


def _check(monitor, oracle, batches=8):
    """What the monitor says of ``batches`` of the oracle's eight is what is known."""
    assert {site: units.tolist() for site, units in monitor.dead_units().items()} == oracle.DEAD
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 8 * batches)
    for site, frequency in monitor.firing_frequency().items():
        assert (frequency * 64).tolist() == oracle.FIRED[site]


# -- counts are what they are under every setting ---------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("compiled", COMPILED)
def test_counts_do_not_depend_on_precision_accumulation_checkpointing_or_compilation(
    oracle, make_trainer, compiled, reentrant
):
    for precision, accumulate in itertools.product(["32-true", "bf16-mixed"], [1, 4]):
        monitor = DeadReLUMonitor(every_n_steps=1)
        trainer = make_trainer(callbacks=monitor, precision=precision, accumulate_grad_batches=accumulate)
        trainer.fit(COMPILED[compiled](oracle.Oracle(reentrant)))
        _check(monitor, oracle)


# dynamo asks every tensor it meets for its gradient
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", ["whole", "submodule", "in place"])
def test_compiled_code_runs_between_sampled_steps_and_is_compiled_once(oracle, make_trainer, compiled):
    def fit(callbacks):
        ran, traced = [], []

        def backend(graph, inputs):
            traced.append(graph)
            return lambda *args: ran.append(None) or graph(*args)

        torch.compiler.reset()
        model = oracle.Oracle()
        if compiled == "whole":
            model = torch.compile(model, backend=backend)
        elif compiled == "submodule":
            model.encoder = torch.compile(model.encoder, backend=backend)
        else:
            model.encoder.compile(backend=backend)
        make_trainer(callbacks=callbacks).fit(model)
        return len(ran), len(traced)

    ran, traced = fit([])
    assert ran == 8
    monitor = DeadReLUMonitor(every_n_steps=3)
    # steps 0, 3 and 6 are looked at, the five others are not, and nothing is traced that would not have been
    assert fit([monitor]) == (5, traced)
    assert monitor.num_samples() == dict.fromkeys(oracle.FIRED, 24)


DDP = """
    import sys
    import lightning as L
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    from lightning_ae.callbacks import DeadReLUMonitor


    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
            self.side = nn.Linear(3, 3)
            with torch.no_grad():  # units: fires where x0 = 1, where x1 = 1, never
                self.net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
                self.net[0].bias.fill_(-0.5)

        def training_step(self, batch, batch_idx):
            h = self.net(batch[0])
            if self.global_rank == 1 and batch_idx > 0:
                h = h + 0 * torch.sigmoid(self.side(h))  # a site that rank 0 does not have
            return h.sum() + 0 * self.side(h).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def train_dataloader(self):
            x = torch.eye(2).repeat(8, 1)  # the sampler gives even rows to rank 0, odd rows to rank 1
            data = TensorDataset(x)
            sampler = DistributedSampler(data, shuffle=False)
            return DataLoader(data, batch_size=2, sampler=sampler)


    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            keys.append(sorted(trainer.callback_metrics))


    if __name__ == "__main__":
        torch.set_num_threads(1)
        keys = []
        out = sys.argv[1]
        monitor = DeadReLUMonitor(every_n_steps=1)
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=int(sys.argv[2]), callbacks=[monitor, Watch()],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=1, use_distributed_sampler=False, default_root_dir=out,
        )
        resume = sys.argv[3] if len(sys.argv) > 3 else None
        trainer.fit(Model(), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(f"{out}/last{sys.argv[2]}.ckpt")
        local = {f"{site}/{field}": value for (site, field), value in monitor.counters.totals().items()}
        torch.save(
            {
                "dead": monitor.dead_units(), "samples": monitor.num_samples(), "keys": keys, "local": local,
                "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            },
            f"{out}/rank{trainer.global_rank}.pt",
        )
"""


@pytest.mark.slow
def test_a_unit_that_fires_on_one_rank_only_is_alive_and_ranks_agree_though_one_takes_a_branch_alone(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(DDP))

    def run(*args):
        command = [sys.executable, str(script), str(tmp_path), *args]
        done = subprocess.run(command, cwd=Path.cwd(), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]

    ranks = run("1")
    for rank, results in enumerate(ranks):
        assert results["dead"]["net.1"].tolist() == [2]
        assert results["samples"] == {"net.1": 16, "sigmoid": 6}
        # what each rank has seen by itself
        assert results["local"]["net.1/fired"].tolist() == ([8, 0, 0] if rank == 0 else [0, 8, 0])
    assert ranks[0]["keys"] == ranks[1]["keys"]
    assert ranks[0]["keys"][-1]
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0]["metrics"]["dead_relu/dead_fraction"] == pytest.approx(1 / 3)

    saved = torch.load(tmp_path / "last1.ckpt", weights_only=True)["callbacks"]
    (state,) = (value for key, value in saved.items() if key.startswith("DeadReLUMonitor"))
    assert state["current"]["net.1"]["fired"].tolist() == [8, 8, 0]
    assert state["current"]["sigmoid"]["examples"] == 6

    # resumed, sums that are global are not counted once for every rank
    for results in run("2", str(tmp_path / "last1.ckpt")):
        assert results["samples"] == {"net.1": 32, "sigmoid": 12}
        assert results["dead"]["net.1"].tolist() == [2]


def resumable(oracle):
    """A loader that goes on where it was."""
    x = oracle.examples()
    return TensorLoader([x], EpochOrder(len(x), 8, shuffle=True))


def interrupted(make_trainer, make_model, make_monitor, path, every, **options):
    """Two runs, of which the second takes up the first at a checkpoint in the middle of its first epoch."""
    runs = []
    for resume in (False, True):
        L.seed_everything(1, verbose=False)
        model, monitor = make_model(), make_monitor()
        save = ModelCheckpoint(path, "{step}", every_n_train_steps=every, save_top_k=-1)
        trainer = make_trainer(callbacks=[save, *monitor], enable_checkpointing=True, log_every_n_steps=1, **options)
        if resume:
            trainer.fit(model, ckpt_path=path / f"step={every}.ckpt", weights_only=True)
        else:
            trainer.fit(model)
        runs.append((trainer, model, monitor))
    assert runs[0][0].global_step == runs[1][0].global_step
    return runs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_in_the_middle_of_an_epoch_counts_as_one_never_interrupted(
    oracle, make_trainer, tmp_path, accumulate
):
    def make_model():
        model = oracle.Oracle()
        model.train_dataloader = lambda: resumable(oracle)
        return model

    (_, model, (monitor,)), (_, resumed_model, (resumed,)) = interrupted(
        make_trainer,
        make_model,
        lambda: [DeadReLUMonitor(every_n_steps=2, horizon=16)],
        tmp_path,
        every=3,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )
    want, got = monitor.state_dict(), resumed.state_dict()
    assert got["previous_samples"] == want["previous_samples"] > 0  # the horizon has rolled
    assert got["sites"] == want["sites"]
    assert len(got["sites"]) == 2
    for span in ("current", "previous"):
        assert got[span].keys() == want[span].keys()
        for site, fields in want[span].items():
            for name, value in fields.items():
                assert torch.equal(got[span][site][name], value), (span, site, name)
                assert got[span][site][name].dtype == value.dtype
    assert resumed.num_samples() == monitor.num_samples()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))


@pytest.mark.parametrize("monitors", [[], [1]])
def test_resumed_weights_are_those_of_a_run_never_interrupted(oracle, make_trainer, tmp_path, monitors):
    def make_model():
        model = oracle.Noisy()
        model.net[3] = nn.Identity()  # a resumed run draws other random numbers
        model.training_step = lambda batch, batch_idx: model.head(model.net(batch)).square().mean()
        model.train_dataloader = lambda: resumable(oracle)
        return model

    (_, plain, _), (_, resumed, _) = interrupted(
        make_trainer, make_model, lambda: [DeadReLUMonitor(every) for every in monitors], tmp_path, every=5
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_unit_that_fired_only_long_ago_is_dead_now(make_trainer, oracle):
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    nn.init.ones_(net[0].weight)
    model = oracle.Step(net)
    # one positive example at the beginning, then 0 until the horizon has rolled twice
    x = torch.zeros(80, 1)
    x[0] = 1.0
    monitor = DeadReLUMonitor(every_n_steps=1, horizon=16)
    dead = []

    class After(L.Callback):
        def on_train_batch_end(self, *_):
            dead.append(len(monitor.dead_units()["net.1"]))

    trainer = make_trainer(callbacks=[monitor, After()], log_every_n_steps=1)
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=8))
    # spans are of 16 examples: the first is forgotten at the end of the second
    assert dead == [0, 0, 0] + [2] * 7
    assert 16 <= monitor.num_samples()["net.1"] < 48


# -- which axis, which positions --------------------------------------------------------------------------------


class Shaped(L.LightningModule):
    """Units 0, 1 of three fire where the input is positive and everywhere; 2 never."""

    def __init__(self, layer, *rest, shape=None):
        super().__init__()
        self.layer, self.rest, self.act = layer, nn.Sequential(*rest), nn.ReLU()
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[0] = 1.0
            layer.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))

    def training_step(self, batch, batch_idx):
        x = batch["x"] if isinstance(batch, dict) else batch
        return self.act(self.rest(self.layer(x))).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Residual(nn.Module):
    def forward(self, h):
        return h + 0.5 * functional.dropout(h, 0.0)


def _signs(*shape):
    """-1 and 1 in turn."""
    count = torch.Size(shape).numel()
    return (2.0 * (torch.arange(count) % 2) - 1).view(shape)


@pytest.mark.parametrize(
    ("layer", "rest", "shape"),
    [
        (lambda: nn.Linear(1, 3), (), (4, 1)),
        (lambda: nn.Linear(1, 3), (), (4, 6, 1)),
        (lambda: nn.Linear(1, 3), (nn.LayerNorm(3, elementwise_affine=False), nn.Dropout(0.0)), (4, 6, 1)),
        (lambda: nn.Conv1d(1, 3, 1), (), (4, 1, 6)),
        (lambda: nn.Conv1d(1, 3, 1), (Residual(),), (4, 1, 3)),
        (lambda: nn.Conv1d(1, 3, 1), (nn.BatchNorm1d(3, affine=False, eps=1.0, momentum=None), Residual()), (4, 1, 6)),
        (lambda: nn.Conv2d(1, 3, 1), (nn.Dropout2d(0.0), nn.MaxPool2d(1), Residual()), (4, 1, 3, 2)),
        (lambda: nn.Conv3d(1, 3, 1), (), (4, 1, 3, 2, 1)),
    ],
)
def test_the_axis_of_the_units_is_that_of_the_layer_before(make_trainer, layer, rest, shape):
    model = Shaped(layer(), *rest)
    # the norms are fed only what leaves the signs of units 0 and 1 of each example alone
    norms = any(isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)) for module in rest)
    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(model, DataLoader(_signs(*shape), batch_size=2))
    assert monitor.sites["act"].units == 3
    assert monitor.num_samples() == {"act": 4}
    if not norms:
        assert monitor.firing_frequency()["act"].tolist() == [0.5, 1.0, 0.0]
        assert monitor.dead_units()["act"].tolist() == [2]
    else:
        assert monitor.firing_frequency()["act"].shape == (3,)


@pytest.mark.parametrize("chosen", [1, -2, {"act": 1}, {"act": -2, "other": 0}])
def test_the_user_may_say_which_axis_it_is(make_trainer, chosen):
    # a Linear over time, whose channels are on axis 1
    model = Shaped(nn.Linear(3, 3))
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(3))
        model.layer.bias.zero_()
    x = torch.ones(4, 2, 3)
    x[:, 1] = -1.0
    monitor = DeadReLUMonitor(1, unit_dim=chosen)
    make_trainer(callbacks=monitor).fit(model, DataLoader(x, batch_size=2))
    assert monitor.dead_units()["act"].tolist() == [1]
    assert monitor.firing_frequency()["act"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("layer", [nn.Linear(1, 3), nn.Conv1d(1, 3, 1)], ids=["(B, T, D)", "(B, C, L)"])
def test_padding_does_not_count(make_trainer, layer):
    model = Shaped(layer)
    last = isinstance(layer, nn.Linear)
    # examples of 4, 2 and 0 positions; positive where it is padding, and NaN there once
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    x = torch.where(valid > 0, -1.0, 1.0)
    x[0, 0] = 1.0
    x[1, 3] = float("nan")
    rows = [{"x": row.unsqueeze(-1 if last else 0), "valid": v} for row, v in zip(x, valid, strict=True)]
    monitor = DeadReLUMonitor(1, mask_fn=lambda batch: batch["valid"])
    make_trainer(callbacks=monitor).fit(model, DataLoader(rows, batch_size=3))
    assert monitor.firing_frequency()["act"].tolist() == [1 / 6, 1.0, 0.0]
    assert monitor.num_samples() == {"act": 2}
    assert monitor.nonfinite_units()["act"].tolist() == []


def test_an_example_that_is_all_padding_does_not_count_where_positions_are_gone(make_trainer):
    model = Shaped(nn.Linear(1, 3))
    model.training_step = lambda batch, batch_idx: model.act(model.layer(batch["x"].mean(1))).sum()
    valid = torch.tensor([[1, 1], [0, 0], [1, 0]])
    rows = [{"x": torch.ones(2, 1), "valid": v} for v in valid]
    monitor = DeadReLUMonitor(1, mask_fn=lambda batch: batch["valid"])
    make_trainer(callbacks=monitor).fit(model, DataLoader(rows, batch_size=3))
    assert monitor.num_samples() == {"act": 2}
    assert monitor.firing_frequency()["act"].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.Hardtanh(0.0, 6.0), nn.Hardsigmoid()])
def test_a_unit_that_is_always_at_the_upper_end_is_dead(make_trainer, oracle, act):
    net = nn.Sequential(nn.Linear(1, 3), act)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([10.0, 1.0, -10.0]))
    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(oracle.Step(net), DataLoader(torch.zeros(4, 1), batch_size=2))
    assert monitor.dead_units()["net.1"].tolist() == [0, 2]
    assert monitor.firing_frequency()["net.1"].tolist() == [0.0, 1.0, 0.0]


def test_nan_is_counted_apart_and_not_as_dead(make_trainer, oracle):
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[float("nan")], [-1.0], [float("inf")]]))
    monitor = DeadReLUMonitor(1)
    trainer = make_trainer(callbacks=monitor)
    trainer.fit(oracle.Step(net), DataLoader(torch.ones(4, 1), batch_size=2))
    assert monitor.nonfinite_units()["net.1"].tolist() == [0, 2]
    assert monitor.dead_units()["net.1"].tolist() == [1]
    assert trainer.callback_metrics["dead_relu/nonfinite_units"] == 2


def test_dormant_scores_are_mean_magnitudes_over_their_mean(make_trainer, oracle):
    net = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2), nn.LeakyReLU(0.5))
    x = torch.randn(12, 2)
    monitor = DeadReLUMonitor(1, tau=0.5)
    trainer = make_trainer(callbacks=monitor)
    trainer.fit(oracle.Step(net), DataLoader(x, batch_size=4))
    h = net[:2].double()(x.double())
    y = net[2:].double()(h)
    for site, values in (("net.1", h), ("net.3", y)):
        mean = values.detach().abs().mean(0)
        want = mean / mean.mean()
        torch.testing.assert_close(monitor.dormant_scores()[site], want, rtol=1e-5, atol=1e-6)
        assert monitor.dormant_units()[site].tolist() == (want <= 0.5).nonzero().flatten().tolist()
    assert monitor.dead_units() == {}  # neither is ever exactly zero
    assert "dead_relu/dead_fraction" not in trainer.callback_metrics


def test_a_layer_that_is_zero_throughout_is_dormant_as_a_whole(make_trainer, oracle):
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    nn.init.constant_(net[0].bias, -10.0)
    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(oracle.Step(net), DataLoader(torch.zeros(4, 1), batch_size=2))
    assert monitor.dormant_scores()["net.1"].tolist() == [0.0, 0.0]
    assert monitor.dormant_units()["net.1"].tolist() == [0, 1]


def test_only_what_is_included_counts(oracle, make_trainer):
    monitor = DeadReLUMonitor(1, include=["encoder.act"])
    trainer = make_trainer(callbacks=monitor)
    trainer.fit(oracle.Oracle())
    assert monitor.dead_units().keys() == {"encoder.act"}
    assert trainer.callback_metrics["dead_relu/dead_fraction"] == pytest.approx(2 / 6)


# -- logging ----------------------------------------------------------------------------------------------------


def test_callbacks_that_watch_metrics_can_watch_these(oracle, make_trainer, tmp_path):
    seen = []

    class See(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(float(trainer.callback_metrics["dead_relu/dead_fraction"]))

    stop = EarlyStopping("dead_relu/dead_fraction", mode="min", patience=1, check_on_train_epoch_end=True)
    save = ModelCheckpoint(
        tmp_path / "kept", "{dead_relu/dead_fraction:.3f}", "dead_relu/dead_fraction", auto_insert_metric_name=False
    )
    # in any order, with no log step in an epoch, and looked at once in two
    trainer = make_trainer(
        callbacks=[See(), stop, save, DeadReLUMonitor(16)], max_epochs=9, enable_checkpointing=True,
        log_every_n_steps=1000,
    )  # fmt: skip
    trainer.fit(oracle.Oracle())
    assert trainer.current_epoch == 2  # it does not get better
    assert seen == [pytest.approx(4 / 9)] * 2  # the first batch only
    assert float(save.best_model_score) == pytest.approx(4 / 9)


def test_a_checkpoint_may_watch_it_after_validation(oracle, make_trainer, tmp_path):
    model = oracle.Oracle()
    model.validation_step = lambda batch, batch_idx: None
    model.val_dataloader = model.train_dataloader
    save = ModelCheckpoint(tmp_path / "kept", monitor="dead_relu/dead_fraction", save_top_k=-1, every_n_epochs=1)
    trainer = make_trainer(
        callbacks=[save, DeadReLUMonitor(1)], enable_checkpointing=True, val_check_interval=4, log_every_n_steps=1000
    )
    trainer.fit(model)
    assert float(save.best_model_score) == pytest.approx(3 / 9)


def test_scalars_and_quantiles_are_logged_at_the_step_of_the_batch(oracle, make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        callbacks=DeadReLUMonitor(2), logger=logger, log_every_n_steps=3, max_epochs=2, accumulate_grad_batches=2
    )
    trainer.fit(oracle.Oracle())
    logger.save()
    rows = list(csv.DictReader(Path(logger.experiment.metrics_file_path).read_text().splitlines()))
    got = {int(row["step"]): float(row["dead_relu/samples"]) for row in rows if row["dead_relu/samples"]}
    # steps 0 and 2, 4 and 6 are looked at, 16 examples each; steps 2 and 5 are log steps, 3 and 7 end an epoch
    assert got == {2: 32.0, 5: 48.0, 7: 64.0}
    columns = set(rows[0])
    assert {"dead_relu/dead_fraction", "dead_relu/encoder.act/dead_fraction"} <= columns
    assert "dead_relu/encoder.act/log10_frequency/p50" in columns
    (last,) = (r for r in rows if r["step"] == "7" and r["dead_relu/encoder.relu/log10_frequency/p95"])
    # log10 of 0.5/64, 48/64 and 1
    want = torch.tensor([0.5 / 64, 48 / 64, 1.0], dtype=torch.float64).log10().quantile(0.95).item()
    assert float(last["dead_relu/encoder.relu/log10_frequency/p95"]) == pytest.approx(want)


def test_tensorboard_gets_histograms_at_the_step_of_the_batch(oracle, make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    make_trainer(callbacks=DeadReLUMonitor(1), logger=logger, log_every_n_steps=4).fit(oracle.Oracle())
    events = EventAccumulator(logger.log_dir, {"histograms": 0}).Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("dead_relu/samples")]
    assert scalars == [(3, 32.0), (7, 64.0)]
    histograms = events.Histograms("dead_relu/encoder.act/log10_frequency")
    assert [e.step for e in histograms] == [3, 7]
    assert histograms[-1].histogram_value.num == 6


def test_nothing_new_is_not_logged_again(oracle, make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(callbacks=DeadReLUMonitor(6), logger=logger, log_every_n_steps=1)
    trainer.fit(oracle.Oracle())
    logger.save()
    rows = list(csv.DictReader(Path(logger.experiment.metrics_file_path).read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["dead_relu/samples"]] == [0, 6]


# -- modules that nobody here wrote -----------------------------------------------------------------------------


def test_a_boring_model_has_nothing_to_say(make_trainer):
    from lightning.pytorch.demos.boring_classes import BoringModel

    monitor = DeadReLUMonitor(1)
    trainer = make_trainer(callbacks=monitor, limit_train_batches=3, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(BoringModel())
    assert monitor.dead_units() == monitor.num_samples() == {}
    assert not any(key.startswith("dead_relu") for key in trainer.callback_metrics)


def test_a_transformer(make_trainer):
    from lightning.pytorch.demos.transformer import Transformer

    class Language(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Transformer(vocab_size=20, ninp=8, nhead=2, nhid=12, nlayers=2, dropout=0.0)
            layer = self.model.transformer.encoder.layers[1].linear1
            with torch.no_grad():
                layer.weight[5] = 0.0
                layer.bias[5] = -1.0

        def training_step(self, batch, batch_idx):
            inputs, target = batch
            return functional.nll_loss(self.model(inputs, target), target.view(-1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    tokens = torch.randint(0, 20, (6, 7))
    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(Language(), DataLoader(TensorDataset(tokens, tokens), batch_size=3))
    sites = [site for site, info in monitor.sites.items() if info.units == 12]
    assert sites == [f"model.transformer.{part}.layers.{i}.relu" for part in ("encoder", "decoder") for i in (0, 1)]
    assert 5 in monitor.dead_units()["model.transformer.encoder.layers.1.relu"].tolist()
    assert 0 < monitor.firing_frequency()["model.transformer.encoder.layers.0.relu"].mean() < 1


def test_a_torchvision_resnet_in_a_plain_module(make_trainer, oracle):
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(weights=None, num_classes=3)
    with torch.no_grad():
        net.layer1[0].bn1.weight[7] = 0.0
        net.layer1[0].bn1.bias[7] = -1.0
    monitor = DeadReLUMonitor(1)
    make_trainer(callbacks=monitor).fit(oracle.Step(net), DataLoader(torch.randn(2, 3, 32, 32), batch_size=2))
    # one ReLU of each block is called twice, in place
    blocks = [f"net.layer{i}.{j}.relu{again}" for i in (1, 2, 3, 4) for j in (0, 1) for again in ("", "#1")]
    assert list(monitor.sites) == ["net.relu", *blocks]
    assert [monitor.sites[f"net.layer{i}.0.relu"].units for i in (1, 2, 3, 4)] == [64, 128, 256, 512]
    assert 7 in monitor.dead_units()["net.layer1.0.relu"].tolist()
    assert monitor.num_samples()["net.layer4.1.relu#1"] == 2


def test_a_gan_with_manual_optimization(make_trainer):
    class Gan(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
            self.discriminator = nn.Sequential(nn.Linear(2, 5), nn.ReLU(inplace=True), nn.Linear(5, 1))
            with torch.no_grad():
                for net, unit in ((self.generator, 3), (self.discriminator, 2)):
                    net[0].weight[unit] = 0.0
                    net[0].bias[unit] = -1.0

        def training_step(self, batch, batch_idx):
            g, d = self.optimizers()
            fake = self.generator(torch.randn(len(batch), 2))
            d.zero_grad()
            loss = functional.softplus(-self.discriminator(batch)).mean()
            self.manual_backward(loss + functional.softplus(self.discriminator(fake.detach())).mean())
            d.step()
            g.zero_grad()
            self.manual_backward(functional.softplus(-self.discriminator(fake)).squeeze(-1).mean())
            g.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.0) for m in (self.generator, self.discriminator)]

    monitor = DeadReLUMonitor(2, include=["generator", "discriminator"])
    make_trainer(callbacks=monitor).fit(Gan(), DataLoader(torch.randn(32, 2), batch_size=8))
    # batches 0 and 2 are looked at; the discriminator runs three times on each
    assert monitor.num_samples() == {"generator.1": 16, "discriminator.1": 48}
    assert 3 in monitor.dead_units()["generator.1"].tolist()
    assert 2 in monitor.dead_units()["discriminator.1"].tolist()


def test_a_model_built_in_configure_model(make_trainer, oracle):
    class Late(oracle.Step):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            if isinstance(self.net, nn.Identity):
                self.net = oracle.Oracle()

    monitor = DeadReLUMonitor(1)
    model = Late()
    make_trainer(callbacks=monitor).fit(model, oracle.Oracle().train_dataloader())
    assert {site: units.tolist() for site, units in monitor.dead_units().items()} == {
        f"net.{site}": units for site, units in oracle.DEAD.items()
    }


def test_any_batch_will_do(make_trainer, oracle):
    class Odd(oracle.Step):
        def training_step(self, batch, batch_idx):
            return self.net(batch["deep"][0]["x"]).sum()

    monitor = DeadReLUMonitor(1, horizon=4)
    rows = [{"deep": [{"x": torch.ones(1)}], "name": "a"}] * 8
    trainer = make_trainer(callbacks=monitor, log_every_n_steps=1)
    trainer.fit(Odd(nn.Sequential(nn.Linear(1, 1), nn.ReLU())), DataLoader(rows, batch_size=4))
    assert monitor.num_samples() == {"net.1": 4}  # the horizon has rolled: examples were counted, not batches
    assert monitor.state_dict()["previous_samples"] == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"every_n_steps": 1.5}, "every_n_steps"),
        ({"horizon": -1}, "horizon"),
        ({"tau": -0.1}, "tau"),
        ({"tau": float("nan")}, "tau"),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DeadReLUMonitor(**wrong)


def test_a_string_is_no_list_of_names():
    with pytest.raises(TypeError, match="include"):
        DeadReLUMonitor(include="encoder")
