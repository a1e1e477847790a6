"""Codes: what stands between encoder and decoder."""

from lightning_ae.codes.identity import Code, CodeOutput, Identity
from lightning_ae.codes.sparse_code import SparseCode
from lightning_ae.codes.topk import BatchTopKCode, SelectingCode, TopKCode

__all__ = ["BatchTopKCode", "Code", "CodeOutput", "Identity", "SelectingCode", "SparseCode", "TopKCode"]
