"""What a code whose state belongs to all processes needs of them."""

from __future__ import annotations

from torch import Tensor


class Ranks:
    """The processes that train together; this one is alone.

    While a Trainer trains, the model's :class:`lightning_ae.models.recorder.Recorder` passes its own, which goes
    through the Trainer's strategy.

    Example:
        >>> import torch
        >>> Ranks().sum(torch.ones(2))
        tensor([1., 1.])
    """

    #: Of this process.
    rank: int = 0
    #: How many there are.
    world_size: int = 1
    #: Whether each has only a part of the parameters.
    sharded: bool = False

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same on all."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes in the order of their ranks, ``(world_size, *shape)``; shapes must agree."""
        return tensor[None]
