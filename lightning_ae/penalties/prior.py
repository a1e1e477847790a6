"""A prior on the weights: maximum a posteriori."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ae.boxes import AutoencoderLike, AutoencoderOutput
from lightning_ae.checks import check_flag, check_positive, check_whole
from lightning_ae.losses.base import full_precision
from lightning_ae.penalties.base import Penalty, refuse_sharding


class WeightPrior(Penalty):
    r"""A Gaussian prior on the weights: maximum a posteriori instead of maximum likelihood.

    With noise :math:`x \mid W \sim N(\hat x, \sigma^2)` and prior :math:`W \sim N(0, \sigma_p^2)`, minus the log
    posterior times :math:`2\sigma^2` is :math:`\sum_i \|x_i - \hat x_i\|^2 + \lambda\|W\|^2` with
    :math:`\lambda = \sigma^2/\sigma_p^2`. A mean over batches estimates that sum divided by the number of
    examples :math:`N`, so the raw term is :math:`\|W\|^2 / N`, and ``weight`` is :math:`\lambda`. This is the
    objective with :class:`SquaredError`; with a loss in nats, whose scale is already its own, leave
    ``noise_variance`` at one half. Examples of a smaller last batch count more than others: choose a batch size
    that divides :math:`N`, or ``drop_last``, where that matters.

    Args:
        noise_variance: :math:`\sigma^2 > 0` in units of ``x`` squared; ½ for a likelihood in nats.
        prior_variance: :math:`\sigma_p^2 > 0` of each weight; infinite for a flat prior.
        num_examples: :math:`N`; None takes it from the Trainer's data when training starts.
        biases: whether biases have the prior too, and every other parameter with fewer than two dimensions.

    Raises:
        ValueError: if a variance is not positive, or ``N`` is neither given nor known.

    Source: MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.448; Bishop 2006, section 5.5.

    Example:
        >>> WeightPrior(noise_variance=0.5, prior_variance=5.0).weight
        0.1
    """

    def __init__(
        self,
        noise_variance: float = 0.5,
        prior_variance: float = 1.0,
        num_examples: int | None = None,
        biases: bool = False,
    ) -> None:
        noise = check_positive("noise_variance", noise_variance)
        super().__init__(noise / check_positive("prior_variance", prior_variance, finite=False))
        self.num_examples = None if num_examples is None else check_whole("num_examples", num_examples)
        self.from_data = num_examples is None
        self.biases = check_flag("biases", biases)

    def on_train_start(self, model: AutoencoderLike) -> None:
        """Take the number of examples from the data, unless it was given."""
        refuse_sharding(self, model)
        if self.from_data:
            self.num_examples = _count_examples(model.trainer)

    def forward(self, x: Tensor, output: AutoencoderOutput, model: AutoencoderLike) -> Tensor:
        r""":math:`\|W\|^2 / N` over encoder and decoder, without dimensions."""
        total = torch.zeros((), device=x.device)
        for weight in self._weights(model):
            total = total + full_precision(weight).square().sum()
        return total / self._known_examples(model)

    def _known_examples(self, model: AutoencoderLike) -> int:
        if self.num_examples is not None:
            return self.num_examples
        trainer: Any = getattr(model, "_trainer", None)  # ``trainer`` raises where there is none
        if trainer is not None and trainer.sanity_checking:
            return 1  # nobody sees the numbers of the sanity check, and the training data are not loaded yet
        if hasattr(getattr(trainer, "datamodule", None), "num_train_examples"):
            return int(trainer.datamodule.num_train_examples)
        raise ValueError("num_examples: not known before training; pass it to WeightPrior.")

    def _weights(self, model: AutoencoderLike) -> Iterator[nn.Parameter]:
        # one container, so that a tied weight is counted once
        for weight in nn.ModuleList([model.encoder, model.decoder]).parameters():
            if self.biases or weight.ndim > 1:
                yield weight

    def get_extra_state(self) -> dict[str, Any]:
        """The weight and the number of examples, so that a checkpoint evaluates as it was trained."""
        return {**super().get_extra_state(), "num_examples": self.num_examples}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what was known when the checkpoint was written."""
        super().set_extra_state(state)
        if self.from_data:
            self.num_examples = state["num_examples"]


def _count_examples(trainer: Any) -> int:
    """Examples in one epoch over all ranks, of what ``limit_train_batches`` leaves."""
    loader = trainer.train_dataloader
    try:
        total = loader.num_examples if hasattr(loader, "num_examples") else len(loader.dataset)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"num_examples: cannot be read off a {type(loader).__name__}; pass it to WeightPrior."
        ) from error
    batches = trainer.num_training_batches
    if batches < len(loader):
        if getattr(loader, "batch_size", None) is None:
            raise ValueError("num_examples: batches without a batch_size cannot be counted; pass it to WeightPrior.")
        total = min(total, int(batches) * loader.batch_size * trainer.world_size)
    return int(total)
