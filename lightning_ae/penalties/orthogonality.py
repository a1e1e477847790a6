"""Distance of weight matrices from orthonormality."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import check_one_of
from lightning_ae.losses.base import full_precision
from lightning_ae.penalties.base import Penalty, refuse_sharding


class OrthogonalityPenalty(Penalty):
    r"""Distance from orthonormality :math:`\|W^\top W - I\|_F^2`, summed over the matrices of one box.

    Of a wide matrix the rows are compared instead of the columns. For a linear decoder the columns are the atoms.

    Args:
        weight: its weight in the objective.
        box: the attribute of the model whose matrices are meant, ``"decoder"`` or ``"encoder"``.

    Shapes:
        the raw term has no dimensions.

    Raises:
        ValueError: if the box has another name, or holds no matrix.

    Source: Brock et al. 2017, https://arxiv.org/abs/1609.07093.

    Example:
        >>> from lightning_ae import LinearAutoencoder
        >>> model = LinearAutoencoder(3, latent_dim=2)
        >>> _ = torch.nn.init.orthogonal_(model.encoder.weight)
        >>> x = torch.zeros(1, 3)
        >>> bool(OrthogonalityPenalty()(x, model(x), model) < 1e-10)
        True
    """

    def __init__(self, weight: float = 1.0, box: str = "decoder") -> None:
        super().__init__(weight)
        self.box = check_one_of("box", box, ("encoder", "decoder"))

    def on_train_start(self, model: AutoencoderLike) -> None:
        """Refuse FSDP, under which no rank holds a whole matrix."""
        refuse_sharding(self, model)

    def forward(self, x: Tensor, output: AutoencoderOutput, model: AutoencoderLike) -> Tensor:
        """Sum over the matrices of the box."""
        matrices = [weight for weight in getattr(model, self.box).parameters() if weight.ndim == 2]
        if not matrices:
            raise ValueError(f"box: the {self.box} has no weight matrix.")
        total = torch.zeros((), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for matrix in matrices:
                w = full_precision(matrix)
                gram = w.t() @ w if w.shape[0] >= w.shape[1] else w @ w.t()
                total = total + (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()
        return total
