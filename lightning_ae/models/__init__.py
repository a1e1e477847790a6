"""Autoencoders: the flow in ``base``, and one file for each variant."""

from lightning_ae.boxes import AutoencoderOutput
from lightning_ae.models.base import Autoencoder
from lightning_ae.models.contractive import ContractiveAutoencoder
from lightning_ae.models.conv import ConvAutoencoder
from lightning_ae.models.denoising import DenoisingAutoencoder
from lightning_ae.models.dictionary import DictionaryAutoencoder
from lightning_ae.models.linear import LinearAutoencoder
from lightning_ae.models.loading import load
from lightning_ae.models.mlp import MLPAutoencoder
from lightning_ae.models.multi_scale import MultiScaleAutoencoder, MultiScaleOutput, optimal_gains
from lightning_ae.models.outliers import OutlierDetector
from lightning_ae.models.quantized import VectorQuantizedAutoencoder
from lightning_ae.models.saelens import load_saelens, save_saelens
from lightning_ae.models.sparse import SparseAutoencoder
from lightning_ae.models.stacked import StackedAutoencoder
from lightning_ae.models.variational import VariationalAutoencoder

__all__ = [
    "Autoencoder",
    "AutoencoderOutput",
    "ContractiveAutoencoder",
    "ConvAutoencoder",
    "DenoisingAutoencoder",
    "DictionaryAutoencoder",
    "LinearAutoencoder",
    "MLPAutoencoder",
    "MultiScaleAutoencoder",
    "MultiScaleOutput",
    "OutlierDetector",
    "SparseAutoencoder",
    "StackedAutoencoder",
    "VariationalAutoencoder",
    "VectorQuantizedAutoencoder",
    "load",
    "load_saelens",
    "optimal_gains",
    "save_saelens",
]
