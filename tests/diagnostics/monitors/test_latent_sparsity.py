"""Figures of the latent against NumPy in double precision over the codes that the model gave."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch import distributions, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_ae as ae
from lightning_ae.codes import Code, CodeOutput
from lightning_ae.diagnostics.monitors.dead_relu import DeadReLUMonitor
from lightning_ae.diagnostics.monitors.gradient_saturation import GradientSaturationMonitor
from lightning_ae.diagnostics.monitors.latent_sparsity import LatentSparsityMonitor
from lightning_ae.diagnostics.watch import probe as probe_module


def reference(z, eps=0.0, mean=None):
    """All figures of dense codes ``(N, D)``, each from its definition."""
    z = np.asarray(z, dtype=np.float64)
    n, d = z.shape
    size = np.abs(z)
    alive = size[size.sum(1) > 0]
    m1, m2 = alive.mean(1), (alive**2).mean(1)
    used = size[:, size.sum(0) > 0]
    covariance = np.atleast_2d(np.cov(z.T, bias=True))
    share = np.linalg.svd(covariance, compute_uv=False)
    share = share[share > 0] / share.sum() if share.sum() > 0 else share[:0]
    pairs = np.abs(alive[:, :, None] - alive[:, None, :]).sum((1, 2))
    return {
        "samples": n,
        "l0": (size > eps).sum(1).mean(),
        "l1": size.sum(1).mean(),
        "hoyer": ((math.sqrt(d) - m1 / np.sqrt(m2) * math.sqrt(d)) / (math.sqrt(d) - 1)).mean(),
        "gini": (pairs / (2 * d * d * m1)).mean(),
        "population_sparsity": ((1 - m1**2 / m2) / (1 - 1 / d)).mean(),
        "lifetime_sparsity": ((1 - used.mean(0) ** 2 / (used**2).mean(0)) / (1 - 1 / n)).mean(),
        "dead_fraction": (~(size > eps).any(0)).mean(),
        "always_on_fraction": (size > eps).all(0).mean(),
        "active_units": ((z if mean is None else np.asarray(mean, dtype=np.float64)).var(0) > 0.01).sum(),
        "effective_rank": math.exp(-(share * np.log(share)).sum()),
    }


def codes(*shape):
    """Sparse, with a latent that is dead, one that is always on and constant, and an example without any."""
    z = torch.randn(*shape) * (torch.rand(*shape) < 0.4)
    z[..., 0] = 0.0
    z[..., 1] = 0.7
    z[0] = 0.0
    return z


class Emits(L.LightningModule):
    """Its batches are its codes."""

    def __init__(self):
        super().__init__()
        self.latent = nn.Identity()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        z = self.latent(batch[0] if isinstance(batch, list) else batch)
        return {"loss": (self.weight * z.float()).square().mean(), "z": z}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def watch(make_trainer, model, batches, batch_size=8, options=None, **settings):
    """Train with a monitor that looks at every step."""
    monitor = LatentSparsityMonitor(**{"every_n_steps": 1, **(options or {})})
    loader = batches if isinstance(batches, DataLoader) else DataLoader(batches, batch_size=batch_size)
    make_trainer(callbacks=monitor, **settings).fit(model, loader)
    return monitor


def agrees(summary, expected, rel=1e-5):
    assert {k: v for k, v in summary.items() if k != "unread_fraction"} == pytest.approx(expected, rel=rel)


# -- dense codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize(
    ("shape", "unit_dim"), [((8,), None), ((5, 8), None), ((8, 3, 4), None), ((8, 5), 1), ((3, 8, 4), 2), ((2,), None)]
)
def test_all_figures_are_numpys_over_the_codes_of_all_batches(shape, unit_dim, eps, make_trainer):
    axis = unit_dim if unit_dim is not None else 1 if len(shape) == 3 else len(shape)
    z = codes(20, *shape).movedim(axis, -1) if len(shape) == 1 else torch.randn(20, *shape)
    if len(shape) > 1:
        moved = codes(20, *[s for i, s in enumerate(shape, 1) if i != axis], shape[axis - 1])
        z = moved.movedim(-1, axis).contiguous()
    rows = z.movedim(axis, -1).flatten(0, -2).numpy()
    monitor = watch(make_trainer, Emits(), z, options={"latent": "latent", "eps": eps, "unit_dim": unit_dim})
    expected = reference(rows, eps)
    agrees(monitor.summary(), expected)
    assert expected["dead_fraction"] > 0
    assert monitor.num_samples() == len(rows)
    np.testing.assert_allclose(monitor.variance(), rows.astype(float).var(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(monitor.firing_frequency(), (np.abs(rows) > eps).mean(0))


def test_only_the_codes_of_the_steps_looked_at_count(make_trainer):
    z = torch.randn(48, 4)
    monitor = watch(make_trainer, Emits(), z, batch_size=4, options={"latent": "latent", "every_n_steps": 3})
    seen = z.view(12, 4, 4)[::3].flatten(0, 1)
    agrees(monitor.summary(), reference(seen))
    # of accumulated steps all batches
    monitor = watch(
        make_trainer,
        Emits(),
        z,
        batch_size=4,
        options={"latent": "latent", "every_n_steps": 3},
        accumulate_grad_batches=2,
    )
    seen = z.view(6, 8, 4)[::3].flatten(0, 1)
    agrees(monitor.summary(), reference(seen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_of_other_precision_are_summed_without_loss(dtype, make_trainer):
    z = torch.randn(64, 6).to(dtype)
    monitor = watch(make_trainer, Emits(), z, options={"latent": "latent"})
    agrees(monitor.summary(), reference(z.double()), rel=1e-9 if dtype == torch.float64 else 1e-5)


def test_wide_codes_have_all_figures_but_the_rank(make_trainer):
    z = codes(24, 300)
    expected = reference(z)
    del expected["effective_rank"]
    monitor = watch(make_trainer, Emits(), z, options={"latent": "latent"})
    agrees(monitor.summary(), expected)
    np.testing.assert_allclose(monitor.variance(), z.double().numpy().var(0), rtol=1e-9, atol=1e-12)


def test_a_large_offset_does_not_drown_the_variance(make_trainer):
    z = torch.randn(64, 4, dtype=torch.float64) * torch.tensor([1.0, 0.05, 0.2, 1e-2]) + 1000.0
    monitor = watch(make_trainer, Emits(), z, options={"latent": "latent"})
    np.testing.assert_allclose(monitor.variance(), z.numpy().var(0), rtol=1e-2)
    assert monitor.summary()["active_units"] == 2


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_a_constant_code_has_rank_zero_and_no_active_unit(value, make_trainer):
    z = torch.full((64, 4), value) * (1 + 1e-7 * torch.randn(64, 4))
    monitor = watch(make_trainer, Emits(), z, options={"latent": "latent"})
    summary = monitor.summary()
    assert summary["effective_rank"] == 0.0
    assert summary["active_units"] == 0.0
    assert monitor.variance().tolist() == [0.0] * 4
    assert all(math.isfinite(v) for v in summary.values())
    assert ("hoyer" in summary) == ("lifetime_sparsity" in summary) == (value != 0)
    assert summary["dead_fraction"] == float(value == 0)
    assert len(monitor.unread_latents()) == 0


def test_rows_that_are_not_finite_are_counted_apart(make_trainer):
    z = torch.randn(24, 4)
    bad = z.clone()
    bad[3, 1], bad[5, 0], bad[5, 2], bad[17, 3] = math.nan, math.inf, math.nan, -math.inf
    monitor = watch(make_trainer, Emits(), bad, options={"latent": "latent"})
    kept = z[[i for i in range(24) if i not in (3, 5, 17)]]
    agrees(monitor.summary(), {**reference(kept), "nonfinite_rows": 3})


# -- padding ----------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([3, 5, 1, 2, 4, 5, 0, 3])


def lengths_mask(batch):
    return torch.arange(5) < batch[1][:, None]


@pytest.mark.parametrize("kind", ["positions", "examples"])
def test_padding_does_not_count(kind, make_trainer):
    z = codes(8, 5, 6)
    mask = torch.arange(5) < LENGTHS[:, None]
    z[~mask] = math.nan  # whatever is there
    data = DataLoader(torch.utils.data.TensorDataset(z, LENGTHS), batch_size=4)
    if kind == "examples":
        whole = codes(8, 5, 6)
        data = DataLoader(torch.utils.data.TensorDataset(whole, LENGTHS), batch_size=4)
        monitor = watch(
            make_trainer, Emits(), data, options={"latent": "latent", "mask_fn": lambda batch: batch[1] > 2}
        )
        agrees(monitor.summary(), reference(whole[LENGTHS > 2].flatten(0, 1)))
        return
    monitor = watch(make_trainer, Emits(), data, options={"latent": "latent", "mask_fn": lengths_mask})
    agrees(monitor.summary(), reference(z[mask]))
    assert monitor.num_samples() == int(LENGTHS.sum())


def test_an_example_counts_unless_all_its_positions_are_padding(make_trainer):
    z = codes(8, 6)
    data = DataLoader(torch.utils.data.TensorDataset(z, LENGTHS), batch_size=4)
    monitor = watch(make_trainer, Emits(), data, options={"latent": "latent", "mask_fn": lengths_mask})
    agrees(monitor.summary(), reference(z[LENGTHS > 0]))


def test_the_mask_holds_for_the_divergence_too(make_trainer):
    mean, log_variance = torch.randn(8, 5, 3), torch.randn(8, 5, 3)
    keep = torch.arange(5) < LENGTHS[:, None]
    data = DataLoader(torch.utils.data.TensorDataset(torch.stack([mean, log_variance], 1), LENGTHS), batch_size=4)
    monitor = watch(
        make_trainer,
        Emits(),
        data,
        options={
            "latent": lambda outputs, batch: {"mean": batch[0][:, 0], "log_variance": batch[0][:, 1]},
            "mask_fn": lengths_mask,
        },
    )
    torch.testing.assert_close(
        monitor.kl_per_dimension(), normal_kl(mean[keep].double(), log_variance[keep].double()).mean(0)
    )
    agrees({k: v for k, v in monitor.summary().items() if k != "kl"}, reference(mean[keep]))


def test_a_mask_of_another_shape_is_an_error(make_trainer):
    with pytest.raises(ValueError, match=r"mask_fn: the latent has rows \(8, 5\), got a mask of shape \(8, 3\)"):
        watch(
            make_trainer,
            Emits(),
            torch.randn(8, 5, 6),
            options={"latent": "latent", "mask_fn": lambda batch: batch[:, :3, 0] > 0},
        )


# -- finding it -------------------------------------------------------------------------------------------------------


class Collect(L.Callback):
    """The codes that the model returned, and its decoder's input."""

    def __init__(self):
        self.z = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        z = outputs["output"].z.detach()
        self.z.append(z.clone() if isinstance(z, torch.Tensor) else z.to_dense())


