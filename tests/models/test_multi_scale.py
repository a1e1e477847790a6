"""Coarse and fine with gains: the objective, gains in closed form, coarse first, and every way to run it."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils.data import DataLoader

import lightning_ae as ae

SHAPE = (1, 8, 8)
SPLITTINGS = [ae.BlockMean([2, 4]), ae.DCTBands([0.5, 0.25]), ae.HaarBands(2), ae.LaplacianPyramid(2)]
IDS = [type(scales).__name__ for scales in SPLITTINGS]


class Band(nn.Module):
    """A perfect decoder where the latent is the data: their band of one scale."""

    def __init__(self, scales, index):
        super().__init__()
        self.scales, self.index = scales, index

    def forward(self, z):
        return self.scales.split(z)[self.index]


def perfect(scales, **options):
    decoders = [Band(scales, index) for index in range(scales.num_scales)]
    return ae.MultiScaleAutoencoder(nn.Identity(), decoders, scales, **options)


def small(scales=None, loss=None, kind=ae.MLPDecoder, **options):
    scales = ae.BlockMean([2, 4]) if scales is None else scales
    network = {"hidden": (16,)} if kind is ae.MLPDecoder else {"channels": (8,)}
    shape = SHAPE if loss is None else loss.params_shape(SHAPE)
    encoder = (ae.MLPEncoder if kind is ae.MLPDecoder else ae.ConvEncoder)(SHAPE, 5, *network.values())
    decoders = ae.scale_decoders(scales, shape, 5, kind, **network)
    return ae.MultiScaleAutoencoder(encoder, decoders, scales, loss, **options)


def block_means(x):
    """NumPy's, over 4×4 pixels, at full size."""
    means = x.reshape(len(x), 1, 2, 4, 2, 4).mean((3, 5), keepdims=True)
    return np.broadcast_to(means, (len(x), 1, 2, 4, 2, 4)).reshape(x.shape)


def images(n, fine=None, coarse=None):
    """Random images; with given energies in the detail and in the means of 4×4 blocks, the same for each image."""
    x = np.random.default_rng(0).normal(size=(n, *SHAPE)) * 0.3 + 0.2
    if fine is not None:
        low = block_means(x)
        high = x - low
        high *= math.sqrt(fine) / np.linalg.norm(high.reshape(n, -1), axis=1).reshape(-1, 1, 1, 1)
        low = low * math.sqrt(coarse) / np.linalg.norm(low.reshape(n, -1), axis=1).reshape(-1, 1, 1, 1)
        x = low + high
    return torch.as_tensor(x).float()


# -- gains ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8),
        lambda p: torch.optim.Adam(p, lr=0.02),
        lambda p: torch.optim.RMSprop(p, lr=0.002),
    ],
    ids=["SGD", "momentum", "Adam", "RMSprop"],
)
def test_gains_reach_their_closed_form_at_any_batch_size_and_by_any_optimizer(make, batch_size):
    (l1, l2), (r1, r2), (fine, coarse) = (0.5, 1.0), (0.7, 3.0), (2.0, 5.0)
    model = perfect(ae.BlockMean(4), level_weights=[l1, l2], gain_ridge=[r1, r2])
    x, optimizer = images(32, fine, coarse), make(model.parameters())
    # the last tenth of the steps with a small rate: Adam and RMSprop circle around the optimum otherwise
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [600, 700], 0.03)
    for step in range(800):
        batch = x[torch.arange(step * batch_size, (step + 1) * batch_size) % 32]
        optimizer.zero_grad()
        model.training_step(batch, step)["loss"].backward()
        optimizer.step()
        schedule.step()
    g1 = (l1 + l2) * fine / ((l1 + l2) * fine + r1)
    g2 = l2 * coarse / (l2 * coarse + r2)
    torch.testing.assert_close(model.gains.detach(), torch.tensor([g1, g2]), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "scales", [ae.BlockMean(4), ae.DCTBands(0.25), ae.HaarBands(2)], ids=lambda s: type(s).__name__
)
def test_gains_of_data_that_vary_reach_it_under_the_trainer(scales, make_trainer):
    level_weights, ridge = [0.3, 0.2, 1.0][-scales.num_scales :], [4.0, 1.0, 2.0][: scales.num_scales]

    class WithSGD(ae.MultiScaleAutoencoder):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02)

    decoders = [Band(scales, index) for index in range(scales.num_scales)]
    model = WithSGD(nn.Identity(), decoders, scales, level_weights=level_weights, gain_ridge=ridge)
    x = images(40)
    make_trainer(max_epochs=150).fit(model, DataLoader(x, batch_size=40))
    energies = [float(part.double().square().sum() / len(x)) for part in scales.parts(x)]
    above = [sum(level_weights[index:]) for index in range(scales.num_scales)]
    expected = [w * e / (w * e + r) for w, e, r in zip(above, energies, ridge, strict=True)]
    torch.testing.assert_close(model.gains.detach(), torch.tensor(expected), rtol=0, atol=1e-4)
    assert max(expected) - min(expected) > 0.05


