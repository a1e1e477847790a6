"""Causes in the wiring: what gets no gradient, what no optimizer holds, what goes past the code."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Look, Severity, Stage, cause


@cause(Stage.WIRING, "torch.optim.Optimizer.zero_grad", heals="never")
def gradients_pile_up(e: Evidence) -> Iterator[Look]:
    """Before the backward pass of a step the gradients of the step before are still there, step after step."""
    if e.training is not None and e.training.piles_up():
        yield Look(
            "error",
            "optimizer",
            "leftover",
            1.0,
            "Gradients of earlier steps are still there when a new backward pass begins.",
            "They add up over the whole run: call optimizer.zero_grad() before each backward pass (Lightning does, "
            "unless optimizer_zero_grad is overridden or optimization is manual).",
        )


@cause(Stage.WIRING, "torch.autograd: a gradient of exactly 0 moves nothing", follows=True, heals="never")
def no_gradient(e: Evidence) -> Iterator[Look]:
    """The gradient of all layers is exactly 0, or there is none, in the later part of the run."""
    norms = e.saturation.gradient_norm()
    t = e.training
    none = t is not None and bool(t.steps_of) and all(t.without_gradient.get(n, 0) >= k for n, k in t.steps_of.items())
    zero = bool(norms) and not any(norms.values())
    perfect = e.relative < 1e-3 or (e.out.get("loss", 1.0) == 0)
    if (none or zero) and not perfect and not len(e.output.stuck_outputs()):
        fallen = any(e.whole_saturation.gradient_norm().values())
        yield Look(
            "error",
            "loss",
            "gradient_norm",
            0.0,
            "No parameter gets a gradient." if none else "The gradient is exactly 0 in every layer.",
            "Nothing can move"
            + (
                ": at first there was one, so a step has thrown the network where it is flat (all ReLUs dead, outputs "
                "saturated): divide the learning rate by 10."
                if fallen and not none
                else ": look for an output that is constant (a softmax over one number, a ReLU that is never positive, "
                "argmax, rounding), a detach() or no_grad() on the way, or a loss computed from numbers."
            ),
            ("learning_rate", -1) if fallen and not none else None,
        )


@cause(Stage.WIRING, "torch.nn.Parameter.requires_grad; Lightning's configure_optimizers", heals="never")
def not_trained(e: Evidence) -> Iterator[Look]:
    """A part that works in the forward pass is frozen, detached, or in no optimizer, or never changes though it is."""
    t = e.training
    if t is None or not t.steps_of:
        return
    layers: dict[str, set[str]] = {}
    for name in t.sizes:
        layer = name.rpartition(".")[0] or "model"
        if layer in t.ran or name.rpartition(".")[0] == "" or not t.ran:
            layers.setdefault(layer, set()).add(name)
    working = {layer for layer in layers if layer not in t.resting}
    said: dict[str, list[str]] = {}
    for layer in sorted(working):
        names = layers[layer]
        if names <= t.frozen:
            said.setdefault("frozen", []).append(layer)
        elif not names & t.held:
            said.setdefault("forgotten", []).append(layer)
        elif all(t.without_gradient.get(n, 0) >= t.steps_of.get(n, 1) for n in names & t.held):
            said.setdefault("detached", []).append(layer)
        elif names <= t.unchanged and t.total_steps > 1 and t.lr == 0:
            said.setdefault("unchanged", []).append(layer)
    total = sum(t.sizes.values()) or 1
    words = {
        "frozen": ("do not ask for a gradient (requires_grad=False)", "set requires_grad_(True) before the fit"),
        "forgotten": ("are in no optimizer", "give all of self.parameters() to the optimizer in configure_optimizers"),
        "detached": (
            "are held by the optimizer and never get a gradient",
            "look for detach(), torch.no_grad(), .data or numpy() between them and the loss, or for an output that the "
            "loss does not read",
        ),
        "unchanged": ("are held by the optimizer and have not changed", "look at their learning rate"),
    }
    for why, names_of in said.items():
        share = sum(t.sizes[n] for layer in names_of for n in layers[layer]) / total
        shown = ", ".join(names_of[:3]) + (f" and {len(names_of) - 3} more" if len(names_of) > 3 else "")
        whole = len(names_of) == len(working)
        # a pretrained part is frozen on purpose
        learnt = e.relative < (0.3 if why == "frozen" else 0.02)
        yield Look(
            _how_bad(e, why, whole, learnt),
            names_of[0],
            why,
            share,
            f"The weights of {shown} ({share:.0%} of all) {words[why][0]}, though these layers work in the forward "
            "pass.",
            f"They stay as they were drawn: {words[why][1]}.",
        )


def _how_bad(e: Evidence, why: str, whole: bool, learnt: bool) -> Severity:
    if learnt:
        return "info"
    if why == "frozen" and not whole:
        return "error" if e.unlearnt(0.9) else "warning"  # it may be on purpose
    return "error" if e.unlearnt(0.25) or whole or why in ("forgotten", "detached") else "warning"


@cause(Stage.WIRING, "a product of matrices is a matrix; Stack Overflow 55328966 and 59325381 in DeepFD's benchmark")
def linear_stack(e: Evidence) -> Iterator[Look]:
    """A layer reads another's output with no activation in between, and the inner one is not narrower."""
    if not e.output.linear or (e.ours and not any(True for _ in e.dead.sites)):
        return
    names = set(e.output.linear)
    site = next(iter(names))
    inner, width, _ = e.output.linear[site]
    if not e.relative < 0.1:
        yield Look(
            "warning" if e.unlearnt(0.5) or e.relative != e.relative else "info",
            site,
            "linear",
            float(len(names)),
            f"It reads {inner} ({width} wide) with no activation in between"
            + (f", and so in {len(names) - 1} more places." if len(names) > 1 else "."),
            f"Two linear layers are one: put an activation such as ReLU or GELU after {inner}, or remove it.",
        )


