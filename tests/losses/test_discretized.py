"""Mixtures on bins: SciPy's masses, sums to one, gradients, and an arithmetic coder that needs as many bits."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.datasets import load_digits

from lightning_ae import (
    BernoulliNLL,
    BitsPerDim,
    DiscretizedGaussianMixtureNLL,
    DiscretizedLogisticMixtureNLL,
    GaussianNLL,
    MLPAutoencoder,
    PoissonNLL,
    SSIMLoss,
    TensorDataModule,
    WeightedLoss,
)
from lightning_ae.losses.discretized import DiscretizedMixtureNLL

EACH = pytest.mark.parametrize(
    ("Loss", "family"), [(DiscretizedLogisticMixtureNLL, stats.logistic), (DiscretizedGaussianMixtureNLL, stats.norm)]
)


def every_value(loss, shape=()):
    """All values as a batch, ``(levels, 1, *shape)``."""
    values = loss.low + torch.arange(loss.levels, dtype=torch.float64) * (loss.high - loss.low) / (loss.levels - 1)
    return values.view(-1, 1, *[1] * len(shape)).expand(-1, 1, *shape)


def probabilities(loss, params):
    """Of every value of one number, from its ``(3K,)``."""
    return (-loss(params.expand(loss.levels, -1), every_value(loss))).exp()


@EACH
def test_is_scipys_mass_of_each_bin(Loss, family):
    loss = Loss(num_components=3, levels=16, low=-1.0, high=2.0)
    params = torch.randn(9, dtype=torch.float64)
    logits, means, scales = params.view(3, 3).numpy()
    weights, half = special.softmax(logits), 1.5
    middle, spread = 0.5 + half * means, half * np.exp(scales)
    edges = np.concatenate([[-np.inf], -1 + (np.arange(15) + 0.5) * 0.2, [np.inf]])
    cdf = family.cdf((edges[:, None] - middle) / spread)
    expected = (weights * np.diff(cdf, axis=0)).sum(1)
    np.testing.assert_allclose(probabilities(loss, params).numpy(), expected, rtol=1e-9)
    assert loss.mean(params[None]).item() == pytest.approx(np.clip((weights * middle).sum(), -1, 2), rel=1e-9)


@EACH
@pytest.mark.parametrize("log_scale", [-200.0, -8.0, -3.0, 0.0, 5.0, 200.0])
def test_bins_sum_to_one_and_none_costs_less_than_nothing(Loss, family, log_scale):
    loss = Loss(num_components=2)
    params = torch.cat([torch.randn(2), torch.tensor([-0.7, 3.0]), torch.full((2,), log_scale)]).double()
    p = probabilities(loss, params)
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert (p <= 1 + 1e-12).all()


@EACH
def test_blocks_are_components_of_all_channels(Loss, family):
    """Each number of an image by itself, from its own logits, means and scales."""
    loss = Loss(num_components=2, levels=8)
    params = torch.randn(3, *loss.params_shape((2, 4, 5)), dtype=torch.float64)
    x = torch.randint(8, (3, 2, 4, 5)) / 7.0
    assert params.shape == (3, 12, 4, 5)
    total = torch.zeros(3, dtype=torch.float64)
    for c in range(2):
        for i in range(4):
            for j in range(5):
                own = params[:, :, i, j].view(3, 3, 2, 2)[..., c].flatten(1)
                total += loss(own, x[:, c, i, j, None])
    torch.testing.assert_close(loss(params, x), total)
    assert loss.mean(params).shape == x.shape


@EACH
def test_gradients_are_those_of_finite_differences(Loss, family):
    loss = Loss(num_components=2, levels=8)
    params = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: loss(p, every_value(loss)), params)


@EACH
def test_of_one_component_the_gradient_is_that_of_the_closed_form(Loss, family):
    """∂L/∂m = (f(b) - f(a)) / (s P) per bin, with the density f at the ends of the bin."""
    loss = Loss(num_components=1, levels=16)
    params = torch.tensor([0.0, 0.2, -1.0], dtype=torch.float64).expand(16, 3).clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(params, every_value(loss)).sum(), params)
    scale, mean = 7.5 * math.exp(-1.0), 7.5 * 1.2
    edges = (np.concatenate([[-np.inf], np.arange(15) + 0.5, [np.inf]]) - mean) / scale
    mass, density = np.diff(family.cdf(edges)), np.diff(family.pdf(edges))
    np.testing.assert_allclose(grad[:, 1].numpy(), 7.5 * density / (scale * mass), rtol=1e-7)


@EACH
def test_values_and_gradients_are_finite_for_any_output_of_a_decoder(Loss, family):
    loss = Loss(num_components=2)
    rows = [
        [w, -w, m, -m, s, s2] for w in (0, 1e3) for m in (0, 1, 50, 1e4) for s, s2 in ((0, -30), (-1e4, 1e4), (80, -90))
    ]
    params = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    for value in (0.0, 128 / 255, 1.0):
        nats = loss(params, torch.full((len(rows), 1), value))
        assert nats.isfinite().all()
        assert (nats >= -1e-6).all()
        assert torch.autograd.grad(nats.sum(), params)[0].isfinite().all()
        assert loss.mean(params).isfinite().all()


@EACH
def test_samples_have_its_frequencies(Loss, family):
    loss = Loss(num_components=2, levels=6)
    params = torch.tensor([0.3, -0.2, -0.8, 1.3, -1.0, -1.5])
    drawn = loss.sample(params.expand(40_000, -1))
    loss.check(drawn)
    counts = torch.bincount((drawn * 5).round().long().flatten(), minlength=6)
    expected = 40_000 * probabilities(loss, params.double())
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4


def test_wide_gaussians_are_the_density_times_the_spacing():
    loss = DiscretizedGaussianMixtureNLL(num_components=1)
    x = torch.randint(60, 200, (5, 3)) / 255.0
    sigma = 0.1
    params = torch.cat([torch.zeros(5, 3), torch.full((5, 3), 0.1), torch.full((5, 3), math.log(2 * sigma))], 1)
    density = GaussianNLL(sigma)(torch.full((5, 3), 0.55), x) - 3 * math.log(1 / 255)
    torch.testing.assert_close(loss(params, x), density, rtol=1e-3, atol=0)


@EACH
def test_rounding_of_the_data_does_not_matter_and_other_values_are_an_error(Loss, family):
    loss = Loss(num_components=1)
    params = torch.randn(256, 3)
    x = every_value(loss).float()
    torch.testing.assert_close(loss(params, x + 1e-5), loss(params, x), rtol=0, atol=0)
    loss.check(x + 1e-6)
    for wrong in (x * 0.97, x + 0.1, 255 * x):
        with pytest.raises(ValueError, match=r"targets must be 256 values from 0 to 1, 0.003922 apart, got others"):
            loss.check(wrong)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_components": 0}, "num_components: expected a positive whole number, got 0"),
    ({"levels": 1}, "levels: expected a whole number >= 2, got 1"),
    ({"levels": 1.0}, "levels: expected a whole number"),
    ({"low": 1.0}, "high: expected a number above low=1.0, got 1.0"),
    ({"high": math.inf}, "high: expected a finite number"),
])  # fmt: skip
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DiscretizedLogisticMixtureNLL(**options)


def test_it_trains_beside_ssim_and_beats_eight_bits(make_trainer):
    x = torch.as_tensor(load_digits().images, dtype=torch.float32)[:600, None] / 16
    loss = WeightedLoss(
        {"bits": DiscretizedLogisticMixtureNLL(2, levels=17), "ssim": SSIMLoss(window_size=7)},
        {"bits": 1.0, "ssim": 1.0},
    )
    model = MLPAutoencoder((1, 8, 8), 8, hidden=(64,), loss=loss, lr=3e-3)
    trainer = make_trainer(max_epochs=8)
    trainer.fit(model, TensorDataModule(x, batch_size=50))
    bits = trainer.callback_metrics["val/reconstruction/bits"].item() / 64 / math.log(2)
    assert 0 < bits < 0.75 * math.log2(17)
    assert trainer.callback_metrics["val/reconstruction/ssim"] < 0.7


# -- lengths ------------------------------------------------------------------------------------------------------


class Coder:
    """Integer arithmetic coder of Witten, Neal & Cleary 1987, with 32 bits, for tables of frequencies."""

    TOP, HALF, QUARTER = (1 << 32) - 1, 1 << 31, 1 << 30

    @classmethod
    def encode(cls, symbols, tables):
        low, high, pending, bits = 0, cls.TOP, 0, []

        def put(bit, pending):
            bits.append(bit)
            bits.extend([1 - bit] * pending)

        for symbol, table in zip(symbols, tables, strict=True):
            width, total = high - low + 1, int(table[-1])
            high = low + width * int(table[symbol + 1]) // total - 1
            low = low + width * int(table[symbol]) // total
            while True:
                if high < cls.HALF or low >= cls.HALF:
                    put(int(low >= cls.HALF), pending)
                    pending = 0
                    low, high = low & (cls.HALF - 1), high & (cls.HALF - 1)
                elif low >= cls.QUARTER and high < 3 * cls.QUARTER:
                    pending += 1
                    low, high = low - cls.QUARTER, high - cls.QUARTER
                else:
                    break
                low, high = 2 * low, 2 * high + 1
        put(int(low >= cls.QUARTER), pending + 1)
        return bits

    @classmethod
    def decode(cls, bits, tables):
        stream = iter(bits)
        low, high, symbols = 0, cls.TOP, []
        code = 0
        for _ in range(32):
            code = 2 * code + next(stream, 0)
        for table in tables:
            width, total = high - low + 1, int(table[-1])
            value = ((code - low + 1) * total - 1) // width
            symbol = int(np.searchsorted(table, value, side="right")) - 1
            symbols.append(symbol)
            high = low + width * int(table[symbol + 1]) // total - 1
            low = low + width * int(table[symbol]) // total
            while True:
                if high < cls.HALF or low >= cls.HALF:
                    shift = cls.HALF if low >= cls.HALF else 0
                elif low >= cls.QUARTER and high < 3 * cls.QUARTER:
                    shift = cls.QUARTER
                else:
                    break
                low, high, code = 2 * (low - shift), 2 * (high - shift) + 1, 2 * (code - shift) + next(stream, 0)
        return symbols


def table(p):
    """Cumulative whole frequencies, none 0, of probabilities."""
    return np.concatenate([[0], np.maximum(1, np.round(p * (1 << 22))).astype(np.int64).cumsum()])


@EACH
def test_the_loss_is_the_length_that_an_arithmetic_coder_writes(Loss, family):
    """Bytes from a two-component mixture, different for each number; the coder's bits are read back as the bytes."""
    loss = Loss(num_components=2)
    params = torch.randn(1500, 6, dtype=torch.float64)
    params[:, 4:] -= 2.5
    x = loss.sample(params)
    symbols = (x * 255).round().long().flatten().tolist()
    tables = [table(probabilities(loss, row).numpy()) for row in params]
    written = Coder.encode(symbols, tables)
    assert Coder.decode(written, tables) == symbols
    length = loss.description_length(params, x).sum().item()
    assert abs(len(written) - length) < 0.01 * length + 32
    metric = BitsPerDim()
    metric.update(loss(params, x), dims=1)
    assert metric.compute().item() * 1500 == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 0.25 / 255, 1e-4])
