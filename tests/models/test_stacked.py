"""A stack's objective is the sum written by hand; each level alone is what it would be without the others."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_ae as ae


def levels():
    first = ae.MLPAutoencoder(9, 6, hidden=(), latent_activation="sigmoid", loss=ae.BernoulliNLL())
    second = ae.SparseAutoencoder(
        *ae.mlp_pair(6, 4, hidden=(5,), activation="tanh"),
        code=ae.L1Code(0.3, "relu"),
        loss=ae.BernoulliNLL(),
        penalties={"orthogonal": ae.OrthogonalityPenalty(0.2, box="encoder")},
    )
    third = ae.LinearAutoencoder(4, 2, tied=False)
    return [first, second, third]


def stack(**options):
    return ae.StackedAutoencoder(levels(), **options)


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def by_hand(model, x, sg=torch.Tensor.detach):
    """Every quantity of :func:`stack` in plain tensor algebra."""
    one, two, three = model.levels
    e2, d2 = two.encoder.layers, two.decoder.layers
    decode = {
        1: lambda z: linear(one.decoder.layers[0], z),
        2: lambda z: linear(d2[2], linear(d2[0], z).tanh()),
        3: lambda z: linear(three.decoder.layer, z),
    }
    z0 = linear(one.encoder.layers[0], x).sigmoid()
    z1 = linear(e2[2], linear(e2[0], z0).tanh()).relu()
    z2 = linear(three.encoder, z1)
    bce = lambda a, t: F.binary_cross_entropy_with_logits(a, t, reduction="none").sum(1)  # noqa: E731
    depth_3 = decode[1](decode[2](decode[3](z2)).sigmoid())
    grams = []
    for layer in (e2[0], e2[2]):
        w = layer.weight
        gram = w.T @ w if len(w) >= w.shape[1] else w @ w.T
        grams.append((gram - torch.eye(len(gram), dtype=w.dtype)).square().sum())
    return {
        "z": [z0, z1, z2],
        "x_hat": [
            decode[1](z0).sigmoid(),
            decode[1](decode[2](z1).sigmoid()).sigmoid(),
            depth_3.sigmoid(),
        ],
        "reconstruction": bce(depth_3, x),
        "level_0": bce(decode[1](z0), x),
        "level_1": bce(decode[2](z1), sg(z0)),
        "level_1_l1": z1.abs().sum(1),
        "level_1_orthogonal": sum(grams),
        "level_2": (decode[3](z2) - sg(z1)).square().sum(1),
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def x():
    return torch.rand(7, 9, dtype=torch.float64)


# -- together ---------------------------------------------------------------------------------------------------------


def test_terms_and_the_joint_objective_are_the_sum_written_by_hand(x):
    model = stack(level_weights=[0.5, 2.0, 0.25]).double()
    expected = by_hand(model, x)
    step = model.training_step(x, 0)
    assert list(step["terms"])[1:] == [
        "reconstruction", "level_0", "level_1", "level_1_l1", "level_1_orthogonal", "level_2",
    ]  # fmt: skip
    for name in list(step["terms"])[1:]:
        torch.testing.assert_close(step["terms"][name], expected[name].mean().detach())
    total = expected["reconstruction"] + 0.5 * expected["level_0"] + 2.0 * expected["level_1"]
    total = total + 0.3 * expected["level_1_l1"] + 0.2 * expected["level_1_orthogonal"] + 0.25 * expected["level_2"]
    torch.testing.assert_close(step["loss"], total.mean())
    torch.testing.assert_close(gradients(model, step["loss"]), gradients(model, total.mean()))


def test_weights_are_read_where_they_are_and_the_default_counts_each_level_once(x):
    model = stack().double()
    assert model.level_weights == [1.0, 1.0, 1.0]
    model.levels[1].code.weight = 7.0
    model.levels[1].penalties["orthogonal"].weight = 0.0
    model.level_weights[0] = 3.0
    e = by_hand(model, x)
    total = e["reconstruction"] + 3 * e["level_0"] + e["level_1"] + 7 * e["level_1_l1"] + e["level_2"]
    torch.testing.assert_close(model.training_step(x, 0)["loss"], total.mean())


def test_a_target_is_no_way_to_make_the_loss_small(x):
    # the gradient of a level's loss at its input goes through the encoder only: with targets that move, it would differ
    model = stack(level_weights=[0.0, 1.0, 0.0]).double()
    moving = by_hand(model, x, sg=lambda z: z)
    held = by_hand(model, x)
    of = model.levels[0].encoder.layers[0].weight
    (a,) = torch.autograd.grad(
        held["reconstruction"].mean() + held["level_1"].mean() + 0.3 * held["level_1_l1"].mean(), of
    )
    (b,) = torch.autograd.grad(moving["level_1"].mean(), of)
    ours = gradients(model, model.training_step(x, 0)["loss"])["levels.0.encoder.layers.0.weight"]
    torch.testing.assert_close(ours, a)
    assert (b - torch.autograd.grad(by_hand(model, x)["level_1"].mean(), of)[0]).abs().max() > 1e-3


def test_a_stack_of_one_level_is_that_level(x):
    (first, *_) = levels()
    model = ae.StackedAutoencoder([first]).double()
    torch.testing.assert_close(model.training_step(x, 0)["loss"], first.training_step(x, 0)["loss"])
    torch.testing.assert_close(model.reconstruct(x), first.reconstruct(x))


def entropy(x):
    return torch.distributions.Bernoulli(x).entropy().sum(1)


def test_codes_and_reconstructions_of_each_depth_are_those_by_hand(x):
    model = stack().double()
    e = by_hand(model, x)
    for depth in (1, 2, 3):
        torch.testing.assert_close(model.encode(x, depth), e["z"][depth - 1])
        torch.testing.assert_close(model.decode(e["z"][depth - 1], depth), e["x_hat"][depth - 1])
        torch.testing.assert_close(model.reconstruct(x, depth), e["x_hat"][depth - 1])
    torch.testing.assert_close(model.encode(x), e["z"][2])
    torch.testing.assert_close(model.decode(e["z"][2]), e["x_hat"][2])
    torch.testing.assert_close(model.reconstruct(x), e["x_hat"][2])
    predicted = model.predict_step(x, 0)
    torch.testing.assert_close(predicted["z"], e["z"][2])
    torch.testing.assert_close(predicted["reconstruction"], e["x_hat"][2])
    torch.testing.assert_close(predicted["score"] + entropy(x), e["reconstruction"])
    model.score = "loss"
    torch.testing.assert_close(model.predict_step(x, 0)["score"], e["reconstruction"])


# -- one level --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_level_alone_has_its_own_objective_and_no_other_level_a_gradient(k, x):
    model = stack(penalties={"prior": ae.WeightPrior(num_examples=3)}).double()
    e = by_hand(model, x)
    model.training_level = k
    step = model.training_step(x, 0)
    own = [
        e["level_0"],
        e["level_1"] + 0.3 * e["level_1_l1"] + 0.2 * e["level_1_orthogonal"],
        e["level_2"],
    ][k]
    torch.testing.assert_close(step["loss"], own.mean())
    found = gradients(model, step["loss"])
    assert found
    assert {name.split(".")[1] for name in found} == {str(k)}
    expected = torch.autograd.grad(own.mean(), list(model.levels[k].parameters()))
    for gradient, p in zip(expected, model.levels[k].parameters(), strict=True):
        torch.testing.assert_close(p.grad, gradient)
    # the reconstruction is that from depth k + 1, and all else is as it was
    torch.testing.assert_close(model.loss.mean(step["output"].params), e["x_hat"][k].detach())
    bce = F.binary_cross_entropy(e["x_hat"][k], x, reduction="none").sum(1).mean()
    torch.testing.assert_close(step["terms"]["reconstruction"], bce.detach())
    assert step["output"].z.shape == (7, 2)
    for name in ("level_0", "level_1", "level_1_l1", "level_1_orthogonal", "level_2"):
        torch.testing.assert_close(step["terms"][name], e[name].mean().detach())
    torch.testing.assert_close(model.predict_step(x, 0)["reconstruction"], e["x_hat"][k])
    # nothing is kept for a backward pass that does not come
    kept = {name for name, term in model(x).penalties.items() if term.requires_grad}
    assert kept == {name for name in model(x).penalties if name.startswith(f"level_{k}")}
    assert model(x).z.requires_grad is (k == 2)
    assert model(x).params.requires_grad is (k == 0)


def minimise(model, parameters, x):
    """Full-batch L-BFGS on the step's own loss."""
    options = {"max_iter": 400, "history_size": 40, "tolerance_grad": 1e-9, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **options)

    def closure():
        optimizer.zero_grad()
        loss = model.training_step(x, 0)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)


