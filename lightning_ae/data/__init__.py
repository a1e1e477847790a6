"""Where ``x`` comes from: data modules, and the loaders they are made of."""

from lightning_ae.data.activation_data import ActivationDataModule, ActivationLoader
from lightning_ae.data.activations import collect_activations
from lightning_ae.data.base import SplitDataModule
from lightning_ae.data.block_order import BlockOrder
from lightning_ae.data.dequantize import dequantize
from lightning_ae.data.digits import DigitsDataModule
from lightning_ae.data.factors import FactorImages, factor_images
from lightning_ae.data.file_loader import FileLoader
from lightning_ae.data.folder import ImageFolderDataModule
from lightning_ae.data.loader import Loader, TensorLoader
from lightning_ae.data.order import EpochOrder
from lightning_ae.data.shards import ActivationShards
from lightning_ae.data.synthetic import LinearGaussian, SparseDictionary, linear_gaussian, sparse_dictionary
from lightning_ae.data.tensors import InMemoryDataModule, TensorDataModule
from lightning_ae.data.vision import VisionDataModule

__all__ = [
    "ActivationDataModule",
    "ActivationLoader",
    "ActivationShards",
    "BlockOrder",
    "DigitsDataModule",
    "EpochOrder",
    "FactorImages",
    "FileLoader",
    "ImageFolderDataModule",
    "InMemoryDataModule",
    "LinearGaussian",
    "Loader",
    "SparseDictionary",
    "SplitDataModule",
    "TensorDataModule",
    "TensorLoader",
    "VisionDataModule",
    "collect_activations",
    "dequantize",
    "factor_images",
    "linear_gaussian",
    "sparse_dictionary",
]