def test_the_length_of_a_density_is_that_of_its_cells(sigma):
    """At σ = 77 δ, δ/4 and δ/40: what the coder writes; the density alone is right in the first case only."""
    loss, delta = GaussianNLL(sigma), 1 / 255
    a = torch.rand(1500, 1, dtype=torch.float64)
    symbols = ((a + sigma * torch.randn_like(a)) / delta).round().long()
    x = symbols * delta
    levels = torch.arange(-1000, 1256, dtype=torch.float64) * delta
    tables = []
    for row in a:
        cells = loss.cell_nll(row.expand(len(levels)), levels, delta)
        tables.append(table(cells.neg().exp().numpy()))
    written = len(Coder.encode((symbols.flatten() + 1000).tolist(), tables))
    length = loss.description_length(a, x, delta).sum().item()
    assert abs(written - length) < 0.01 * length + 32
    assert (loss.description_length(a, x, delta) >= 0).all()
    bits = loss(a, x).sum().item() / math.log(2) - 1500 * math.log2(delta)
    assert (abs(bits - length) < 0.01 * length) == (sigma == 0.3)
    metric = BitsPerDim(delta)
    metric.update(loss(a, x), dims=1)
    if bits < 0:
        with pytest.warns(UserWarning, match="is no length of a code"):
            metric.compute()


def test_only_probabilities_call_themselves_discrete():
    assert DiscretizedLogisticMixtureNLL.discrete
    assert PoissonNLL.discrete
    assert BernoulliNLL.discrete
    assert not GaussianNLL.discrete
    with pytest.raises(ValueError, match="resolution: PoissonNLL gives probabilities of whole values"):
        PoissonNLL().description_length(torch.zeros(1, 1), torch.zeros(1, 1), 0.1)
    with pytest.raises(ValueError, match="resolution: expected a positive number, got 0"):
        GaussianNLL().description_length(torch.zeros(1, 1), torch.zeros(1, 1), 0)
    assert issubclass(DiscretizedLogisticMixtureNLL, DiscretizedMixtureNLL)
