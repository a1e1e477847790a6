"""Every public constructor and function, with an odd value for each parameter in turn; every call, with odd tensors.

What comes in is taken and gives a right result, or is refused by this package (not deep in torch), under its name.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_ae as ae
from lightning_ae import metrics

PACKAGE = str(Path(ae.__file__).parent)
#: classes that are only what comes out of others, contracts without a constructor of their own, and other rooms' names
NOT_BUILT = {
    *("AutoencoderOutput", "CodeOutput", "LossRecovered", "MultiScaleOutput", "SSIMParts", "Rebuildable", "Scales"),
    *("Code", "SelectingCode", "Likelihood", "PointwiseLoss", "ReconstructionLoss", "Corruption", "Penalty"),
}


def pair() -> dict[str, Any]:
    return dict(zip(("encoder", "decoder"), ae.mlp_pair(4, 2, (3,)), strict=True))


def images() -> Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def rows() -> Tensor:
    return torch.rand(4, 4, generator=torch.Generator().manual_seed(0))


def alpha_mix(alpha: float) -> ae.Autoencoder:
    return ae.LinearAutoencoder(4, 2, loss=ae.AlphaMix(ae.SquaredError(), ae.SquaredError(), alpha))


SQUARED = ae.SquaredError
FOLDERS = itertools.count()
QUIET = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
#: valid arguments of each name, made anew each time
VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "ActivationDataModule": lambda: {"folder": "nowhere"},
    "AlphaMix": lambda: {"pixel": SQUARED(), "perceptual": SQUARED()},
    "Autoencoder": pair,
    "AuxiliaryK": dict,
    "BatchTopKCode": lambda: {"k": 2},
    "BitsPerDim": dict,
    "BlockMean": lambda: {"sizes": 2},
    "ConstraintPenalty": lambda: {"residual": ae.Total()},
    "ContractiveAutoencoder": lambda: {"in_shape": 4, "latent_dim": 2},
    "ConvAutoencoder": lambda: {"in_shape": (1, 8, 8), "latent_dim": 2, "channels": (2,)},
    "ConvDecoder": lambda: {"latent_dim": 2, "out_shape": (1, 8, 8), "channels": (2,)},
    "ConvEncoder": lambda: {"in_shape": (1, 8, 8), "latent_dim": 2, "channels": (2,)},
    "CosineSchedule": lambda: {"attribute": "code.beta", "start": 0.0, "end": 1.0},
    "CyclicalSchedule": lambda: {"attribute": "code.beta", "start": 0.0, "end": 1.0},
    "DCTBands": lambda: {"cutoffs": 0.5},
    "DenoisingAutoencoder": lambda: {"in_shape": 4, "latent_dim": 2, "hidden": (3,)},
    "DictionaryAutoencoder": lambda: {"in_features": 4, "num_latents": 8, "code": ae.TopKCode(2)},
    "DictionaryDecoder": lambda: {"num_latents": 8, "in_features": 4},
    "DictionaryEncoder": lambda: {"in_features": 4, "num_latents": 8},
    "DigitsDataModule": dict,
    "Divergence": dict,
    "FeatureDensity": lambda: {"num_latents": 4},
    "FeatureLoss": lambda: {"features": nn.Identity()},
    "FiniteScalarQuantizerCode": lambda: {"levels": [5, 4]},
    "GatedCode": lambda: {"num_latents": 4, "weight": 0.1},
    "GaussianCode": dict,
    "GaussianNLL": dict,
    "GaussianNoise": lambda: {"std": 0.1},
    "GreedyLevels": lambda: {"epochs_per_level": 1},
    "HaarBands": dict,
    "ImageFolderDataModule": lambda: {"root": "nowhere", "image_size": 8},
    "ImageGradients": dict,
    "JacobianPenalty": dict,
    "JumpReLUCode": lambda: {"num_latents": 4, "weight": 0.1},
    "KLSparsityCode": lambda: {"target": 0.1, "weight": 0.1},
    "L1Code": lambda: {"weight": 0.1, "activation": "relu"},
    "LISTAEncoder": lambda: {"in_shape": 4, "latent_dim": 8, "weight": 0.1},
    "LPIPSLoss": lambda: {"net": "squeeze"},
    "LaplaceNLL": dict,
    "LaplacianPyramid": dict,
    "LinearAutoencoder": lambda: {"in_shape": 4, "latent_dim": 2},
    "LinearDecoder": lambda: {"latent_dim": 2, "out_shape": 4},
    "LinearEncoder": lambda: {"in_shape": 4, "latent_dim": 2},
    "LinearSchedule": lambda: {"attribute": "code.beta", "start": 0.0, "end": 1.0},
    "MLPAutoencoder": lambda: {"in_shape": 4, "latent_dim": 2, "hidden": (3,)},
    "MLPDecoder": lambda: {"latent_dim": 2, "out_shape": 4, "hidden": (3,)},
    "MLPEncoder": lambda: {"in_shape": 4, "latent_dim": 2, "hidden": (3,)},
    "MaskingNoise": lambda: {"p": 0.5},
    "MultiScaleAutoencoder": lambda: {
        "encoder": ae.MLPEncoder((1, 8, 8), 2, (3,)),
        "decoders": ae.scale_decoders(ae.BlockMean(2), (1, 8, 8), 2, hidden=(3,)),
        "scales": ae.BlockMean(2),
    },
    "MultiScaleSSIMLoss": dict,
    "NegativeBinomialNLL": dict,
    "OrthogonalityPenalty": dict,
    "OutlierDetector": dict,
    "ParetoFront": lambda: {"alphas": [0.0, 1.0], "objectives": [[1.0, 2.0], [2.0, 1.0]]},
    "PredictionWriter": lambda: {"folder": "nowhere"},
    "PrefixReconstruction": lambda: {"prefixes": [1, 2]},
    "ReconstructionImages": dict,
    "SSIMLoss": dict,
    "SaltAndPepper": lambda: {"p": 0.5},
    "ScaleError": lambda: {"parts": ae.BlockMean(2).parts, "num_scales": 2},
    "SoftThresholdCode": lambda: {"threshold": 0.1},
    "SparseAutoencoder": pair,
    "SparseCode": lambda: {
        "values": torch.ones(2, 2),
        "indices": torch.tensor([[0, 1], [1, 2]]),
        "num_latents": 4,
    },
    "SquaredError": dict,
    "StackedAutoencoder": lambda: {"levels": [ae.LinearAutoencoder(4, 3), ae.LinearAutoencoder(3, 2)]},
    "SubspaceAngle": lambda: {"reference": torch.eye(4)[:, :2]},
    "TensorDataModule": lambda: {"train": rows()},
    "TopKCode": lambda: {"k": 2},
    "TorchvisionFeatures": lambda: {"model": "squeezenet1_1", "layers": ["features.1"]},
    "Total": dict,
    "VariationalAutoencoder": lambda: dict(zip(("encoder", "decoder"), ae.mlp_pair(4, 2, (3,), h_dim=4), strict=True)),
    "VectorQuantizedAutoencoder": pair,
    "VectorQuantizerCode": lambda: {"num_codes": 4, "dim": 2},
    "VisionDataModule": dict,
    "WeightPrior": dict,
    "WeightedLoss": lambda: {"losses": {"a": SQUARED()}},
    "ZeroInflatedNegativeBinomialNLL": dict,
    "atom_recovery": lambda: {"learned": torch.eye(4), "true": torch.eye(4)},
    "collect_activations": lambda: {
        "model": nn.Sequential(nn.Linear(4, 3)),
        "layer": "0",
        "batches": [rows()],
        "out_dir": f"out-{next(FOLDERS)}",
    },
    "conv_pair": lambda: {"in_shape": (1, 8, 8), "latent_dim": 2, "channels": (2,)},
    "factor_images": lambda: {"size": 4, "positions": 2},
    "linear_gaussian": lambda: {"num_examples": 4, "in_features": 4, "latent_dim": 2},
    "loss_recovered": lambda: {
        "model": nn.Sequential(nn.Linear(4, 3)),
        "layer": "0",
        "splice": lambda rows: rows,
        "batches": [rows()],
        "loss": lambda output, batch: output.mean(1),
    },
    "mlp_pair": lambda: {"in_shape": 4, "latent_dim": 2, "hidden": (3,)},
    "optimal_gains": lambda: {"parts": ae.BlockMean(2).parts(images()), "x": images(), "level_weights": [1.0, 1.0]},
    "reconstruction_metrics": lambda: {"event_shape": (1, 8, 8)},
    "scale_decoders": lambda: {"scales": ae.BlockMean(2), "out_shape": (1, 8, 8), "latent_dim": 2},
    "soft_threshold": lambda: {"c": rows(), "threshold": 0.5},
    "sparse_dictionary": lambda: {"num_examples": 4, "in_features": 4, "num_atoms": 8, "active": 2},
    "sparse_encode": lambda: {"x": rows(), "dictionary": torch.eye(4), "weight": 0.1},
    "dequantize": lambda: {"x": rows()},
    "DiscretizedGaussianMixtureNLL": dict,
    "DiscretizedLogisticMixtureNLL": dict,
    "ssim": lambda: {"x_hat": images(), "x": images(), "window_size": 3},
    "subspace_angles": lambda: {"a": torch.eye(4)[:, :2], "b": torch.eye(4)[:, 1:3]},
    "sweep": lambda: {"make_model": alpha_mix, "alphas": [0.5], "data": ae.TensorDataModule(rows()), **QUIET},
    "active_units": lambda: {"variance": torch.ones(3)},
    "codebook_usage": lambda: {"counts": torch.ones(3)},
    "dci": lambda: {"z": rows().repeat(4, 1), "factors": torch.arange(16)[:, None] % 2, "trees": 1},
    "dead_fraction": lambda: {"density": torch.tensor([0.0, 0.5])},
    "decoder_overlap": lambda: {"decoder": torch.eye(4)},
    "effective_rank": lambda: {"covariance": torch.eye(4)},
    "gini": lambda: {"z": rows()},
    "hoyer": lambda: {"z": rows()},
    "kl_per_dimension": lambda: {"mean": rows(), "log_variance": rows()},
    "l0": lambda: {"z": rows()},
    "lifetime_sparsity": lambda: {"mean_abs": torch.ones(3), "mean_square": torch.full((3,), 2.0), "n": 4},
    "log10_density": lambda: {"density": torch.tensor([0.0, 0.5])},
    "max_cosine": lambda: {"atoms": torch.eye(4), "among": torch.eye(4)},
    "mutual_information_gap": lambda: {"z": rows().repeat(4, 1), "factors": torch.arange(16)[:, None] % 2},
    "perplexity": lambda: {"counts": torch.ones(3)},
    "population_sparsity": lambda: {"z": rows()},
    "sap": lambda: {"z": rows().repeat(4, 1), "factors": torch.arange(16)[:, None] % 2},
}
#: files, whose damage has tests of its own, and names without arguments
ELSEWHERE = {"ActivationShards", "load", "load_predictions", "load_saelens", "save_saelens"}
BARE = {"BernoulliNLL", "ContinuousBernoulliNLL", "FractionVarianceUnexplained", "Identity", "PoissonNLL", "Shrinkage"}


def public() -> dict[str, Any]:
    names = {name: getattr(ae, name) for name in ae.__all__} | {
        name: getattr(metrics, name) for name in metrics.__all__
    }
    return {name: value for name, value in names.items() if "diagnostics" not in getattr(value, "__module__", "")}


def test_the_table_knows_every_public_name():
    assert set(public()) - NOT_BUILT - ELSEWHERE - BARE - {"DCI"} == set(VALID)


# -- constructors and functions --------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, "x", "", b"x", 1.5, -1, 0, 2**70, -(2**70), float("nan"), float("inf"), -float("inf"), 1e308, 1j),
    *(
        [],
        (),
        {},
        [1, "x"],
        (0, -1),
        [float("nan")],
        {"a": "x"},
        {1: 2},
        set(),
        object(),
        int,
        nn.Linear,
        nn.Linear(1, 1),
    ),
    *(
        lambda *args: "x",
        torch.tensor(float("nan")),
        torch.tensor([float("nan")]),
        torch.zeros(0),
        torch.tensor(1 + 1j),
    ),
    *(torch.tensor(True), np.float32("nan"), np.array([]), np.array("x"), np.array([[1.0]]), Path("nowhere"), slice(2)),
]
FUNCTIONS = {"forward", "kind", "loss", "make_model", "mask_fn", "parts", "residual", "splice", "transform", "model"}
OURS = (TypeError, ValueError)
PATHS = (FileNotFoundError, NotADirectoryError)


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Of a function, or of a class with those that it passes on to its base."""
    found: dict[str, inspect.Parameter] = {}
    for owner in inspect.getmro(function) if inspect.isclass(function) else [function]:
        if inspect.isclass(owner) and "__init__" not in vars(owner):
            continue
        if inspect.isclass(owner) and not owner.__module__.startswith("lightning_ae"):
            break
        signature = inspect.signature(owner.__init__ if inspect.isclass(owner) else owner)
        own = {name: p for name, p in signature.parameters.items() if name != "self" and not name.startswith("_")}
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = {**{name: p for name, p in own.items() if p.kind in plain}, **found}
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
            break
    return found