def test_greedy_pca_is_pca_of_pca():
    digits = torch.from_numpy(load_digits().data[:500] / 16)
    model = ae.StackedAutoencoder([ae.LinearAutoencoder(64, 10), ae.LinearAutoencoder(10, 4)]).double()
    for k, kept in enumerate((10, 4)):
        model.training_level = k
        minimise(model, list(model.levels[k].parameters()), digits)
        eigenvalues = np.linalg.eigvalsh(np.cov(digits.numpy().T, bias=True))[::-1]
        loss = model.training_step(digits, 0)["loss"].item()
        # of the second level: those of the first ten that it discards
        assert loss == pytest.approx(eigenvalues[kept : 10 if k else None].sum(), rel=1e-4)
        reconstruction = model.training_step(digits, 0)["terms"]["reconstruction"].item()
        assert reconstruction == pytest.approx(eigenvalues[kept:].sum(), rel=1e-4)
        pca = PCA(kept, svd_solver="full").fit(digits.numpy())
        weights = [level.encoder.weight.detach().numpy() for level in model.levels[: k + 1]]
        span = weights[0].T if k == 0 else (weights[1] @ weights[0]).T
        assert linalg.subspace_angles(span, pca.components_.T).max() < 5e-3


def test_levels_below_are_fixed_functions_whatever_their_code_draws():
    gaussian = ae.VariationalAutoencoder(*ae.mlp_pair(6, 3, hidden=(5,), h_dim=6))
    model = ae.StackedAutoencoder([gaussian, ae.MLPAutoencoder(3, 2, hidden=())])
    x = torch.rand(5, 6)
    together = [model.training_step(x, 0)["terms"]["level_1"] for _ in range(2)]
    assert together[0] != together[1]
    model.training_level = 1
    step = model.training_step(x, 0)
    mean = gaussian.encoder(x)[:, :3]
    top = model.levels[1]
    expected = (top.decoder(top.encoder(mean)) - mean).square().sum(1).mean()
    torch.testing.assert_close(step["loss"], expected)
    torch.testing.assert_close(step["output"].z, top.encoder(mean))


