"""Causes in the pairing of the last activation with the loss."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause
from lightning_ae.diagnostics.monitors.pairs import RANGES
from lightning_ae.diagnostics.watch.comparisons import REAL

_OWN = {
    "cross_entropy": "softmax",
    "binary_cross_entropy_with_logits": "sigmoid",
    "multilabel_soft_margin_loss": "sigmoid",
}
#: Activations that keep a logit from where it should be able to go.
_BOUNDED = {"softmax", "sigmoid", "hardsigmoid", "tanh", "softsign", "hardtanh", "relu", "relu6"}


@cause(Stage.CERTAIN, "Stack Overflow 33969059 and 45337371, in DeepFD's benchmark", heals="never")
def constant_softmax(e: Evidence) -> Iterator[Look]:
    """A softmax normalises a single number, which is 1 for ever."""
    for name, pair in e.pairs.items():
        if pair.width == 1:
            yield Look(
                "error",
                "output",
                "softmax",
                1.0,
                f"The prediction of {name} is a softmax over one number, which is 1 whatever the input; it passes no "
                "gradient.",
                "For two classes in one number use a sigmoid (no activation at all before "
                "binary_cross_entropy_with_logits), for real numbers no activation.",
            )


@cause(Stage.PAIRING, "documentation of torch.nn.CrossEntropyLoss, NLLLoss and BCEWithLogitsLoss", heals="never")
def double_activation(e: Evidence) -> Iterator[Look]:
    """An activation before a loss that applies its own, or on the output of another with no layer in between."""
    for pair in e.pairs.values():
        before = next((step for step in pair.path if step != "dropout"), "layer")
        own = _OWN.get(pair.loss)
        if own is not None and before in _BOUNDED and pair.width != 1:
            yield Look(
                "error" if not e.relative < 0.15 else "warning",
                "loss",
                "twice",
                2.0,
                f"The prediction passes {before} before {pair.loss}, which applies {own} itself.",
                (
                    "Negative logits are cut off, and with them their gradient. "
                    if "relu" in before
                    else "That squeezes its output into a part of its range: probabilities can no longer get near 0 "
                    "and 1, and gradients are small. "
                )
                + f"Remove the {before}: give {pair.loss} what the last layer puts out.",
            )
        if pair.loss == "nll_loss" and pair.path and (before == "layer" or before in RANGES) and before[:3] != "log":
            what = "a softmax" if before == "softmax" else "what no log_softmax has passed"
            yield Look(
                "error",
                "loss",
                "twice",
                1.0,
                f"nll_loss is given {what}; it expects logarithms of probabilities.",
                "Use cross_entropy on what the last layer puts out, or log_softmax before nll_loss.",
            )
    for site, earlier in e.output.twice.items():
        if site == "the loss's sigmoid" or any(site == s for s in e.pairs):
            continue
        gates = e.is_gate(site)
        if not gates:
            yield Look(
                "error" if not e.relative < 0.15 else "warning",
                site,
                "twice",
                2.0,
                f"It is applied to the output of {earlier}, with no layer in between.",
                f"That squeezes its output into a part of its range. Remove {earlier}"
                + ("; the loss owns the output activation, so the decoder ends in none." if e.ours else "."),
            )


@cause(Stage.PAIRING, "Stack Overflow 38648195, in DeepFD's benchmark", heals="never")
def softmax_multilabel(e: Evidence) -> Iterator[Look]:
    """Targets are 0 or 1 and several in a row may be 1 (or none), and the prediction is a softmax."""
    for name, pair in e.pairs.items():
        figures = e.figures(name)
        softmax = ("softmax" in pair.path[:3] and pair.loss != "target × log") or pair.loss == "cross_entropy"
        if not softmax or pair.classes or figures.get("binary", 0.0) < 0.999 or figures.get("columns", 1) < 2:
            continue
        several = figures["several_in_a_row"]
        if several > 0.01 or 1 - figures["one_in_a_row"] > 0.05:
            yield Look(
                "error",
                "output",
                "labels",
                several,
                f"In {several:.0%} of the examples several labels hold together, and the prediction is a softmax, "
                "whose numbers add up to 1.",
                "Labels that do not exclude each other each need a sigmoid: no softmax, and "
                "binary_cross_entropy_with_logits.",
            )


@cause(Stage.PAIRING, "Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.3", heals="never")
def class_activation(e: Evidence) -> Iterator[Look]:
    """Classes, as rows with one 1, are predicted through an activation that is no softmax, or by squared error."""
    for name, pair in e.pairs.items():
        figures = e.figures(name)
        one_hot = figures.get("binary", 0.0) > 0.999 and figures.get("one_in_a_row", 0.0) > 0.999
        if pair.classes or not one_hot or e.reconstructs or figures.get("columns", 1) < 2:
            continue
        last = next((step for step in pair.path if step in RANGES), "identity")
        columns = figures["columns"]
        if pair.loss == "target × log" and last not in ("softmax", "log_softmax"):
            wrong = f"The probabilities of {columns:.0f} classes come from {last}, not from a softmax."
        elif pair.loss in REAL and last != "softmax" and (columns > 2 or last == "relu"):
            wrong = f"{columns:.0f} classes are learnt by {pair.loss} through {last}."
        elif pair.loss in REAL and e.unlearnt(0.5):
            wrong = (
                f"{columns:.0f} classes are learnt by {pair.loss}: it is flat where a prediction is confidently wrong."
            )
        else:
            continue
        yield Look(
            e.grade(fine=0.1, costs=0.3),
            "loss",
            "classes",
            columns,
            wrong,
            "Classes that exclude each other are learnt by cross_entropy on what the last layer puts out, with no "
            "activation: its gradient is p − y, however wrong the prediction.",
        )


@cause(Stage.PAIRING, "Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.2")
def label_loss(e: Evidence) -> Iterator[Look]:
    """Labels of 0 and 1 are learnt by squared or absolute error, and half of what a constant leaves is left."""
    for name, pair in e.pairs.items():
        figures = e.figures(name)
        single = figures.get("columns", 1) == 1 or figures.get("one_in_a_row", 0.0) < 0.9
        if pair.loss not in REAL or figures.get("binary", 0.0) < 0.9999 or e.reconstructs or not single:
            continue
        if figures.get("relative", 0.0) > 0.5 and figures.get("x_variance", 0.0) > 0 and "softmax" not in pair.path[:3]:
            yield Look(
                "error" if "l1" in pair.loss or "absolute" in pair.loss else "warning",
                "loss",
                "labels",
                figures["relative"],
                f"Labels of 0 and 1 are learnt by {pair.loss}, and {figures['relative']:.0%} of what a constant leaves "
                "is left.",
                "Its gradient vanishes where the prediction is confidently wrong: use "
                "binary_cross_entropy_with_logits with no activation, and Adam.",
            )


@cause(Stage.PAIRING, "Goodfellow, Bengio & Courville 2016, Deep Learning, section 6.2.2.2")
def squared_error_sigmoid(e: Evidence) -> Iterator[Look]:
    """More than 5 % of the outputs that are wrong get less than 1 % of their error as gradient."""
    starved, ratio = e.saturation.starved_fraction(), e.saturation.output_ratio()
    if starved != starved:
        starved = e.out.get("starved", 0.0)
    told = f" (on average {ratio:.2g} of it)" if ratio == ratio else ""
    if starved > 0.05 and e.squashes and e.relative > 0.02:
        tanh = e.output.activation == "tanh"
        if tanh and e.out.get("outside", 0.0) > 0.001:
            return  # what the output cannot reach drives it there
        instead = "BernoulliNLL()" if e.ours else "binary_cross_entropy_with_logits and no sigmoid"
        advice = (
            "Let the last layer's output be the prediction, with no tanh, or start that layer with smaller weights."
            if tanh
            else f"Use {instead}, whose gradient at the pre-activation is x̂ − x."
        )
        yield Look(
            "error" if starved > 0.2 and not e.relative < 0.3 else "warning",
            "output",
            "starved_fraction",
            starved,
            f"{starved:.0%} of the outputs that are wrong get less than 1 % of their error as gradient{told}.",
            f"Squared error through a {e.output.activation} is flat where it is confidently wrong. " + advice,
        )


@cause(Stage.PAIRING, "Srivastava et al. 2014, Dropout: for hidden and input units", heals="never")
def dropout_on_output(e: Evidence) -> Iterator[Look]:
    """A dropout stands between the last layer and the loss."""
    for name, pair in e.pairs.items():
        if pair.dropped > 0:
            yield Look(
                "error" if pair.dropped >= 0.3 and not e.relative < 0.15 else "warning",
                "output",
                "dropout",
                pair.dropped,
                f"{pair.dropped:.0%} of the prediction are dropped before {name} sees them.",
                "A prediction that is 0 at random cannot fit: move the dropout before the last layer, or remove it.",
            )