def shown(value: Any) -> str:
    return re.sub(r" at 0x\w+", "", repr(value).replace("\n", " "))[:60]


def fault(error: BaseException, names: Sequence[str]) -> str | None:
    """Why an error is none that helps; None if it does."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {str(error)[:100]}"
    if not isinstance(error, (*OURS, *PATHS)) or not frame.filename.startswith(PACKAGE):
        return f"{text} in {Path(frame.filename).name}:{frame.lineno}"
    if not any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names):
        return f"{text} names none of {list(names)}"
    return None


def is_nan(value: Any) -> bool:
    if value is None:
        return False
    try:
        return bool(np.isnan(np.asarray(value, dtype=np.float64)).any())
    except (TypeError, ValueError, RuntimeError):
        return False


def takes(annotation: str, value: Any) -> bool:
    """Whether what was taken is at least of a type that the parameter has."""
    if any(word in annotation for word in ("Any", "Tensor", "Array")):
        return True
    if is_nan(value):
        return False
    if isinstance(value, (str, bytes)):
        return isinstance(value, str) and any(word in annotation for word in ("str", "Path", "Literal"))
    return True


def odd_arguments(name: str) -> Iterator[str]:
    function = public()[name]
    for parameter, described in parameters(function).items():
        for value in ODD:
            if (callable(value) and parameter in FUNCTIONS) or (name, parameter) == ("sweep", "devices"):
                continue  # what a function gives is its owner's, and devices are the Trainer's
            if parameter == "batches" and isinstance(value, (list, tuple, Tensor, np.ndarray, set)):
                continue  # what is in them is the model's
            arguments = {**VALID[name](), parameter: value}
            torch.manual_seed(0)
            try:
                function(**arguments)
            except Exception as error:
                # a value that is right by itself may not go with another, which then is named
                if why := fault(error, [parameter]):
                    yield f"{name}({parameter}={shown(value)}): {why}"
            else:
                if not takes(str(described.annotation), value):
                    yield f"{name}({parameter}={shown(value)}) is taken"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(VALID))
def test_odd_arguments_are_right_or_refused_by_name(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public()[name](**VALID[name]())
    faults = list(odd_arguments(name))
    assert not faults, "\n" + "\n".join(faults)


# -- calls -----------------------------------------------------------------------------------------------------

Call = tuple[Callable[..., Any], dict[str, Any]]
H = ("h", lambda: rows() - 0.3)


def of_loss(loss: ae.ReconstructionLoss, x: Callable[[], Tensor] = rows) -> dict[str, Call]:
    params = torch.rand(len(x()), *loss.params_shape(x().shape[1:]), generator=torch.Generator().manual_seed(1))
    name = type(loss).__name__
    calls: dict[str, Call] = {
        f"{name}": (loss, {"params": params, "x": x()}),
        f"{name}.excess": (loss.excess, {"params": params, "x": x()}),
        f"{name}.check": (loss.check, {"x": x()}),
        f"{name}.mean": (loss.mean, {"params": params}),
        f"{name}.prediction": (loss.prediction, {"params": params, "x": x()}),
    }
    if isinstance(loss, ae.Likelihood):
        calls[f"{name}.description_length"] = (loss.description_length, {"params": params, "x": x()})
    return calls


def of_code(code: ae.Code, h: Callable[[], Tensor] = rows) -> dict[str, Call]:
    name = type(code).__name__
    code.eval()
    return {f"{name}": (code, {"h": h() - 0.3}), f"{name}.encode": (code.encode, {"h": h() - 0.3})}


def of_model(model: ae.Autoencoder, x: Callable[[], Tensor] = rows) -> dict[str, Call]:
    name = type(model).__name__
    model.eval()
    calls: dict[str, Call] = {
        f"{name}.{method}": (getattr(model, method), {"x": x()})
        for method in ("forward", "encode", "reconstruct", "check_input")
    }
    z = model.encode(x()).detach()
    return calls if isinstance(z, ae.SparseCode) else {**calls, f"{name}.decode": (model.decode, {"z": z})}


def updated(make: Callable[[], Any]) -> Callable[..., Any]:
    """A metric of one update."""

    def compute(**arguments: Any) -> Any:
        metric = make()
        metric.update(**arguments)
        return metric.compute()

    return compute


def counts() -> Tensor:
    return rows().mul(9).round()


def table() -> dict[str, Call]:
    torch.manual_seed(0)
    nets = [
        ae.MLPEncoder(4, 2, (3,)), ae.MLPEncoder(4, 2, (3,), input_transform="log1p"), ae.LinearEncoder(4, 2),
        ae.DictionaryEncoder(4, 8), ae.LISTAEncoder(4, 8, 0.1), ae.GaussianNoise(0.0), ae.MaskingNoise(0.0),
        ae.SaltAndPepper(0.0), ae.Total(),
    ]  # fmt: skip
    calls: dict[str, Call] = {f"{type(net).__name__}-{i}": (net, {"x": rows()}) for i, net in enumerate(nets)}
    calls |= {f"{type(net).__name__}": (net, {"z": rows()[:, :2]}) for net in (
        ae.MLPDecoder(2, 4, (3,)), ae.LinearDecoder(2, 4), ae.DictionaryDecoder(2, 4),
        ae.ConvDecoder(2, (1, 8, 8), (2,)),
    )}  # fmt: skip
    calls |= {f"{type(net).__name__}": (net, {"x": images()}) for net in (
        ae.ConvEncoder((1, 8, 8), 2, (2,)), ae.ImageGradients("sobel"),
    )}  # fmt: skip
    calls["Divergence"] = (ae.Divergence(), {"v": images().expand(-1, 2, -1, -1)})
    for loss in (
        ae.SquaredError(), ae.GaussianNLL(), ae.LaplaceNLL(), ae.BernoulliNLL(), ae.ContinuousBernoulliNLL(),
        ae.WeightedLoss({"a": ae.SquaredError()}), ae.FeatureLoss(nn.Identity()),
        ae.AlphaMix(ae.SquaredError(), ae.SquaredError()),
    ):  # fmt: skip
        calls |= of_loss(loss)
    for loss in (ae.PoissonNLL(), ae.NegativeBinomialNLL(), ae.ZeroInflatedNegativeBinomialNLL()):
        calls |= of_loss(loss, counts)
    for loss in (ae.SSIMLoss(window_size=3), ae.MultiScaleSSIMLoss(window_size=3, weights=(0.5, 0.5))):
        calls |= of_loss(loss, images)
    quantizer = ae.VectorQuantizerCode(4, 2, kmeans=False)
    for code in (
        ae.Identity(), ae.L1Code(0.1, "relu"), ae.SoftThresholdCode(0.1), ae.KLSparsityCode(0.1, 0.1),
        ae.GaussianCode(), ae.GatedCode(4, 0.1), ae.JumpReLUCode(4, 0.1), ae.TopKCode(2), ae.BatchTopKCode(2),
        quantizer, ae.FiniteScalarQuantizerCode([5, 4]),
    ):  # fmt: skip
        calls |= of_code(code)
    index = torch.tensor([[0, 1], [1, 0]])
    calls["GaussianCode-full"] = (ae.GaussianCode(covariance="full").eval(), {"h": torch.rand(4, 5)})
    calls["GaussianCode.statistics"] = (ae.GaussianCode().statistics, {"h": rows()})
    calls["GaussianCode.posterior"] = (lambda h: ae.GaussianCode().posterior(h).rsample(), {"h": rows()})
    calls["SparseCode.decode"] = (
        lambda atoms: ae.SparseCode(**VALID["SparseCode"]()).decode(atoms), {"atoms": torch.rand(4, 3)},
    )  # fmt: skip
    calls["JumpReLUCode.set_threshold"] = (
        lambda threshold: code_with(threshold), {"threshold": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    )  # fmt: skip
    vae = ae.VariationalAutoencoder(**VALID["VariationalAutoencoder"]()).eval()
    for method in ("log_likelihood", "iwae_bound"):
        bound = functools.partial(getattr(vae, method), num_samples=2)
        calls[f"VariationalAutoencoder.{method}"] = (bound, {"x": rows()})
    calls["VariationalAutoencoder.interpolate"] = (vae.interpolate, {"x": rows(), "y": 1 - rows()})
    calls["VariationalAutoencoder.traverse"] = (
        functools.partial(vae.traverse, dim=0), {"x": rows(), "values": torch.tensor([0.0, 1.0])},
    )  # fmt: skip
    calls["VectorQuantizerCode.lookup"] = (quantizer.lookup, {"indices": index})
    calls["FiniteScalarQuantizerCode.lookup"] = (ae.FiniteScalarQuantizerCode([5, 4]).lookup, {"indices": index})
    for name in ("ConvAutoencoder", "MultiScaleAutoencoder"):
        calls |= of_model(getattr(ae, name)(**VALID[name]()), images)
    for name in (
        "Autoencoder", "LinearAutoencoder", "DictionaryAutoencoder", "StackedAutoencoder", "VariationalAutoencoder",
        "VectorQuantizedAutoencoder",
    ):  # fmt: skip
        calls |= of_model(getattr(ae, name)(**VALID[name]()))
    for scales in (ae.BlockMean(2), ae.DCTBands(0.5), ae.HaarBands(1), ae.LaplacianPyramid(1)):
        calls[f"{type(scales).__name__}.parts"] = (scales.parts, {"x": images()})
        calls[f"{type(scales).__name__}.split"] = (scales.split, {"x": images()})
    for make in (ae.FractionVarianceUnexplained, ae.Shrinkage):
        calls[make.__name__] = (updated(make), {"preds": rows(), "target": rows() + 0.1})
    calls["ScaleError"] = (
        updated(lambda: ae.ScaleError(ae.BlockMean(2).parts, 2)), {"preds": images(), "target": images() + 0.1},
    )  # fmt: skip
    calls["BitsPerDim"] = (updated(lambda: _Bits()), {"nll": rows()[:, 0]})
    calls["FeatureDensity"] = (updated(lambda: ae.FeatureDensity(4)), {"z": rows()})
    calls["SubspaceAngle"] = (updated(lambda: ae.SubspaceAngle(torch.eye(4)[:, :2])), {"matrix": rows()[:, :2]})
    for name in (
        *(
            "atom_recovery",
            "optimal_gains",
            "soft_threshold",
            "sparse_encode",
            "ssim",
            "subspace_angles",
            "active_units",
        ),
        *("codebook_usage", "dci", "dead_fraction", "decoder_overlap", "effective_rank", "gini", "hoyer", "sap"),
        *("kl_per_dimension", "l0", "lifetime_sparsity", "log10_density", "max_cosine", "mutual_information_gap"),
        *("perplexity", "population_sparsity"),
    ):
        arguments = VALID[name]()
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in arguments.items() if key not in tensors}
        calls[name] = (functools.partial(public()[name], **others), tensors)
    return calls


def code_with(threshold: Tensor) -> Tensor:
    code = ae.JumpReLUCode(4, 0.1)
    code.set_threshold(threshold)
    return code.threshold


class _Bits(ae.BitsPerDim):
    def update(self, nll: Tensor) -> None:
        super().update(nll, dims=3)


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def put(t: Tensor) -> Tensor:
        out = t.contiguous().clone()
        out.view(-1)[int(0.6 * out.numel())] = value  # inside, where images have a border
        return out

    return put


#: of the same numbers in another precision the result has to be the same
PRECISIONS = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda t: t + 0j,
    "without dimensions": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "all empty": lambda t: t.new_zeros(0),
    "no features": lambda t: t[:, :0] if t.ndim > 1 else t[:0],
    "flat": lambda t: t.flatten(),
    "one more dimension": lambda t: t[None],
    "one column less": lambda t: t[..., :-1],
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "None": lambda t: None,
    "a string": lambda t: "x",
    "sparse": lambda t: t.to_sparse(),
}
#: counts, in which a NaN is documented to be nothing; and predictions, which need no target
HIDES_NAN = ("l0", "active_units", ".prediction")


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, ae.SparseCode):
        return [value.to_dense()]
    if isinstance(value, (float, int, np.ndarray)):
        return [torch.as_tensor(value)]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [leaf for item in items for leaf in leaves(item)]


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return [leaf.detach() for leaf in leaves(function(**arguments))]


def odd_tensors(name: str, call: Call) -> Iterator[str]:
    function, arguments = call
    for argument, valid in arguments.items():
        for dtype in PRECISIONS:
            given = valid.to(dtype)
            where = f"{name}({argument}={dtype})"
            try:
                got = outcome(function, {**arguments, argument: given})
            except Exception as error:
                if why := fault(error, [argument]):
                    yield f"{where}: {why}"
                continue
            if valid.is_floating_point():
                expected = outcome(function, {**arguments, argument: given.to(valid.dtype)})
                close = [
                    torch.allclose(a.double(), b.double(), rtol=2e-2, atol=2e-2, equal_nan=True)
                    for a, b in zip(got, expected, strict=True)
                ]
                if not all(close):
                    yield f"{where}: {got} is not {expected}"
        for shape, change in SHAPES.items():
            try:
                outcome(function, {**arguments, argument: change(valid)})
            except Exception as error:
                if why := fault(error, [*arguments, "k", "event_shape", "levels"]):
                    yield f"{name}({argument} {shape}): {why}"
        if not valid.is_floating_point():
            continue
        try:
            got = outcome(function, {**arguments, argument: with_one(float("nan"))(valid)})
        except Exception as error:
            if why := fault(error, [argument]):
                yield f"{name}({argument} with NaN): {why}"
        else:
            if got and not name.endswith(HIDES_NAN) and all(bool(leaf.isfinite().all()) for leaf in got):
                yield f"{name}({argument} with NaN): {got} says nothing of it"


TABLE = table()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TABLE)
def test_odd_tensors_are_right_or_refused_by_name(name: str):
    outcome(*TABLE[name])
    faults = list(odd_tensors(name, TABLE[name]))
    assert not faults, "\n" + "\n".join(faults)
