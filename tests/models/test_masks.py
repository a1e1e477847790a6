"""Numbers that are missing have neither loss nor gradient, wherever they are said to be missing."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_ae as ae

LOSSES = {
    "squared error": lambda: ae.SquaredError(),
    "sigmoid": lambda: ae.SquaredError("sigmoid"),
    "gaussian": lambda: ae.GaussianNLL(0.5, learn_scale=True),
    "laplace": lambda: ae.LaplaceNLL(),
    "bernoulli": lambda: ae.BernoulliNLL(),
    "continuous bernoulli": lambda: ae.ContinuousBernoulliNLL(),
    "poisson": lambda: ae.PoissonNLL(),
    "negative binomial": lambda: ae.NegativeBinomialNLL(6),
    "zero-inflated": lambda: ae.ZeroInflatedNegativeBinomialNLL(6),
    "discretised": lambda: ae.DiscretizedLogisticMixtureNLL(2),
    "weighted": lambda: ae.WeightedLoss({"a": ae.SquaredError(), "b": ae.LaplaceNLL()}, {"a": 1.0, "b": 2.0}),
}


def data(loss: ae.ReconstructionLoss, rows: int = 5) -> torch.Tensor:
    counts = isinstance(loss, (ae.PoissonNLL, ae.NegativeBinomialNLL))
    return torch.poisson(torch.full((rows, 6), 3.0)) if counts else torch.rand(rows, 6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_masked_loss_is_that_of_the_numbers_that_are_there(name):
    loss = LOSSES[name]().double()
    x = data(loss).double()
    params = torch.randn(5, *loss.params_shape((6,)), dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 6) < 0.6
    found = loss(params, torch.where(mask, x, torch.nan), mask)
    # each number by itself: the others do not matter, so a row of one number at a time adds up to the same
    alone = torch.stack(
        [sum((loss(params, x, torch.zeros_like(mask).index_put((torch.tensor(i), torch.tensor(j)), mask[i, j]))[i]
              for j in range(6)), torch.tensor(0.0)) for i in range(5)]
    )  # fmt: skip
    torch.testing.assert_close(found, alone.double())
    (gradient,) = torch.autograd.grad(found.sum(), params)
    assert gradient.isfinite().all()
    blocks = gradient.view(5, -1, 6)
    assert (blocks[~mask[:, None].expand_as(blocks)] == 0).all()
    torch.testing.assert_close(loss(params, x, torch.ones_like(mask)), loss(params, x))


def test_a_masked_gaussian_is_scipys_density_of_what_is_there():
    from scipy.stats import norm

    x, a = np.random.default_rng(0).normal(size=(2, 4, 7))
    there = np.random.default_rng(1).random((4, 7)) < 0.5
    loss = ae.GaussianNLL(0.7)(torch.tensor(a), torch.tensor(np.where(there, x, np.nan)), torch.tensor(there))
    np.testing.assert_allclose(loss, -(norm.logpdf(x, a, 0.7) * there).sum(1), rtol=1e-6)


def test_a_mask_of_another_shape_or_kind_is_refused():
    x = torch.rand(3, 6)
    with pytest.raises(ValueError, match=r"mask: expected booleans \(3, 6\)"):
        ae.SquaredError()(x, x, torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected booleans"):
        ae.SquaredError()(x, x, torch.ones(3, 6))


def twins(**kwargs):
    made = []
    for extra in ({}, kwargs):
        torch.manual_seed(0)
        made.append(ae.MLPAutoencoder(6, 3, hidden=(8,), loss=ae.GaussianNLL(learn_scale=True), **extra))
    return made


def losses(model: ae.Autoencoder, batch) -> torch.Tensor:
    return model.training_step(batch, 0)["loss"]


@pytest.mark.parametrize("where", ["dict", "tuple", "nan", "nan and mask", "column"])
def test_a_mask_is_read_wherever_it_is(where):
    x, mask = torch.rand(4, 6), torch.rand(4, 6) < 0.7
    if where == "column":
        mask = mask[:, :1].expand(4, 6)
    holes = torch.where(mask, x, torch.nan)
    given = {
        "dict": ({"mask_key": "there"}, {"x": x, "there": mask.float()}),
        "tuple": ({"mask_key": 1}, (x, mask)),
        "nan": ({"missing": "mask"}, holes),
        "nan and mask": ({"missing": "mask", "mask_key": 1}, (holes, torch.ones(4, 6))),
        "column": ({"mask_key": 1}, (x, mask[:, 0])),
    }[where]
    plain, masked = twins(**given[0])
    filled = torch.where(mask, x, 0.0)
    expected = plain.loss(plain(filled).params, filled, mask).mean()
    torch.testing.assert_close(losses(masked, given[1]), expected, rtol=0, atol=0)
    masked.score = "loss"
    score = masked.predict_step(given[1], 0)["score"]
    torch.testing.assert_close(score.mean(), expected, rtol=0, atol=0)
    masked.score = "excess"
    excess = masked.predict_step(given[1], 0)["score"]
    torch.testing.assert_close(excess, ((filled - plain(filled).params).square() * mask).sum(1) / 2)


def test_training_with_holes_ignores_what_is_in_them():
    x, mask = torch.rand(32, 6), torch.rand(32, 6) < 0.8

    def trained(fill: torch.Tensor) -> list[torch.Tensor]:
        _, model = twins(mask_key=1, missing="mask")
        loader = DataLoader(TensorDataset(torch.where(mask, x, fill), mask), 8)
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                            enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
        trainer.fit(model, loader, loader)
        return [*model.parameters(), *trainer.callback_metrics.values()]

    for a, b in zip(trained(torch.tensor(torch.nan)), trained(torch.tensor(1e6)), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_metrics_of_masked_data_are_numpys_over_what_is_there():
    x, mask = torch.rand(20, 6), torch.rand(20, 6) < 0.6
    _, model = twins(mask_key=1)
    loader = DataLoader(TensorDataset(x, mask), 7)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(model, loader, verbose=False)
    model.eval()
    with torch.no_grad():
        x_hat = model.reconstruct(torch.where(mask, x, 0.0)).double().numpy()
    data, there = np.where(mask, x.double(), np.nan), mask.numpy()
    off = (data - x_hat)[there]
    total = np.nansum((data - np.nanmean(data, axis=0)) ** 2)
    expected = {"val/mse": (off**2).mean(), "val/mae": np.abs(off).mean(), "val/fvu": (off**2).sum() / total}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda **k: ae.MLPAutoencoder((1, 16, 16), 3, loss=ae.SSIMLoss(), **k), "SSIMLoss"),
        (lambda **k: ae.DictionaryAutoencoder(6, 12, **k), "DictionaryAutoencoder"),
        (
            lambda **k: ae.MLPAutoencoder(
                (1, 16, 16), 3, loss=ae.AlphaMix(ae.SquaredError(), ae.FeatureLoss(ae.ImageGradients())), **k
            ),
            "AlphaMix",
        ),
    ],
)
@pytest.mark.parametrize("kwargs", [{"missing": "mask"}, {"mask_key": 1}])
def test_what_cannot_leave_numbers_out_says_so_when_it_is_built(build, what, kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}: a {what} cannot leave numbers out"):
        build(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "batch", "match"),
    [
        ({"mask_key": "m"}, {"x": torch.rand(2, 6)}, r"mask_key: the batch \{'x': tensor \(2, 6\)\} has no 'm'"),
        ({"mask_key": 1}, torch.rand(2, 6), r"mask_key: the batch tensor \(2, 6\) has no 1"),
        ({"mask_key": 1}, (torch.rand(2, 6), torch.ones(2, 5)), r"a mask \(2, 5\) cannot be broadcast to x \(2, 6\)"),
        ({"mask_key": 1}, (torch.rand(2, 6), "all"), "expected a tensor at 1, got a str"),
    ],
)
def test_a_batch_without_the_mask_it_should_have_is_refused(kwargs, batch, match):
    with pytest.raises((ValueError, TypeError), match=match):
        twins(**kwargs)[1].training_step(batch, 0)


def test_nan_is_still_refused_unless_it_is_said_to_be_missing():
    with pytest.raises(ValueError, match="finite"):
        twins()[0].check_input(torch.tensor([[torch.nan] * 6]))


def test_an_unused_mask_is_warned_of():
    x = torch.rand(8, 6)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    with pytest.warns(UserWarning, match="mask_key=1"):
        trainer.fit(twins()[0], DataLoader(TensorDataset(x, x > 0.5), 4))


def test_a_masked_model_comes_back_from_its_checkpoint(tmp_path):
    _, model = twins(mask_key=1, missing="mask")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = ae.load(tmp_path / "m.ckpt")
    assert (again.mask_key, again.missing) == (1, "mask")


def test_a_masked_step_compiles_to_the_same_loss():
    _, model = twins(missing="mask")
    x = torch.rand(4, 6)
    x[0, 0] = torch.nan
    compiled = torch.compile(lambda batch: model.training_step(batch, 0)["loss"], fullgraph=True)
    torch.testing.assert_close(compiled(x), model.training_step(x, 0)["loss"])


def test_a_report_counts_what_is_missing_as_neither_wrong_nor_not_finite():
    x = torch.rand(128, 6)
    x[torch.rand(128, 6) < 0.4] = torch.nan
    report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
    model = ae.MLPAutoencoder(6, 5, hidden=(32,), lr=1e-2, missing="mask")
    trainer = L.Trainer(max_epochs=60, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, callbacks=report)  # fmt: skip
    trainer.fit(model, DataLoader(x, 32, shuffle=True), DataLoader(x, 32))
    assert "nonfinite_data" not in [finding.cause for finding in report.findings]
    assert report.report.output["fvu"] < 0.5


# -- losses that cannot be ------------------------------------------------------------------------------------------


def test_the_first_raw_term_that_is_not_finite_is_named():
    class Late(ae.Penalty):
        def forward(self, x, output, model):
            return output.z.square().sum(1) * torch.inf

    model = ae.MLPAutoencoder(6, 2, penalties={"late": Late()})
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, log_every_n_steps=1,
                        enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    with pytest.warns(UserWarning, match="train/late is not finite, while the terms before it are"):
        trainer.fit(model, DataLoader(torch.rand(8, 6), 4))


def test_a_loss_below_its_bound_is_noticed_in_later_batches():
    x = torch.rand(12, 6)
    x[4:] *= 1000  # after the first batch, which is checked
    model = ae.MLPAutoencoder(6, 2, loss=ae.BernoulliNLL(), lr=0.5)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, log_every_n_steps=1,
                        enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"train/reconstruction is -.*, but cannot be below 0: a batch after the first"
    ):
        trainer.fit(model, DataLoader(x, 4))


def test_what_rounding_leaves_beyond_one_is_not_outside():
    x = torch.full((2, 3), 1 + 1.2e-7)
    ae.BernoulliNLL().check(x)
    ae.BernoulliNLL().check(-1e-8 * x)
    with pytest.raises(ValueError, match="must lie in"):
        ae.BernoulliNLL().check(x * 1.001)


@pytest.mark.parametrize("cls", [ae.NegativeBinomialNLL, ae.ZeroInflatedNegativeBinomialNLL])
def test_with_a_library_size_what_is_there_is_scored_as_if_it_were_all(cls):
    """Total and shares are those of the genes that are there: the missing ones might as well not exist."""
    torch.manual_seed(0)
    loss = cls(inverse_dispersion=2.0, library_size=True).double()
    there = torch.tensor([True, False, True, True, False, True])
    x, mask = torch.poisson(torch.full((5, 6), 3.0)).double(), there.expand(5, 6)
    params = torch.randn(5, *loss.params_shape((6,)), dtype=torch.float64, requires_grad=True)
    kept = params.view(5, -1, 6)[..., there].flatten(1)
    holes = torch.where(mask, x, torch.nan)
    found = loss(params, holes, mask)
    torch.testing.assert_close(found, loss(kept, x[:, there]))
    (gradient,) = torch.autograd.grad(found.sum(), params)
    assert (gradient.view(5, -1, 6)[..., ~there] == 0).all()
    prediction = loss.prediction(params, holes, mask)
    torch.testing.assert_close(prediction[:, there], loss.prediction(kept, x[:, there]), rtol=1e-5, atol=1e-6)
    assert prediction.isfinite().all()
    torch.testing.assert_close(loss.prediction(params, x, torch.ones_like(mask)), loss.prediction(params, x))


def test_metrics_of_a_library_size_go_by_what_is_there(make_trainer):
    torch.manual_seed(0)
    there = torch.tensor([True, False, True, True, False, True])
    x = torch.poisson(torch.full((16, 6), 3.0))
    model = ae.MLPAutoencoder(6, 2, loss=ae.NegativeBinomialNLL(library_size=True), missing="mask")
    metrics = make_trainer().validate(model, DataLoader(torch.where(there, x, torch.nan), 8), verbose=False)[0]
    share = model.decoder(model.encode(torch.where(there, x, 0.0)))[:, there].softmax(1)
    expected = (x[:, there].sum(1, keepdim=True) * share - x[:, there]).square().mean()
    assert metrics["val/mse"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_gates_auxiliary_reconstruction_is_that_of_what_is_there():
    torch.manual_seed(0)
    model = ae.SparseAutoencoder(*ae.mlp_pair(6, 4), code=ae.GatedCode(4, 0.1), mask_key=1)
    x, mask = torch.rand(8, 6), torch.rand(8, 6) < 0.5
    found = model.training_step((torch.where(mask, x, 77.0), mask), 0)["terms"]["gate"]
    params = model.decoder(model.encoder(torch.where(mask, x, 0.0)).relu())
    expected = ((params - x).square() * mask).sum(1).mean()
    torch.testing.assert_close(found, expected.detach())


def test_what_is_missing_has_no_noise_for_the_encoder():
    model = ae.DenoisingAutoencoder(6, 2, corruption=ae.GaussianNoise(3.0), missing="mask")
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.where(torch.rand(8, 6) < 0.5, torch.rand(8, 6), torch.nan)
    model.training_step(x, 0)
    model.predict_step(x, 0)
    for given in seen:
        assert (given[x.isnan()] == 0).all()
    assert (seen[0][~x.isnan()] != x[~x.isnan()]).all()


@pytest.mark.parametrize(
    "method",
    ["encode", "reconstruct", "forward", "posterior", "log_likelihood", "iwae_bound"],
)
def test_methods_take_nan_for_what_is_missing(method):
    torch.manual_seed(0)
    pair = ae.MLPEncoder(6, 4), ae.MLPDecoder(2, 6)
    model = ae.VariationalAutoencoder(*pair, ae.GaussianNLL(0.5), missing="mask")
    x = torch.where(torch.rand(8, 6) < 0.7, torch.rand(8, 6), torch.nan)

    def call(given):
        torch.manual_seed(1)
        found = getattr(model, method)(given, *([5] if method in ("log_likelihood", "iwae_bound") else []))
        return found.params if method == "forward" else found.mean if method == "posterior" else found

    assert call(x).isfinite().all()
    if method not in ("log_likelihood", "iwae_bound"):
        torch.testing.assert_close(call(x), call(x.nan_to_num(0.0)))


def test_the_likelihood_of_what_is_there_is_exact_for_a_linear_model():
    """Probabilistic PCA: what is there is normal with covariance WWᵀ + σ²I of its rows."""
    from scipy.stats import multivariate_normal

    torch.manual_seed(0)
    sigma, there = 0.5, torch.tensor([True, False, True, True])
    model = ae.VariationalAutoencoder(ae.LinearEncoder(4, 2), ae.LinearDecoder(1, 4), ae.GaussianNLL(sigma),
                                      missing="mask")  # fmt: skip
    x = torch.randn(3, 4)
    w, b = model.decoder.weight.detach().double(), model.decoder.layer.bias.detach().double()
    covariance = (w @ w.T + sigma**2 * torch.eye(4, dtype=torch.float64))[there][:, there]
    expected = multivariate_normal(b[there].numpy(), covariance.numpy()).logpdf(x[:, there].double().numpy())
    found = model.log_likelihood(torch.where(there, x, torch.nan), 20_000)
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("kwargs", [{"missing": "mask"}, {"mask_key": 1}])
def test_a_level_of_a_stack_that_would_mask_is_refused(kwargs):
    with pytest.raises(ValueError, match=r"levels\[0\]: expected an Autoencoder without mask_key"):
        ae.StackedAutoencoder([ae.MLPAutoencoder(6, 4, **kwargs), ae.MLPAutoencoder(4, 2)])
