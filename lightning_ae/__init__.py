"""lightning_ae: autoencoders for PyTorch Lightning.

The flow is ``x → corruption → encoder → code → decoder → loss → terms → objective``; see
:class:`lightning_ae.Autoencoder`, where it is written once.
"""

from lightning_ae.callbacks import PredictionWriter, load_predictions
from lightning_ae.checkpoint import load
from lightning_ae.codes import Code, CodeOutput, Identity
from lightning_ae.corruption import Corruption, GaussianNoise, MaskingNoise, SaltAndPepper
from lightning_ae.data import (
    DigitsDataModule,
    ImageFolderDataModule,
    TensorDataModule,
    VisionDataModule,
    linear_gaussian,
)
from lightning_ae.losses import (
    AlphaMix,
    BernoulliNLL,
    ContinuousBernoulliNLL,
    FeatureLoss,
    GaussianNLL,
    ImageGradients,
    LaplaceNLL,
    Likelihood,
    LPIPSLoss,
    MultiScaleSSIMLoss,
    NegativeBinomialNLL,
    PointwiseLoss,
    PoissonNLL,
    ReconstructionLoss,
    SquaredError,
    SSIMLoss,
    SSIMParts,
    TorchvisionFeatures,
    WeightedLoss,
    ZeroInflatedNegativeBinomialNLL,
    ssim,
)
from lightning_ae.metrics import (
    BitsPerDim,
    FractionVarianceUnexplained,
    SubspaceAngle,
    reconstruction_metrics,
    subspace_angles,
)
from lightning_ae.models import (
    Autoencoder,
    AutoencoderOutput,
    ContractiveAutoencoder,
    ConvAutoencoder,
    DenoisingAutoencoder,
    LinearAutoencoder,
    MLPAutoencoder,
)
from lightning_ae.networks import (
    ConvDecoder,
    ConvEncoder,
    LinearDecoder,
    LinearEncoder,
    MLPDecoder,
    MLPEncoder,
    conv_pair,
    mlp_pair,
)
from lightning_ae.pareto import ParetoFront, sweep
from lightning_ae.penalties import (
    ConstraintPenalty,
    Divergence,
    JacobianPenalty,
    OrthogonalityPenalty,
    Penalty,
    Total,
    WeightPrior,
)
from lightning_ae.rebuildable import Rebuildable

__version__ = "0.1.0.dev0"

__all__ = [
    "AlphaMix",
    "Autoencoder",
    "AutoencoderOutput",
    "BernoulliNLL",
    "BitsPerDim",
    "Code",
    "CodeOutput",
    "ConstraintPenalty",
    "ContinuousBernoulliNLL",
    "ContractiveAutoencoder",
    "ConvAutoencoder",
    "ConvDecoder",
    "ConvEncoder",
    "Corruption",
    "DenoisingAutoencoder",
    "DigitsDataModule",
    "Divergence",
    "FeatureLoss",
    "FractionVarianceUnexplained",
    "GaussianNLL",
    "GaussianNoise",
    "Identity",
    "ImageFolderDataModule",
    "ImageGradients",
    "JacobianPenalty",
    "LPIPSLoss",
    "LaplaceNLL",
    "Likelihood",
    "LinearAutoencoder",
    "LinearDecoder",
    "LinearEncoder",
    "MLPAutoencoder",
    "MLPDecoder",
    "MLPEncoder",
    "MaskingNoise",
    "MultiScaleSSIMLoss",
    "NegativeBinomialNLL",
    "OrthogonalityPenalty",
    "ParetoFront",
    "Penalty",
    "PointwiseLoss",
    "PoissonNLL",
    "PredictionWriter",
    "Rebuildable",
    "ReconstructionLoss",
    "SSIMLoss",
    "SSIMParts",
    "SaltAndPepper",
    "SquaredError",
    "SubspaceAngle",
    "TensorDataModule",
    "TorchvisionFeatures",
    "Total",
    "VisionDataModule",
    "WeightPrior",
    "WeightedLoss",
    "ZeroInflatedNegativeBinomialNLL",
    "conv_pair",
    "linear_gaussian",
    "load",
    "load_predictions",
    "mlp_pair",
    "reconstruction_metrics",
    "ssim",
    "subspace_angles",
    "sweep",
]