VARIANTS = {
    "linear": lambda: ae.LinearAutoencoder((1, 8, 8), 3),
    "untied": lambda: ae.LinearAutoencoder((1, 8, 8), 3, tied=False),
    "mlp": lambda: ae.MLPAutoencoder((1, 8, 8), 3, hidden=(8,)),
    "conv": lambda: ae.ConvAutoencoder((1, 8, 8), 3, channels=(4, 8)),
    "denoising": lambda: ae.DenoisingAutoencoder((1, 8, 8), 3, hidden=(8,)),
    "contractive": lambda: ae.ContractiveAutoencoder((1, 8, 8), 3, hidden=(8,)),
    "sparse": lambda: ae.SparseAutoencoder(*ae.mlp_pair((1, 8, 8), 3, hidden=(8,))),
    "stacked": lambda: ae.StackedAutoencoder([ae.LinearAutoencoder((1, 8, 8), 5), ae.LinearAutoencoder(5, 3)]),
    "multi scale": lambda: ae.MultiScaleAutoencoder(
        ae.MLPEncoder((1, 8, 8), 3, hidden=(8,)),
        ae.scale_decoders(ae.BlockMean(4), (1, 8, 8), 3, hidden=(8,)),
        ae.BlockMean(4),
    ),
    "sparse box": lambda: ae.Autoencoder(*ae.mlp_pair((1, 8, 8), 3, hidden=(8,)), code=HalfGaussian(3)),
    "variational": lambda: ae.VariationalAutoencoder(
        ae.MLPEncoder((1, 8, 8), 6, hidden=(8,)), ae.MLPDecoder(3, (1, 8, 8), hidden=(8,))
    ),
    "vector quantized": lambda: ae.VectorQuantizedAutoencoder(
        *ae.mlp_pair((1, 8, 8), 4, hidden=(8,)), code=ae.VectorQuantizerCode(8, 2)
    ),
}


