"""Codes: what stands between encoder and decoder."""

from lightning_ae.codes.identity import Code, CodeOutput, Identity

__all__ = ["Code", "CodeOutput", "Identity"]
