"""Encoders and decoders; any ``nn.Module`` may stand in their place."""

from lightning_ae.networks.conv import ConvDecoder, ConvEncoder
from lightning_ae.networks.dictionary import DictionaryDecoder, DictionaryEncoder
from lightning_ae.networks.fista import sparse_encode
from lightning_ae.networks.init import initialise, make_activation
from lightning_ae.networks.linear import LinearDecoder, LinearEncoder, TiedLinear
from lightning_ae.networks.lista import LISTAEncoder
from lightning_ae.networks.mlp import MLPDecoder, MLPEncoder
from lightning_ae.networks.pairs import conv_pair, mlp_pair
from lightning_ae.networks.pyramid import HaarBands, LaplacianPyramid
from lightning_ae.networks.scales import BlockMean, DCTBands, Scales, scale_decoders

__all__ = [
    "BlockMean",
    "ConvDecoder",
    "ConvEncoder",
    "DCTBands",
    "DictionaryDecoder",
    "DictionaryEncoder",
    "HaarBands",
    "LISTAEncoder",
    "LaplacianPyramid",
    "LinearDecoder",
    "LinearEncoder",
    "MLPDecoder",
    "MLPEncoder",
    "Scales",
    "TiedLinear",
    "conv_pair",
    "initialise",
    "make_activation",
    "mlp_pair",
    "scale_decoders",
    "sparse_encode",
]