def test_every_variant_is_among_those_tested():
    shipped = {c for c in vars(ae).values() if isinstance(c, type) and issubclass(c, ae.Autoencoder)}
    # whose codes are no tensors: below
    assert shipped - {ae.DictionaryAutoencoder} == {type(make()) for make in VARIANTS.values()}


def test_the_sparse_code_of_a_dictionary_is_found(make_trainer):
    monitor, collect = LatentSparsityMonitor(every_n_steps=1), Collect()
    model = ae.DictionaryAutoencoder(16, 48, code=ae.TopKCode(5))
    make_trainer(callbacks=[monitor, collect]).fit(model, DataLoader(torch.randn(32, 16), batch_size=8))
    z = torch.cat(collect.z).double()
    assert z.shape == (32, 48)
    for name, value in reference(z).items():
        assert monitor.summary()[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_latent_of_our_models_is_found(variant, precision, make_trainer):
    monitor, collect = LatentSparsityMonitor(every_n_steps=1), Collect()
    trainer = make_trainer(callbacks=[monitor, collect], precision=precision)
    trainer.fit(VARIANTS[variant](), DataLoader(torch.rand(32, 1, 8, 8), batch_size=8))
    z = torch.cat(collect.z).double()
    summary = monitor.summary()
    for name, value in reference(z).items():
        if variant not in ("sparse box", "variational") or name != "active_units":
            assert summary[name] == pytest.approx(value, rel=1e-4), name
    assert summary["unread_fraction"] == 0.0


def test_a_module_by_name_and_a_function_find_the_same(make_trainer):
    z = codes(32, 6)
    expected = reference(z)
    for latent in ("latent", {"z": "latent"}, lambda outputs, batch: outputs["z"], lambda outputs, batch: {"z": batch}):
        agrees(watch(make_trainer, Emits(), z, options={"latent": latent}).summary(), expected)


def normal_kl(mean, log_variance):
    posterior = distributions.Normal(mean, (log_variance / 2).exp())
    return distributions.kl_divergence(posterior, distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)))


