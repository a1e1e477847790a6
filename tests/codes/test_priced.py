"""The controller that finds a weight for a stated number of active latents."""

import math
import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ae import (
    GatedCode,
    L1Code,
    LinearDecoder,
    LinearEncoder,
    SoftThresholdCode,
    SparseAutoencoder,
    TensorDataModule,
)
from lightning_ae.codes.priced import L0Controller
from lightning_ae.codes.ranks import Ranks


def by_hand(seen, target, weight, rate=0.007, gain=0.5):
    """The weight in use after each batch, in plain Python."""
    smooth, used = 0.0, []
    for value in seen:
        error = max(-1.0, min(1.0, math.log(value / target) if value else -math.inf))
        weight *= math.exp(rate * error)
        smooth = 0.9 * smooth + 0.1 * error
        used.append(weight * math.exp(gain * smooth))
    return used


def test_the_law_is_the_documented_one():
    controller = L0Controller(0.5, target=8)
    used = []
    for value in (20.0, 9.0, 8.0, 3.0, 0.0, 200.0):
        controller.observe(torch.tensor([value, value]))
        controller.step()
        controller.step()  # nothing new
        used.append(float(controller.current()))
    assert used == pytest.approx(by_hand((20, 9, 8, 3, 0, 200), 8, 0.5), rel=1e-5)


def test_latents_are_counted_in_whole_numbers_also_where_single_precision_has_none():
    controller = L0Controller(0.5, target=8)
    for _ in range(3):
        controller.observe(torch.tensor([2.0**24, 1.0]))
    assert controller.seen.tolist() == [3 * (2**24 + 1), 6]
    # and a checkpoint that has them in single precision is read
    controller.load_state_dict(controller.state_dict() | {"seen": torch.tensor([40.0, 4.0])})
    assert controller.bfloat16().seen.tolist() == [40, 4]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        controller.step()
    finally:
        torch.set_default_dtype(before)
    assert float(controller.current()) == pytest.approx(by_hand([10], 8, 0.5)[0], rel=1e-6)


def test_the_weight_of_a_batch_stays_until_the_next():
    code = L1Code(0.5, "relu", target_l0=2).train()
    h = torch.ones(4, 6)
    code(h)
    first = float(code.weights()["l1"])
    assert first == 0.5
    assert float(code.weights()["l1"]) == first
    code(h)
    assert float(code.weights()["l1"]) == pytest.approx(by_hand([6], 2, 0.5)[0])
    code.eval()(h)
    code.encode(h)
    assert float(code.weights()["l1"]) == pytest.approx(by_hand([6], 2, 0.5)[0])


def test_compiled_code_leaves_the_weight_alone_until_step_is_called():
    # in a graph that changes the weight, torch 2.14 takes the changed one for the gradient
    torch._dynamo.reset()
    model = SparseAutoencoder(LinearEncoder(8, 6), LinearDecoder(6, 8), L1Code(0.5, "relu", target_l0=2))

    def loss(x):
        return model.objective(model.terms(x, model(x))).mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(torch.randn(16, 8))
    assert float(model.code.weights()["l1"]) == 0.5
    model.code.controller.step()
    assert float(model.code.weights()["l1"]) != 0.5


class TwoRanks(Ranks):
    """Beside this one, one with four examples of two active latents."""

    world_size = 2

    def sum(self, tensor):
        return tensor + torch.tensor([8.0, 4.0])


def test_ranks_and_accumulated_batches_go_by_the_mean_of_theirs():
    code = L1Code(0.5, "relu", target_l0=2).train()
    code.managed = True
    code(torch.ones(2, 6))
    code(torch.ones(2, 6))
    assert float(code.weights()["l1"]) == 0.5
    code.after_step(TwoRanks())
    assert float(code.weights()["l1"]) == pytest.approx(by_hand([4], 2, 0.5)[0])


def test_the_controller_works_in_single_precision_in_a_bfloat16_model():
    code = L1Code(0.5, "relu", target_l0=2).to(torch.bfloat16).train()
    h = torch.ones(4, 3, dtype=torch.bfloat16)
    for _ in range(11):
        code(h)
    assert float(code.weights()["l1"]) == pytest.approx(by_hand([3] * 10, 2, 0.5)[-1], rel=1e-5)


