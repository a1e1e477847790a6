"""The dictionary against a plain dense implementation, and what the Trainer keeps of it."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

import lightning_ae as ae
from lightning_ae import BatchTopKCode, DictionaryAutoencoder, SparseCode, TensorDataModule, TopKCode
from lightning_ae.models.upkeep import LOOK_EVERY


def randomise(model, scale=0.7):
    """Weights without any symmetry."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.decoder.atoms.copy_(torch.nn.functional.normalize(model.decoder.atoms, dim=1))
        model.input_scale.fill_(scale)
    return model


def tensors(model):
    """Parameters and buffers, copied."""
    return {name: v.detach().clone() for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def plain(model, x, k):
    """The equations, dense."""
    s, b = model.input_scale, model.pre_bias
    h = (s * x - b) @ model.encoder.weight.t() + model.encoder.bias
    on = h >= h.sort(1, descending=True).values[:, k - 1 : k]
    z = torch.where(on, h.relu(), 0.0)
    return z, (z @ model.decoder.atoms + b) / s


def test_forward_and_backward_are_those_of_the_dense_equations():
    model = randomise(DictionaryAutoencoder(5, 24, TopKCode(3)).double())
    x = torch.randn(40, 5, dtype=torch.float64)
    output = model(x)
    z, x_hat = plain(model, x, 3)
    torch.testing.assert_close(output.z.to_dense(), z)
    torch.testing.assert_close(output.params, x_hat)
    torch.testing.assert_close(model.reconstruct(x), x_hat)
    torch.testing.assert_close(model.decode(model.encode(x).to_dense()), x_hat)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = model.objective(model.terms(x, output)).mean()
    expected = (0.7**2 * (x_hat - x).square().sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    got, reference = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    assert len(names) == 4
    for name, ours, theirs in zip(names, got, reference, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_codes_that_do_not_select_go_the_dense_way():
    model = randomise(DictionaryAutoencoder(5, 24, ae.Identity()).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    h = (0.7 * x - model.pre_bias) @ model.encoder.weight.t() + model.encoder.bias
    torch.testing.assert_close(model.encode(x), h)
    torch.testing.assert_close(model(x).params, (h @ model.decoder.atoms + model.pre_bias) / 0.7)
    assert list(model.penalties) == []


def test_without_unit_norm_the_penalty_has_the_norm():
    class Charged(ae.Code):
        def forward(self, h):
            z = h.relu()
            return ae.CodeOutput(z, {"l1": z.sum(1)})

        def weights(self):
            return {"l1": 0.1}

    model = randomise(DictionaryAutoencoder(5, 24, Charged(), unit_norm=False))
    with torch.no_grad():
        model.decoder.atoms.mul_(torch.rand(24, 1) + 0.5)
    x = torch.randn(4, 5)
    output = model(x)
    h = (0.7 * x - model.pre_bias) @ model.encoder.weight.t() + model.encoder.bias
    torch.testing.assert_close(output.z, h.relu())
    torch.testing.assert_close(output.penalties["l1"], (h.relu() * model.decoder.atoms.norm(dim=1)).sum(1))


def test_it_starts_as_a_transpose_of_unit_norm():
    model = DictionaryAutoencoder(5, 24, TopKCode(3))
    torch.testing.assert_close(model.encoder.weight, model.decoder.atoms * 2 / 3)
    assert model.encoder.weight is not model.decoder.atoms
    charged = DictionaryAutoencoder(5, 24, ae.L1Code(0.1, "relu"))
    assert torch.equal(charged.encoder.weight, charged.decoder.atoms)
    torch.testing.assert_close(model.decoder.weight.norm(dim=0), torch.ones(24))


@pytest.mark.parametrize(("latents", "rate"), [(512, 4e-3), (3072, 4e-3), (12288, 2e-3)])
def test_a_rate_that_nobody_chose_falls_with_the_width_and_is_halved_for_the_encoder(latents, rate):
    model = DictionaryAutoencoder(4, latents, TopKCode(3))
    assert model.lr == pytest.approx(rate)
    assert model.dead_after == min(10_000_000, 300 * latents // 3)
    rates = {id(p): g["lr"] for g in model.configure_optimizers().param_groups for p in g["params"]}
    assert rates[id(model.encoder.weight)] == rates[id(model.encoder.bias)] == pytest.approx(rate / 2)
    assert rates[id(model.decoder.atoms)] == rates[id(model.pre_bias)] == pytest.approx(rate)


def test_a_rate_that_is_set_is_the_rate_of_all():
    given, changed = DictionaryAutoencoder(4, 8, TopKCode(3), lr=4e-3), DictionaryAutoencoder(4, 8, TopKCode(3))
    changed.lr = 1e-3
    charged = DictionaryAutoencoder(4, 8, ae.L1Code(0.1, "relu"))
    for model, rate in ((given, 4e-3), (changed, 1e-3), (charged, 1e-3)):
        assert {group["lr"] for group in model.configure_optimizers().param_groups} == {rate}
    assert charged.dead_after == 10_000_000


@pytest.mark.parametrize("unit_norm", [True, False])
def test_thresholds_start_where_twice_the_target_is_active(unit_norm):
    model = DictionaryAutoencoder(16, 64, ae.JumpReLUCode(64, 0.1, target_l0=4), unit_norm=unit_norm)
    x = 3 * torch.randn(4096, 16) + 1
    x[5] = float("nan")
    model.observe(x)
    l0 = (model.encode(x[x.isfinite().all(1)]) != 0).sum(1).double().mean()
    assert float(l0) == pytest.approx(8, rel=0.02)
    start = model.code.threshold.clone()
    torch.testing.assert_close(model.code.controller.weight, 0.3 * start[0] ** 2)
    model.observe(9 * x)  # later batches refine the scale, not the start
    assert torch.equal(model.code.threshold, start)
    again = DictionaryAutoencoder(16, 64, ae.JumpReLUCode(64, 0.1, target_l0=4), unit_norm=unit_norm)
    again.load_state_dict(model.state_dict())
    again.observe(x)
    assert torch.equal(again.code.threshold, start)
    assert again.code.controller.rate == model.code.controller.rate > 0.02
    given = DictionaryAutoencoder(16, 64, ae.JumpReLUCode(64, 0.1, target_l0=4, init_threshold=0.2))
    given.observe(x)
    torch.testing.assert_close(given.code.threshold, torch.full((64,), 0.2))


def test_weights_from_before_thresholds_started_from_data_are_what_they_were():
    old = DictionaryAutoencoder(6, 12, ae.JumpReLUCode(12, 0.1, target_l0=2, init_threshold=0.01))
    with torch.no_grad():
        old.code.log_scale.uniform_(0, 0.3)
    new = DictionaryAutoencoder(6, 12, ae.JumpReLUCode(12, 0.1, target_l0=2))
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.code.threshold, old.code.threshold)
    assert float(new.code.controller.rate) == pytest.approx(old.code.controller.rate)


def centred_norm(x):
    """Mean distance from the mean."""
    return (x - x.mean(0)).norm(dim=1).mean()


def test_normalisation_makes_the_mean_distance_from_the_mean_the_root_of_d_and_is_done_once(make_trainer, tmp_path):
    x = 30 * torch.randn(640, 9) + 500
    data = TensorDataModule(x, batch_size=32, val_fraction=0.0)
    model = DictionaryAutoencoder(9, 24, TopKCode(3))
    trainer = make_trainer()
    trainer.fit(model, data)
    s = model.input_scale.item()
    assert s * centred_norm(x).item() == pytest.approx(3.0, rel=1e-5)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = ae.load(tmp_path / "m.ckpt")
    assert again.input_scale.item() == s
    make_trainer().fit(again, TensorDataModule(x * 100, batch_size=32, val_fraction=0.0))
    assert again.input_scale.item() == s


def test_the_pre_bias_starts_at_the_mean():
    model = DictionaryAutoencoder(9, 24, TopKCode(3))
    x = torch.randn(64, 9) + 5
    model.observe(x)
    torch.testing.assert_close(model.pre_bias.detach(), x.mean(0) * 3 / centred_norm(x))


def test_further_batches_refine_mean_and_scale_and_leave_what_was_learned():
    """Batches of different sizes, as if they were one up to what the mean moved; b/s moves with the mean."""
    model = DictionaryAutoencoder(9, 24, TopKCode(3))
    x = 3 * torch.randn(600, 9) + 100
    learned = torch.linspace(-1, 1, 9)
    for i, rows in enumerate(x.split([500, 60, 40])):
        model.observe(rows)
        if i == 0:
            with torch.no_grad():
                model.pre_bias.add_(learned * model.input_scale)
    torch.testing.assert_close(model.input_scale, 3 / centred_norm(x), rtol=2e-3, atol=0)
    torch.testing.assert_close(model.pre_bias.detach() / model.input_scale, x.mean(0) + learned)


def test_rows_that_are_not_finite_do_not_spoil_the_scale():
    x = torch.randn(64, 9) + 5
    clean, holes = (DictionaryAutoencoder(9, 24, TopKCode(3)) for _ in range(2))
    clean.observe(x)
    holes.observe(torch.cat([x, torch.full((2, 9), torch.nan), torch.full((1, 9), torch.inf)]))
    torch.testing.assert_close(holes.input_scale, clean.input_scale)
    torch.testing.assert_close(holes.pre_bias, clean.pre_bias)
    nothing = DictionaryAutoencoder(9, 24, TopKCode(3))
    nothing.observe(torch.full((2, 9), torch.nan))
    assert nothing.input_scale == 1
    assert nothing.pre_bias.eq(0).all()
    with pytest.raises(ValueError, match=r"x: expected a batch \(B, 9\), got \(3, 2, 9\)"):
        nothing.observe(torch.zeros(3, 2, 9))


SHIFTED = {
    "l1": lambda: ae.L1Code(0.3, "relu"),
    "jump": lambda: ae.JumpReLUCode(32, 0.1, target_l0=3),
    "topk": lambda: TopKCode(3),
    "batch topk": lambda: BatchTopKCode(3),
    "gated": lambda: ae.GatedCode(32, 0.3),
    "soft threshold": lambda: ae.SoftThresholdCode(0.3, 0.1, 32),
}


@pytest.mark.parametrize(("name", "weight_decay"), [*((name, 0.0) for name in SHIFTED), ("l1", 0.1)])
def test_training_does_not_depend_on_where_the_data_lie(name, weight_decay, make_trainer):
    """A constant of rms 0, 10 and 1000 beside data of rms 1: the same variance explained, the same latents dead."""
    x = ae.sparse_dictionary(1536, 12, 32, 3).x
    x = (x - x.mean(0)) / x.std(0)
    direction = torch.randn(12, generator=torch.Generator().manual_seed(7))
    found = []
    for size in (0, 10, 1000):
        L.seed_everything(3, verbose=False)
        model = DictionaryAutoencoder(12, 32, SHIFTED[name](), lr=3e-3, dead_after=500, weight_decay=weight_decay)
        data = TensorDataModule(x + size * direction / direction.square().mean().sqrt(), batch_size=64)
        trainer = make_trainer(max_epochs=4, limit_val_batches=1)
        trainer.fit(model, data)
        found.append((trainer.callback_metrics["val/fvu"].item(), len(model.find_dead())))
    fvu, dead = zip(*found, strict=True)
    assert fvu[0] < 0.7
    # float32 has 6e-5 around 1000, and a selection may turn on that
    assert max(fvu) - min(fvu) < 0.02
    assert max(dead) - min(dead) <= 2


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")  # right for one process
@pytest.mark.parametrize("shuffled_by", ["module", "loader", "iterable"])
def test_scale_and_loss_do_not_depend_on_micro_batches(shuffled_by, make_trainer):
    x = ae.sparse_dictionary(1024, 12, 32, 3).x + 5

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(x)

        def __len__(self):
            return len(x)

    def loader(size):
        if shuffled_by == "module":
            return TensorDataModule(x, batch_size=size, val_fraction=0.0)
        data = Rows() if shuffled_by == "iterable" else x
        return torch.utils.data.DataLoader(data, batch_size=size, shuffle=shuffled_by == "loader")

    fitted = []
    for accumulate in (1, 4):
        L.seed_everything(3, verbose=False)
        model = DictionaryAutoencoder(12, 32, TopKCode(3), dead_after=10**6)
        trainer = make_trainer(accumulate_grad_batches=accumulate, max_epochs=2)
        trainer.fit(model, loader(64 // accumulate))
        fitted.append((trainer.callback_metrics["train/loss_epoch"], model.input_scale, model.pre_bias))
    torch.testing.assert_close(fitted[0][:2], fitted[1][:2], rtol=2e-5, atol=0)
    torch.testing.assert_close(fitted[0][2], fitted[1][2], rtol=1e-4, atol=1e-5)


def test_the_look_at_the_data_leaves_them_and_random_numbers_alone(make_trainer):
    """The rows of the first epoch, in their order, with and without the look."""

    def batches(known, persistent):
        L.seed_everything(3, verbose=False)
        model = DictionaryAutoencoder(9, 24, TopKCode(3))
        model.norm_batches.fill_(int(known))
        seen = []
        model.on_train_batch_start = lambda batch, _: seen.append(batch)
        data = torch.utils.data.DataLoader(
            x, batch_size=16, shuffle=True, num_workers=int(persistent), persistent_workers=persistent,
            generator=torch.Generator().manual_seed(1), multiprocessing_context="fork" if persistent else None,
        )  # fmt: skip
        make_trainer(max_epochs=2).fit(model, data)
        return torch.cat(seen), torch.rand(1), model.input_scale

    x = 5 * torch.randn(64, 9)
    for persistent in (False, True):
        before, number, scale = batches(True, persistent)
        after, same, estimated = batches(False, persistent)
        assert torch.equal(before, after)
        assert torch.equal(number, same)
        assert scale == 1
        torch.testing.assert_close(estimated, 3 / centred_norm(x))


@pytest.mark.parametrize("form", ["dataset", "generator", "loader"])
def test_no_row_of_a_stream_is_taken_from_training(form, make_trainer):
    x = torch.randn(320, 9) + 5

    class Stream:
        def __init__(self, source):
            self.source = source

        def __iter__(self):
            return self.source if form == "dataset" else (row for row in self.source)

    class Rows(Stream, torch.utils.data.IterableDataset):
        pass

    data = Stream(iter(x.split(16))) if form == "loader" else torch.utils.data.DataLoader(Rows(iter(x)), batch_size=16)
    seen = []
    model = DictionaryAutoencoder(9, 24, TopKCode(3))
    model.on_train_batch_start = lambda batch, _: seen.append(batch)
    make_trainer(max_epochs=1).fit(model, data)
    assert torch.equal(torch.cat(seen), x)
    torch.testing.assert_close(model.input_scale, 3 / centred_norm(x[:160]), rtol=0.02, atol=0)


def test_data_that_can_be_read_only_once_are_observed_in_the_first_steps(make_trainer):
    x = 5 * torch.randn(320, 9) + 100
    seen = []
    model = DictionaryAutoencoder(9, 24, TopKCode(3), lr=1e-3)
    model.on_train_batch_start = lambda batch, _: seen.append(batch)
    make_trainer(limit_train_batches=20).fit(model, iter(x.split(16)))
    assert torch.equal(torch.cat(seen), x)
    first = x[:160]
    torch.testing.assert_close(model.input_scale, 3 / centred_norm(first), rtol=0.05, atol=0)
    apart = model.pre_bias.detach() / model.input_scale - first.mean(0)
    assert apart.abs().max() < 0.2


def test_an_optimizer_in_which_the_pre_bias_decayed_is_resumed(make_trainer, tmp_path):
    data = TensorDataModule(torch.randn(64, 6) + 5, batch_size=16, val_fraction=0.0)

    class Before(DictionaryAutoencoder):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    for cls in (Before, DictionaryAutoencoder):
        L.seed_everything(1, verbose=False)
        model = cls(6, 24, ae.L1Code(0.1, "relu"), weight_decay=0.1)
        trainer = make_trainer()
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / f"{cls.__name__}.ckpt")
        # as a subclass of the user's resumes with its own optimizer
        for again in (DictionaryAutoencoder, cls):
            resumed = make_trainer(max_epochs=2)
            model = again(6, 24, ae.L1Code(0.1, "relu"), weight_decay=0.1)
            resumed.fit(model, data, ckpt_path=tmp_path / f"{cls.__name__}.ckpt")
            (optimizer,) = resumed.optimizers
            decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
            assert decays[model.encoder.weight] == 0.1
            assert decays[model.pre_bias] == (0.1 if again is Before else 0.0)
            assert all(optimizer.state[p]["step"] == 8 for p in model.parameters())


def test_a_tuner_that_restores_the_model_does_not_stop_the_estimate():
    model = DictionaryAutoencoder(9, 24, TopKCode(3))
    before = copy.deepcopy(model.state_dict())
    model.observe(torch.randn(64, 9))
    model.load_state_dict(before)
    x = 30 * torch.randn(64, 9) + 5
    model.observe(x)
    torch.testing.assert_close(model.input_scale, 3 / centred_norm(x))


def test_training_does_not_depend_on_the_datas_unit(make_trainer):
    x = torch.randn(256, 9)
    fitted = []
    for unit in (1.0, 1024.0):
        L.seed_everything(3, verbose=False)
        model = DictionaryAutoencoder(9, 24, TopKCode(3), dead_after=64)
        make_trainer(max_epochs=5).fit(model, TensorDataModule(unit * x, batch_size=32, val_fraction=0.0))
        fitted.append(model)
    torch.testing.assert_close(fitted[0].decoder.atoms, fitted[1].decoder.atoms, rtol=1e-4, atol=1e-5)


def test_folding_keeps_the_function_and_needs_no_scale():
    model = randomise(DictionaryAutoencoder(5, 24, TopKCode(3)).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    z, x_hat = model.encode(x).to_dense(), model.reconstruct(x)
    model.fold_normalization()
    assert model.input_scale == 1
    torch.testing.assert_close(model.encode(x).to_dense(), z)
    torch.testing.assert_close(model.reconstruct(x), x_hat)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_can_be_clipped(precision, make_trainer):
    model = DictionaryAutoencoder(9, 24, TopKCode(3))
    seen = []
    model.on_before_zero_grad = lambda _: seen.extend(
        p.grad.norm() for p in [model.encoder.weight] if p.grad is not None
    )
    trainer = make_trainer(max_epochs=2, precision=precision, gradient_clip_val=1e-3)
    trainer.fit(model, TensorDataModule(torch.randn(64, 9), batch_size=32, val_fraction=0.0))
    assert seen
    assert all(0 < norm <= 1.01e-3 for norm in seen)


@pytest.mark.parametrize(
    "code", [ae.JumpReLUCode(24, 0.1, init_threshold=0.5), ae.GatedCode(24, 0.1), ae.SoftThresholdCode(0.5, 0.1, 24)]
)
def test_folding_keeps_the_function_where_thresholds_go_by_norms(code):
    model = DictionaryAutoencoder(5, 24, code, unit_norm=False).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.decoder.atoms.mul_(1.7)
    model.input_scale.fill_(3.0)
    x = torch.randn(20, 5, dtype=torch.float64)
    z, x_hat = model.encode(x), model.reconstruct(x)
    model.fold_normalization()
    torch.testing.assert_close(model.encode(x), z)
    torch.testing.assert_close(model.reconstruct(x), x_hat)


def test_folding_refuses_before_it_changes_anything():
    model = DictionaryAutoencoder(5, 24, ae.KLSparsityCode(0.1, 1.0), unit_norm=False)
    model.input_scale.fill_(3.0)
    before = tensors(model)
    with pytest.raises(ValueError, match="KLSparsityCode"):
        model.fold_normalization()
    for name, tensor in tensors(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_the_auxiliary_of_gates_leaves_atoms_alone_without_unit_norm():
    model = DictionaryAutoencoder(5, 24, ae.GatedCode(24, 0.1), unit_norm=False).double()
    with torch.no_grad():
        model.decoder.atoms.mul_(1.7)
    x = torch.randn(20, 5, dtype=torch.float64)
    gate = model.terms(x, model(x))["gate"]
    atoms = model.decoder.atoms.detach()
    h = x @ model.encoder.weight.t() + model.encoder.bias
    expected = (h.relu() @ atoms - x).square().sum(1)
    torch.testing.assert_close(gate, expected)
    to_atoms, to_weight = torch.autograd.grad(gate.sum(), (model.decoder.atoms, model.encoder.weight))
    assert to_atoms.abs().max() < 1e-10
    torch.testing.assert_close(to_weight, torch.autograd.grad(expected.sum(), model.encoder.weight)[0])


def test_dead_latents_train_after_inference_mode_asked_for_them():
    model = DictionaryAutoencoder(5, 24, TopKCode(3))
    model.since_fired[:6] = model.dead_after
    x = torch.randn(20, 5)
    with torch.inference_mode():
        model.find_dead()
        model.terms(x, model(x))
    model.terms(x, model(x))["auxiliary"].mean().backward()
    assert (model.encoder.weight.grad[:6] != 0).any(1).all()


@pytest.mark.parametrize("code", [ae.JumpReLUCode(24, 0.1), ae.GatedCode(24, 0.1)])
def test_latents_that_start_anew_forget_the_threshold_that_killed_them(code):
    model = DictionaryAutoencoder(5, 24, code, dead_after=1)
    with torch.no_grad():
        if isinstance(code, ae.JumpReLUCode):
            code.set_threshold(torch.cat([torch.full((6,), 100.0), torch.full((18,), 0.2)]))
        else:
            code.bias[:6] = -100.0
    x = torch.randn(200, 5)
    model.count(model(x).z)
    dead = model.find_dead()
    assert dead.tolist() == list(range(6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    output = model(x)
    model.objective(model.terms(x, output)).mean().backward()
    optimizer.step()
    for parameter in code.parameters():
        optimizer.state[parameter]["exp_avg"].fill_(1.0)
    model.start_anew(dead, model.resample(x, output.params, 6), [optimizer])
    assert (model.encode(x) != 0).any(0).all()
    for parameter in code.parameters():
        assert optimizer.state[parameter]["exp_avg"].tolist() == [0.0] * 6 + [1.0] * 18
    if isinstance(code, ae.JumpReLUCode):
        torch.testing.assert_close(code.threshold[6:], torch.full((18,), 0.2))


def test_the_projected_gradient_is_orthogonal_to_the_atoms_and_steps_keep_norm_1(make_trainer):
    model = randomise(DictionaryAutoencoder(5, 24, TopKCode(3)))
    x = torch.randn(40, 5)
    model.objective(model.terms(x, model(x))).mean().backward()
    before = model.decoder.atoms.grad.clone()
    model.project_gradient()
    after = model.decoder.atoms.grad
    assert (before * model.decoder.atoms).sum(1).abs().max() > 1e-2
    assert (after * model.decoder.atoms).sum(1).abs().max() < 1e-5
    # only what is along the atoms has gone
    tangent = before - after
    along = (tangent * model.decoder.atoms).sum(1, keepdim=True) * model.decoder.atoms
    torch.testing.assert_close(tangent, along, atol=1e-5, rtol=1e-5)
    make_trainer(gradient_clip_val=1.0).fit(model, TensorDataModule(x, batch_size=8))
    torch.testing.assert_close(model.decoder.atoms.norm(dim=1), torch.ones(24))


def test_counters_count_examples_since_a_latent_was_on():
    model = DictionaryAutoencoder(5, 6, TopKCode(1), dead_after=10)
    for size, latents in ((4, [0, 1]), (3, [1, 2]), (5, [2, 3])):
        indices = torch.tensor([latents[i % 2] for i in range(size)])[:, None]
        model.count(SparseCode(torch.ones(size, 1), indices, 6))
    assert model.since_fired.tolist() == [8, 5, 0, 0, 12, 12]
    assert model.since_fired.dtype == torch.int64
    assert model.find_dead().tolist() == [4, 5]
    # a value of zero is off, and dense codes count as well
    model.count(SparseCode(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), 6))
    assert model.since_fired[0] == 9
    model.count(torch.eye(6)[:1])
    assert model.since_fired.tolist() == [0, 7, 2, 2, 14, 14]


def test_validation_counts_nothing(make_trainer):
    model = DictionaryAutoencoder(5, 24, BatchTopKCode(3))
    data = TensorDataModule(torch.randn(64, 5), batch_size=16)
    make_trainer().fit(model, data)
    before = tensors(model)
    make_trainer().validate(model, data, verbose=False)
    make_trainer().test(model, data.val_dataloader(), verbose=False)
    make_trainer().predict(model, data.val_dataloader())
    for name, value in tensors(model).items():
        assert torch.equal(value, before[name]), name


def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path):
    data = torch.randn(320, 6)

    def fit(epochs, path=None):
        L.seed_everything(1, verbose=False)
        model = DictionaryAutoencoder(6, 48, BatchTopKCode(2), dead_after=200, resample_every=7)
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(model, TensorDataModule(data, batch_size=8, val_fraction=0.0), ckpt_path=path)
        return model, trainer

    whole, _ = fit(4)
    half, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    assert not torch.equal(half.decoder.atoms, whole.decoder.atoms)
    expected = tensors(resumed)
    for name, value in tensors(whole).items():
        assert torch.equal(value, expected[name]), name


def test_checkpoints_remember_who_is_dead(make_trainer, tmp_path):
    model = DictionaryAutoencoder(6, 48, TopKCode(1), dead_after=100)
    with torch.no_grad():
        model.encoder.bias[:5] = -100.0
    trainer = make_trainer()
    trainer.fit(model, TensorDataModule(torch.randn(8 * LOOK_EVERY, 6), batch_size=8, val_fraction=0.0))
    assert set(range(5)) <= set(model.dead_latents().tolist())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = ae.load(tmp_path / "m.ckpt")
    assert torch.equal(again.dead_latents(), model.dead_latents())
    other = DictionaryAutoencoder(6, 48, TopKCode(1))
    assert len(other.dead_latents()) == 0
    other.load_state_dict(again.state_dict())
    assert torch.equal(other.dead_latents(), model.dead_latents())
    assert torch.equal(again.since_fired, model.since_fired)


class Ranks(L.Callback):
    """Writes what each rank has, and a checkpoint."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == LOOK_EVERY + 5:
            own = pl_module.since_fired.clone(), pl_module.dead_latents(), pl_module.input_scale
            torch.save((*own, dict(pl_module.named_parameters())), f"{self.path}/{trainer.global_rank}.pt")
            trainer.save_checkpoint(f"{self.path}/m.ckpt")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(f"{self.path}/validated.ckpt")


class ByRank(DictionaryAutoencoder):
    """Rank 0 sees the first direction only, rank 1 the second."""

    def get_input(self, batch):
        return torch.eye(4)[self.global_rank].repeat(len(batch), 1)


@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_what_fires_on_one_of_two_ranks_is_not_dead(make_trainer, tmp_path):
    eye = torch.eye(4)
    model = ByRank(4, 4, TopKCode(1), lr=0.0, normalize=False, dead_after=10)
    with torch.no_grad():
        model.encoder.weight.copy_(eye)
        model.decoder.atoms.copy_(eye)
    model.norm_batches.fill_(1)
    trainer = make_trainer(
        devices=2, strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"), callbacks=[]
    )
    # after ours: the last callback of the Trainer
    model.configure_callbacks = lambda: [*ByRank.configure_callbacks(model), Ranks(tmp_path)]
    loader = torch.utils.data.DataLoader(torch.zeros(8 * (LOOK_EVERY + 7), 4), batch_size=4)
    trainer.fit(model, loader, torch.utils.data.DataLoader(torch.zeros(8, 4), batch_size=4))
    counts, dead, scale, weights = zip(*(torch.load(tmp_path / f"{r}.pt") for r in (0, 1)), strict=True)
    for rank in (0, 1):
        assert dead[rank].tolist() == [2, 3]
        # five batches of eight, of both ranks, since they agreed
        assert counts[rank].tolist() == [[0, 40, 440, 440], [40, 0, 440, 440]][rank]
    # two batches later, as a ModelCheckpoint with a monitored metric writes it
    for name, count in (("m.ckpt", 440), ("validated.ckpt", 456)):
        saved = torch.load(tmp_path / name, weights_only=True)["state_dict"]["since_fired"]
        assert saved.tolist() == [0, 0, count, count]
    assert torch.equal(scale[0], scale[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_monitors_recorder_and_predictions_read_sparse_codes(make_trainer, tmp_path):
    data = TensorDataModule(torch.randn(128, 6), batch_size=16)
    model = DictionaryAutoencoder(6, 48, TopKCode(4))
    monitor = ae.LatentSparsityMonitor(every_n_steps=1)
    trainer = make_trainer(callbacks=[monitor, ae.DeadReLUMonitor(every_n_steps=1)], max_epochs=2)
    trainer.fit(model, data)
    assert 3 < monitor.summary()["l0"] <= 4
    assert len(monitor.firing_frequency()) == 48
    assert trainer.callback_metrics["val/fvu"] > 0
    assert {"train/auxiliary_epoch", "val/auxiliary", "val/reconstruction"} <= set(trainer.callback_metrics)
    writer = ae.PredictionWriter(tmp_path / "out")
    make_trainer(callbacks=writer).predict(model, data, return_predictions=False)
    found = ae.load_predictions(tmp_path / "out")
    z = SparseCode(found["z_values"], found["z_indices"], 48)
    torch.testing.assert_close(model.decode(z), found["reconstruction"])


def test_a_step_reads_nothing_back_between_two_looks(make_trainer, monkeypatch):
    """Whatever would make the host wait for the device."""
    counted = []
    for name in ("item", "nonzero", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _original=original, _name=name, **kwargs):
            counted.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    model = DictionaryAutoencoder(6, 48, TopKCode(4))
    optimizer = model.configure_optimizers()
    x = torch.randn(16, 6)
    counted.clear()
    model.observe(x)
    output = model(x)
    model.objective(model.terms(x, output)).mean().backward()
    model.project_gradient()
    model.count(output.z.detach())
    model.terms(x, model(x))
    model.normalize_atoms()
    assert counted == []
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize(("code", "gain"), [(TopKCode(1), 1.0), (ae.Identity(), 0.2)])
def test_resampled_latents_point_at_what_is_badly_reconstructed(code, gain):
    model = DictionaryAutoencoder(4, 8, code, normalize=False, dead_after=1)
    x = torch.eye(4)[torch.tensor([0, 0, 0, 0, 2])]
    params = x.clone()
    params[-1] = 0.0  # only the last is wrong
    optimizer = torch.optim.Adam(model.parameters())
    model.objective(model.terms(x, model(x))).mean().backward()
    optimizer.step()
    dead = torch.tensor([3, 5])
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    drawn = model.resample(x, params, 2 * len(x))
    expected = torch.nn.functional.normalize(x[-1] - model.pre_bias.detach(), dim=0)
    torch.testing.assert_close(drawn, expected.expand_as(drawn))
    model.start_anew(dead, drawn[:2], [optimizer])
    living = [0, 1, 2, 4, 6, 7]
    torch.testing.assert_close(model.decoder.atoms[dead].detach(), drawn[:2])
    size = gain * kept["encoder.weight"][living].norm(dim=1).mean()
    torch.testing.assert_close(model.encoder.weight[dead].detach(), size * drawn[:2])
    assert model.encoder.bias[dead].tolist() == [0, 0]
    assert torch.equal(model.encoder.weight[living], kept["encoder.weight"][living])
    assert torch.equal(model.decoder.atoms[living], kept["decoder.atoms"][living])
    for parameter in (model.encoder.weight, model.encoder.bias, model.decoder.atoms):
        assert optimizer.state[parameter]["exp_avg_sq"][dead].abs().sum() == 0


def test_resampling_in_training_leaves_fewer_dead(make_trainer):
    x = ae.sparse_dictionary(4096, 16, 64, 3).x
    dead = {}
    for every in (0, 32):
        L.seed_everything(0, verbose=False)
        model = DictionaryAutoencoder(16, 64, TopKCode(3), penalties={}, dead_after=512, resample_every=every, lr=3e-3)
        with torch.no_grad():
            model.encoder.bias[:32] = -100.0
        make_trainer(max_epochs=8).fit(model, TensorDataModule(x, batch_size=128, val_fraction=0.0))
        dead[every] = len(model.find_dead())
    assert dead[0] >= 32
    assert dead[32] < 8


def test_prefixes_are_reconstructed_on_their_own():
    model = randomise(DictionaryAutoencoder(5, 24, TopKCode(3), prefixes=[4, 10]).double())
    x = torch.randn(8, 5, dtype=torch.float64)
    z, x_hat = plain(model, x, 3)
    terms = model.terms(x, model(x))
    s, b = model.input_scale, model.pre_bias
    expected = sum((z[:, :m] @ model.decoder.atoms[:m] + b - s * x).square().sum(1) for m in (4, 10))
    torch.testing.assert_close(terms["prefixes"], expected)
    whole = (s * (x_hat - x)).square().sum(1)
    torch.testing.assert_close(model.objective(terms), whole + expected)
    parameters = list(model.parameters())
    got = torch.autograd.grad(model.objective(terms).sum(), parameters)
    for ours, theirs in zip(got, torch.autograd.grad((whole + expected).sum(), parameters), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("options", "message"), [
    ({"code": TopKCode(25)}, "code: expected k of at most num_latents=24, got 25"),
    ({"dead_after": 0}, "dead_after: expected a positive whole number, got 0"),
    ({"resample_every": -1}, "resample_every: expected a whole number >= 0"),
    ({"prefixes": [4, 24]}, "prefixes: expected less than num_latents=24"),
    ({"prefixes": [4, 3]}, "prefixes: expected rising numbers"),
    ({"loss": ae.BernoulliNLL()}, "loss: expected one without output activation, got BernoulliNLL"),
])  # fmt: skip
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        DictionaryAutoencoder(5, 24, **{"code": TopKCode(3), **options})


def test_the_first_step_of_a_new_or_loaded_model_compiles_without_a_graph_break(make_trainer):
    model = DictionaryAutoencoder(5, 24, TopKCode(3))
    torch._dynamo.reset()
    torch.compile(model.training_step, fullgraph=True, backend="aot_eager")(torch.randn(16, 5), 0)["loss"].backward()
    loaded = DictionaryAutoencoder(5, 24, TopKCode(3))
    loaded.load_state_dict(model.state_dict() | {"dead": torch.arange(24) < 2})
    loaded.training_step = torch.compile(loaded.training_step, fullgraph=True, backend="aot_eager")
    make_trainer(max_epochs=2).fit(loaded, torch.utils.data.DataLoader(torch.randn(32, 5), batch_size=16))
    assert len(loaded.dead_latents()) == 2


@pytest.mark.parametrize("code", [TopKCode(3), BatchTopKCode(3)])
def test_a_step_compiles_without_a_graph_break(code):
    model = DictionaryAutoencoder(5, 24, code, prefixes=[8])
    model.since_fired[[1, 5, 7]] = model.dead_after
    assert len(model.find_dead()) == 3
    x = torch.randn(16, 5)
    torch._dynamo.reset()  # other tests have compiled the same step for other models, and their number is limited
    compiled = torch.compile(model.training_step, fullgraph=True, backend="aot_eager")(x, 0)
    got = torch.autograd.grad(compiled["loss"], list(model.parameters()))
    eager = model.training_step(x, 0)
    for name, value in eager["terms"].items():
        torch.testing.assert_close(compiled["terms"][name], value)
    for ours, theirs in zip(got, torch.autograd.grad(eager["loss"], list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mixed_precision_trains(make_trainer):
    model = DictionaryAutoencoder(16, 64, TopKCode(4))
    trainer = make_trainer(precision="bf16-mixed", max_epochs=4)
    trainer.fit(model, TensorDataModule(ae.sparse_dictionary(2048, 16, 32, 2).x, batch_size=64))
    assert trainer.callback_metrics["val/fvu"] < 0.6
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("code", [TopKCode(3), BatchTopKCode(3)])
def test_the_atoms_of_a_known_dictionary_are_recovered(code, make_trainer):
    """64 atoms in 32 dimensions, 3 on, 20 000 examples, 20 epochs, 96 latents: |cos| > 0.9 for at least 95 %."""
    data = ae.sparse_dictionary(20_000, 32, 64, 3)
    model = DictionaryAutoencoder(32, 96, code, lr=3e-3, dead_after=5_000)
    make_trainer(max_epochs=20).fit(model, TensorDataModule(data.x, batch_size=256, val_fraction=0.0))
    best = (data.atoms @ model.decoder.weight).abs().amax(1)
    assert (best > 0.9).float().mean() >= 0.95
    untrained = DictionaryAutoencoder(32, 96, code)
    assert ((data.atoms @ untrained.decoder.weight).abs().amax(1) > 0.9).float().mean() < 0.05


def test_codes_of_another_width_or_a_target_beyond_it_are_refused_at_the_door():
    with pytest.raises(ValueError, match="code: expected one for 32 latents, got log_scale of 16"):
        DictionaryAutoencoder(8, 32, ae.JumpReLUCode(16, 0.1))
    with pytest.raises(ValueError, match="target_l0: expected at most the 32 latents there are, got 33"):
        DictionaryAutoencoder(8, 32, ae.L1Code(0.1, "relu", target_l0=33))
