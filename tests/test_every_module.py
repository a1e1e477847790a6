"""Every public module through what is done to modules: copied, sent, exported, widened, laid out anew, averaged."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.export import Dim
from torchmetrics import Metric

import lightning_ae as ae
from tests.test_fuzz import VALID, images, leaves, public, rows, table

#: models that are built from what is given, so that every code is in one, with rows or images
ROWS: dict[str, Callable[[], ae.Autoencoder]] = {
    **{
        f"sparse {name}": lambda code=code: ae.SparseAutoencoder(*ae.mlp_pair(4, 2, (3,)), code=code())
        for name, code in {
            "l1": lambda: ae.L1Code(0.1, "relu", target_l0=1),
            "soft": lambda: ae.SoftThresholdCode(0.1, num_latents=2),
            "kl": lambda: ae.KLSparsityCode(0.1, 0.1),
            "jump": lambda: ae.JumpReLUCode(2, 0.1, target_l0=1),
            "gated": lambda: ae.GatedCode(2, 0.1),
            "topk": lambda: ae.TopKCode(1),
            "batchtopk": lambda: ae.BatchTopKCode(1),
        }.items()
    },
    **{
        f"dictionary {name}": lambda code=code, more=more: ae.DictionaryAutoencoder(4, 8, code(), **more)
        for name, code, more in (
            ("l1", lambda: ae.L1Code(0.1, "relu"), {}),
            ("norms", lambda: ae.L1Code(0.1, "relu"), {"unit_norm": False}),
            ("jump", lambda: ae.JumpReLUCode(8, 0.1, target_l0=2), {}),
            ("gated", lambda: ae.GatedCode(8, 0.1), {}),
            ("topk", lambda: ae.TopKCode(2), {}),
            ("batchtopk", lambda: ae.BatchTopKCode(2), {"resample_every": 2}),
            ("prefixes", lambda: ae.TopKCode(2), {"prefixes": [2, 4]}),
        )
    },
    "linear": lambda: ae.LinearAutoencoder(4, 2),
    "tied": lambda: ae.LinearAutoencoder(4, 2, tied=True),
    "mlp": lambda: ae.MLPAutoencoder(4, 2, hidden=(3,), loss=ae.GaussianNLL(learn_scale=True)),
    "normed": lambda: ae.Autoencoder(*ae.mlp_pair(4, 2, (3,), norm="layer")),
    "denoising": lambda: ae.DenoisingAutoencoder(4, 2, hidden=(3,)),
    "contractive": lambda: ae.ContractiveAutoencoder(4, 2),
    "variational": lambda: ae.VariationalAutoencoder(*ae.mlp_pair(4, 2, (3,), h_dim=4)),
    "variational full": lambda: ae.VariationalAutoencoder(
        *ae.mlp_pair(4, 2, (3,), h_dim=5), code=ae.GaussianCode(covariance="full")
    ),
    "quantized": lambda: ae.VectorQuantizedAutoencoder(
        *ae.mlp_pair(4, 2, (3,)), code=ae.VectorQuantizerCode(4, 2, kmeans=False)
    ),
    "quantized by gradient": lambda: ae.VectorQuantizedAutoencoder(
        *ae.mlp_pair(4, 2, (3,)), code=ae.VectorQuantizerCode(4, 2, kmeans=False, decay=None)
    ),
    "finite scalar": lambda: ae.VectorQuantizedAutoencoder(
        *ae.mlp_pair(4, 2, (3,)), code=ae.FiniteScalarQuantizerCode([5, 4])
    ),
    "stacked": lambda: ae.StackedAutoencoder([ae.LinearAutoencoder(4, 3), ae.LinearAutoencoder(3, 2)]),
    "lista": lambda: ae.SparseAutoencoder(
        ae.LISTAEncoder(4, 8, 0.1), ae.LinearDecoder(8, 4), code=ae.SoftThresholdCode(0.1)
    ),
}
IMAGES: dict[str, Callable[[], ae.Autoencoder]] = {
    "conv": lambda: ae.ConvAutoencoder((1, 8, 8), 2, channels=(2,)),
    "conv normed": lambda: ae.Autoencoder(*ae.conv_pair((1, 8, 8), 2, channels=(2,), norm="batch")),
    "conv ssim": lambda: ae.ConvAutoencoder((1, 8, 8), 2, channels=(2,), loss=ae.SSIMLoss(window_size=3)),
    "conv quantized": lambda: ae.VectorQuantizedAutoencoder(
        *ae.conv_pair((1, 8, 8), 2, channels=(2,), spatial=True), code=ae.VectorQuantizerCode(4, 2, kmeans=False)
    ),
    "conv finite scalar": lambda: ae.VectorQuantizedAutoencoder(
        *ae.conv_pair((1, 8, 8), 2, channels=(2,), spatial=True), code=ae.FiniteScalarQuantizerCode([5, 4])
    ),
    "conv jump": lambda: ae.SparseAutoencoder(
        *ae.conv_pair((1, 8, 8), 2, channels=(2,), spatial=True), code=ae.JumpReLUCode(2, 0.1)
    ),
    "multi-scale": lambda: ae.MultiScaleAutoencoder(
        ae.MLPEncoder((1, 8, 8), 2, (3,)),
        ae.scale_decoders(ae.BlockMean(2), (1, 8, 8), 2, hidden=(3,)),
        ae.BlockMean(2),
    ),
}


class Example(NamedTuple):
    """A module in evaluation mode, and what a call takes."""

    module: nn.Module
    args: tuple[Any, ...]

    def __call__(self, module: nn.Module, *args: Any) -> list[Tensor]:
        """The tensors that another module of the same kind gives for the same, or other, arguments."""
        args = args or self.args
        torch.manual_seed(1)
        if isinstance(module, Metric):
            module.reset()
            module.update(*args)
            return leaves(module.compute())
        return leaves(module(*args))


def models() -> dict[str, Example]:
    torch.manual_seed(0)
    made = {name: Example(make().eval(), (rows(),)) for name, make in ROWS.items()}
    return made | {name: Example(make().eval(), (images(),)) for name, make in IMAGES.items()}


def parts() -> dict[str, Example]:
    """Networks, codes, losses: those of the fuzz that take tensors alone."""
    return {
        name: Example(call, tuple(arguments.values()))
        for name, (call, arguments) in table().items()
        if isinstance(call, nn.Module) and not isinstance(call, ae.Autoencoder)
    } | {
        "ImageGradients-difference": Example(ae.ImageGradients(), (images(),)),
        "DiscretizedLogisticMixtureNLL": mixture(ae.DiscretizedLogisticMixtureNLL()),
        "DiscretizedGaussianMixtureNLL": mixture(ae.DiscretizedGaussianMixtureNLL()),
        "MaskingNoise": Example(ae.MaskingNoise(0.5), (rows(),)),
        "GaussianNoise": Example(ae.GaussianNoise(0.5), (rows(),)),
        "SaltAndPepper": Example(ae.SaltAndPepper(0.5), (rows(),)),
    }


def mixture(loss: ae.Likelihood) -> Example:
    return Example(loss, (torch.randn(4, *loss.params_shape((1, 8, 8))), images()))


def asked() -> dict[str, Example]:
    """Penalties and metrics, whose arguments are no mere tensors of one batch."""
    torch.manual_seed(0)
    model = ae.MLPAutoencoder(4, 2, hidden=(3,)).eval()
    dictionary = ae.DictionaryAutoencoder(4, 8, ae.TopKCode(2)).eval()
    x = rows()
    of_model = {
        "ConstraintPenalty": ae.ConstraintPenalty(ae.Total()),
        "JacobianPenalty": ae.JacobianPenalty(),
        "OrthogonalityPenalty": ae.OrthogonalityPenalty(),
        "WeightPrior": ae.WeightPrior(num_examples=4),
    }
    of_dictionary = {"AuxiliaryK": ae.AuxiliaryK(), "PrefixReconstruction": ae.PrefixReconstruction([2, 4])}
    blocks = ae.BlockMean(2)
    return {
        **{name: Example(penalty, (x, model(x).detach(), model)) for name, penalty in of_model.items()},
        **{name: Example(penalty, (x, dictionary(x).detach(), dictionary)) for name, penalty in of_dictionary.items()},
        "FractionVarianceUnexplained": Example(ae.FractionVarianceUnexplained(), (x + 0.1, x)),
        "Shrinkage": Example(ae.Shrinkage(), (x + 0.1, x)),
        "FeatureDensity": Example(ae.FeatureDensity(4), (x,)),
        "SubspaceAngle": Example(ae.SubspaceAngle(torch.eye(4)[:, :2]), (x[:, :2],)),
        "BitsPerDim": Example(ae.BitsPerDim(), (x[:, 0], 4)),
        "ScaleError": Example(ae.ScaleError(blocks.parts, 2), (images() + 0.1, images())),
        "Scales": Example(Parts(blocks), (images(),)),
        "LaplacianPyramid": Example(Parts(ae.LaplacianPyramid(1)), (images(),)),
        "HaarBands": Example(Parts(ae.HaarBands(1)), (images(),)),
        "DCTBands": Example(Parts(ae.DCTBands(0.5)), (images(),)),
    }


class Parts(nn.Module):
    """What scales make of an image, and the image again."""

    def __init__(self, scales: ae.Scales) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """Parts and splits."""
        return self.scales.parts(x), self.scales.split(x)


class Reconstruct(nn.Module):
    """What of a model is exported for others: ``x`` to its reconstruction."""

    def __init__(self, model: ae.Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction."""
        return self.model.reconstruct(x)


