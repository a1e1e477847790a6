"""Codes: what stands between encoder and decoder."""

from lightning_ae.codes.finite_scalar import FiniteScalarQuantizerCode
from lightning_ae.codes.gated import GatedCode
from lightning_ae.codes.gaussian import GaussianCode
from lightning_ae.codes.identity import Code, CodeOutput, Identity
from lightning_ae.codes.jump import JumpReLUCode
from lightning_ae.codes.quantized import VectorQuantizerCode
from lightning_ae.codes.sparse import KLSparsityCode, L1Code, SoftThresholdCode, soft_threshold
from lightning_ae.codes.sparse_code import SparseCode
from lightning_ae.codes.topk import BatchTopKCode, SelectingCode, TopKCode

__all__ = [
    "BatchTopKCode",
    "Code",
    "CodeOutput",
    "FiniteScalarQuantizerCode",
    "GatedCode",
    "GaussianCode",
    "Identity",
    "JumpReLUCode",
    "KLSparsityCode",
    "L1Code",
    "SelectingCode",
    "SoftThresholdCode",
    "SparseCode",
    "TopKCode",
    "VectorQuantizerCode",
    "soft_threshold",
]
