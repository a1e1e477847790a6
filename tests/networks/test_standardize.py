from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lightning_ae as ae
from lightning_ae.networks.standardize import (
    MOST_APART,
    ROWS,
    restore_output_scale,
    restore_scaling,
    standardize_input,
)


class Seen(nn.Linear):
    """Gives what it reads."""

    def forward(self, input):
        return input


def reading(features):
    layer = Seen(features, 1)
    standardize_input(layer, features)
    return layer


# -- the statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_are_those_of_the_first_thousand_rows_in_whole_batches_and_stay(offset):
    layer, draw = reading(5), np.random.default_rng(0)
    rows = (draw.standard_normal((2000, 5)) * 3 + offset + np.arange(5)).astype(np.float32)
    for batch in torch.from_numpy(rows).split(300):
        layer(batch)
    of = rows[:1200].astype(np.float64)
    assert layer.input_count == 1200 >= ROWS
    np.testing.assert_allclose(layer.input_mean.numpy(), of.mean(0), rtol=1e-6)
    # numbers near 1e6 are an eighth apart
    np.testing.assert_allclose(layer.input_square.numpy(), of.var(0), rtol=1e-5 if offset == 0 else 2e-2)


def test_far_from_zero_it_gives_mean_0_and_spread_1():
    layer = reading(3)
    x = 1e6 + 100 * torch.randn(1000, 3)
    layer(x)
    out = layer.eval()(x).double()
    assert out.mean(0).abs().max() < 1e-3
    assert out.var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-4)


def test_features_keep_their_spreads_unless_those_are_far_apart():
    draw = torch.randn(1000, 3)
    for apart, each in ((0.9 * MOST_APART, False), (1.2 * MOST_APART, True)):
        spreads = torch.tensor([1.0, 1.0, apart])
        layer = reading(3)
        layer(draw * spreads)
        out = layer.eval()(draw * spreads).double().std(0, correction=0)
        x = (draw * spreads).double()
        whole = out / (x.std(0, correction=0) / x.var(0, correction=0).mean().sqrt())
        expected = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(out if each else whole, expected, rtol=1e-5, atol=0)


def test_features_that_do_not_vary_become_0():
    layer, x = reading(3), torch.randn(1000, 3) * torch.tensor([1.0, 1.0, 1e6])
    x[:, 1] = 7.0
    layer(x)
    out = layer.eval()(x)
    assert out[:, 1].eq(0).all()
    assert out.std(0)[[0, 2]].tolist() == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e6 / 3])
def test_data_that_do_not_vary_stay_as_they_are(value):
    """Their rounding errors are not made much of."""
    layer, x = reading(3), torch.full((64, 3), value)
    assert torch.equal(layer(x), x)


def test_without_a_row_seen_the_input_stays_as_it_is():
    layer, x = reading(2).eval(), torch.randn(9, 2)
    assert torch.equal(layer(x), x)
    assert layer.input_count == 0


def test_in_evaluation_nothing_is_counted():
    layer = reading(2)
    layer(torch.randn(64, 2))
    state = copy.deepcopy(layer.state_dict())
    layer.eval()(torch.randn(64, 2) + 9)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


# -- the kinds of layers -------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(3, 2), (500, 3), -1),
    "positions": (nn.Linear(3, 2), (100, 7, 3), -1),
    "one example": (nn.Linear(3, 2), (3,), -1),
    "lstm": (nn.LSTM(3, 2, batch_first=True), (100, 7, 3), -1),
    "gru cell": (nn.GRUCell(3, 2), (500, 3), -1),
    "conv1d": (nn.Conv1d(3, 2, 3), (100, 3, 9), 1),
    "conv2d": (nn.Conv2d(3, 2, 3), (50, 3, 6, 5), 1),
    "one image": (nn.Conv2d(3, 2, 3), (3, 20, 30), 0),
    "conv3d": (nn.Conv3d(3, 2, 1), (20, 3, 4, 4, 4), 1),
    "transposed": (nn.ConvTranspose2d(3, 2, 3), (50, 3, 6, 5), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_features_are_on_the_axis_on_which_the_layer_reads_them(name):
    plain, shape, axis = LAYERS[name]
    layer, x = copy.deepcopy(plain), 50 + 4 * torch.randn(shape)
    standardize_input(layer, 3)
    layer(x)
    rows = x.double().movedim(axis, -1).reshape(-1, 3)
    mean, spread = rows.mean(0), rows.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(layer.input_mean.double(), mean, rtol=1e-6, atol=0)
    if name != "one example":  # which has no spread
        expected = plain(((x.double().movedim(axis, -1) - mean) / spread).movedim(-1, axis).float())
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_packed_sequences_are_standardised_without_their_padding():
    layer = nn.LSTM(2, 3, batch_first=True)
    standardize_input(layer, 2)
    sequences = [5 + torch.randn(n, 2) for n in (9, 4, 1)]
    layer(nn.utils.rnn.pack_sequence(sequences))
    assert layer.input_count == 14
    torch.testing.assert_close(layer.input_mean, torch.cat(sequences).mean(0))


def test_an_input_that_is_given_by_name_is_standardised():
    layer, x = nn.Linear(2, 2), 100 + torch.randn(99, 2)
    standardize_input(layer, 2)
    by_name = layer(input=x)
    assert torch.equal(by_name, layer.eval()(x))
    assert layer.input_count == 99


def test_bad_arguments_are_named():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="features: expected a positive number, got 0"):
        standardize_input(layer, 0)
    with pytest.raises(ValueError, match="features: this Linear reads 3, got 4"):
        standardize_input(layer, 4)
    standardize_input(layer, 3)
    with pytest.raises(ValueError, match="standardised already"):
        standardize_input(layer, 3)
    with pytest.raises(ValueError, match="std: expected a positive number, got 0"):
        restore_output_scale(layer, 0.0, 0.0)
    restore_output_scale(layer)
    with pytest.raises(ValueError, match="scaled already"):
        restore_output_scale(layer)