def test_corruption_acts_on_the_input_of_the_level_that_is_trained_and_on_no_target():
    denoising = [
        ae.DenoisingAutoencoder(6, 5, hidden=(), corruption=ae.MaskingNoise(1.0)),
        ae.DenoisingAutoencoder(5, 3, hidden=(), corruption=ae.MaskingNoise(1.0)),
    ]
    model = ae.StackedAutoencoder(denoising)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.rand(4, 6)
    encode = [level.encoder.layers[0] for level in model.levels]
    decode = [level.decoder.layers[0] for level in model.levels]
    error = lambda a, b: (a - b).square().sum(1).mean()  # noqa: E731
    blind = [decode[k](encode[k].bias).expand(4, -1) for k in (0, 1)]  # what comes of zeros
    model.training_level = 0
    torch.testing.assert_close(model.training_step(x, 0)["loss"], error(blind[0], x))
    model.training_level = 1
    torch.testing.assert_close(model.training_step(x, 0)["loss"], error(blind[1], encode[0](x)))
    model.training_level = None
    terms = model.training_step(x, 0)["terms"]
    torch.testing.assert_close(terms["level_0"], error(blind[0], x).detach())
    torch.testing.assert_close(terms["level_1"], error(blind[1], encode[0].bias).detach())
    torch.testing.assert_close(terms["reconstruction"], error(decode[0](blind[1]), x).detach())
    # not in evaluation, unless asked
    torch.testing.assert_close(
        model.eval().training_step(x, 0)["terms"]["level_0"], error(decode[0](encode[0](x)), x).detach()
    )
    model.levels[1].corruption.in_eval = True
    torch.testing.assert_close(model.predict_step(x, 0)["z"], encode[1].bias.expand(4, -1))
    torch.testing.assert_close(model.encode(x), encode[1](encode[0](x)))


