"""Level by level: what is frozen does not move, what is trained is what it would be alone, runs resume anywhere."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_ae as ae
from lightning_ae.models.dictionary import DictionaryAutoencoder


def levels():
    return [
        ae.MLPAutoencoder(9, 6, hidden=(8,), norm="batch", latent_activation="sigmoid"),
        ae.SparseAutoencoder(*ae.mlp_pair(6, 4, hidden=()), code=ae.L1Code(0.01)),
        ae.DenoisingAutoencoder(4, 2, hidden=(3,), corruption=ae.GaussianNoise(0.1)),
    ]


def stack(**options):
    return ae.StackedAutoencoder(levels(), **{"lr": 0.01, **options})


@pytest.fixture
def loader():
    return DataLoader(torch.rand(32, 9), batch_size=8)


class Watch(L.Callback):
    """State of each level, before and after each epoch, and what is frozen in between."""

    def __init__(self):
        self.starts, self.ends, self.rows, self.losses = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.starts.append([state(level) for level in pl_module.levels])
            self.rows.append(
                (
                    pl_module.training_level,
                    [all(p.requires_grad for p in level.parameters()) for level in pl_module.levels],
                    [all(m.training for m in level.modules()) for level in pl_module.levels],
                    [any(m.training for m in level.modules()) for level in pl_module.levels],
                )
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append([state(level) for level in pl_module.levels])


def state(module):
    return {name: v.clone() for name, v in module.state_dict().items() if isinstance(v, torch.Tensor)}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class MemoryLogger(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


# -- phases -----------------------------------------------------------------------------------------------------------


def test_only_the_level_that_is_trained_moves_and_then_all_do(make_trainer, loader):
    model, watch = stack(weight_decay=0.1), Watch()
    trainer = make_trainer(max_epochs=5, callbacks=[ae.GreedyLevels([1, 2, 1], 1), watch])
    trainer.fit(model, loader, loader)  # a validation between the epochs leaves the modes as they are
    phases = [0, 1, 1, 2, None]
    assert [row[0] for row in watch.rows] == phases
    for phase, start, end, (_, trainable, all_on, any_on) in zip(
        phases, watch.starts, watch.ends, watch.rows, strict=True
    ):
        for k in range(3):
            trained = phase in (None, k)
            # statistics of batch normalisation too
            assert same(start[k], end[k]) is not trained
            assert trainable[k] is all_on[k] is any_on[k] is trained
    assert model.training_level is None
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_each_level_becomes_what_it_would_be_alone(make_trainer):
    """Against autoencoders that are trained one after the other on the codes of the last, by plain torch."""
    model, x = stack(), torch.rand(32, 9)
    alone = copy.deepcopy(model)
    make_trainer(max_epochs=5, callbacks=ae.GreedyLevels([2, 2, 1], 0)).fit(
        model, DataLoader(x, batch_size=8), DataLoader(x, batch_size=8)
    )
    L.seed_everything(0, verbose=False)  # noise of the last level
    random = torch.get_rng_state()
    codes = x
    for k, epochs in enumerate((2, 2, 1)):
        level = alone.levels[k]
        optimizer = torch.optim.AdamW(level.parameters(), lr=0.01, weight_decay=0.0, fused=True)
        torch.set_rng_state(random)
        for _ in range(epochs):
            for batch in codes.split(8):
                noisy = batch + 0.1 * torch.randn_like(batch) if k == 2 else batch
                h = level.encoder(noisy)
                error = (level.decoder(h) - batch).square().sum(1)
                loss = (error + 0.01 * h.abs().sum(1) if k == 1 else error).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        level.eval()
        with torch.no_grad():
            codes = level.encoder(codes)
        if k < 2:
            for name, value in state(level).items():
                torch.testing.assert_close(state(model.levels[k])[name], value, msg=f"{k} {name}")
    assert model.levels[2].encoder.layers[0].weight.isfinite().all()


def test_a_phase_starts_with_a_new_optimizer_state(make_trainer, loader):
    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.model = copy.deepcopy(state(pl_module)) if trainer.current_epoch == 2 else self.model
            self.steps = [int(s["step"]) for s in trainer.optimizers[0].state.values()]

        model = None

    model = ae.StackedAutoencoder([ae.LinearAutoencoder(9, 4), ae.LinearAutoencoder(4, 2)], lr=0.01)
    keep = Keep()
    make_trainer(max_epochs=4, callbacks=[ae.GreedyLevels([1, 2]), keep]).fit(model, loader)
    assert set(keep.steps) == {4}  # of this epoch alone
    twin = ae.StackedAutoencoder([ae.LinearAutoencoder(9, 4), ae.LinearAutoencoder(4, 2)], lr=0.01)
    twin.load_state_dict(keep.model, strict=False)
    make_trainer(max_epochs=1).fit(twin, loader)
    assert same(state(model), state(twin))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "NAdam", "Rprop", "LBFGS"])
def test_a_new_state_suits_all_kinds_of_optimizer(name, make_trainer, loader):
    class Model(ae.StackedAutoencoder):
        def configure_optimizers(self):
            options = {"SGD": {"momentum": 0.9}, "Adagrad": {"initial_accumulator_value": 0.5, "lr_decay": 0.1}}.get(
                name, {}
            )
            return getattr(torch.optim, name)(self.parameters(), lr=0.01, **options)

    def make():
        return Model([ae.LinearAutoencoder(9, 4), ae.LinearAutoencoder(4, 2)])

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.first = state(pl_module.levels[0])
            if trainer.current_epoch == 1:
                self.model = copy.deepcopy(state(pl_module))

    model, twin, keep = make(), make(), Keep()
    make_trainer(max_epochs=3, callbacks=[ae.GreedyLevels(1), keep]).fit(model, loader)
    # no memory of the first phase moves the first level in the second
    assert all(torch.equal(keep.model[f"levels.0.{name}"], value) for name, value in keep.first.items())
    twin.load_state_dict(keep.model, strict=False)
    make_trainer(max_epochs=1).fit(twin, loader)
    assert same(state(model), state(twin))


def test_the_phase_is_logged_when_it_begins(make_trainer, loader):
    logger = MemoryLogger()
    make_trainer(max_epochs=4, callbacks=ae.GreedyLevels(1), logger=logger).fit(stack(), loader)
    found = [(step, row["greedy/level"]) for step, row in logger.rows if "greedy/level" in row]
    assert found == [(0, 0.0), (4, 1.0), (8, 2.0), (12, 3.0)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_run_logs_the_phases_that_begin_and_no_other(make_trainer, loader, tmp_path):
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"max_epochs": 4, "enable_checkpointing": True}
    make_trainer(callbacks=[ae.GreedyLevels(1), saver], **options).fit(stack(), loader)
    for step in (2, 4, 6, 10, 14):
        logger, greedy = MemoryLogger(), ae.GreedyLevels(1)
        again = make_trainer(logger=logger, callbacks=[greedy, saver], **options)
        again.fit(stack(), loader, ckpt_path=tmp_path / f"step={step}.ckpt")
        found = [(at, row["greedy/level"]) for at, row in logger.rows if "greedy/level" in row]
        assert found == [(at, level) for at, level in [(4, 1.0), (8, 2.0), (12, 3.0)] if at >= step], step
        assert float(again.callback_metrics["greedy/level"]) == 3.0
    make_trainer(logger=(other := MemoryLogger()), max_epochs=4, callbacks=greedy).fit(stack(), loader)
    assert sum("greedy/level" in row for _, row in other.rows) == 4  # another run of the same callback


def test_metrics_are_those_of_the_depth_that_is_trained(make_trainer, loader):
    model = stack()
    trainer = make_trainer(max_epochs=2, callbacks=ae.GreedyLevels(2))
    with pytest.warns(UserWarning, match="do not fit into max_epochs=2"):
        trainer.fit(model, loader, loader)
    assert model.training_level == 0
    x = loader.dataset
    with torch.no_grad():
        x_hat = model.eval().reconstruct(x, depth=1)
    torch.testing.assert_close(trainer.callback_metrics["val/mse"], (x_hat - x).square().mean())
    expected = (x_hat - x).square().sum(1).mean()
    torch.testing.assert_close(trainer.callback_metrics["val/reconstruction"].float(), expected)
    torch.testing.assert_close(trainer.callback_metrics["val/loss"].float(), expected)
    assert trainer.callback_metrics["val/level_2"] > 0  # terms are the same in all phases


@pytest.mark.parametrize(("finetune", "epochs"), [(0, 3), (2, 5), (None, 7)])
def test_the_fit_stops_after_fine_tuning(finetune, epochs, make_trainer, loader):
    model = stack()
    trainer = make_trainer(max_epochs=7, callbacks=ae.GreedyLevels(1, finetune))
    trainer.fit(model, loader)
    assert trainer.current_epoch == epochs
    assert model.training_level == (2 if finetune == 0 else None)


def test_an_error_leaves_nothing_frozen_and_what_was_frozen_stays_so(make_trainer, loader):
    class Fail(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert not pl_module.levels[0].encoder.training
            assert not any(p.requires_grad for p in pl_module.levels[0].encoder.parameters())
            if trainer.current_epoch == 1:
                raise RuntimeError("on purpose")

    model = stack()
    model.levels[0].encoder.requires_grad_(False)
    model.levels[0].encoder.eval()
    model.levels[1].decoder.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found .* module.* in eval mode")
        trainer = make_trainer(max_epochs=4, callbacks=[ae.GreedyLevels([1, 1, 1]), Fail()])
        before = state(model.levels[0].encoder)
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(model, loader)
    assert same(state(model.levels[0].encoder), before)
    frozen = {*model.levels[0].encoder.parameters(), *model.levels[1].decoder.parameters()}
    assert {p for p in model.parameters() if not p.requires_grad} == frozen
    assert not model.levels[0].encoder.training
    assert model.levels[0].decoder.training
    assert model.levels[1].training
    assert model.levels[2].training


def test_the_adapted_weight_of_a_level_waits_while_others_are_trained(make_trainer, loader):
    code = ae.L1Code(0.1, "relu", target_l0=1)
    sparse = ae.SparseAutoencoder(*ae.mlp_pair(6, 4, hidden=()), code=code)
    model = ae.StackedAutoencoder([ae.MLPAutoencoder(9, 6), sparse])
    found = []

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            found.append(float(code.controller.weight))

    make_trainer(max_epochs=3, callbacks=[ae.GreedyLevels(1), Keep()]).fit(model, loader)
    assert found[0] == pytest.approx(0.1)
    assert found[1] != pytest.approx(0.1)
    assert found[2] != found[1]


def test_the_level_follows_from_the_epoch():
    assert [ae.GreedyLevels([1, 2]).level_of(epoch, 2) for epoch in range(5)] == [0, 1, 1, None, None]
    assert [ae.GreedyLevels(2, 1).level_of(epoch, 2) for epoch in range(6)] == [0, 0, 1, 1, None, None]
    assert [ae.GreedyLevels(1, 0).level_of(epoch, 2) for epoch in range(4)] == [0, 1, 1, 1]


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_run_resumes_anywhere_to_what_it_would_have_been(make_trainer, tmp_path):
    """From a checkpoint in the middle and at the end of every epoch of every phase, bit by bit."""

    x = torch.rand(40, 9)  # a last batch that is smaller, and a validation after each epoch

    def fit(**options):
        L.seed_everything(1, verbose=False)
        model = stack()
        callbacks = [ae.GreedyLevels([1, 2, 1], 1), *options.pop("callbacks", [])]
        make_trainer(max_epochs=5, callbacks=callbacks, **options.pop("trainer", {})).fit(
            model, ae.TensorDataModule(x, batch_size=7, val_fraction=0.25, seed=3), **options
        )
        return model

    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    ends = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="end-{epoch}")
    expected = fit(callbacks=[save, ends], trainer={"enable_checkpointing": True})
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 17
    for path in paths:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch")
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint")
            resumed = fit(ckpt_path=path)
        assert same(state(resumed), state(expected)), path.name
        assert resumed.training_level is None


@pytest.mark.parametrize("finetune", [0, 1])
def test_a_run_that_was_over_is_not_trained_further(finetune, make_trainer, loader, tmp_path):
    options = {"max_epochs": 9, "callbacks": ae.GreedyLevels(1, finetune)}
    model, resumed = stack(), stack()
    trainer = make_trainer(**options)
    trainer.fit(model, loader)
    trainer.save_checkpoint(tmp_path / "over.ckpt")
    make_trainer(**options).fit(resumed, loader, ckpt_path=tmp_path / "over.ckpt")
    assert same(state(resumed), state(model))
    assert resumed.training_level == model.training_level


# -- others looking on ------------------------------------------------------------------------------------------------


def test_monitors_look_on_through_all_phases(make_trainer, loader):
    monitors = [
        ae.DeadReLUMonitor(every_n_steps=1),
        ae.GradientSaturationMonitor(every_n_steps=1),
        ae.LatentSparsityMonitor(every_n_steps=1),
        ae.DiagnosticsReport(every_n_steps=1),
    ]
    z = []

    class Collect(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            z.append(outputs["output"].z)

    model, twin = stack(), stack()
    twin.load_state_dict(model.state_dict())
    L.seed_everything(0, verbose=False)
    make_trainer(max_epochs=4, callbacks=[ae.GreedyLevels(1), *monitors, Collect()]).fit(model, loader, loader)
    L.seed_everything(0, verbose=False)
    make_trainer(max_epochs=4, callbacks=ae.GreedyLevels(1)).fit(twin, loader, loader)
    assert same(state(model), state(twin))  # without touching anything
    assert monitors[2].num_samples() == len(torch.cat(z)) == 128
    assert monitors[2].summary()["l1"] == pytest.approx(float(torch.cat(z).abs().sum(1).mean()), rel=1e-4)
    assert monitors[2].summary()["unread_fraction"] == 0.0
    counted = monitors[0].num_samples()
    assert counted["levels.0.encoder.layers.2"] == counted["levels.2.encoder.layers.1"] == 128
    # also on codes from above, in all phases but its own
    assert counted["levels.0.decoder.layers.2"] == 128 + 3 * 32
    assert all(name.startswith("levels.") for name in counted)


@pytest.mark.slow
def test_a_compiled_model_goes_through_the_phases(make_trainer, loader):
    model = ae.StackedAutoencoder(levels()[:2], lr=0.01)
    twin = copy.deepcopy(model)
    for m, compiled in ((model, torch.compile(model, backend="aot_eager")), (twin, twin)):
        L.seed_everything(0, verbose=False)
        make_trainer(max_epochs=3, callbacks=ae.GreedyLevels(1)).fit(compiled, loader)
        assert m.training_level is None
    for name, value in state(twin).items():
        torch.testing.assert_close(state(model)[name], value, msg=name)


class _Write(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save({"state": state(pl_module), "level": pl_module.training_level}, self.path)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_two_ranks_train_as_one_does(make_trainer, tmp_path):
    x, seen = torch.rand(40, 9), {}
    # batch normalisation sees the batch of a rank
    start = ae.StackedAutoencoder([ae.MLPAutoencoder(9, 5, hidden=(6,)), ae.MLPAutoencoder(5, 2)], lr=0.01)
    for ranks, batch_size in ((1, 10), (2, 5)):
        options = {"strategy": "ddp_spawn_find_unused_parameters_true"} if ranks > 1 else {}
        callbacks = [ae.GreedyLevels(1, 1), _Write(tmp_path / f"{ranks}.pt")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
            trainer = make_trainer(devices=ranks, max_epochs=3, callbacks=callbacks, **options)
            trainer.fit(copy.deepcopy(start), ae.TensorDataModule(x, batch_size=batch_size, val_fraction=0))
        seen[ranks] = torch.load(tmp_path / f"{ranks}.pt")
    assert seen[2]["level"] is None
    assert not same(seen[1]["state"], state(start))
    torch.testing.assert_close(seen[2]["state"], seen[1]["state"])


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "error"),
    [(0, ValueError), (-1, ValueError), ([], ValueError), ([1, 0], ValueError), ([1.5], TypeError), (True, TypeError)],
)
def test_epochs_are_positive_whole_numbers(epochs, error):
    with pytest.raises(error, match="epochs_per_level: expected a"):
        ae.GreedyLevels(epochs)


@pytest.mark.parametrize(("epochs", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_fine_tuning_takes_a_whole_number_of_epochs(epochs, error):
    with pytest.raises(error, match="finetune_epochs: expected a whole number >= 0"):
        ae.GreedyLevels(1, epochs)


def test_each_level_has_a_number(make_trainer, loader):
    with pytest.raises(ValueError, match=r"epochs_per_level: expected 3 numbers, one for each level, got \[1, 1\]"):
        make_trainer(callbacks=ae.GreedyLevels([1, 1])).fit(stack(), loader)


def test_other_models_have_no_levels(make_trainer):
    loader = DataLoader(torch.rand(8, 6), batch_size=4)
    for model in (ae.LinearAutoencoder(6, 2), DictionaryAutoencoder(6, 9, ae.TopKCode(2))):
        with pytest.raises(TypeError, match="GreedyLevels: expected a StackedAutoencoder, got a"):
            make_trainer(callbacks=ae.GreedyLevels(1)).fit(model, loader)


def test_ddp_has_to_look_for_parameters_without_gradients(make_trainer):
    for strategy in ("ddp", "ddp_spawn", "ddp_find_unused_parameters_false"):
        trainer = make_trainer(strategy=strategy, max_epochs=4)
        with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
            ae.GreedyLevels(1).setup(trainer, stack(), "fit")
    trainer = make_trainer(strategy="ddp_find_unused_parameters_true", max_epochs=4)
    assert ae.GreedyLevels(1).setup(trainer, stack(), "fit") is None


@pytest.mark.parametrize(
    ("max_epochs", "finetune", "fits"),
    [(3, None, False), (4, None, True), (3, 0, True), (4, 2, False), (-1, 2, True)],
)
def test_too_few_epochs_are_told(max_epochs, finetune, fits, make_trainer):
    greedy, trainer = ae.GreedyLevels(1, finetune), make_trainer(max_epochs=max_epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        greedy.setup(trainer, stack(), "fit")
    assert any("do not fit into max_epochs" in str(w.message) for w in caught) is not fits