MODELS, PARTS, ASKED = models(), parts(), asked()
ALL = {**{f"model {name}": example for name, example in MODELS.items()}, **PARTS, **ASKED}
#: contracts, and what needs weights from elsewhere, for which losses/test_perceptual.py has copies and exports
ABSENT = {"LPIPSLoss", "TorchvisionFeatures", "FeatureLoss"}


def of(examples: dict[str, Example]) -> Any:
    return pytest.mark.parametrize("example", [pytest.param(example, id=name) for name, example in examples.items()])


def same(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_every_public_module_is_here():
    named = {name for name, value in public().items() if isinstance(value, type) and issubclass(value, nn.Module)}
    here = {type(part).__name__ for example in ALL.values() for part in example.module.modules()}
    abstract = {
        name for name in named if name not in VALID and getattr(getattr(ae, name, None), "__abstractmethods__", ())
    }
    assert named - here - abstract <= ABSENT


@of(ALL)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_a_copy_gives_the_same_and_shares_nothing(example, copied):
    twin = copied(example.module)
    same(example(twin), example(example.module), rtol=0, atol=0)
    own = {tensor.data_ptr() for tensor in example.module.state_dict().values() if isinstance(tensor, Tensor)}
    others = {tensor.data_ptr() for tensor in twin.state_dict().values() if isinstance(tensor, Tensor)}
    assert not (own & others) - {0}  # of what has no elements


def outcomes(rank: int, examples: dict[str, Example], file: str) -> None:
    torch.set_num_threads(1)
    torch.save({name: [t.detach() for t in example(example.module)] for name, example in examples.items()}, file)


def test_a_spawned_process_gets_what_it_is_sent(tmp_path):
    file = tmp_path / "found.pt"
    torch.multiprocessing.spawn(outcomes, (ALL, str(file)))
    found = torch.load(file)
    for name, example in ALL.items():
        same(found[name], [t.detach() for t in example(example.module)], rtol=0, atol=0)


@of({**{f"model {name}": example for name, example in MODELS.items()}, **PARTS})
def test_in_double_precision_all_of_it_is_double(example):
    wide = copy.deepcopy(example.module).double()
    found = example(wide, *(arg.double() for arg in example.args))
    assert {t.dtype for t in found if t.is_floating_point()} <= {torch.float64}
    if not isinstance(example.module, ae.Corruption):  # other random numbers
        same([t.float() for t in found], [t.float() for t in example(example.module)], rtol=1e-4, atol=1e-5)


@of({name: example for name, example in {**MODELS, **PARTS}.items() if example.args[0].ndim == 4})
def test_images_with_channels_last_give_the_same(example):
    module = copy.deepcopy(example.module).to(memory_format=torch.channels_last)
    args = (arg.contiguous(memory_format=torch.channels_last) if arg.ndim == 4 else arg for arg in example.args)
    same(example(module, *args), example(example.module))


def exported(module: nn.Module, args: tuple[Tensor, ...], *, dynamic: bool) -> nn.Module:
    # inside another module: torch gives what it exports an attribute "code", so none of its parts may have that name
    shapes = {"args": tuple({0: Dim("batch")} for _ in args)} if dynamic else None
    program: nn.Module = torch.export.export(Outer(module), args, dynamic_shapes=shapes).module()
    return program


class Outer(nn.Module):
    """A module around another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Any:
        """What the other gives."""
        return self.module(*args)


def larger(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([arg, arg.flip(0), arg[:3]]) for arg in args)


@of({**MODELS, **PARTS, **{name: e for name, e in ASKED.items() if isinstance(e.module, Parts)}})
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_exports(example, dynamic):
    with torch.no_grad():
        program = exported(example.module, example.args, dynamic=dynamic)
        for args in (example.args, larger(example.args)) if dynamic else (example.args,):
            same(example(program, *args), example(example.module, *args))


@of(MODELS)
def test_onnx_reconstructs_batches_of_any_size(example):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with torch.no_grad():
        program = torch.onnx.export(
            Reconstruct(example.module).eval(),
            example.args,
            dynamo=True,
            dynamic_shapes=({0: Dim("batch")},),
            verbose=False,
        )
        file = io.BytesIO()
        program.save(file)
        session = runtime.InferenceSession(file.getvalue())
        (x,) = larger(example.args)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        same([torch.from_numpy(found[0])], [example.module.reconstruct(x)], rtol=1e-4, atol=1e-5)


class Averages:
    """Lightning's two callbacks that average weights."""

    swa = staticmethod(lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1))
    ema = staticmethod(EMAWeightAveraging)


@of(MODELS)
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_weights_are_those_of_the_model(example, kind, make_trainer):
    model = copy.deepcopy(example.module).train()
    (x,) = example.args
    data = ae.TensorDataModule(torch.cat([x, 1 - x, x / 2, x / 4]), batch_size=4, val_fraction=0.25)
    make_trainer(max_epochs=4, callbacks=getattr(Averages, kind)()).fit(model, data)
    before, after = example.module.state_dict(), model.state_dict()
    trained = [name for name, _ in model.named_parameters()]
    assert any(not torch.equal(before[name], after[name]) for name in trained)
    assert all(after[name].isfinite().all() for name in trained)
    if isinstance(model, ae.DictionaryAutoencoder) and model.unit_norm:
        norms = torch.linalg.vector_norm(model.decoder.atoms, dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