# -- boxes of every kind ----------------------------------------------------------------------------------------------


def test_maps_between_convolutional_levels_and_a_vector_on_top():
    first = ae.Autoencoder(*ae.conv_pair((1, 8, 8), 4, channels=(6,), spatial=True), ae.BernoulliNLL())
    second = ae.Autoencoder(*ae.conv_pair((4, 4, 4), 3, channels=(5,), spatial=True))
    model = ae.StackedAutoencoder([first, second, ae.MLPAutoencoder((3, 2, 2), 2)])
    x = torch.rand(5, 1, 8, 8)
    assert [tuple(model.encode(x, depth).shape) for depth in (1, 2, 3)] == [(5, 4, 4, 4), (5, 3, 2, 2), (5, 2)]
    assert all(model.reconstruct(x, depth).shape == x.shape for depth in (1, 2, 3))
    model.training_step(x, 0)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_penalties_on_the_whole_see_the_weights_of_all_levels():
    model = stack(penalties={"prior": ae.WeightPrior(num_examples=10), "o": ae.OrthogonalityPenalty(0.0)})
    x = torch.rand(5, 9)
    terms = model.training_step(x, 0)["terms"]
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("penalties")]
    assert len(weights) == 8
    torch.testing.assert_close(terms["prior"], sum(w.square().sum() for w in weights).detach() / 10)
    assert terms["o"] > 0
    plain = stack()
    plain.load_state_dict(model.state_dict(), strict=False)
    with_prior, without = model.training_step(x, 0)["loss"], plain.training_step(x, 0)["loss"]
    torch.testing.assert_close(with_prior - without, terms["prior"] * 0.5)


def test_penalties_of_a_level_learn_of_the_data_before_the_first_batch(make_trainer):
    first = ae.LinearAutoencoder(6, 3, penalties={"prior": ae.WeightPrior(0.5, 10.0)})
    model = ae.StackedAutoencoder([first, ae.LinearAutoencoder(3, 2)])
    loader = DataLoader(torch.rand(24, 6), batch_size=8)
    trainer = make_trainer()
    trainer.fit(model, loader, loader)  # a sanity check comes first
    assert model.levels[0].penalties["prior"].num_examples == 24
    squared = model.levels[0].encoder.weight.square().sum().detach()  # tied: once
    torch.testing.assert_close(trainer.callback_metrics["val/level_0_prior"].float(), squared / 24)


def test_atoms_of_a_level_keep_norm_1_while_it_is_trained(make_trainer):
    sparse = ae.SparseAutoencoder(ae.LinearEncoder(4, 6), ae.LinearDecoder(6, 4), unit_norm=True, lr=0.1)
    model = ae.StackedAutoencoder([ae.LinearAutoencoder(8, 4), sparse], lr=0.1)
    before = sparse.decoder.weight.detach().clone()
    make_trainer().fit(model, DataLoader(torch.rand(32, 8), batch_size=8))
    assert (sparse.decoder.weight - before).abs().max() > 0.01
    torch.testing.assert_close(sparse.decoder.weight.norm(dim=0), torch.ones(6))


@pytest.mark.parametrize("k", [None, 1])
def test_a_step_compiles_without_a_graph_break(k):
    model, x = stack(), torch.rand(4, 9)
    model.training_level = k
    eager = model.training_step(x, 0)
    expected = gradients(model, eager["loss"])
    compiled = torch.compile(model.training_step, fullgraph=True, backend="aot_eager")(x, 0)
    torch.testing.assert_close(compiled["terms"], eager["terms"])
    torch.testing.assert_close(gradients(model, compiled["loss"]), expected)