class VAE(L.LightningModule):
    """A variational autoencoder of somebody else; its encoder gives a tuple, and two heads give the same."""

    def __init__(self, collapsed=0):
        super().__init__()
        self.mean, self.log_variance = nn.Linear(6, 4), nn.Linear(6, 4)
        self.encoder = Both(self.mean, self.log_variance)
        self.decoder = nn.Linear(4, 6)
        self.collapsed = collapsed
        with torch.no_grad():
            for head in (self.mean, self.log_variance):
                head.weight[:collapsed] = 0.0
                head.bias[:collapsed] = 0.0
            self.decoder.weight[:, :collapsed] = 0.0
        self.seen = []

    def training_step(self, batch, batch_idx):
        mean, log_variance = self.encoder(batch)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = normal_kl(mean, log_variance)
        self.seen.append((mean.detach(), log_variance.detach()))
        loss = functional.mse_loss(self.decoder(z), batch) + kl.sum(1).mean()
        return {"loss": loss, "mean": mean, "log_variance": log_variance, "kl": kl, "z": z}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Both(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x), self.second(x)


@pytest.mark.parametrize(
    "latent",
    [
        {"mean": "mean", "log_variance": "log_variance"},
        {"mean": "encoder", "log_variance": "encoder[1]"},
        lambda outputs, batch: {"mean": outputs["mean"], "log_variance": outputs["log_variance"]},
        lambda outputs, batch: {"mean": outputs["mean"], "kl": outputs["kl"]},
    ],
)
def test_the_divergence_of_a_gaussian_code_is_that_of_torch_distributions(latent, make_trainer):
    model = VAE(collapsed=1)
    x = 3 * torch.randn(40, 6)
    monitor = watch(make_trainer, model, x, options={"latent": latent})
    mean, log_variance = (torch.cat(part).double() for part in zip(*model.seen, strict=True))
    expected = normal_kl(mean, log_variance).mean(0)
    torch.testing.assert_close(monitor.kl_per_dimension(), expected, rtol=1e-5, atol=1e-9)
    assert monitor.summary()["kl"] == pytest.approx(float(expected.sum()), rel=1e-5)
    assert monitor.kl_per_dimension()[0] == 0.0
    assert monitor.summary()["active_units"] == (mean.numpy().var(0) > 0.01).sum() == 3


def test_a_collapsed_posterior_costs_nothing_and_has_no_active_unit(make_trainer):
    monitor = watch(
        make_trainer,
        VAE(collapsed=4),
        torch.randn(40, 6),
        options={"latent": lambda outputs, batch: {k: outputs[k] for k in ("z", "mean", "log_variance")}},
    )
    summary = monitor.summary()
    assert summary["kl"] == 0.0
    assert summary["active_units"] == 0  # of the means
    assert float(monitor.variance().min()) > 0.5  # the samples do vary
    assert monitor.num_samples() == 40