def test_the_closed_form_is_that_of_the_design():
    x = images(50).double()
    low = block_means(x.numpy())
    coarse, fine = (low**2).sum() / 50, ((x.numpy() - low) ** 2).sum() / 50
    l1, l2, r1, r2 = 0.4, 1.3, 2.0, 0.6
    expected = [(l1 + l2) * fine / ((l1 + l2) * fine + r1), l2 * coarse / (l2 * coarse + r2)]
    got = ae.optimal_gains(ae.BlockMean(4).parts(x), x, [l1, l2], [r1, r2])
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("perfect_parts", [True, False])
@pytest.mark.parametrize("scales", SPLITTINGS, ids=IDS)
def test_the_closed_form_is_where_the_gradient_of_the_objective_vanishes(scales, perfect_parts):
    options = {"level_weights": [0.3, 0.2, 1.1], "gain_ridge": [0.5, 0.1, 2.0]}
    model = (perfect(scales, **options) if perfect_parts else small(scales, **options)).double()
    x = images(20).double()
    z = model.encode(x)
    parts = [part.detach() for part in model.decoder.parts(z)]  # gains are 1
    model.decoder.gains.data = ae.optimal_gains(parts, x, *options.values())
    assert (model.gains - 1).abs().max() > 0.01
    (gradient,) = torch.autograd.grad(model.training_step(x, 0)["loss"], model.gains)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_a_part_that_is_not_there_has_the_smallest_gain():
    x = images(5)
    gains = ae.optimal_gains([x, torch.zeros_like(x)], x, [0.0, 1.0])
    torch.testing.assert_close(gains, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_gains_may_be_left_alone():
    model = small(learn_gains=False)
    assert "decoder.gains" not in dict(model.named_parameters())
    x = torch.rand(4, *SHAPE)
    assert set(model.terms(x, model(x))) == {"reconstruction", "scale_0", "scale_1"}
    torch.testing.assert_close(model.training_step(x, 0)["loss"], (model.reconstruct(x) - x).square().sum() / 4)
    with pytest.raises(ValueError, match="gain_ridge: expected 0 for gains that are not learned, got 0"):
        small(learn_gains=False, gain_ridge=0.1)


# -- the objective ----------------------------------------------------------------------------------------------------


def test_the_objective_of_two_scales_is_the_formula():
    model = small(ae.BlockMean(4), level_weights=[0.3, 0.8], gain_ridge=[0.1, 0.7])
    model.gains.data = torch.tensor([0.5, 2.0])
    x = torch.rand(6, *SHAPE)
    z = model.encode(x)
    fine, coarse = (decoder(z).detach().numpy() for decoder in model.decoder.decoders)
    x_fine = 0.5 * (fine - block_means(fine))
    x_full = x_fine + 2.0 * coarse.repeat(4, 2).repeat(4, 3)
    squares = [((x.numpy() - x_hat) ** 2).sum((1, 2, 3)) for x_hat in (x_fine, x_full)]
    expected = 0.3 * squares[0] + 0.8 * squares[1] + 0.1 * 0.25 + 0.7 * 4.0
    terms = model.terms(x, model(x))
    torch.testing.assert_close(model.objective(terms), torch.as_tensor(expected))
    torch.testing.assert_close(terms["scale_0"], torch.as_tensor(squares[0]))
    torch.testing.assert_close(terms["reconstruction"], torch.as_tensor(squares[1]))
    assert [terms[f"squared_gain_{index}"].item() for index in (0, 1)] == [0.25, 4.0]
    torch.testing.assert_close(model.reconstruct(x), torch.as_tensor(x_full))


@pytest.mark.parametrize("scales", SPLITTINGS, ids=IDS)
def test_perfect_decoders_and_unit_gains_reconstruct_exactly(scales):
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    model = perfect(scales)
    torch.testing.assert_close(model.reconstruct(x), x, rtol=0, atol=1e-12)
    assert model.training_step(x, 0)["loss"].item() < 1e-24


@pytest.mark.parametrize("loss", [ae.BernoulliNLL(), ae.GaussianNLL(0.3, learn_scale=True), ae.SquaredError("tanh")])
def test_by_default_it_is_the_loss_of_the_whole(loss):
    model = small(loss=loss)
    assert model.level_weights == [0.0, 0.0, 1.0]
    x = torch.rand(4, *SHAPE)
    output = model(x)
    torch.testing.assert_close(model.training_step(x, 0)["loss"], loss(output.params, x).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [ae.MLPDecoder, ae.ConvDecoder])
@pytest.mark.parametrize("scales", SPLITTINGS, ids=IDS)
def test_logits_of_scales_add_up_under_bernoulli(scales, kind):
    model = small(scales, ae.BernoulliNLL(), kind, level_weights=[0.5, 0.25, 1.0])
    x = torch.rand(4, *SHAPE)
    z = model.encode(x)
    bands = [decoder(z) for decoder in model.decoder.decoders]
    logits = sum(scales.part(band, index, SHAPE) for index, band in enumerate(bands))
    torch.testing.assert_close(model.reconstruct(x), logits.sigmoid())
    expected = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
    output = model(x)
    terms = model.terms(x, output)
    torch.testing.assert_close(terms["reconstruction"], expected)
    two = scales.part(bands[0], 0, SHAPE) + scales.part(bands[1], 1, SHAPE)
    expected = functional.binary_cross_entropy_with_logits(two, x, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(terms["scale_1"], expected)
    model.training_step(x, 0)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.decoder.parameters())


def test_losses_with_several_parameters_are_split_by_their_channels():
    loss = ae.NegativeBinomialNLL()
    model = small(ae.BlockMean(4), loss)
    x = torch.poisson(torch.full((4, *SHAPE), 3.0))
    output = model(x)
    assert output.params.shape == (4, *loss.params_shape(SHAPE))
    assert model.terms(x, output)["reconstruction"].isfinite().all()


def test_a_partial_sum_that_nobody_asks_for_may_be_infinite():
    model = small(level_weights=[0.0, 0.5, 1.0])
    x = torch.rand(4, *SHAPE)
    terms = model.terms(x, model(x))
    terms["scale_0"] = torch.full((4,), math.inf)
    torch.testing.assert_close(model.objective(terms), terms["reconstruction"] + 0.5 * terms["scale_1"])


def test_codes_and_penalties_count_as_ever():
    model = small(code=ae.L1Code(0.5), penalties={"prior": ae.WeightPrior(2.0, 1.0, 10)}, level_weights=[0.0, 1.0, 2.0])
    x = torch.rand(4, *SHAPE)
    terms = model.terms(x, model(x))
    weighted = model.penalties["prior"].weight * terms["prior"] + 0.5 * terms["l1"]
    torch.testing.assert_close(model.objective(terms), 2 * terms["reconstruction"] + terms["scale_1"] + weighted)
    with pytest.raises(ValueError, match=r"penalties: \['scale_1'\] is the name of another term"):
        small(penalties={"scale_1": ae.WeightPrior(2.0, 1.0, 10)})


# -- coarse first -----------------------------------------------------------------------------------------------------


def gradients(model, x):
    model.zero_grad()
    model.training_step(x, 0)["loss"].backward()
    return [max(float(p.grad.abs().max()) for p in decoder.parameters()) for decoder in model.decoder.decoders]


@pytest.mark.parametrize("scales", SPLITTINGS, ids=IDS)
def test_what_does_not_take_part_has_no_gradient(scales):
    model, x = small(scales, level_weights=[0.2, 0.2, 1.0]), torch.rand(4, *SHAPE)
    assert model.detail == 3.0
    for detail, learning in ((1, [False, False, True]), (2, [False, True, True]), (3, [True, True, True])):
        model.detail = detail
        assert [g > 0 for g in gradients(model, x)] == learning


def test_a_fraction_of_detail_lets_the_next_scale_in_by_that_much():
    scales = ae.HaarBands(2)
    model, x = small(scales), torch.rand(4, *SHAPE)
    parts = [scales.part(d(model.encode(x)), i, SHAPE) for i, d in enumerate(model.decoder.decoders)]
    for detail, shares in ((0.5, (0, 0, 0.5)), (1.25, (0, 0.25, 1)), (2.75, (0.75, 1, 1)), (9.0, (1, 1, 1))):
        model.detail = detail
        expected = sum(share * part for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(model.reconstruct(x), expected)


def test_a_schedule_brings_the_scales_one_after_the_other(make_trainer):
    model = small(ae.BlockMean(4))
    before = [copy.deepcopy(decoder).state_dict() for decoder in model.decoder.decoders]
    moved = []

    class Watch(ae.LinearSchedule):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            decoders = zip(pl_module.decoder.decoders, before, strict=True)
            moved.append([any((p != old[n]).any() for n, p in d.state_dict().items()) for d, old in decoders])

    schedule = Watch("detail", 1, 2, begin=4, duration=2)
    make_trainer(max_steps=8, callbacks=schedule).fit(model, DataLoader(torch.rand(64, *SHAPE), batch_size=8))
    assert moved == [[False, True]] * 5 + [[True, True]] * 3
    assert model.detail == 2.0


def test_stages_go_from_coarse_to_all():
    x = torch.rand(3, *SHAPE)
    model = small(ae.BlockMean([2, 4]), ae.BernoulliNLL())
    stages = model.stages(x)
    assert [stage.shape for stage in stages] == [x.shape] * 3
    torch.testing.assert_close(stages[-1], model.reconstruct(x))
    for stage, size in zip(stages, (4, 2), strict=False):
        blocks = stage.reshape(3, 1, 8 // size, size, 8 // size, size)
        torch.testing.assert_close(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))
        assert (stage[..., size] - stage[..., size - 1]).abs().max() > 1e-4


# -- running it -------------------------------------------------------------------------------------------------------


def test_each_scale_is_logged(make_trainer):
    model, x = small(ae.BlockMean([2, 4]), lr=1e-2), torch.rand(40, *SHAPE)
    trainer = make_trainer()
    trainer.fit(model, DataLoader(x, batch_size=8), DataLoader(x, batch_size=16))
    logged = trainer.callback_metrics
    assert {f"train/{name}_epoch" for name in ("scale_0", "scale_1", "squared_gain_2")} <= set(logged)
    error = (model.reconstruct(x) - x).detach().numpy()
    coarse = block_means(error)
    assert float(logged["val/mse_scale_2"]) == pytest.approx((coarse**2).mean(), rel=1e-4)
    rest = float(logged["val/mse_scale_0"] + logged["val/mse_scale_1"])
    assert rest == pytest.approx(((error - coarse) ** 2).mean(), rel=1e-4)
    assert float(logged["val/squared_gain_0"]) == pytest.approx(model.gains[0].item() ** 2, rel=1e-5)


# the others are compiled with recipes/variants
@pytest.mark.parametrize("scales", SPLITTINGS[1:3], ids=IDS[1:3])
def test_it_compiles_in_one_graph_and_not_again_when_a_schedule_moves_a_number(scales):
    torch._dynamo.reset()
    model = small(scales, ae.BernoulliNLL(), level_weights=[0.1, 0.2, 1.0], gain_ridge=0.1)
    x = torch.rand(4, *SHAPE)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.training_step, backend=counter, fullgraph=True)
    for detail in (1.0, 1.3, 1.9, 2.0, 2.2, 3.0):
        model.detail = detail
        model.level_weights[0] += 0.1
        model.gain_ridge[1] *= 1.5
        both = []
        for run in (model.training_step, step):
            model.zero_grad()
            loss = run(x, 0)["loss"]
            loss.backward()
            both.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for eager, compiled in zip(*both, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2  # as it is, and for any number


@pytest.mark.parametrize("scales", SPLITTINGS, ids=IDS)
def test_parts_are_in_single_precision_under_autocast(scales):
    model, x = small(scales, ae.BernoulliNLL(), level_weights=[0.1, 0.2, 1.0]), torch.rand(8, *SHAPE)
    exact = model.training_step(x, 0)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        loss = model.training_step(x, 0)["loss"]
    assert {part.dtype for part in (output.params, *output.parts)} == {torch.float32}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", [ae.MLPDecoder, ae.ConvDecoder])
@pytest.mark.parametrize("scales", SPLITTINGS, ids=IDS)
def test_a_checkpoint_brings_everything_back(scales, kind, make_trainer, tmp_path):
    model = small(scales, ae.BernoulliNLL(), kind, level_weights=[0.1, 0.2, 1.0], gain_ridge=[0.1, 0.2, 0.3])
    x = torch.rand(16, *SHAPE)
    trainer = make_trainer(callbacks=ae.LinearSchedule("level_weights.0", 0.1, 0.4, duration=2))
    model.detail = 2.5
    trainer.fit(model, DataLoader(x, batch_size=4))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ae.load(tmp_path / "model.ckpt")
    assert type(loaded) is ae.MultiScaleAutoencoder
    assert loaded.level_weights == [0.4, 0.2, 1.0]
    assert loaded.gain_ridge == [0.1, 0.2, 0.3]
    assert loaded.detail == 2.5
    assert (model.gains != 1).all()
    torch.testing.assert_close(loaded.gains, model.gains, rtol=0, atol=0)
    torch.testing.assert_close(loaded.reconstruct(x), model.reconstruct(x), rtol=0, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path):
    x = torch.rand(32, *SHAPE)

    def fit(epochs, ckpt_path=None):
        torch.manual_seed(3)
        model = small(level_weights=[0.1, 0.2, 1.0], gain_ridge=0.1)
        schedules = [ae.LinearSchedule("detail", 1, 3, duration=6), ae.LinearSchedule("gain_ridge.0", 0, 1, duration=7)]
        trainer = make_trainer(max_epochs=epochs, callbacks=schedules)
        trainer.fit(model, ae.TensorDataModule(x, batch_size=8, val_fraction=0.0), ckpt_path=ckpt_path)
        return model, trainer

    whole, _ = fit(2)
    with pytest.warns(UserWarning, match="before the schedule does"):
        fit(1)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
        else:
            assert resumed.state_dict()[name] == value
    assert whole.gain_ridge == [1.0, 0.1, 0.1]


def test_predictions_hold_the_whole(make_trainer):
    model, x = small(), torch.rand(6, *SHAPE)
    (batch,) = make_trainer().predict(model, DataLoader(x, batch_size=6))
    torch.testing.assert_close(batch["reconstruction"], model.reconstruct(x))
    torch.testing.assert_close(batch["score"], (model.reconstruct(x) - x).square().sum((1, 2, 3)))


def test_the_step_gives_detached_parts_for_callbacks():
    output = small().training_step(torch.rand(4, *SHAPE), 0)["output"]
    assert not any(tensor.requires_grad for tensor in (output.z, output.params, *output.parts))
    torch.testing.assert_close(sum(output.parts), output.params)


def test_the_gradient_at_the_output_is_seen_at_the_decoder(make_trainer):
    monitor = ae.GradientSaturationMonitor(every_n_steps=1)
    model = small(loss=ae.BernoulliNLL())
    make_trainer(callbacks=monitor).fit(model, DataLoader(torch.rand(16, *SHAPE), batch_size=8))
    assert monitor.output_ratio() == pytest.approx(1.0, rel=1e-4)  # x̂ − x against |x̂ − x|


# -- errors at the door -----------------------------------------------------------------------------------------------

SCALES = ae.BlockMean(4)


def build(decoders=None, scales=SCALES, **options):
    decoders = ae.scale_decoders(SCALES, SHAPE, 5) if decoders is None else decoders
    return ae.MultiScaleAutoencoder(ae.MLPEncoder(SHAPE, 5), decoders, scales, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(ae.scale_decoders(SCALES, SHAPE, 5)[:1]), "decoders: expected one for each of 2 scales, got 1"),
        (
            lambda: build(ae.scale_decoders(SCALES, SHAPE, 5)[::-1]),
            "decoders: expected that of the finest scale first, got them in reverse",
        ),
        (
            lambda: build([ae.MLPDecoder(5, SHAPE), ae.MLPDecoder(4, (1, 2, 2))]),
            r"decoders: expected all to read latents of one shape, got \['\(4,\)', '\(5,\)'\]",
        ),
        (lambda: build([ae.MLPDecoder(4, SHAPE), ae.MLPDecoder(4, (1, 2, 2))]), r"encoder: .* it must give \(4,\)"),
        (lambda: build(level_weights=[1.0]), r"level_weights: expected 2 finite numbers >= 0, .* got \[1.0\]"),
        (lambda: build(level_weights=[1.0, -1.0]), r"level_weights: expected 2 finite numbers >= 0"),
        (lambda: build(gain_ridge=[0.1, 0.1, 0.1]), r"gain_ridge: expected 2 finite numbers >= 0"),
        (lambda: build(gain_ridge=math.inf), r"gain_ridge: expected 2 finite numbers >= 0"),
        (lambda: ae.optimal_gains([torch.ones(1, 1, 2)], torch.ones(1, 1, 2), [1.0, 2.0]), "level_weights: expected 1"),
        (lambda: ae.optimal_gains([torch.ones(3, 1, 2)], torch.ones(1, 3, 2), [1.0]), "parts: expected tensors of the"),
        (lambda: ae.optimal_gains([], torch.ones(1, 3, 2), []), "parts: expected tensors of the shape"),
        (lambda: setattr(build(), "detail", -1), "detail: expected a finite number >= 0, got -1"),
        (lambda: setattr(build(), "detail", math.nan), "detail: expected a finite number >= 0, got nan"),
    ],
)
def test_numbers_and_decoders_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=re.escape("scales: expected a Scales, such as BlockMean, got a int")):
        build(scales=4)
    with pytest.raises(TypeError, match="decoders: expected a list of modules, got a MLPDecoder"):
        build(ae.MLPDecoder(5, SHAPE))
    with pytest.raises(TypeError, match=r"level_weights: expected 2 numbers, one for each scale, got 0\.5"):
        build(level_weights=0.5)
    with pytest.raises(TypeError, match="gain_ridge: expected 2 numbers, one for each scale, got 'ab'"):
        build(gain_ridge="ab")


def test_decoders_of_unknown_size_are_refused_when_they_first_run():
    class Unknown(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.shape = shape

        def forward(self, z):
            return z.new_zeros(len(z), *self.shape)

    assert build([Unknown(SHAPE), Unknown((1, 2, 2))]).reconstruct(torch.rand(3, *SHAPE)).shape == (3, *SHAPE)
    with pytest.raises(ValueError, match=r"decoders: for data of shape \(1, 8, 8\) they must give"):
        build([Unknown(SHAPE), Unknown((1, 4, 4))]).reconstruct(torch.rand(3, *SHAPE))