def test_another_level_is_another_graph():
    model, x = stack(), torch.rand(4, 9)
    step = torch.compile(model.training_step, fullgraph=True, backend="aot_eager")
    for k in (0, 1, 2, None, 0):
        model.training_level = k
        found = gradients(model, step(x, 0)["loss"])
        assert {name.split(".")[1] for name in found} == ({str(k)} if k is not None else {"0", "1", "2"})
        torch.testing.assert_close(found, gradients(model, model.training_step(x, 0)["loss"]))


def test_losses_are_computed_in_full_precision_under_autocast(x):
    model = stack()
    wide = model.training_step(x.float(), 0)["terms"]
    with torch.autocast("cpu", torch.bfloat16):
        step = model.training_step(x.float(), 0)
    assert step["loss"].dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in step["terms"].values())
    for name, term in wide.items():
        torch.testing.assert_close(step["terms"][name], term, rtol=0.05, atol=0.05)


# -- saving, the command line -----------------------------------------------------------------------------------------


def test_a_checkpoint_rebuilds_the_stack_with_its_level_and_weights(make_trainer, tmp_path):
    model = stack(level_weights=[1.0, 0.5, 0.25], penalties={"prior": ae.WeightPrior(num_examples=3)})
    model.level_weights[1] = 0.125
    model.levels[1].code.weight = 9.0
    model.training_level = 2
    trainer = make_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = ae.load(tmp_path / "m.ckpt")
    assert type(loaded) is ae.StackedAutoencoder
    assert (loaded.level_weights, loaded.training_level) == ([1.0, 0.125, 0.25], 2)
    assert loaded.levels[1].code.weight == 9.0
    x = torch.rand(4, 9)
    torch.testing.assert_close(loaded.reconstruct(x), model.reconstruct(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded.training_step(x, 0)["terms"], model.training_step(x, 0)["terms"])


def test_parameters_have_one_name_and_two_models_no_list_in_common():
    model, other = stack(), stack()
    names = [name for name, _ in model.named_parameters()]
    assert all(name.startswith("levels.") for name in names)
    assert set(names) <= set(model.state_dict())
    assert not [name for name in model.state_dict() if name.startswith(("encoder", "decoder"))]
    other.load_state_dict(model.state_dict())
    other.level_weights[0] = 5.0
    assert model.level_weights[0] == 1.0


def test_the_mode_of_a_box_is_that_of_its_parts():
    model = stack()
    model.encoder.eval()
    assert not any(module.training for level in model.levels for module in level.encoder.modules())
    assert all(module.training for level in model.levels for module in level.decoder.modules())


def test_replaced_modules_of_levels_are_those_of_the_boxes():
    model = ae.StackedAutoencoder([ae.MLPAutoencoder(6, 4, norm="batch"), ae.MLPAutoencoder(4, 2, hidden=())])
    names = list(model.state_dict())
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # as Trainer(sync_batchnorm=True) does
    assert list(model.state_dict()) == names
    for box in (model.encoder, model.decoder):
        assert [type(m).__name__ for m in box.modules() if "Norm" in type(m).__name__] == ["SyncBatchNorm"]


CONFIG = """
trainer:
  max_epochs: 3
  callbacks: [{class_path: lightning_ae.GreedyLevels, init_args: {epochs_per_level: 1}}]
model:
  class_path: StackedAutoencoder
  init_args:
    levels:
      - class_path: ConvAutoencoder
        init_args: {in_shape: [1, 8, 8], latent_dim: 12, channels: [4], loss: BernoulliNLL}
      - class_path: MLPAutoencoder
        init_args: {in_shape: 12, latent_dim: 3, hidden: [8]}
    level_weights: [1.0, 0.5]
    lr: 0.002
data: {class_path: DigitsDataModule}
"""


def test_the_command_line_builds_one_from_yaml(tmp_path, monkeypatch):
    from lightning_ae.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ae"])
    Path("run.yaml").write_text(CONFIG)
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    run = main(["fit", "-c", "run.yaml", "--trainer.logger=false", *quiet])
    assert run.model.level_weights == [1.0, 0.5]
    assert run.trainer.callback_metrics["greedy/level"] == 2
    (path,) = Path().rglob("*.ckpt")
    assert isinstance(ae.load(path).levels[0].loss, ae.BernoulliNLL)
    main(["predict", "--ckpt_path", str(path), "--data", "DigitsDataModule", *quiet])
    predicted = ae.load_predictions("predictions")
    x = torch.cat([x for x, _ in run.datamodule.predict_dataloader()])
    with torch.no_grad():
        torch.testing.assert_close(predicted["z"], run.model.cpu().eval().encode(x))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "levels: expected at least one Autoencoder, got none"),
        (ae.LinearAutoencoder, TypeError, "levels: expected a sequence"),
        ([torch.nn.Linear(2, 2)], TypeError, r"levels\[0\]: expected an Autoencoder, got a Linear"),
        (
            [ae.DictionaryAutoencoder(6, 9, ae.TopKCode(2))],
            TypeError,
            r"levels\[0\]: expected an Autoencoder without callbacks of its own.*got a DictionaryAutoencoder",
        ),
        (
            [ae.StackedAutoencoder([ae.LinearAutoencoder(4, 2)])],
            TypeError,
            r"levels\[0\]: expected an Autoencoder without callbacks",
        ),
        (
            [ae.LinearAutoencoder(6, 4), ae.LinearAutoencoder(5, 2)],
            ValueError,
            r"levels\[1\]: expected an encoder for the codes below, \(4,\), got \(5,\)",
        ),
        ([ae.LinearAutoencoder(6, 6)] * 2, ValueError, r"levels\[1\]: expected another Autoencoder"),
    ],
)
def test_what_is_no_stack_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        ae.StackedAutoencoder(given)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, -1.0], [1.0, 1.0, float("nan")]])
def test_weights_have_to_be_one_for_each_level(weights):
    with pytest.raises(ValueError, match="level_weights: expected 3 finite numbers >= 0"):
        stack(level_weights=weights)