class HalfGaussian(Code):
    """A code with layers of its own that describes itself."""

    def __init__(self, size):
        super().__init__()
        self.mean, self.log_variance = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, h):
        return CodeOutput(self.mean(h) + 0.1, {})

    def statistics(self, h):
        return {"mean": self.mean(h), "log_variance": self.log_variance(h)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_code_of_ones_own_is_asked_before_the_step_and_in_the_precision_of_the_model(precision, make_trainer):
    model = ae.Autoencoder(*ae.mlp_pair((6,), 3, hidden=(4,)), code=HalfGaussian(3), lr=0.5)
    start = copy.deepcopy(model)
    x = torch.rand(16, 6)
    monitor = watch(make_trainer, model, x, batch_size=16, options={}, precision=precision)
    with torch.no_grad():
        expected = start.code.statistics(start.encoder(x))
    rtol = 1e-5 if precision == "32-true" else 5e-2
    kl = normal_kl(expected["mean"].double(), expected["log_variance"].double()).mean(0)
    torch.testing.assert_close(monitor.kl_per_dimension(), kl, rtol=rtol, atol=rtol)


# -- quantised codes --------------------------------------------------------------------------------------------------


class Chooses(Code):
    """Indices of the nearest of five numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("book", torch.linspace(-1, 1, 5))

    def indices(self, h):
        return (h[..., None] - self.book).abs().argmin(-1)

    def forward(self, h):
        return CodeOutput(h + (self.book[self.indices(h)] - h).detach(), {})

    def statistics(self, h):
        return {"indices": self.indices(h), "num_codes": torch.tensor(5)}


def usage(indices, size):
    counts = np.bincount(np.asarray(indices).ravel(), minlength=size)
    p = counts[counts > 0] / counts.sum()
    return {"codebook_usage": (counts > 0).mean(), "perplexity": math.exp(-(p * np.log(p)).sum())}


def test_usage_and_perplexity_of_a_codebook(make_trainer):
    model = ae.Autoencoder(*ae.mlp_pair((6,), 3, hidden=(4,)), code=Chooses(), lr=0.0)
    x = torch.rand(32, 6)
    summary = watch(make_trainer, model, x).summary()
    with torch.no_grad():
        expected = usage(model.code.indices(model.encoder(x)), 5)
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert 1 < expected["perplexity"] < 5
    assert "l0" in summary


class Quantises(Emits):
    def __init__(self):
        super().__init__()
        self.quantizer = Argmax()

    def training_step(self, batch, batch_idx):
        return {**super().training_step(batch, batch_idx), "indices": self.quantizer(batch)}


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


def test_indices_alone_have_usage_and_nothing_else(make_trainer):
    x = torch.randn(32, 7, 4)
    expected = usage(x.argmax(-1), 6)
    for latent in (
        {"indices": "quantizer", "num_codes": 6},
        lambda outputs, batch: {"indices": outputs["indices"], "num_codes": 6},
    ):
        monitor = watch(make_trainer, Quantises(), x, options={"latent": latent})
        assert monitor.summary() == pytest.approx(expected)
        with pytest.raises(ValueError, match="No codes were seen"):
            monitor.firing_frequency()


def test_negative_indices_are_padding_and_those_beyond_the_book_are_told(make_trainer):
    def latent(outputs, batch):
        return {"indices": torch.tensor([0, 0, 1, -1, 7]), "num_codes": 3}

    with pytest.warns(UserWarning, match="1 indices are not below num_codes = 3"):
        summary = watch(make_trainer, Emits(), torch.randn(8, 2), options={"latent": latent}).summary()
    assert summary == pytest.approx(usage([0, 0, 1], 3))


# -- who reads it -----------------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """A decoder that is blind to some latents, or to all."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.linear = nn.Linear(max(len(read), 1), 6)

    def forward(self, z):
        seen = z[:, self.read] if self.read else torch.ones(len(z), 1)
        return self.linear(seen)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("read", [[0, 1, 2, 3], [0, 2], []])
def test_latents_that_the_decoder_does_not_read_are_named(read, accumulate, make_trainer):
    model = ae.Autoencoder(nn.Linear(6, 4), Reads(read), ae.SquaredError())
    monitor = watch(make_trainer, model, torch.rand(32, 6), accumulate_grad_batches=accumulate)
    unread = [i for i in range(4) if i not in read]
    assert monitor.unread_latents().tolist() == unread
    assert monitor.summary()["unread_fraction"] == len(unread) / 4


def test_a_latent_that_does_not_vary_is_not_called_unread(make_trainer):
    model = ae.Autoencoder(nn.Linear(6, 4), Reads([1, 2]), ae.SquaredError(), lr=0.0)
    with torch.no_grad():
        model.encoder.weight[3] = 0.0
    assert watch(make_trainer, model, torch.rand(32, 6)).unread_latents().tolist() == [0]


def test_a_small_latent_is_read_if_its_weight_is_large(make_trainer):
    model = ae.Autoencoder(nn.Linear(6, 4), Reads([0, 1, 2]), ae.SquaredError(), lr=0.0)
    with torch.no_grad():
        model.encoder.weight[0] *= 1e-5
        model.decoder.linear.weight[:, 0] *= 1e5
        model.encoder.weight[1] *= 1e5
        model.decoder.linear.weight[:, 1] *= 1e-5
        model.decoder.linear.weight[:, 2] *= 1e-4  # little, and yet read
    assert watch(make_trainer, model, torch.rand(32, 6)).unread_latents().tolist() == [3]


def test_the_latent_of_a_foreign_model_is_heard_as_well(make_trainer):
    class Foreign(Emits):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), Reads([0, 3])

        def training_step(self, batch, batch_idx):
            return functional.mse_loss(self.decoder(self.encoder(batch)), batch)

    monitor = watch(make_trainer, Foreign(), torch.rand(32, 6), options={"latent": "encoder"})
    assert monitor.unread_latents().tolist() == [1, 2]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0, got -1.0"),
        ({"eps": math.nan}, ValueError, "eps: expected a number of at least 0, got nan"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps: expected a positive whole number, got 0"),
        ({"latent": {}}, ValueError, "latent: expected names for some of"),
        ({"latent": {"mu": "encoder"}}, ValueError, r"latent: expected names for some of .* got \['mu'\]"),
        ({"latent": {"indices": "vq"}}, ValueError, "indices and the number num_codes belong together"),
        ({"latent": {"z": 3}}, ValueError, "expected a module's name such as 'encoder.2' or 'encoder.1.', got 3"),
        ({"latent": 3}, TypeError, "expected a module's name, a dict of names or a function, got int"),
        ({"latent": nn.Linear(2, 2)}, TypeError, "got Linear; give its name"),
        ({"unit_dim": "channels"}, TypeError, "unit_dim: expected a whole number, got str"),
    ],
)
def test_errors_at_the_door(options, error, message):
    with pytest.raises(error, match=message):
        LatentSparsityMonitor(**options)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (None, "Emits is no lightning_ae.Autoencoder; name the module whose output is the latent"),
        ("latents", r"Emits has no module 'latents'; close to it: \['latent'\]"),
        ("unused", "latent: unused has given no tensor in training_step"),
        (lambda outputs, batch: None, "latent: the function has given no tensor in training_step"),
        (lambda outputs, batch: {"code": batch}, r"expected a dict with some of .* got \['code'\]"),
        (
            lambda outputs, batch: batch.argmax(1),
            r"z: expected floating-point codes \(B, ...\), got torch.int64 \(8,\)",
        ),
        (lambda outputs, batch: {"indices": batch.argmax(1)}, "indices need num_codes beside them"),
        (lambda outputs, batch: {"indices": batch, "num_codes": 3}, "indices: expected whole numbers"),
    ],
)
def test_a_latent_that_is_not_there_is_an_error_in_the_first_step(latent, message, make_trainer):
    model = Emits()
    model.unused = nn.Identity()
    with pytest.raises(ValueError, match=message):
        watch(make_trainer, model, torch.randn(8, 3), options={"latent": latent})


