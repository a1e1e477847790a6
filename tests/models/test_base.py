"""The flow: one step for every variant, the same numbers whatever the batch size, and clear errors at the door."""

from __future__ import annotations

import math
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.image import structural_similarity_index_measure

import lightning_ae as ae
from lightning_ae.codes import Code, CodeOutput
from lightning_ae.models.running import RunningMeans


class Shrink(Code):
    """A code with a charge: half the latent, and its squared norm."""

    def __init__(self, weight: float = 3.0):
        super().__init__()
        self.weight = weight

    def forward(self, h):
        return CodeOutput(h / 2, {"norm": h.square().sum(1)})

    def weights(self):
        return {"norm": self.weight}


class WithSGD(ae.MLPAutoencoder):
    """Plain gradient descent, so that equal gradients give equal weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def model(**kwargs):
    return WithSGD(6, 2, hidden=(5,), activation="tanh", **kwargs)


def data(n=64, **kwargs):
    generator = torch.Generator().manual_seed(1)
    kwargs = {"batch_size": 8, "val_fraction": 0.25, **kwargs}
    return ae.TensorDataModule(torch.rand(n, 6, generator=generator), **kwargs)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# -- the flow ---------------------------------------------------------------------------------------------------------


def test_the_objective_is_the_weighted_sum_of_raw_terms():
    m = ae.MLPAutoencoder(
        6, 2, code=Shrink(3.0), penalties={"q": ae.OrthogonalityPenalty(0.5), "p": ae.WeightPrior(2.0, 4.0, 10)}
    )
    x = torch.rand(4, 6)
    output = m(x)
    terms = m.terms(x, output)
    h = m.encoder(x)
    torch.testing.assert_close(output.z, h / 2)
    torch.testing.assert_close(terms["norm"], h.square().sum(1))
    reconstruction = (m.decoder(h / 2) - x).square().sum(1)
    expected = reconstruction + 3.0 * h.square().sum(1) + 0.5 * terms["q"] + 0.5 * terms["p"]
    torch.testing.assert_close(m.objective(terms), expected)
    assert m.objective(terms).shape == (4,)


def test_weights_are_read_at_every_step():
    m = ae.MLPAutoencoder(6, 2, code=Shrink(1.0), penalties={"q": ae.OrthogonalityPenalty(1.0)})
    terms = m.terms(torch.rand(4, 6), m(torch.rand(4, 6)))
    m.code.weight = 0.0
    m.penalties["q"].weight = 0.0
    torch.testing.assert_close(m.objective(terms), terms["reconstruction"])


def test_encode_decode_and_reconstruct_agree_with_the_forward_pass():
    m = ae.ConvAutoencoder((1, 5, 4), 3, loss=ae.BernoulliNLL()).eval()
    x = torch.rand(2, 1, 5, 4)
    output = m(x)
    torch.testing.assert_close(m.encode(x), output.z)
    torch.testing.assert_close(m.decode(output.z), output.params.sigmoid())
    torch.testing.assert_close(m.reconstruct(x), output.params.sigmoid())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 1), lambda x: [x], lambda x: {"x": x, "y": 0}])
def test_a_batch_is_a_tensor_a_tuple_or_a_dict(wrap):
    x = torch.rand(4, 6)
    assert model().get_input(wrap(x)) is x


def test_a_dict_may_have_another_key():
    x = torch.rand(4, 6)
    assert model(batch_key="image").get_input({"image": x}) is x
    with pytest.raises(ValueError, match=r"batch_key: the batch has no 'x', only \['image'\]"):
        model().get_input({"image": x})
    with pytest.raises(TypeError, match="got str"):
        model().get_input("image")


def test_batches_of_loaders_by_name_are_found_and_others_described():
    x, y = torch.rand(4, 6), torch.rand(4)
    assert model(batch_key="u").get_input({"u": [x, y], "v": [y]}) is x
    with pytest.raises(
        TypeError, match=r"^batch: expected a tensor, .* got \[\(tensor \(4, 6\), tensor \(4,\)\), \(tensor"
    ):
        model().get_input([(x, y), (x, y)])
    with pytest.raises(TypeError, match=r"\(batch_key\), got \{'x': \{'y': tensor \(4, 6\)\}\}"):
        model().get_input({"x": {"y": x}})
    with pytest.raises(ValueError, match=r"batch_key: the batch has no 'x', only \['1', 'u'\]"):
        model().get_input({"u": x, 1: x})


def test_it_trains_on_the_loader_that_is_named(make_trainer):
    loaders = {name: torch.utils.data.DataLoader(torch.rand(8, 6), batch_size=4) for name in ("u", "v")}
    seen = []

    class Looks(ae.Autoencoder):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    encoder, decoder = torch.nn.Linear(6, 2), torch.nn.Linear(2, 6)
    trained = Looks(encoder, decoder, batch_key="v")
    make_trainer(max_epochs=1).fit(trained, loaders)
    assert [set(batch) for batch in seen] == [{"u", "v"}] * 2
    torch.testing.assert_close(trained.get_input(seen[0]), seen[0]["v"])


def test_of_a_list_of_loaders_it_says_that_the_first_alone_is_trained_on(make_trainer):
    loaders = [torch.utils.data.DataLoader(torch.rand(8, 6), batch_size=4) for _ in range(2)]
    with pytest.warns(UserWarning, match="A list of 2 loaders: .* is trained on the first alone"):
        make_trainer(max_epochs=1).fit(model(), loaders)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_an_empty_later_batch_is_named(make_trainer, stage):
    batches = [torch.rand(4, 6), torch.rand(0, 6)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with pytest.raises(ValueError, match=r"^x: expected a batch \(B, \*event\) with B > 0, got \(0, 6\)"):
        getattr(make_trainer(max_epochs=1), stage)(model(), loader)


def test_data_without_a_logarithm_are_refused(make_trainer):
    counts = ae.MLPAutoencoder(6, 2, hidden=(3,), input_transform="log1p")
    counts.check_input(torch.full((2, 6), -0.9))
    loader = torch.utils.data.DataLoader(torch.full((4, 6), -1.5), batch_size=2)
    with pytest.raises(ValueError, match=r"^x: expected numbers above -1 for input_transform='log1p', got some"):
        make_trainer(max_epochs=1).fit(counts, loader)


def test_the_first_batch_of_each_loader_is_looked_at(make_trainer):
    good, bad = (torch.utils.data.DataLoader(torch.full((4, 6), value), batch_size=2) for value in (0.5, float("nan")))
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        make_trainer().validate(model(), [good, bad], verbose=False)


def test_the_step_gives_detached_outputs_for_callbacks():
    step = model(code=Shrink()).training_step(torch.rand(4, 6), 0)
    assert step["loss"].requires_grad
    tensors = [step["output"].z, step["output"].params, step["output"].penalties["norm"], *step["terms"].values()]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert list(step["terms"]) == ["loss", "reconstruction", "norm"]


def test_prediction_gives_latent_reconstruction_and_score(make_trainer):
    m, d = model(), data(val_fraction=0.0)
    batches = make_trainer().predict(m, d)
    x = torch.cat(list(d.predict_dataloader()))
    torch.testing.assert_close(torch.cat([b["z"] for b in batches]), m.encode(x))
    reconstruction = torch.cat([b["reconstruction"] for b in batches])
    torch.testing.assert_close(reconstruction, m.reconstruct(x))
    torch.testing.assert_close(torch.cat([b["score"] for b in batches]), (reconstruction - x).square().sum(1))


# -- same numbers everywhere ------------------------------------------------------------------------------------------


def fit(make_trainer, m, d, **options):
    make_trainer(**options).fit(m, d)
    return weights(m)


def test_accumulation_trains_as_one_large_batch_does(make_trainer):
    start = model().state_dict()
    whole, split = model(), model()
    whole.load_state_dict(start)
    split.load_state_dict(start)
    a = fit(make_trainer, whole, data(batch_size=16), max_epochs=3)
    b = fit(make_trainer, split, data(batch_size=4), max_epochs=3, accumulate_grad_batches=4)
    torch.testing.assert_close(a, b)


def test_data_of_any_strides_are_validated(make_trainer):
    x = torch.rand(6, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    m = ae.Autoencoder(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1))
    batches = torch.utils.data.DataLoader([x], batch_size=None)
    (got,) = make_trainer().validate(m, batches, verbose=False)
    assert got["val/mse"] == pytest.approx((m.reconstruct(x) - x).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 48])
def test_validation_does_not_depend_on_the_batch_size(batch_size, make_trainer):
    m = model(penalties={"q": ae.OrthogonalityPenalty()})
    (expected,) = make_trainer().validate(m, data(batch_size=16), verbose=False)
    (got,) = make_trainer().validate(m, data(batch_size=batch_size), verbose=False)
    assert got == pytest.approx(expected, rel=1e-5)
    x = torch.cat(list(data().val_dataloader() or []))
    error = (m.reconstruct(x) - x).square()
    assert got["val/reconstruction"] == pytest.approx(error.sum(1).mean().item(), rel=1e-5)
    assert got["val/mse"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert got["val/loss"] == pytest.approx(got["val/reconstruction"] + got["val/q"], rel=1e-5)


def test_mixed_precision_computes_the_loss_in_full(make_trainer):
    dtypes = {}

    class Probe(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            dtypes["params"] = outputs["output"].params.dtype
            dtypes["loss"] = outputs["terms"]["loss"].dtype

    make_trainer(precision="bf16-mixed", callbacks=Probe(), fast_dev_run=1).fit(model(), data())
    assert dtypes == {"params": torch.bfloat16, "loss": torch.float32}


class _Ranks(L.Callback):
    """Writes what rank 0 saw."""

    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            torch.save({"weights": weights(pl_module), "metrics": metrics}, self.path)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_two_ranks_train_and_log_as_one_does(make_trainer, tmp_path):
    """Also ragged: 45 training examples in batches of 8, and 15 in validation, over two gloo processes."""
    start = model().state_dict()
    seen = {}
    for ranks, batch_size in ((1, 10), (2, 5)):
        m = model(penalties={"prior": ae.WeightPrior(0.5, 10.0)})
        m.load_state_dict(start, strict=False)
        options = {"strategy": "ddp_spawn"} if ranks > 1 else {}
        trainer = make_trainer(
            devices=ranks, max_epochs=2, log_every_n_steps=2, callbacks=_Ranks(tmp_path / f"{ranks}.pt"), **options
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
            trainer.fit(m, data(n=54, batch_size=batch_size, val_fraction=14 / 54))
        seen[ranks] = torch.load(tmp_path / f"{ranks}.pt")
    torch.testing.assert_close(seen[2]["weights"], seen[1]["weights"])
    assert seen[2]["metrics"] == pytest.approx(seen[1]["metrics"], rel=1e-5)
    assert {"val/loss", "val/fvu", "train/prior", "train/loss_epoch"} <= set(seen[1]["metrics"])


# -- logging ----------------------------------------------------------------------------------------------------------


class Recorder(L.Callback):
    """Every batch's loss, and what the logger was given."""

    def __init__(self):
        self.losses, self.sizes, self.logged = [], [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["terms"]["loss"]))
        self.sizes.append(len(batch))


