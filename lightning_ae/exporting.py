"""Whether a graph for others is being made, in which batches have any size and nothing is kept for later."""

from __future__ import annotations

import torch

#: torch 2.6 knows only of compiling, of which exporting is a kind
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
