"""Trained together is trained one by one, whatever the layers; and what would not be is refused."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_ae import (
    AlphaMix,
    Autoencoder,
    ContractiveAutoencoder,
    DenoisingAutoencoder,
    FeatureLoss,
    GaussianNLL,
    ImageGradients,
    LinearAutoencoder,
    LinearDecoder,
    MaskingNoise,
    MLPAutoencoder,
    MLPEncoder,
    SquaredError,
    TensorDataModule,
    WeightPrior,
    sweep,
)
from lightning_ae.pareto.together import AutoencoderGroup, why_not_together

SHAPE = (1, 6, 6)
EIGHT = [0.0, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 1.0]


def mix(alpha, **options):
    return AlphaMix(SquaredError(), FeatureLoss(ImageGradients("sobel")), alpha, **options)


def perceptron(alpha, **options):
    defaults = {"hidden": (10,), "loss": mix(alpha), "lr": 0.01, "weight_decay": 0.1}
    return MLPAutoencoder(SHAPE, 3, **{**defaults, **options})


def composed(alpha):
    encoder = MLPEncoder(SHAPE, 3, hidden=(10, 7), activation="leaky_relu", latent_activation="tanh")
    return Autoencoder(encoder, LinearDecoder(3, SHAPE), mix(alpha), lr=0.01)


MODELS = {
    "linear": lambda alpha: LinearAutoencoder(SHAPE, 3, tied=False, loss=mix(alpha), lr=0.01),
    "linear, tied": lambda alpha: LinearAutoencoder(SHAPE, 3, loss=mix(alpha), lr=0.01),
    "linear, tied, no bias": lambda alpha: LinearAutoencoder(SHAPE, 3, bias=False, loss=mix(alpha), lr=0.01),
    "one layer": lambda alpha: perceptron(alpha, hidden=()),
    "one layer, tied": lambda alpha: perceptron(alpha, hidden=(), tied=True),
    "deep": lambda alpha: perceptron(alpha, hidden=(12, 8), activation="gelu"),
    "deep, tied": lambda alpha: perceptron(alpha, hidden=(12, 8), activation="silu", tied=True),
    "layer norm": lambda alpha: perceptron(alpha, hidden=(12, 8), activation="elu", norm="layer"),
    "sigmoid output": lambda alpha: perceptron(
        alpha, loss=AlphaMix(SquaredError("sigmoid"), FeatureLoss(ImageGradients()), alpha)
    ),
    "likelihood": lambda alpha: perceptron(
        alpha, loss=AlphaMix(GaussianNLL(0.3), FeatureLoss(ImageGradients()), alpha)
    ),
    "composed": composed,
}


@pytest.fixture
def data():
    # 45 examples in batches of 8: the last batch is smaller
    return TensorDataModule(torch.rand(50, *SHAPE), batch_size=8)


def differences(make_model, data, alphas=(0.0, 0.4, 1.0), **options):
    """Relative differences of objectives and of each parameter between the two ways to train."""
    ours, theirs = (
        sweep(make_model, alphas, data, together=together, max_epochs=4, accelerator="cpu", **options)
        for together in (True, False)
    )
    assert len({tuple(point) for point in theirs.objectives.tolist()}) == len(alphas)  # something was learned
    parameters = [
        ((p - q).norm() / q.norm()).item()
        for a, b in zip(ours.models, theirs.models, strict=True)
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    ]
    return ((ours.objectives - theirs.objectives).abs() / theirs.objectives.abs()).max().item(), max(parameters)


@pytest.mark.parametrize("name", MODELS)
def test_together_equals_one_by_one_in_float64(name, data):
    objectives, parameters = differences(MODELS[name], data, precision="64-true")
    assert objectives < 1e-11
    assert parameters < 1e-9


@pytest.mark.parametrize("hidden", [(), (12, 8)])
def test_eight_together_equal_eight_one_by_one_in_float32(hidden, data):
    def make_model(alpha):
        return perceptron(alpha, hidden=hidden, activation="gelu", lr=1e-3)

    objectives, parameters = differences(make_model, data, EIGHT)
    assert objectives < 1e-5
    # at α = 0 the brightness has no gradient but its rounding, which AdamW turns into steps that the loss does not see
    assert parameters < 1e-3


@pytest.mark.parametrize(
    "options", [{"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"accumulate_grad_batches": 3}]
)
def test_options_of_the_trainer_that_work_number_by_number_do(options, data):
    objectives, parameters = differences(perceptron, data, precision="64-true", **options)
    assert objectives < 1e-11
    assert parameters < 1e-9


def test_shuffles_by_the_global_generator_are_the_same_for_every_point():
    class Shuffled(L.LightningDataModule):
        x = torch.rand(30, *SHAPE)

        def train_dataloader(self):
            return DataLoader(self.x, batch_size=8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.x, batch_size=8)

    objectives, parameters = differences(perceptron, Shuffled(), precision="64-true")
    assert objectives < 1e-11
    assert parameters < 1e-9


def test_the_gradient_of_each_model_is_that_of_its_own_objective():
    models = [perceptron(alpha).double() for alpha in (0.2, 0.7)]
    group, x = AutoencoderGroup(models), torch.rand(5, *SHAPE, dtype=torch.float64)
    group.on_fit_start()
    group.training_step(x, 0).backward()
    theirs = []
    for model in models:
        model.training_step(x, 0)["loss"].backward()
        theirs.append([p.grad for p in model.parameters()])
    names = [name for name, _ in models[0].named_parameters()]
    grouped = [p.grad for p in group.parameters()]
    for name, ours, *single in zip(names, grouped, *theirs, strict=True):
        # all but the first layer's weights are kept as (K, in, out)
        kept_transposed = name.endswith("weight") and name != "encoder.layers.0.weight"
        expected = torch.stack([gradient.t() if kept_transposed else gradient for gradient in single])
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


class Weighted(MLPAutoencoder):
    def objective(self, terms):
        return 2 * super().objective(terms)


class Other(MLPAutoencoder):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Measured(MLPAutoencoder):
    def configure_metrics(self, x):
        return super().configure_metrics(x)


class Narrow(MLPEncoder):
    def forward(self, x):
        return 0.5 * super().forward(x)


def frozen(alpha):
    model = perceptron(alpha)
    model.encoder.layers[0].weight.requires_grad_(False)
    return model


def changed(change):
    def make_model(alpha):
        model = perceptron(alpha)
        change(model, model.encoder.layers[0])
        return model

    return make_model


REFUSED = {
    "overrides configure_gradient_clipping": changed(
        lambda model, layer: setattr(model, "configure_gradient_clipping", print)
    ),
    "has a ParametrizedLinear": changed(lambda model, layer: nn.utils.parametrizations.weight_norm(layer)),
    "has hooks": changed(lambda model, layer: layer.register_forward_hook(lambda *call: 0.5 * call[-1])),
    "MLPAutoencoder has hooks": changed(lambda model, layer: layer.weight.register_hook(torch.sign)),
    "overrides objective": lambda alpha: Weighted(SHAPE, 3, loss=mix(alpha)),
    "overrides configure_optimizers": lambda alpha: Other(SHAPE, 3, loss=mix(alpha)),
    "has a corruption, MaskingNoise": lambda alpha: perceptron(alpha, corruption=MaskingNoise(0.1)),
    "DenoisingAutoencoder has": lambda alpha: DenoisingAutoencoder(SHAPE, 3, loss=mix(alpha)),
    "ContractiveAutoencoder has penalties": lambda alpha: ContractiveAutoencoder(SHAPE, 3, loss=mix(alpha)),
    "has penalties": lambda alpha: perceptron(alpha, penalties={"prior": WeightPrior(num_examples=9)}),
    "has an input_transform, log1p": lambda alpha: perceptron(alpha, input_transform="log1p"),
    "has a BatchNorm1d": lambda alpha: perceptron(alpha, norm="batch"),
    "has a Narrow": lambda alpha: Autoencoder(Narrow(SHAPE, 3), LinearDecoder(3, SHAPE), mix(alpha)),
    "has parameters that are not weights": lambda alpha: perceptron(
        alpha, loss=AlphaMix(GaussianNLL(learn_scale=True), FeatureLoss(ImageGradients()), alpha)
    ),
    "has frozen parameters": frozen,
    "differ in lr": lambda alpha: perceptron(alpha, lr=0.01 * (1 + alpha)),
    "differ in weight_decay": lambda alpha: perceptron(alpha, weight_decay=alpha),
    "differ in shape": lambda alpha: perceptron(alpha, hidden=(8 + int(2 * alpha),)),
    "differ in their losses": lambda alpha: perceptron(
        alpha, loss=AlphaMix(GaussianNLL(0.1 + alpha), FeatureLoss(ImageGradients()), alpha)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_whose_results_would_differ_are_refused(reason, data):
    models = [REFUSED[reason](alpha) for alpha in (0.0, 1.0)]
    assert reason in why_not_together(models, {})
    with pytest.raises(ValueError, match=f"together: .*{reason}"):
        sweep(REFUSED[reason], [0.0, 1.0], data, together=True, accelerator="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 1.0},
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"},
        {"precision": "16-mixed"},
        {"precision": "bf16-true"},
        {"logger": True},
        {"enable_checkpointing": True},
        {"plugins": [object()]},
    ],
)
def test_options_that_would_couple_the_models_are_refused(options):
    models = [perceptron(alpha) for alpha in (0.0, 1.0)]
    assert why_not_together(models, {}) is None
    assert next(iter(options)) in why_not_together(models, options)


def test_what_training_does_not_call_may_be_overridden():
    models = [Measured(SHAPE, 3, loss=mix(alpha)) for alpha in (0.0, 1.0)]
    assert why_not_together(models, {}) is None


def test_bad_data_get_the_error_of_the_models(data):
    bad = TensorDataModule(torch.full((8, *SHAPE), torch.nan), val_fraction=0.5)
    with pytest.raises(ValueError, match="expected finite numbers"):
        sweep(perceptron, [0.0, 1.0], bad, together=True, max_epochs=1, accelerator="cpu")


def test_a_model_that_diverges_does_not_take_the_others_along(data):
    class Explosive(nn.Module):
        def forward(self, x):
            return 1e30 * x.flatten(1)

    def make_model(alpha):
        return perceptron(alpha, loss=AlphaMix(SquaredError(), FeatureLoss(Explosive()), alpha))

    front = sweep(make_model, [0.5, 1.0], data, together=True, max_epochs=1, accelerator="cpu")
    assert front.objectives[1, 0].isfinite()
    assert front.models[1].encoder.layers[0].weight.isfinite().all()