def _narrowest(e: Evidence) -> tuple[str, int] | None:
    """The linear layer with the fewest outputs that another layer reads."""
    found = [(width, name) for name, width in e.output.widths.items()]
    return (min(found)[1], min(found)[0]) if found else None


@cause(Stage.WIRING, "Hinton & Salakhutdinov 2006: the error falls with the width of the code")
def narrow_code(e: Evidence) -> Iterator[Look]:
    """A reconstruction of more than 8 numbers from one or two, with a third of the variance left."""
    if not e.reconstructs or e.out.get("columns", 0) <= 8 or not e.unlearnt(0.3):
        return
    narrow = _narrowest(e)
    if narrow is not None and narrow[1] <= 2 and e.code.get("dead_fraction") != 1.0:
        yield Look(
            "error" if narrow[1] == 1 and e.unlearnt(0.5) else "warning",
            narrow[0],
            "width",
            float(narrow[1]),
            f"{e.out['columns']:.0f} numbers of the data are to be told by {narrow[1]} (the narrowest layer), and "
            f"{e.relative:.0%} of the variance is left.",
            "Make the code wider: 8 to 32 numbers for small images.",
        )


@cause(Stage.WIRING, "Srivastava et al. 2014, Dropout: a code has no units to spare")
def dropout_on_code(e: Evidence) -> Iterator[Look]:
    """A dropout of at least 30 % acts on the narrowest layer's output, the code of a reconstruction."""
    narrow = _narrowest(e)
    width = int(e.code.get("width", 0)) or (narrow[1] if narrow is not None else 0)
    if not e.reconstructs or not e.unlearnt(0.1):
        return
    for name, (rate, size) in e.output.dropouts.items():
        if rate >= 0.3 and size == width:
            yield Look(
                "warning" if rate < 0.5 else "error" if e.unlearnt(0.4) else "warning",
                name,
                "dropout",
                rate,
                f"{rate:.0%} of the code ({width} numbers) are dropped in each step.",
                "The decoder must guess what it cannot know: remove the dropout on the code, or drop inputs instead "
                "(a denoising autoencoder).",
            )


@cause(Stage.WIRING, "Goodfellow, Bengio & Courville 2016, Deep Learning, chapter 14: undercomplete autoencoders")
def skip_connection(e: Evidence) -> Iterator[Look]:
    """The input itself is added or joined to what the decoder reads or gives, so that the code need not carry it."""
    narrow = _narrowest(e)
    past = narrow is not None and narrow[1] < e.out.get("columns", 0) and e.output.goes_past()
    if e.reconstructs and e.output.skips and past:
        where = next(iter(e.output.skips))
        yield Look(
            "error" if e.code.get("unread_fraction", 0.0) > 0.5 else "warning",
            where or "output",
            "skip",
            1.0,
            "The input reaches the reconstruction past the code: it is added or joined to what is computed from it.",
            "The decoder copies it, and the code need not carry anything: let the decoder read the code alone.",
        )