# -- the output ----------------------------------------------------------------------------------------------------


def test_the_output_is_in_the_units_of_the_targets_and_so_are_gradients():
    layer, x = nn.Linear(3, 2).double(), torch.randn(7, 3, dtype=torch.float64)
    restore_output_scale(layer, -40.0, 9.0)
    layer.double()
    out = layer(x)
    torch.testing.assert_close(out, 9 * (x @ layer.weight.T + layer.bias) - 40)
    (grad,) = torch.autograd.grad(out.sum(), layer.bias)
    assert grad.tolist() == [63, 63]


def test_under_autocast_the_output_far_from_zero_is_not_rounded_to_half_precision():
    layer, x = nn.Linear(3, 1), torch.randn(50, 3)
    plain = layer(x).double()
    restore_output_scale(layer, 1000.0, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    assert (out.double() - 1000 - plain).abs().max() < 0.05  # bfloat16 has steps of 4 there


# -- what else is done with models ---------------------------------------------------------------------------------


def network():
    made = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    standardize_input(made[0], 3)
    restore_output_scale(made[2], 5.0, 2.0)
    return made


def test_copies_and_pickles_go_on_by_themselves():
    first = network()
    first(torch.randn(40, 3))
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    x = 9 + torch.randn(30, 3)
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other.eval()(x), first.eval()(x))
        other.train()(x)
        assert other[0].input_count == 70
        assert first[0].input_count == 40


def test_nothing_is_read_from_the_device_and_one_graph_is_compiled():
    with FakeTensorMode():  # a fake tensor has no values to read
        fake = network()
        assert fake(torch.randn(8, 3)).shape == (8, 3)
    plain, x = network(), 3 + torch.randn(64, 3)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(compiled._orig_mod[0].input_mean, plain[0].input_mean)
    assert plain[0].input_count == compiled._orig_mod[0].input_count == 128


def test_gradients_pass_through_and_statistics_may_change_before_the_backward_pass():
    layer = nn.Linear(3, 1)
    standardize_input(layer, 3)
    x = torch.randn(10, 3, requires_grad=True)
    loss = layer(x).sum() + layer(2 * x).sum()
    loss.backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_in_half_precision_the_count_ends_all_the_same():
    layer = nn.Linear(2, 1)
    standardize_input(layer, 2)
    layer.to(torch.bfloat16)
    for _ in range(1100):
        layer(torch.randn(1, 2, dtype=torch.bfloat16))
    assert layer.input_count == ROWS


def test_autocast_standardises_in_full_precision():
    layer, x = nn.Linear(3, 2), 1000 + torch.randn(400, 3)
    standardize_input(layer, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    layer.eval()
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)
    assert out.dtype == torch.bfloat16


def test_a_checkpoint_of_ours_brings_them_back(make_trainer, tmp_path):
    model = ae.MLPAutoencoder(6, 2, hidden=(8,))
    standardize_input(model.encoder.layers[0], 6)
    restore_output_scale(model.decoder.layers[-1], 50.0, 3.0)
    x = 50 + 3 * torch.randn(64, 6)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, torch.utils.data.DataLoader(x, 16))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = ae.load(tmp_path / "model.ckpt")
    assert again.encoder.layers[0].input_count == 128
    assert torch.equal(again.eval().reconstruct(x), model.eval().reconstruct(x))
    with pytest.raises(ValueError, match="already"):
        standardize_input(again.encoder.layers[0], 6)


def test_a_model_without_such_layers_is_loaded_as_before():
    plain = nn.Sequential(nn.Linear(2, 2))
    restore_scaling(plain, {"0.weight": torch.zeros(2, 2), "other.input_mean": torch.zeros(2)})
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight"]
