"""Hosts, and the faults that are planted in them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from faults_hosts import LONG, Knobs

TOLD = {"mean": "mean", "log_variance": "log_variance"}
# faster or narrower, a third and more of the ReLUs are dead at the end
WIDE: dict[str, Any] = {"width": 256, "lr": 2e-3}
TANH: dict[str, Any] = {"width": 128, "lr": 5e-3, "activation": "tanh"}

HOSTS = {
    "our mlp": Knobs("our mlp", **WIDE),
    "our conv": Knobs("our conv", loss="bce_logits", lr=5e-3),
    "our vae": Knobs("our vae", loss="bce_logits", **WIDE),
    "our vq": Knobs("our vq", **WIDE),
    "mlp ae": Knobs("mlp", told="encoder", **WIDE),
    "conv ae": Knobs("conv", told="encoder", lr=1e-2),
    "vae told": Knobs("vae", told=TOLD, loss="bce_sum", **TANH),
    "vae": Knobs("vae", loss="bce_sum", **TANH),
    "mlp": Knobs("mlp", "classes", loss="ce"),
    "cnn": Knobs("conv", "classes", loss="ce"),
    "lstm": Knobs("lstm", "classes", loss="ce", lr=1e-2),
    "transformer": Knobs("transformer", "classes", width=32, loss="ce"),
    "mlp binary": Knobs("mlp", "binary", loss="bce_logits"),
    "cnn binary": Knobs("conv", "binary", loss="bce_logits"),
    "mlp labels": Knobs("mlp", "labels", loss="bce_logits"),
    "cnn labels": Knobs("conv", "labels", loss="bce_logits"),
    "mlp regression": Knobs("mlp", "regression", lr=1e-2),
    "lstm regression": Knobs("lstm", "regression", lr=1e-2),
}
OURS, VAES = ("our mlp", "our conv", "our vae", "our vq"), ("our vae", "vae told", "vae")
PLAIN_AE, CLASSES = ("mlp ae", "conv ae"), ("mlp", "cnn", "lstm", "transformer")
SLOWER = ("mlp", "lstm", "transformer")  # where the convolutions are so good that they get over it
BINARY, LABELS = ("mlp binary", "cnn binary"), ("mlp labels", "cnn labels")
REGRESSION = ("mlp regression", "lstm regression")
DENSE = ("mlp", "mlp binary", "mlp ae", "mlp regression", "our mlp")
SOME = ("our mlp", "our vae", "conv ae", "cnn", "transformer", "mlp binary", "lstm regression")  # one of each family


class Fault(NamedTuple):
    """A change of knobs, the causes that are a right diagnosis of it, and where it fits.

    ``hidden`` says why it does not show in the held-out error, for the few that do not by their nature.
    """

    name: str
    causes: str
    hosts: tuple[str, ...]
    knobs: dict[str, Any]
    hidden: str = ""


IMAGES = {"x_scale": 255.0}
SGD = {"optimizer": "sgd"}
FAULTS = (
    # data
    Fault("NaN in 2 % of the inputs", "nonfinite_data",
          (*PLAIN_AE, *CLASSES, "mlp regression"), {"broken": "nan_input"}),
    Fault("infinity in 2 % of the targets", "nonfinite_data", REGRESSION, {"broken": "inf_target"}),
    Fault("all inputs the same", "constant_data",
          (*PLAIN_AE, "our mlp", "mlp", "cnn", "mlp regression"), {"broken": "constant_input"}),
    Fault("all targets the same", "constant_data", REGRESSION, {"broken": "constant_target"}),
    Fault("one class only", "one_class", (*CLASSES, *BINARY), {"broken": "constant_target"}),
    Fault("shuffled targets", "misaligned_pair", (*PLAIN_AE, *CLASSES, *REGRESSION), {"broken": "shuffled_target"}),
    Fault("bytes into tanh", "input_scale saturated", ("mlp", "mlp binary", "lstm"), {**IMAGES, "activation": "tanh"}),
    Fault("one feature 1e5 times larger", "input_scale",
          ("mlp", "mlp binary", "mlp regression", "lstm regression"), {"feature_scale": 1e5}),
    Fault("inputs far from zero", "input_scale", ("mlp", "transformer", "mlp binary", *REGRESSION), {"x_shift": 300.0}),
    Fault("inputs of size 1e-4", "input_scale", ("mlp", "lstm", "mlp binary", *REGRESSION), {"x_scale": 1e-4}),
    Fault("bytes against a sigmoid", "target_out_of_reach input_scale", PLAIN_AE, {**IMAGES, "output": ("sigmoid",)}),
    Fault("images in [-1, 1] against a sigmoid", "target_out_of_reach",
          PLAIN_AE, {"x_scale": 2.0, "x_shift": -1.0, "output": ("sigmoid",)}),
    Fault("standardised targets against a ReLU", "target_out_of_reach", REGRESSION, {"output": ("relu",)}),
    Fault("targets of std 5 against a tanh", "target_out_of_reach", REGRESSION, {"output": ("tanh",), "y_scale": 5.0}),
    Fault("standardised images with BCE", "bce_target_range",
          PLAIN_AE, {"x_scale": 3.0, "x_shift": -1.0, "loss": "bce_logits"}),
    Fault("images in a hundredth of the range", "narrow_range",
          PLAIN_AE, {"x_scale": 0.02, "x_shift": 0.5, "output": ("sigmoid",)}),
    Fault("images in a hundredth of the range", "narrow_range",
          ("our mlp",), {"x_scale": 0.02, "x_shift": 0.5, "loss": "sigmoid_mse"}),
    Fault("targets a thousand times larger", "target_scale", REGRESSION, {"y_scale": 1000.0}),
    Fault("targets around 1000", "target_scale", REGRESSION, {"y_shift": 1000.0}),
    Fault("validation data in bytes", "validation_scale", (*SLOWER[1:], "cnn", *REGRESSION), {"val_scale": 255.0}),
    Fault("validation data divided by 255 twice", "validation_scale",
          (*PLAIN_AE, "our mlp", *CLASSES), {"val_scale": 1 / 255}),
    # loss and output
    Fault("(B, 1) against (B,)", "broadcast_pair", REGRESSION, {"flat_target": True}),
    Fault("softmax over one unit", "constant_softmax", BINARY, {"output": ("softmax",), "loss": "bce"}),
    Fault("softmax over one unit, squared error", "constant_softmax", BINARY, {"output": ("softmax",), "loss": "mse"}),
    Fault("softmax before cross-entropy", "double_activation", SLOWER, {"output": ("softmax",)}),
    Fault("sigmoid before cross-entropy", "double_activation", SLOWER[1:], {"output": ("sigmoid",)}),
    Fault("ReLU before cross-entropy", "double_activation", CLASSES, {"output": ("relu",)}),
    Fault("softmax without log into NLL", "double_activation", SLOWER, {"output": ("softmax",), "loss": "nll"}),
    Fault("sigmoid before BCE with logits", "double_activation",
          (*BINARY, *LABELS, *PLAIN_AE, "our conv"), {"output": ("sigmoid",), "loss": "bce_logits"}),
    Fault("two sigmoids", "double_activation", (*BINARY, *PLAIN_AE), {"output": ("sigmoid", "sigmoid"), "loss": "bce"}),
    Fault("softmax for several labels", "softmax_multilabel", LABELS, {"output": ("softmax",), "loss": "bce"}),
    Fault("one-hot classes through ReLU", "class_activation", CLASSES, {"output": ("relu",), "loss": "onehot_mse"}),
    Fault("one-hot classes through sigmoid", "class_activation squared_error_sigmoid",
          SLOWER, {"output": ("sigmoid",), "loss": "onehot_mse"}),
    Fault("confident squared error through sigmoid", "squared_error_sigmoid",
          (*PLAIN_AE, *BINARY), {"output": ("sigmoid",), "loss": "mse", "output_bias": -20.0}),
    Fault("confident squared error through sigmoid", "squared_error_sigmoid",
          ("our mlp",), {"loss": "sigmoid_mse", "output_bias": -20.0}),
    Fault("dropout on the output", "dropout_on_output", (*PLAIN_AE, *REGRESSION), {"dropout_output": 0.7}),
    Fault("ReLU that is off at the output", "stuck_outputs dead_units constant_output no_gradient target_out_of_reach",
          (*PLAIN_AE, *REGRESSION), {"output": ("relu",), "output_bias": -20.0}),
    # wiring
    Fault("no activation between layers", "linear_stack", ("mlp binary", "mlp regression"), {"activation": "identity"}),
    Fault("rounded outputs", "no_gradient", (*PLAIN_AE, *REGRESSION), {"output": ("round",)}),
    Fault("frozen encoder", "not_trained",
          (*OURS[:2], *PLAIN_AE, "mlp", "lstm", *REGRESSION), {"frozen": ("encoder",)}),
    Fault("decoder forgotten by the optimizer", "not_trained",
          (*OURS, *PLAIN_AE, "vae told", "vae"), {"forgotten": ("decoder",)}),
    Fault("encoder forgotten by the optimizer", "not_trained",
          ("our conv", "mlp ae", "cnn", "lstm", "mlp regression"), {"forgotten": ("encoder",)}),
    Fault("detached code", "not_trained",
          (*OURS[:2], *PLAIN_AE, "cnn", "transformer", *REGRESSION), {"code_layers": ("detach",)}),
    Fault("latent compared instead of the output", "misaligned_pair not_trained",
          PLAIN_AE, {"compare": "latent", "code": 64}),
    Fault("gradients never zeroed", "gradients_pile_up", SOME, {"zero_grad": False}),
    Fault("skip connection past the code", "skip_connection",
          PLAIN_AE, {"skip": True}, "the output is copied, the code is empty"),
    Fault("decoder reads two of the latents", "unread_latents narrow_code", (*OURS[:2], *PLAIN_AE), {"read": 2}),
    # code
    Fault("dropout on the code", "dropout_on_code", (*OURS[:2], *PLAIN_AE), {"dropout_code": 0.9}),
    Fault("code of one number", "narrow_code", (*OURS[:2], *PLAIN_AE), {"code": 1}),
    Fault("code that is always zero", "zero_code dead_units", PLAIN_AE, {"code_bias": -30.0, "code_layers": ("relu",)}),
    Fault("L1 far too heavy", "penalty_dominates zero_code", ("our mlp", "our conv", *PLAIN_AE), {"l1": 100.0}),
    Fault("divergence a hundred times too heavy", "penalty_dominates posterior_collapse", VAES, {"kl": 100.0}),
    Fault("divergence summed, error averaged", "penalty_dominates posterior_collapse",
          VAES[1:], {"loss": "bce_logits"}),
    Fault("divergence with the wrong sign", "log_variance_explodes penalty_dominates", VAES[1:], {"kl": -1.0}),
    Fault("log-variances start at 20", "log_variance_explodes", VAES[1:], {"log_variance_bias": 20.0}),
    Fault("codebook far from the vectors", "codebook_collapse", ("our vq",), {"codebook_shift": 20.0}),
    # gradients
    Fault("deep sigmoids", "vanishing_gradient", DENSE, {"activation": "sigmoid", "depth": 8, "width": 64}),
    Fault("deep tanh, small weights", "vanishing_gradient",
          DENSE[:4], {"activation": "tanh", "depth": 8, "width": 64, "gain": 0.1}),
    Fault("deep ReLUs, small weights", "vanishing_gradient", DENSE, {"depth": 8, "width": 64, "gain": 0.1}),
    Fault("weights all zero", "vanishing_gradient no_gradient dead_units constant_output zero_code",
          DENSE, {"gain": 0.0}),
    Fault("recurrent weights too large", "exploding_gradient",
          ("lstm", "lstm regression"), {"activation": "rnn_relu", "recurrent_gain": 8.0}),
    Fault("saturated tanh", "saturated", ("mlp", "mlp binary", "mlp regression"), {"activation": "tanh", "gain": 60.0}),
    Fault("dead ReLUs", "dead_units",
          ("our mlp", "our conv", "mlp ae", "mlp", "mlp binary", "mlp regression"), {"hidden_bias": -20.0}),
    # steps
    Fault("SGD with a rate of 30", "learning_rate_high", SOME, {**SGD, "lr": 30.0}),
    Fault("Adam with 300 times the rate", "learning_rate_high dead_units saturated", SOME, {"lr": 1.0}),
    Fault("a thousandth of the rate", "learning_rate_low too_short", SOME, {"lr": 5e-6}),
    Fault("SGD with a rate of 1e-4", "learning_rate_low too_short", SOME, {**SGD, "lr": 1e-4}),
    Fault("five steps", "too_short", SOME, {"steps": 5}),
    Fault("momentum and a rate that oscillate", "oscillation learning_rate_high",
          ("mlp", "mlp ae", "cnn binary", *REGRESSION), {**SGD, "lr": 1.0, "momentum": 0.97, "batch": 16}),
    Fault("decoupled weight decay of 30", "weight_decay", SOME, {"optimizer": "adamw", "weight_decay": 30.0}),
    Fault("L2 of 1", "weight_decay", SOME, {"weight_decay": 1.0}),
    # generalisation
    Fault("twenty examples", "overfitting",
          (*PLAIN_AE, "our mlp", *CLASSES[:2], *BINARY, *REGRESSION), {"examples": 20, "steps": LONG}),
    Fault("batch norm with pairs", "train_eval_mismatch",
          ("mlp", "mlp binary", "mlp regression"), {"norm": "batch", "batch": 2}),
    Fault("batch norm that never averages", "train_eval_mismatch",
          ("conv ae", "cnn", "cnn binary", "cnn labels"), {"norm_momentum": 1e-5}),
)  # fmt: skip


class Case(NamedTuple):
    """A run to make."""

    fault: Fault | None  # None in a healthy host
    host: str
    length: int
    seed: int

    @property
    def kind(self) -> str:
        """The fault's name."""
        return "healthy" if self.fault is None else self.fault.name

    @property
    def knobs(self) -> Knobs:
        """The host's, turned."""
        change = {"steps": self.length} | ({} if self.fault is None else self.fault.knobs)
        return dataclasses.replace(HOSTS[self.host], **change)