def test_questions_before_anything_was_seen_are_errors():
    monitor = LatentSparsityMonitor()
    assert monitor.summary() == {}
    assert monitor.num_samples() == 0
    for ask in (monitor.firing_frequency, monitor.variance, monitor.unread_latents):
        with pytest.raises(ValueError, match="No codes were seen yet"):
            ask()
    with pytest.raises(ValueError, match="no code with mean and log-variance, or kl, was seen"):
        monitor.kl_per_dimension()


# -- over steps, logs and monitors ------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_figures_of_an_uninterrupted_one(make_trainer, tmp_path):
    x = torch.rand(40, 6)

    def fit(epochs, path=None):
        torch.manual_seed(1)
        model = ae.MLPAutoencoder(6, 3, hidden=(5,), lr=0.01)
        monitor = LatentSparsityMonitor(every_n_steps=3, horizon=16)
        trainer = make_trainer(max_epochs=epochs, callbacks=monitor, log_every_n_steps=4)
        trainer.fit(model, DataLoader(x, batch_size=8), ckpt_path=path)
        return trainer, monitor

    trainer, half = fit(3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(6, tmp_path / "half.ckpt")
    _, whole = fit(6)
    assert resumed.summary() == pytest.approx(whole.summary(), rel=1e-9)
    assert half.summary() != pytest.approx(whole.summary(), rel=1e-3)


def test_the_latest_nats_of_a_resumed_run_are_those_of_an_uninterrupted_one(make_trainer, tmp_path):
    x, seen = torch.rand(40, 6), {}

    class Logs(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values = {
                n: float(v) for n, v in trainer.callback_metrics.items() if n in ("latent/kl", "latent/active_units")
            }
            seen.setdefault(trainer.global_step, []).append(values)

    def fit(epochs, path=None):
        torch.manual_seed(1)
        model = ae.VariationalAutoencoder(*ae.mlp_pair(6, 3, hidden=(5,), h_dim=6), lr=0.05)
        monitor = LatentSparsityMonitor(every_n_steps=2, horizon=16)
        trainer = make_trainer(max_epochs=epochs, callbacks=[monitor, Logs()], log_every_n_steps=4)
        trainer.fit(model, ae.TensorDataModule(x, batch_size=8, val_fraction=0), ckpt_path=path)
        return trainer, monitor

    trainer, _ = fit(3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    seen.clear()
    _, resumed = fit(6, tmp_path / "half.ckpt")
    _, whole = fit(6)
    assert resumed.summary() == pytest.approx(whole.summary(), rel=1e-9)
    # the first batch of a resumed fit has no metrics of callbacks yet
    compared = [values for step, values in seen.items() if len(values) == 2 and values[0]]
    assert len(compared) > 10
    assert all(resumed == pytest.approx(whole, rel=1e-9) for resumed, whole in compared)
    assert len({values[0]["latent/kl"] for values in compared}) > 3


class Drifts(L.LightningModule):
    """Posteriors that are the same for all examples of a batch, and go from far away to the prior."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.latent = nn.Identity()

    def training_step(self, batch, batch_idx):
        mean = self.latent(torch.full((len(batch), 2), 10.0 - 2 * min(batch_idx, 5)) + 0 * batch)
        return {"loss": self.weight.square(), "mean": mean, "log_variance": torch.zeros_like(mean)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_posterior_that_moved_while_training_tells_no_examples_apart(make_trainer):
    monitor = LatentSparsityMonitor(lambda outputs, batch: {k: outputs[k] for k in ("mean", "log_variance")}, 1)
    trainer = make_trainer(callbacks=monitor, log_every_n_steps=3)
    trainer.fit(Drifts(), DataLoader(torch.zeros(64, 2), batch_size=8))
    summary = monitor.summary()
    assert summary["samples"] == 64
    assert summary["active_units"] == 0
    assert summary["kl"] == 0.0  # of the last two batches
    assert monitor.kl_per_dimension().tolist() == [0.0, 0.0]


def three():
    return [
        DeadReLUMonitor(every_n_steps=2),
        GradientSaturationMonitor(every_n_steps=2),
        LatentSparsityMonitor(every_n_steps=2),
    ]


def test_figures_arrive_in_tensorboard_csv_and_the_metrics_of_callbacks(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="board")
    table = L.pytorch.loggers.CSVLogger(tmp_path, name="csv")
    monitors = three()
    trainer = make_trainer(callbacks=monitors, logger=[board, table], log_every_n_steps=4, max_epochs=1)
    trainer.fit(ae.MLPAutoencoder(6, 3, hidden=(5,)), DataLoader(torch.rand(64, 6), batch_size=8))
    summary = monitors[2].summary()
    read = EventAccumulator(board.log_dir)
    read.Reload()
    rows = np.genfromtxt(f"{table.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
    medians = rows["latent/log10_frequency/p50"]
    rows = rows[~np.isnan(rows["latent/l1"])]
    assert len(rows) == 2
    assert len(read.Scalars("latent/l1")) == 2
    for name, value in summary.items():
        assert float(trainer.callback_metrics[f"latent/{name}"]) == pytest.approx(value, rel=1e-5)
        assert rows[f"latent/{name}"][-1] == pytest.approx(value, rel=1e-5)
        assert read.Scalars(f"latent/{name}")[-1].value == pytest.approx(value, rel=1e-5)
    assert "latent/log10_frequency" in read.Tags()["histograms"]
    assert medians[~np.isnan(medians)].tolist() == [0.0, 0.0]  # a dense code is always on


def test_all_monitors_of_a_trainer_share_one_probe_and_one_reduction_per_log(make_trainer, tmp_path, monkeypatch):
    calls = []
    original = probe_module.reduce_and_read

    def counted(sums, *args):
        calls.append({monitor for monitor, _ in sums})
        return original(sums, *args)

    monkeypatch.setattr(probe_module, "reduce_and_read", counted)
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    logs = []
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logs.append(set(metrics)))
    monitors = three()
    trainer = make_trainer(callbacks=monitors, logger=logger, log_every_n_steps=4)
    trainer.fit(ae.MLPAutoencoder(6, 3, hidden=(5,)), DataLoader(torch.rand(96, 6), batch_size=8))
    assert len({id(monitor._probe) for monitor in monitors}) == 1
    logs = [keys for keys in logs if "latent/l1" in keys]
    assert len(logs) == 3
    for keys in logs:
        assert {"dead_relu/dead_fraction", "saturation/output_ratio", "latent/l0"} <= keys
    assert calls == [{0, 1, 2}] * (len(logs) + 1)  # once more at the end of the fit


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a device."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.waits or (
            name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        ):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_waits_for_the_device_while_a_step_is_looked_at(masked, make_trainer, monkeypatch):
    class Variational(VAE):
        def training_step(self, batch, batch_idx):
            return {**super().training_step(batch, batch_idx), "indices": batch.argmax(1), "num_codes": 6}

    def latent(outputs, batch):
        return {k: v for k, v in outputs.items() if k != "loss"}

    mask = {"mask_fn": lambda batch: batch[:, 0] > 0} if masked else {}
    monitors = [
        GradientSaturationMonitor(every_n_steps=1, output="decoder", **mask),
        LatentSparsityMonitor(latent, every_n_steps=1, **mask),
        LatentSparsityMonitor(latent="mean", every_n_steps=2, horizon=7, **mask),
    ]
    called = set()
    for monitor in monitors:
        for name in ("on_activation", "on_gradient", "on_module", "on_batch", "on_step"):

            def checked(original, name, *args):
                called.add(name)
                with NoWaiting():
                    return original(*args)

            monkeypatch.setattr(monitor, name, partial(checked, getattr(monitor, name), name))
    model = Variational()
    model.decoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
    make_trainer(callbacks=monitors).fit(model, DataLoader(torch.rand(16, 6), batch_size=8))
    assert len(called) == 5
    assert monitors[1].summary()["perplexity"] > 1
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        float(torch.ones(1))


def test_weights_are_the_same_with_and_without_the_monitor(make_trainer):
    x = torch.rand(32, 6)
    found = []
    for callbacks in ([], [LatentSparsityMonitor(every_n_steps=2)]):
        torch.manual_seed(3)
        model = ae.Autoencoder(*ae.mlp_pair((6,), 3, hidden=(4,)), code=HalfGaussian(3))
        make_trainer(callbacks=callbacks, max_epochs=2).fit(model, DataLoader(x, batch_size=4))
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


class Write(L.Callback):
    """Writes what rank 0 has."""

    def __init__(self, monitor, path):
        self.monitor, self.path = monitor, path

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(self.monitor.summary(), self.path)


@pytest.mark.slow
@pytest.mark.flaky(reruns=2, only_rerun=["ProcessExitedException", "Connection (closed|reset) by peer"])
def test_two_ranks_have_the_figures_of_one(make_trainer, tmp_path):
    x = torch.rand(32, 6)
    start = ae.MLPAutoencoder(6, 3, hidden=(5,), latent_activation="relu", lr=0.01)
    seen = {}
    for ranks in (1, 2):
        monitor = LatentSparsityMonitor(every_n_steps=1)
        options = {"strategy": "ddp_spawn"} if ranks > 1 else {}
        trainer = make_trainer(
            devices=ranks, callbacks=[monitor, Write(monitor, tmp_path / f"{ranks}.pt")], log_every_n_steps=2, **options
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the spawned processes' own, and Lightning's on spawn
            trainer.fit(copy.deepcopy(start), ae.TensorDataModule(x, batch_size=8 // ranks, val_fraction=0.0, seed=0))
        seen[ranks] = torch.load(tmp_path / f"{ranks}.pt")
    assert seen[1]["samples"] == 32
    assert seen[2] == pytest.approx(seen[1], rel=1e-4)


def test_two_latents_of_one_model_are_two_monitors(make_trainer):
    monitors = [LatentSparsityMonitor(latent, every_n_steps=1) for latent in ("encoder", "decoder")]
    assert len({monitor.state_key for monitor in monitors}) == 2
    make_trainer(callbacks=monitors)  # which refuses two of one state


def test_a_graph_that_outlives_its_batch_is_heard_once(make_trainer):
    class Keeps(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.kept = torch.nn.Linear(6, 3), torch.nn.Linear(3, 6), None
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            if self.kept is None:
                self.kept = (self.decoder(self.encoder(batch)) - batch).square().mean()
            self.manual_backward(self.kept, retain_graph=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    monitors = [LatentSparsityMonitor("encoder", 1000), GradientSaturationMonitor(1000, output="decoder")]
    make_trainer(callbacks=monitors).fit(Keeps(), DataLoader(torch.rand(64, 6), batch_size=8))
    assert monitors[0]._read == []
    assert monitors[1]._pairs == []
