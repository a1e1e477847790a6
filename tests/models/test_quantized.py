"""The vector-quantised autoencoder, in and out of a Trainer."""

import copy
import math
import pickle
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_ae as ae
from lightning_ae.codes.ranks import Ranks

FSQ = ae.FiniteScalarQuantizerCode


def maps(code=None, **options):
    """A convolutional model with 2×2 maps of four channels."""
    code = ae.VectorQuantizerCode(12, 4) if code is None else code
    pair = ae.conv_pair((1, 8, 8), 4, channels=(4, 8), activation="tanh", spatial=True)
    return ae.VectorQuantizedAutoencoder(*pair, ae.BernoulliNLL(), code=code, lr=0.01, **options)


def flat(**options):
    """Two vectors of two numbers each."""
    code = ae.VectorQuantizerCode(12, 2, **options)
    return ae.VectorQuantizedAutoencoder(*ae.mlp_pair(6, 4, hidden=(8,), activation="tanh"), code=code, lr=0.01)


def tensors(model):
    """Everything that a checkpoint holds."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


@pytest.mark.parametrize("code", [None, FSQ([5, 4, 3, 3])], ids=["vq", "fsq"])
def test_indices_are_all_that_the_decoder_needs(code):
    model = maps(code)
    model.code.started = True
    x = torch.rand(3, 1, 8, 8)
    indices = model.indices(x)
    assert indices.shape == (3, 1, 2, 2)
    assert 0 <= indices.amin() <= indices.amax() < model.code.num_codes
    with torch.no_grad():
        torch.testing.assert_close(model.decode_indices(indices), model.reconstruct(x))
    assert model.bits_per_example() == pytest.approx(4 * math.log2(model.code.num_codes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("code", [None, FSQ([5, 4, 3, 3])], ids=["vq", "fsq"])
def test_indices_are_decoded_in_the_precision_of_the_model(code, dtype):
    model = maps(copy.deepcopy(code)).to(dtype)
    model.code.started = True
    x = torch.rand(3, 1, 8, 8, dtype=dtype)
    with torch.no_grad():
        assert model(x).z.dtype == dtype
        assert torch.equal(model.decode_indices(model.indices(x)), model.reconstruct(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("code", [ae.VectorQuantizerCode(12, 4, kmeans=False), FSQ([5, 4, 3, 3])], ids=["vq", "fsq"])
def test_the_decoder_gets_one_memory_layout_whatever_the_latent_comes_from(code, layout):
    """Convolutions of another layout are other kernels, which on some processors round differently."""
    code, h = copy.deepcopy(code), torch.randn(3, 8, 5, 4).contiguous(memory_format=layout)
    latents = [code.train()(h).z, code.eval()(h).z, code.encode(h), code.lookup(code.indices(h))]
    assert [z.stride() for z in latents] == 4 * [torch.empty(3, 8, 5, 4).stride()]
    assert all(torch.equal(z, latents[1]) for z in latents[2:])


def test_the_objective_is_the_loss_plus_the_weighted_commitment():
    model = maps(ae.VectorQuantizerCode(12, 4, kmeans=False, commitment=0.5)).eval()
    x = torch.rand(3, 1, 8, 8)
    terms = model.terms(x, model(x))
    assert set(terms) == {"reconstruction", "commitment"}
    h = model.encoder(x)
    e = model.code.lookup(model.indices(x))
    expected = torch.nn.functional.binary_cross_entropy(model.decode(e), x, reduction="none").sum((1, 2, 3))
    expected = expected + 0.5 * (h - e).square().sum((1, 2, 3))
    torch.testing.assert_close(model.objective(terms), expected)
    assert set(maps(FSQ([5, 5])).terms(x, maps(FSQ([5, 5]))(x))) == {"reconstruction"}


def test_the_default_code_has_the_decoders_channels():
    model = ae.VectorQuantizedAutoencoder(*ae.conv_pair((1, 8, 8), 5, spatial=True))
    assert (model.code.num_codes, model.code.dim) == (512, 5)
    with pytest.raises(ValueError, match=r"^code: expected one"):
        ae.VectorQuantizedAutoencoder(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"^code: expected a VectorQuantizerCode"):
        ae.VectorQuantizedAutoencoder(*ae.mlp_pair(6, 4), code=ae.L1Code(0.1))
    plain = ae.VectorQuantizedAutoencoder(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), code=FSQ([5, 5]))
    with pytest.raises(ValueError, match="latent_shape"):
        plain.bits_per_example()
    with pytest.raises(ValueError, match=r"^code: expected a latent"):
        maps(ae.VectorQuantizerCode(8, 3))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_training_learns_without_a_trainer(duplicate, make_trainer):
    copies = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.append(duplicate(pl_module.code))

    model, x = maps(), torch.rand(32, 1, 8, 8)
    make_trainer(callbacks=Copy()).fit(model, DataLoader(x, batch_size=8))
    code = copies[-1]
    before = code.codebook.clone()
    for _ in range(2):
        code(model.encoder(x).detach())
    assert not torch.equal(code.codebook, before)


def test_a_loop_without_a_trainer_learns():
    x = torch.as_tensor(ae.DigitsDataModule(seed=0).splits()["train"][0])[:512]
    model = maps(ae.VectorQuantizerCode(32, 4)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(150):
        batch = x[64 * (step % 8) :][:64]
        loss = model.objective(model.terms(batch, model(batch))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert model.code.started
    assert np.mean(losses[-8:]) < 0.7 * losses[1]
    assert len(model.eval().indices(x).unique()) > 16


@pytest.mark.parametrize("every", [1, 5, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(every, make_trainer, tmp_path):
    """Weights and codebook bit by bit: before k-means (32 vectors are wanted), just after it, and amid an epoch."""
    x = torch.rand(96, 6)

    def build(accumulate=2):
        saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"callbacks": saver, "enable_checkpointing": True, "accumulate_grad_batches": accumulate}
        code = ae.VectorQuantizerCode(32, 2, expire=0.2)
        pair = ae.mlp_pair(6, 4, hidden=(8,), activation="tanh")
        model = ae.VectorQuantizedAutoencoder(*pair, code=code, lr=0.01)
        return model, make_trainer(max_epochs=3, **options), ae.TensorDataModule(x, batch_size=8, val_fraction=0)

    whole, trainer, data = build()
    trainer.fit(whole, data)
    assert whole.code.started
    assert int(whole.code.moved) > 0
    resumed, trainer, data = build()
    trainer.fit(resumed, data, ckpt_path=tmp_path / f"step={every}.ckpt")
    assert trainer.global_step == 18
    same(tensors(resumed), tensors(whole))


def test_a_checkpoint_rebuilds_the_model_with_its_codebook(make_trainer, tmp_path):
    model = maps(commitment := ae.VectorQuantizerCode(12, 4, commitment=0.7))
    assert model.code is commitment
    trainer = make_trainer()
    trainer.fit(model, DataLoader(torch.rand(32, 1, 8, 8), batch_size=16))
    trainer.save_checkpoint(tmp_path / "vq.ckpt")
    loaded = ae.load(tmp_path / "vq.ckpt")
    assert loaded.code.started
    assert loaded.code.commitment == 0.7
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded.indices(x), model.indices(x))
    assert torch.equal(loaded.code.codebook, model.code.codebook)


@pytest.mark.parametrize("decay", [0.9, None])
def test_accumulated_batches_train_as_one_does(decay, make_trainer):
    x, seen = torch.randn(120, 6), {}
    start = flat(decay=decay).state_dict()
    for windows, batch_size in ((1, 24), (3, 8)):
        model = flat(decay=decay, expire=0.6)
        model.load_state_dict({**start, "code._extra_state": model.state_dict()["code._extra_state"]})
        data = DataLoader(x, batch_size=batch_size)
        make_trainer(max_epochs=4, accumulate_grad_batches=windows).fit(model, data)
        assert model.code.started
        seen[windows] = tensors(model)
    assert int(seen[1]["code.moved"]) > 0
    for name in ("code.codebook", "code.share", "code.moved", "encoder.layers.0.weight"):
        torch.testing.assert_close(seen[3][name], seen[1][name], rtol=1e-3, atol=1e-4, msg=name)


class _Ranks(L.Callback):
    """Writes what rank 0 has in the end."""

    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        for name in ("codebook", "share", "pool"):
            value = getattr(pl_module.code, name).detach()
            others = trainer.strategy.all_gather(value.clone())
            assert (others == value).all(), name  # the same on all
        if trainer.is_global_zero:
            torch.save(tensors(pl_module), self.path)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_two_ranks_learn_the_codebook_of_one(make_trainer, tmp_path):
    x, seen = torch.randn(60, 6), {}
    start = flat(decay=0.9).state_dict()
    for ranks, batch_size in ((1, 10), (2, 5)):
        model = flat(decay=0.9, expire=0.3)
        model.load_state_dict({**start, "code._extra_state": model.state_dict()["code._extra_state"]})
        options = {"strategy": "ddp_spawn"} if ranks > 1 else {}
        trainer = make_trainer(devices=ranks, max_epochs=3, callbacks=_Ranks(tmp_path / f"{ranks}.pt"), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
            trainer.fit(model, ae.TensorDataModule(x, batch_size=batch_size, val_fraction=0))
        seen[ranks] = torch.load(tmp_path / f"{ranks}.pt")
    assert int(seen[1]["code.moved"]) > 0
    for name in seen[1]:
        if "recent" not in name:  # what a rank itself has seen, already put together
            torch.testing.assert_close(seen[2][name], seen[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("started", [True, False])
def test_a_compiled_step_is_one_graph_with_the_same_loss_gradients_and_state(decay, started, make_trainer):
    torch._dynamo.reset()
    model = maps(ae.VectorQuantizerCode(12, 4, decay=decay, kmeans=not started)).train()
    model.trainer = make_trainer()
    x, ends = torch.rand(8, 1, 8, 8), []
    for compiled in (False, True):
        own = copy.deepcopy(model)
        own.code.managed = True
        step = torch.compile(own.training_step, fullgraph=True, backend="aot_eager") if compiled else own.training_step
        for _ in range(2):
            own.zero_grad()
            loss = step(x, 0)["loss"]
            loss.backward()
        own.code.after_step(Ranks())
        grads = {f"grad {name}": p.grad for name, p in own.named_parameters() if p.grad is not None}
        ends.append({"loss": loss.detach(), **grads, **tensors(own)})
    assert len([name for name in ends[0] if name.startswith("grad")]) > 5
    same(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_compiled_code_leaves_the_codebook_alone_until_after_step_is_called():
    torch._dynamo.reset()
    model = maps(ae.VectorQuantizerCode(12, 4, kmeans=False)).train()
    before = model.code.codebook.clone()
    step = torch.compile(
        lambda x: model.objective(model.terms(x, model(x))).mean(), backend="aot_eager", fullgraph=True
    )
    for _ in range(2):
        step(torch.rand(8, 1, 8, 8))
    assert torch.equal(model.code.codebook, before)
    model.code.after_step(Ranks())
    assert not torch.equal(model.code.codebook, before)


def test_mixed_precision_keeps_the_codebook_in_single(make_trainer):
    model = maps()
    trainer = make_trainer(precision="bf16-mixed", max_epochs=3)
    trainer.fit(model, DataLoader(torch.rand(64, 1, 8, 8), batch_size=16))
    assert model.code.started
    assert model.code.codebook.dtype == torch.float32
    assert trainer.callback_metrics["train/commitment_epoch"].isfinite()
    rounded = model.code.codebook.to(torch.bfloat16).float()
    assert not torch.equal(rounded, model.code.codebook)


def test_usage_and_perplexity_are_monitored(make_trainer):
    monitor = ae.LatentSparsityMonitor(every_n_steps=1)
    seen = []

    class Collect(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                seen.append(pl_module.indices(batch))

    model = maps(ae.VectorQuantizerCode(12, 4, kmeans=False, decay=None, expire=0.0), weight_decay=0.0)
    model.lr = 0.0  # so that codes looked up after the step are those of the step
    make_trainer(callbacks=[monitor, Collect()]).fit(model, DataLoader(torch.rand(64, 1, 8, 8), batch_size=16))
    share = np.bincount(torch.cat(seen).flatten().numpy(), minlength=12) / (64 * 4)
    used = share[share > 0]
    summary = monitor.summary()
    assert summary["codebook_usage"] == pytest.approx((share > 0).mean())
    assert summary["perplexity"] == pytest.approx(math.exp(-(used * np.log(used)).sum()))


def test_expiry_keeps_a_large_codebook_in_use_on_digits(make_trainer):
    used = {}
    for expire in (0.0, 0.05):
        L.seed_everything(0, verbose=False)
        code = ae.VectorQuantizerCode(128, 8, decay=0.95, kmeans=False, expire=expire)
        pair = ae.conv_pair((1, 8, 8), 8, channels=(8, 16), spatial=True)
        model = ae.VectorQuantizedAutoencoder(*pair, ae.BernoulliNLL(), code=code, lr=0.005)
        data = ae.DigitsDataModule(seed=0, batch_size=64)
        make_trainer(max_epochs=8, limit_val_batches=0).fit(model, data)
        x = torch.as_tensor(data.splits()["test"][0])
        used[expire] = len(model.eval().indices(x).unique())
    assert used[0.0] < 64
    assert used[0.05] > 100


@pytest.mark.parametrize(
    "code", [ae.FiniteScalarQuantizerCode([8, 6, 5]), ae.VectorQuantizerCode(240, 3, kmeans=False)]
)
def test_indices_that_are_no_codes_are_an_error(code):
    model = ae.VectorQuantizedAutoencoder(*ae.conv_pair((1, 8, 8), 3, (4, 4), spatial=True), code=code)
    for wrong in (-1, 240):
        with pytest.raises(ValueError, match=f"indices: expected numbers from 0 to 239, got .* {wrong}"):
            model.decode_indices(torch.full((1, 1, 2, 2), wrong))


def test_indices_are_predicted_too():
    code = ae.VectorQuantizerCode(16, 3, kmeans=False)
    model = ae.VectorQuantizedAutoencoder(*ae.conv_pair((1, 8, 8), 3, (4, 4), spatial=True), code=code).eval()
    x = torch.rand(5, 1, 8, 8)
    prediction = model.predict_step(x, 0)
    assert prediction["indices"].shape == (5, 1, 2, 2)
    torch.testing.assert_close(model.decode_indices(prediction["indices"]), prediction["reconstruction"])
    torch.testing.assert_close(prediction["score"], (x - prediction["reconstruction"]).square().flatten(1).sum(1))
