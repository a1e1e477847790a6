"""Which remedies a finding calls for, the first one first."""

from __future__ import annotations

from lightning_ae.diagnostics.causes.base import Evidence, Finding
from lightning_ae.diagnostics.remedies.base import ByHand, Remedy
from lightning_ae.diagnostics.remedies.prescriptions import PRESCRIPTIONS

_CALLED = "is called in forward() as a function"
#: Why a cause has no remedy that can be applied from outside, or has none in a model where nothing was found to change.
BY_HAND = {
    "nonfinite_data": "which values the missing ones should have is not known",
    "constant_data": "the loader gives nothing to learn from",
    "one_class": "the labels are made before the model sees them",
    "bce_target_range": "data are scaled where they are loaded, and the loss is called in training_step",
    "misaligned_pair": "which target belongs to which input is not known",
    "broadcast_pair": "the shapes are given in training_step: target.view_as(prediction)",
    "label_loss": "the loss is called in training_step",
    "nonfinite_loss": "the loss is computed in training_step",
    "narrow_code": "the sizes of the network are given where it is built",
    "skip_connection": "what is added where is written in forward()",
    "unread_latents": "what the decoder reads is written in forward()",
    "validation_scale": "validation data are scaled where they are loaded",
    "input_scale": "the layer that reads the data is not a module with weights",
    "narrow_range": "the data are no reconstruction's, or the layer that gives the output was not found",
    "target_scale": "the layer that gives the output was not found",
    "target_out_of_reach": f"the output's activation {_CALLED}",
    "constant_softmax": f"the softmax {_CALLED}",
    "softmax_multilabel": f"the softmax {_CALLED}, or belongs to the loss",
    "double_activation": f"the activation {_CALLED}",
    "class_activation": f"the output's activation {_CALLED}, and so is the loss in training_step",
    "squared_error_sigmoid": "the loss is called in training_step, and the last layer was not found",
    "stuck_outputs": f"the output's activation {_CALLED}",
    "dropout_on_output": f"the dropout {_CALLED}",
    "not_trained": "where the graph is cut is written in the model's code",
    "linear_stack": "the network's layers are put together where it is built",
    "gradients_pile_up": "with manual optimization, gradients are zeroed in training_step",
    "penalty_dominates": "the weight is a number in training_step, not of a part that is known",
    "posterior_collapse": "the weight of the divergence is a number in training_step",
    "dead_latents": "the weight of the sparsity is a number in training_step",
    "overfitting": "what is missing are examples",
}


def prescribe(e: Evidence, finding: Finding) -> tuple[Remedy, ...]:
    """The remedies of a finding, in the order in which to try them.

    Args:
        e: what was seen.
        finding: one of what was found in it.

    Returns:
        At least one; a :class:`ByHand` where nothing can be done from outside.
    """
    try:
        rule = PRESCRIPTIONS.get(finding.cause)
        found = [] if rule is None else list(dict.fromkeys(rule(e, finding)))
    except Exception as error:  # a report without a remedy is worth more than none
        found = [ByHand(f"none could be made ({type(error).__name__}: {error})")]
    why = BY_HAND.get(finding.cause, "what it would change is not a module, an optimizer or a setting")
    return tuple(found) or (ByHand(why),)
