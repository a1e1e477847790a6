"""Remedies in the scale of data and targets, inside the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_ae.diagnostics.remedies.base import Change, Options, Remedy, modules_by_name
from lightning_ae.networks.standardize import restore_output_scale, standardize_input

#: Layers that read indices, or several tensors.
_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.Bilinear)


@dataclass(frozen=True)
class StandardizeInput(Remedy):
    """Standardise what a layer reads, with the statistics of the first thousand rows of training.

    Checkpoints keep them. A checkpoint of somebody's module is loaded after the remedy was applied to a new one.

    Args:
        layer: name of the first layer with weights.
        features: how many numbers it reads on the axis of its features.

    Source: LeCun et al. 1998, Efficient BackProp, section 4.3.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 1))
        >>> StandardizeInput("0", 3).apply(network).done, sorted(network.state_dict())[2:]
        (True, ['0.input_mean', '0.input_square', '0.weight'])
    """

    layer: str
    features: int

    def describe(self) -> str:
        """Where."""
        return f"Standardise what {self.layer} reads, by mean and standard deviation of the training data."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Add the statistics to the layer."""
        layer = modules_by_name(model).get(self.layer)
        if layer is None:
            return Change(False, f"there is no layer {self.layer}")
        if isinstance(layer, _OTHERS):
            return Change(False, f"a {type(layer).__name__} reads something else than features")
        try:
            standardize_input(layer, self.features)
        except ValueError as error:
            return Change(False, str(error).rstrip("."))
        return Change(True, self.describe())


@dataclass(frozen=True)
class ScaleOutput(Remedy):
    """Give the output of the last layer mean and spread of the targets, so that weights need not reach them.

    Args:
        layer: name of the last layer.
        mean: of the targets.
        std: their standard deviation.

    Source: LeCun et al. 1998, Efficient BackProp, section 4.5.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 1))
        >>> ScaleOutput("0", 1000.0, 50.0).apply(network).what
        'Let 0 predict standardised targets, and multiply by 50 and add 1000.'
    """

    layer: str
    mean: float
    std: float

    def describe(self) -> str:
        """Where, and how."""
        return f"Let {self.layer} predict standardised targets, and multiply by {self.std:.4g} and add {self.mean:.4g}."

    def apply(self, model: nn.Module, trainer_options: Options | None = None, data: Options | None = None) -> Change:
        """Add mean and deviation to the layer."""
        layer = modules_by_name(model).get(self.layer)
        if layer is None:
            return Change(False, f"there is no layer {self.layer}")
        if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):
            return Change(False, f"a {type(layer).__name__} gives more than one tensor")
        try:
            restore_output_scale(layer, self.mean, self.std)
        except ValueError as error:
            return Change(False, str(error).rstrip("."))
        return Change(True, self.describe())