@pytest.mark.parametrize("weights", [1.0, "abc", [1.0, None, 1.0]])
def test_weights_have_to_be_numbers(weights):
    with pytest.raises(TypeError, match="level_weights: expected 3 numbers, one for each level, got"):
        stack(level_weights=weights)


def test_the_names_of_levels_are_taken():
    with pytest.raises(ValueError, match=r"penalties: \['level_0'\] is the name of another term"):
        stack(penalties={"level_0": ae.WeightPrior(num_examples=2)})


@pytest.mark.parametrize("depth", [0, 4, -1, 1.0, True])
def test_a_depth_that_is_not_there_is_an_error(depth):
    for call in (stack().encode, stack().reconstruct):
        with pytest.raises(ValueError, match="depth: expected a whole number from 1 to the 3 levels"):
            call(torch.rand(2, 9), depth)
    with pytest.raises(ValueError, match="depth: expected a whole number"):
        stack().decode(torch.rand(2, 2), depth)


def test_a_level_that_is_not_there_cannot_be_trained():
    model = stack()
    model.training_level = 3
    with pytest.raises(ValueError, match="training_level: expected None or a level from 0 to 2, got 3"):
        model.training_step(torch.rand(2, 9), 0)


def test_codes_outside_of_the_support_of_the_loss_above_are_told_before_training(make_trainer):
    below = ae.MLPAutoencoder(6, 4, hidden=(5,), norm="batch")
    below.encoder.layers.append(torch.nn.Dropout(0.5))
    with torch.no_grad():
        below.encoder.layers[3].bias.fill_(-100.0)
    model = ae.StackedAutoencoder([below, ae.MLPAutoencoder(4, 2, loss=ae.BernoulliNLL())])
    statistics, x = below.encoder.layers[1].running_mean.clone(), torch.rand(8, 6)
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"levels\.1: on the codes of the level below: x: BernoulliNLL: targets must"):
        model.check_input(x)
    assert model.levels[0].training
    assert torch.equal(below.encoder.layers[1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), random)
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"levels\.1: on the codes"):
        trainer.fit(model, DataLoader(x, batch_size=4))