class _Ranks(L.Callback):
    """Writes what rank 0 has in the end."""

    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        weights = trainer.strategy.reduce(pl_module.code.controller.weight.clone(), reduce_op="mean")
        assert weights == pl_module.code.controller.weight  # the same on all
        if trainer.is_global_zero:
            state = {name: value for name, value in pl_module.state_dict().items() if isinstance(value, torch.Tensor)}
            torch.save(state, self.path)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_two_ranks_adapt_the_weight_as_one_does(make_trainer, tmp_path):
    x, seen = torch.randn(60, 8), {}
    model = SparseAutoencoder(LinearEncoder(8, 6), LinearDecoder(6, 8), L1Code(0.1, "relu", target_l0=2))
    start = model.state_dict()
    for ranks, batch_size in ((1, 10), (2, 5)):
        model = SparseAutoencoder(LinearEncoder(8, 6), LinearDecoder(6, 8), L1Code(0.1, "relu", target_l0=2))
        model.load_state_dict(start)
        options = {"strategy": "ddp_spawn"} if ranks > 1 else {}
        trainer = make_trainer(devices=ranks, max_epochs=3, callbacks=_Ranks(tmp_path / f"{ranks}.pt"), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
            trainer.fit(model, TensorDataModule(x, batch_size=batch_size, val_fraction=0))
        seen[ranks] = torch.load(tmp_path / f"{ranks}.pt")
    assert seen[1]["code.controller.weight"] != 0.1
    for name, value in seen[1].items():
        torch.testing.assert_close(seen[2][name], value)


def test_accumulated_batches_adapt_the_weight_as_one_does(make_trainer):
    x, seen = torch.randn(60, 8), {}
    start = SparseAutoencoder(LinearEncoder(8, 6), LinearDecoder(6, 8), L1Code(0.1, "relu", target_l0=2)).state_dict()
    for windows, batch_size in ((1, 12), (3, 4)):
        model = SparseAutoencoder(LinearEncoder(8, 6), LinearDecoder(6, 8), L1Code(0.1, "relu", target_l0=2))
        model.load_state_dict(start)
        data = DataLoader(x, batch_size=batch_size)
        make_trainer(max_epochs=2, accumulate_grad_batches=windows).fit(model, data)
        assert not model.code.managed
        seen[windows] = float(model.code.controller.weight)
    assert seen[1] != 0.1
    assert seen[3] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.slow
def test_a_wide_target_of_32_is_met_within_a_tenth_by_the_trainer(make_trainer):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(256, 64, generator=generator), dim=1)
    on = torch.rand(6144, 256, generator=generator) < 16 / 256
    x = (on * (0.5 + torch.rand(6144, 256, generator=generator))) @ atoms
    train, held_out = x[:5120], x[5120:]
    for code in (
        L1Code(0.01, "relu", target_l0=32),
        L1Code(1.0, "relu", target_l0=32),
        SoftThresholdCode(0.1, 0.1, num_latents=256, target_l0=32),
        GatedCode(256, 0.1, target_l0=32),
    ):
        L.seed_everything(0, verbose=False)
        model = SparseAutoencoder(LinearEncoder(64, 256), LinearDecoder(256, 64), code, unit_norm=True, lr=2e-3)
        make_trainer(max_epochs=30).fit(model, DataLoader(train, batch_size=128, shuffle=True))
        with torch.no_grad():
            l0 = (model.eval().encode(held_out) != 0).sum(1).float().mean().item()
        assert l0 == pytest.approx(32, rel=0.1), code


def test_the_number_of_active_latents_is_logged(make_trainer):
    model = SparseAutoencoder(LinearEncoder(8, 6), LinearDecoder(6, 8), L1Code(0.1, "relu", target_l0=2))
    trainer = make_trainer()
    x = torch.randn(64, 8)
    trainer.fit(model, DataLoader(x, batch_size=16), DataLoader(x, batch_size=64))
    expected = (model.encode(x) != 0).sum(1).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["val/l0"].float(), expected)