class MemoryLogger(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def mean(losses, sizes):
    return sum(a * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_logged_step_is_the_mean_since_the_last_one_and_an_epoch_that_of_all(accumulate, make_trainer):
    recorder, logger = Recorder(), MemoryLogger()
    trainer = make_trainer(
        callbacks=recorder, logger=logger, log_every_n_steps=2, accumulate_grad_batches=accumulate, max_epochs=1
    )
    trainer.fit(model(), data(n=80, batch_size=7, val_fraction=0.0))  # 11 full batches and one of 3
    rows = [row["train/loss"] for _, row in logger.rows if "train/loss" in row]
    width = 2 * accumulate
    for i, row in enumerate(rows):
        window = slice(i * width, (i + 1) * width)
        assert row == pytest.approx(mean(recorder.losses[window], recorder.sizes[window]), rel=1e-5)
    assert len(rows) == 12 // width
    assert trainer.callback_metrics["train/loss_epoch"].item() == pytest.approx(
        mean(recorder.losses, recorder.sizes), rel=1e-5
    )


def test_every_term_is_logged_raw_in_every_stage(make_trainer):
    m = model(code=Shrink(), penalties={"q": ae.OrthogonalityPenalty(0.5)})
    trainer = make_trainer(log_every_n_steps=1)
    trainer.fit(m, data())
    names = set(trainer.callback_metrics)
    for term in ("loss", "reconstruction", "norm", "q"):
        assert {f"train/{term}", f"train/{term}_epoch", f"val/{term}"} <= names
    assert {"val/mse", "val/mae", "val/fvu"} <= names
    got = {name: trainer.callback_metrics[f"val/{name}"].item() for name in ("loss", "reconstruction", "norm", "q")}
    assert got["loss"] == pytest.approx(got["reconstruction"] + 3.0 * got["norm"] + 0.5 * got["q"], rel=1e-5)


def test_several_validation_sets_are_kept_apart(make_trainer):
    m, one, two = model(), torch.rand(8, 6), torch.rand(8, 6) + 1
    loaders = [torch.utils.data.DataLoader(x, batch_size=4) for x in (one, two)]
    results = make_trainer().validate(m, loaders, verbose=False)
    for i, x in enumerate((one, two)):
        expected = m.terms(x, m(x))["reconstruction"].mean().item()
        assert results[i][f"val/reconstruction/dataloader_idx_{i}"] == pytest.approx(expected, rel=1e-5)


class _NoReadback(TorchDispatchMode):
    """Fails on any operation that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert "_local_scalar_dense" not in name
        assert "nonzero" not in name
        return func(*args, **(kwargs or {}))


def test_a_training_step_reads_nothing_back_off_log_steps(make_trainer):
    class Watch(L.Callback):
        steps = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:  # after the first batch's check, before the first log step
                self.mode = _NoReadback()
                self.mode.__enter__()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:  # the optimizer is torch's
                self.mode.__exit__(None, None, None)
                Watch.steps += 1

    m = model(code=Shrink(), penalties={"q": ae.OrthogonalityPenalty(), "j": ae.JacobianPenalty()})
    make_trainer(callbacks=Watch(), log_every_n_steps=50).fit(m, data())
    assert Watch.steps == 1
    with _NoReadback():
        means = RunningMeans()
        step = m.training_step(torch.rand(4, 6), 0)
        means.update(step["terms"], 4)


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [3, 6, 9])
def test_a_resumed_run_equals_an_uninterrupted_one(every, make_trainer, tmp_path):
    """Weights bit by bit and logged means, with random corruption, shuffling and a checkpoint amid an epoch."""

    def build():
        return ae.DenoisingAutoencoder(6, 2, hidden=(5,), corruption=ae.GaussianNoise(0.3), lr=0.01)

    start = build().state_dict()
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    writes = {"callbacks": saver, "enable_checkpointing": True}
    whole = build()
    whole.load_state_dict(start)
    trainer = make_trainer(max_epochs=3, **writes)
    trainer.fit(whole, data())
    resumed = build()
    again = make_trainer(max_epochs=3, **writes)
    again.fit(resumed, data(), ckpt_path=tmp_path / f"step={every}.ckpt")
    assert again.global_step == trainer.global_step == 18
    assert torch.equal(weights(resumed), weights(whole))
    for name in ("train/loss_epoch", "val/loss"):
        assert torch.equal(again.callback_metrics[name], trainer.callback_metrics[name])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 4}], ids=str)
@pytest.mark.parametrize("then", [{"max_steps": 15}, {"max_epochs": 3}], ids=str)
@pytest.mark.parametrize("first", [{"max_steps": 4}, {"max_steps": 6}, {"max_steps": 8}, {"max_epochs": 1}], ids=str)
def test_a_run_goes_on_after_a_fit_that_ended_amid_an_epoch_or_with_it(first, then, options, make_trainer, tmp_path):
    """Saved by hand after the fit, and resumed to a later end."""

    def fit(limit, path=None):
        torch.manual_seed(2)
        m, seen = ae.DenoisingAutoencoder(6, 2, hidden=(5,), corruption=ae.GaussianNoise(0.3), lr=0.01), []

        class See(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                seen.append((trainer.current_epoch, batch_idx, batch.sum().item()))

        trainer = make_trainer(callbacks=See(), **limit, **options)
        trainer.fit(m, data(), ckpt_path=path)
        return m, seen, trainer

    _, before, trainer = fit(first)
    epoch = trainer.current_epoch
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert trainer.current_epoch == epoch  # what is written down leaves the Trainer alone
    resumed, after, _ = fit(then, tmp_path / "after.ckpt")
    whole, batches, _ = fit(then)
    assert before + after == batches
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("then", [{"max_steps": 15}, {"max_epochs": 3}], ids=str)
def test_a_run_of_steps_goes_on_after_the_checkpoint_of_an_epochs_end(then, make_trainer, tmp_path):
    saver = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1
    )
    runs = []
    for path in (None, tmp_path / "epoch=0.ckpt"):
        torch.manual_seed(2)
        m = ae.DenoisingAutoencoder(6, 2, hidden=(5,), corruption=ae.GaussianNoise(0.3), lr=0.01)
        trainer = make_trainer(callbacks=saver, enable_checkpointing=True, **then)
        trainer.fit(m, data(), ckpt_path=path)
        runs.append((weights(m), trainer.current_epoch, trainer.global_step))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_run_logs_on_as_if_it_was_not(step, make_trainer, tmp_path):
    """Amid an epoch and at its end, every row of every epoch."""
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    start = model().state_dict()
    rows = []
    for checkpoint in (None, tmp_path / f"step={step}.ckpt"):
        logger, m = MemoryLogger(), model()
        m.load_state_dict(start)
        options = {"log_every_n_steps": 3, "logger": logger, "enable_checkpointing": True}
        make_trainer(callbacks=saver, max_epochs=3, **options).fit(m, data(), ckpt_path=checkpoint)
        rows.append([(at, row) for at, row in logger.rows if at >= step and "epoch" in row])
    assert rows[0] == rows[1]
    assert {"train/loss", "train/loss_epoch", "val/loss"} <= {name for _, row in rows[0] for name in row}


def test_a_prior_that_counts_the_data_does_not_disturb_a_resumed_run(make_trainer, tmp_path):
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"callbacks": saver, "enable_checkpointing": True}
    whole = model(penalties={"prior": ae.WeightPrior()})
    resumed = model(penalties={"prior": ae.WeightPrior()})
    make_trainer(**options).fit(whole, data())
    make_trainer(**options).fit(resumed, data(), ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("loaders", ["ours", "torch"])
@pytest.mark.parametrize("every", [1.0, 0.5])
def test_validation_changes_nothing_in_training(loaders, every, make_trainer):
    def build():
        return ae.ContractiveAutoencoder(6, 2, hidden=(4,), num_projections=1, corruption=ae.GaussianNoise(0.1, True))

    start, x, ends = build().state_dict(), torch.rand(32, 6), []
    for val in (None, torch.rand(16, 6)):
        m = build()
        m.load_state_dict(start)
        L.seed_everything(1, verbose=False)
        trainer = make_trainer(max_epochs=2, val_check_interval=every)
        if loaders == "ours":
            trainer.fit(m, ae.TensorDataModule(x, val=val, batch_size=8, val_fraction=0.0))
        else:
            loader = torch.utils.data.DataLoader  # each draws a number when its iteration begins
            train = loader(x, batch_size=8, shuffle=True)
            trainer.fit(m, train, None if val is None else loader(val, batch_size=8))
        ends.append(weights(m))
    assert torch.equal(*ends)


def test_hooks_of_the_users_own_need_no_super(make_trainer):
    class Hooked(WithSGD):
        def on_fit_start(self): ...
        def on_train_start(self): ...
        def on_train_batch_start(self, batch, batch_idx): ...
        def on_train_batch_end(self, outputs, batch, batch_idx): ...
        def on_validation_epoch_end(self): ...
        def on_save_checkpoint(self, checkpoint): ...

    m = Hooked(6, 2, hidden=(5,), activation="tanh", penalties={"prior": ae.WeightPrior()})
    trainer = make_trainer(log_every_n_steps=1)
    trainer.fit(m, data())
    assert {"train/loss", "train/prior_epoch", "val/loss"} <= set(trainer.callback_metrics)
    assert m.penalties["prior"].num_examples == 48


# -- compile, copy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: ae.LinearAutoencoder((1, 6, 6), 2),
        lambda: ae.ConvAutoencoder((1, 6, 6), 2, loss=ae.ContinuousBernoulliNLL()),
        lambda: ae.DenoisingAutoencoder((1, 6, 6), 2, loss=ae.LaplaceNLL(learn_scale=True)),
        lambda: ae.ContractiveAutoencoder((1, 6, 6), 2, loss=ae.BernoulliNLL()),
        lambda: ae.ContractiveAutoencoder((1, 6, 6), 2, hidden=(4,), loss=ae.GaussianNLL()),
        lambda: ae.MLPAutoencoder((1, 6, 6), 2, penalties={"p": ae.WeightPrior(num_examples=5)}),
        lambda: ae.MLPAutoencoder((1, 6, 6), 2, loss=ae.ZeroInflatedNegativeBinomialNLL(6, library_size=True)),
    ],
)
def test_a_step_compiles_without_a_graph_break(build):
    m = build()
    x = torch.rand(4, 1, 6, 6).round()
    eager = m.eval().training_step(x, 0)["terms"]
    compiled = torch.compile(m.training_step, fullgraph=True, backend="aot_eager")(x, 0)
    for name, value in eager.items():
        torch.testing.assert_close(compiled["terms"][name], value)
    compiled["loss"].backward()
    gradient = weights_gradient(m)
    m.zero_grad()
    m.training_step(x, 0)["loss"].backward()
    torch.testing.assert_close(gradient, weights_gradient(m))


def weights_gradient(m):
    return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])


# -- errors at the door -----------------------------------------------------------------------------------------------


def test_nan_in_the_first_batch_is_an_error(make_trainer):
    x = torch.rand(8, 6)
    x[3, 2] = math.nan
    with pytest.raises(ValueError, match=r"x: expected finite numbers, got 1 NaN or infinite of 48"):
        make_trainer().fit(model(), ae.TensorDataModule(x, batch_size=8, val_fraction=0.0))


def test_training_data_are_looked_at_even_after_clean_validation_data(make_trainer):
    x = torch.rand(8, 6)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"expected finite numbers, got 1 NaN"):
        make_trainer().fit(model(), ae.TensorDataModule(x, val=torch.rand(8, 6), batch_size=8))


def test_a_loss_that_stops_being_finite_is_warned_of(make_trainer):
    x = torch.rand(64, 6)
    x[1:] = torch.where(torch.arange(63)[:, None] > 40, math.inf, x[1:])
    loader = torch.utils.data.DataLoader(x, batch_size=8)
    with pytest.warns(UserWarning, match=r"train/reconstruction is not finite: look for NaN in the data .* at step 8"):
        make_trainer(log_every_n_steps=8).fit(model(), loader)


def test_float64_data_for_float32_weights_are_an_error(make_trainer):
    loader = torch.utils.data.DataLoader(torch.rand(8, 6, dtype=torch.float64), batch_size=4)
    with pytest.raises(TypeError, match=r"expected torch.float32 as the weights are, got float64"):
        make_trainer().fit(model(), loader)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_ssim_in_validation_is_that_of_intensities_from_0_to_1(activation, make_trainer):
    """The same pictures in [-1, 1] for a tanh and in [0, 1] for a sigmoid: the same similarity to the same output."""
    x = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(2 * x - 1 if activation == "tanh" else x, batch_size=4)
    m = ae.ConvAutoencoder((1, 12, 12), 2, channels=(4,), loss=ae.SquaredError(activation))
    trainer = make_trainer()
    trainer.validate(m, loader, verbose=False)
    x_hat = m.reconstruct(next(iter(loader))).detach()
    x_hat = (x_hat + 1) / 2 if activation == "tanh" else x_hat
    expected = structural_similarity_index_measure(x_hat, x, data_range=1.0)
    torch.testing.assert_close(trainer.callback_metrics["val/ssim"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x", [torch.rand(4, 1, 12, 12) - 0.5, 255 * torch.rand(4, 1, 12, 12)])
def test_images_of_an_unknown_range_are_warned_of_unless_the_loss_names_it(x):
    m = ae.ConvAutoencoder((1, 12, 12), 2, channels=(4,))
    with pytest.warns(UserWarning, match="psnr and ssim take images to have a range of 1, from 0 on"):
        m.configure_metrics(x)
    loss = ae.WeightedLoss({"pixel": ae.SquaredError(), "ssim": ae.SSIMLoss(low=-0.5, data_range=300.0)})
    metrics = ae.ConvAutoencoder((1, 12, 12), 2, channels=(4,), loss=loss).configure_metrics(x)
    assert (metrics["ssim"].low, metrics["ssim"].data_range) == (-0.5, 300.0)


def test_images_of_another_range_are_warned_of(make_trainer):
    m = ae.ConvAutoencoder((1, 12, 12), 2, channels=(4,))
    loader = torch.utils.data.DataLoader(255 * torch.rand(4, 1, 12, 12), batch_size=4)
    with pytest.warns(UserWarning, match="psnr and ssim take images to have a range of 1"):
        make_trainer().validate(m, loader, verbose=False)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({"loss": nn.MSELoss()}, "loss: expected a ReconstructionLoss, got a MSELoss"),
        ({"loss": ae.BernoulliNLL}, "loss: expected a ReconstructionLoss, got the class BernoulliNLL"),
        ({"code": nn.Identity()}, "code: expected a Code, got a Identity"),
        ({"penalties": [ae.WeightPrior()]}, "penalties: expected a Mapping, got a list"),
        ({"penalties": {"p": nn.Identity()}}, r"penalties\['p'\]: expected a Penalty, got a Identity"),
    ],
)
def test_a_box_of_another_type_is_an_error(boxes, message):
    with pytest.raises(TypeError, match=message):
        model(**boxes)


def test_a_term_of_another_shape_is_an_error():
    class Wide(ae.MLPAutoencoder):
        def terms(self, x, output):
            return super().terms(x, output) | {"z": output.z}

    with pytest.raises(ValueError, match=r"terms: 'z' must have shape \(4,\) or \(\), got \(4, 2\)"):
        Wide(6, 2).training_step(torch.rand(4, 6), 0)


def test_a_code_that_forgets_a_weight_is_an_error():
    class Forgetful(Shrink):
        def weights(self):
            return {}

    with pytest.raises(ValueError, match=r"Forgetful: charges \['norm'\], but weights\(\) has \[\]"):
        model(code=Forgetful()).training_step(torch.rand(4, 6), 0)


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_targets_outside_the_support_are_an_error_in_every_stage(stage, make_trainer):
    m = model(loss=ae.BernoulliNLL())
    d = ae.TensorDataModule(torch.rand(8, 6) * 255, val=torch.rand(8, 6) * 255, batch_size=8)
    with pytest.raises(ValueError, match=r"BernoulliNLL: targets must lie in \[0, 1\], got values from .* to 2"):
        getattr(make_trainer(), stage)(m, d)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(8, 7), ValueError, r"MLPEncoder: expected a batch \(B, 6\), got \(4, 7\)"),
        (torch.ones(8, 6, dtype=torch.int64), TypeError, "expected floating-point data, got torch.int64"),
        (torch.rand(8), ValueError, r"expected a batch \(B, \*event\) with B > 0, got \(4,\)"),
    ],
)
def test_data_of_another_shape_or_type_is_an_error(x, error, message, make_trainer):
    with pytest.raises(error, match=message):
        make_trainer().fit(model(), torch.utils.data.DataLoader(x, batch_size=4))


def test_a_decoder_of_another_shape_is_an_error():
    m = ae.Autoencoder(ae.LinearEncoder(6, 2), nn.Linear(2, 5))  # which does not say its shape
    x = torch.rand(3, 6)
    with pytest.raises(ValueError, match=r"SquaredError: for targets of shape \(3, 6\) the decoder must give \(3, 6\)"):
        m.terms(x, m(x))


@pytest.mark.parametrize("loss", [ae.SquaredError(), ae.ZeroInflatedNegativeBinomialNLL()])
def test_a_decoder_whose_shape_is_known_is_refused_when_built(loss):
    wanted = loss.params_shape((6,))
    with pytest.raises(ValueError, match=rf"decoder: for examples of shape \(6,\) and a {type(loss).__name__} it must"):
        ae.Autoencoder(ae.LinearEncoder(6, 2), ae.LinearDecoder(2, 5), loss)
    ae.Autoencoder(ae.LinearEncoder(6, 2), ae.LinearDecoder(2, wanted), loss)
    # a corruption of one's own may show the encoder less than the loss sees
    ae.Autoencoder(ae.LinearEncoder(3, 2), ae.LinearDecoder(2, wanted), loss, corruption=nn.AvgPool1d(2))


def test_a_decoder_that_ends_in_the_losss_activation_is_warned_of():
    decoder = nn.Sequential(nn.Linear(2, 6), nn.Sigmoid())
    with pytest.warns(UserWarning, match="ends in Sigmoid, and BernoulliNLL applies sigmoid to its output once more"):
        ae.Autoencoder(nn.Linear(6, 2), decoder, ae.BernoulliNLL())
    ae.Autoencoder(nn.Linear(6, 2), decoder)  # squared error applies none: nothing to say


@pytest.mark.parametrize("name", ["loss", "reconstruction", "norm", "mse"])
def test_two_terms_of_one_name_are_an_error(name):
    with pytest.raises(ValueError, match=f"penalties: \\['{name}'\\] is the name of another term"):
        model(code=Shrink(), penalties={name: ae.OrthogonalityPenalty()})


@pytest.mark.parametrize("build", [ae.LinearAutoencoder, ae.MLPAutoencoder, ae.DenoisingAutoencoder])
@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_a_latent_without_dimensions_is_an_error(build, size, error):
    with pytest.raises(error, match="latent_dim: expected a positive whole number"):
        build(6, size)


@pytest.mark.parametrize("kind", ["denoising", "dictionary", "quantized"])
def test_a_checkpoint_amid_an_accumulation_resumes_to_the_same_run(kind, make_trainer, tmp_path):
    """Of every batch, within windows of four and at their ends, and of validations within them."""

    class SaveEach(L.pytorch.callbacks.Checkpoint):  # which Lightning calls last
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{batch_idx}.ckpt")

        def on_validation_end(self, trainer, pl_module):
            batch = trainer.fit_loop.epoch_loop.batch_idx
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{batch}-val.ckpt")

    def fit(callbacks=(), path=None):
        torch.manual_seed(2)
        m = {
            "denoising": lambda: ae.DenoisingAutoencoder(6, 2, hidden=(5,), corruption=ae.GaussianNoise(0.3), lr=0.01),
            "dictionary": lambda: ae.DictionaryAutoencoder(6, 12, ae.JumpReLUCode(12, 0.1, target_l0=3)),
            "quantized": lambda: ae.VectorQuantizedAutoencoder(
                *ae.mlp_pair(6, 2, (5,)), code=ae.VectorQuantizerCode(3, 2)
            ),
        }[kind]()
        options = {"accumulate_grad_batches": 4, "val_check_interval": 3, "enable_checkpointing": bool(callbacks)}
        options["num_sanity_val_steps"] = 0
        make_trainer(max_epochs=3, callbacks=list(callbacks), **options).fit(m, data(), ckpt_path=path)
        return m

    whole = fit([SaveEach()])
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 3 * (6 + 2)
    assert {"gradients" in torch.load(path, weights_only=False).get("lightning_ae", {}) for path in saved} == {
        True,
        False,
    }
    for path in saved:
        assert torch.equal(weights(fit(path=path)), weights(whole)), path.name


@pytest.mark.parametrize("at", range(8))
def test_an_exception_amid_a_batch_says_whether_gradients_are_lost(at, make_trainer, tmp_path):
    """They are, if there were batches before it since the last step: with windows of four in all but the first."""

    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == at:
                raise RuntimeError("stop")

    saved = L.pytorch.callbacks.OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer(callbacks=[saved, Interrupt()], accumulate_grad_batches=4, enable_checkpointing=True)
    loader = torch.utils.data.DataLoader(torch.rand(32, 6), 4)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="stop"):
            trainer.fit(model(), loader)
    assert any("cannot hold the gradients" in str(w.message) for w in found) == (at % 4 > 0)
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


class _ByHand(ae.MLPAutoencoder):
    """Steps after each third batch, with two optimizers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        self.manual_backward(result["loss"] / 3)
        if batch_idx % 3 == 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return result

    def configure_optimizers(self):
        parts = (self.encoder, torch.optim.Adam), (self.decoder, torch.optim.SGD)
        return [kind(part.parameters(), 0.01) for part, kind in parts]


def test_a_checkpoint_between_steps_by_hand_has_the_gradients_so_far(make_trainer, tmp_path):
    class SaveEach(L.pytorch.callbacks.Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{batch_idx}.ckpt")

    def fit(callbacks=(), path=None):
        torch.manual_seed(2)
        m = _ByHand(6, 2, hidden=(5,))
        options = {"enable_checkpointing": bool(callbacks), "limit_val_batches": 0, "max_epochs": 2}
        make_trainer(callbacks=list(callbacks), **options).fit(m, data(), ckpt_path=path)
        return m

    whole = fit([SaveEach()])
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 2 * 6
    for path in saved:
        assert torch.equal(weights(fit(path=path)), weights(whole)), path.name


class _SaveAt(L.pytorch.callbacks.Checkpoint):
    """Writes a file after the second of each four batches, and the weights at the end."""

    def __init__(self, folder, end):
        self.folder, self.end = folder, end

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(weights(pl_module), self.folder / self.end)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_on_two_ranks_a_checkpoint_amid_an_accumulation_has_the_gradients_of_both(make_trainer, tmp_path):
    start = model().state_dict()
    for end, path in (("whole", None), ("resumed", tmp_path / "1.ckpt")):
        m = model()
        m.load_state_dict(start)
        trainer = make_trainer(
            devices=2, strategy="ddp_spawn", max_epochs=2, accumulate_grad_batches=4, enable_checkpointing=True,
            callbacks=_SaveAt(tmp_path, end),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
            trainer.fit(m, data(batch_size=6), ckpt_path=path)
    torch.testing.assert_close(torch.load(tmp_path / "resumed"), torch.load(tmp_path / "whole"), rtol=1e-5, atol=1e-7)
