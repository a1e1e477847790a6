"""Causes in the latent: a posterior that says nothing, a codebook that is not used, latents that carry nothing."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_ae.diagnostics.causes.base import Evidence, Look, Stage, cause


@cause(Stage.LATENT, "Bowman et al. 2016, https://arxiv.org/abs/1511.06349; Lucas et al. 2019")
def posterior_collapse(e: Evidence) -> Iterator[Look]:
    """The posterior of a Gaussian code is the prior for every example: less than a tenth of a nat in all."""
    kl = None
    if e.latent is not None and "kl" in e.code:
        kl = e.latent.kl_per_dimension()
    elif (heard := e.output.posterior(e.output.late_results())) is not None:
        kl = heard
    if kl is None or len(kl) == 0:
        return
    total, off = float(kl.sum()), int((kl < 0.01).sum())
    if total < 0.1 or off / len(kl) > 0.5:
        yield Look(
            # dimensions that are not needed collapse in a healthy model too
            "error"
            if total < 0.1 and (e.relative > 0.15 or "kl" in e.code) and not e.relative < 0.15
            else "warning"
            if off > 0.9 * len(kl) and total < 0.5
            else "info",
            "latent",
            "collapsed",
            off / len(kl),
            f"The posterior of {off} of {len(kl)} latents is the prior (KL < 0.01 nats); an example's code carries "
            f"{total:.2g} nats in all.",
            "The KL term wins before the latent is of use: " + _how_to_weigh(e),
            ("weight of kl", -1),
            int(e.code.get("samples", e.n)),
        )


def _how_to_weigh(e: Evidence) -> str:
    columns = e.out.get("columns", 1)
    if not e.ours and e.pair is not None and e.pair.reduction == "mean" and columns > 1:
        return (
            f"the reconstruction is a mean over {columns:.0f} numbers, as if β were that many times larger. Use the "
            "sum over an example's numbers (reduction='sum', divided by the batch size), or divide the KL by "
            f"{columns:.0f}."
        )
    return "lower β, raise it slowly from 0, or grant free bits."


@cause(Stage.SCALE, "Kingma & Welling 2014: exp of a log-variance without a bound", heals="rate")
def log_variance_explodes(e: Evidence) -> Iterator[Look]:
    """The log-variance of a Gaussian code goes beyond 20, or the KL beyond 10⁴ nats for each latent."""
    _, values = e.curve("log_variance")
    if e.whole_saturation.first_update_ratio() > 0.3 and not (values and values[0] > 10):
        return  # the steps have thrown it there
    largest = e.output.largest_log_variance()
    kl = e.code.get("kl", 0.0)
    width = max(1.0, e.code.get("width", 1.0))
    if largest > 20 or kl / width > 1e4 or (kl != kl):
        yield Look(
            "error",
            "latent",
            "log_variance",
            largest,
            f"The log-variance of the posterior reaches {largest:.3g}"
            + (f", and an example's code costs {kl:.3g} nats." if kl else "."),
            "Its exponential is then beyond all bounds: start the layer that gives it at zero weights, clamp it to "
            "[-10, 10], and divide the learning rate by 10.",
            ("learning_rate", -1),
        )


@cause(Stage.LATENT, "van den Oord et al. 2017, https://arxiv.org/abs/1711.00937; Zeghidour et al. 2021 for expiry")
def codebook_collapse(e: Evidence) -> Iterator[Look]:
    """Less than half of the codes are used; an error if a handful is left and much is not reconstructed."""
    if e.latent is None or e.code.get("codebook_usage", 1.0) >= 0.5:
        return
    usage, counts = e.code["codebook_usage"], e.latent.results()["latent", "codes"]
    chosen, used = int(counts.sum()), int((counts > 0).sum())
    if chosen < 5 * len(counts):
        return  # too few to use them all
    few = e.code["perplexity"] < max(2.5, 0.05 * len(counts)) and not e.relative < 0.15
    yield Look(
        "error" if few else "warning" if not e.relative < 0.15 else "info",
        "latent",
        "codebook_usage",
        usage,
        f"{usage:.0%} of the codes are used ({used} of {len(counts)}, perplexity {e.code['perplexity']:.1f}).",
        "Start the codebook from data (k-means), expire codes that are not used, or make it smaller.",
        None,
        chosen,
    )


@cause(Stage.LATENT, "Gao et al. 2024, https://arxiv.org/abs/2406.04093, for sparse codes", follows=True)
def dead_latents(e: Evidence) -> Iterator[Look]:
    """More than a tenth of the latents of a sparse code were never on."""
    if e.latent is None or not e.code.get("samples", 0) > 1:
        return
    n, dead = int(e.code["samples"]), e.code["dead_fraction"]
    width = len(e.latent.variance())
    if e.code["l0"] < 0.5 * width and 0 < dead < 1:
        yield Look(
            # in few codes a latent that is rarely on may be off throughout
            "warning" if dead > 0.1 and n * e.code["l0"] / width >= 30 and not e.relative < 0.05 else "info",
            "latent",
            "dead_fraction",
            dead,
            f"{dead:.1%} of the {width} latents were never on in {n:,} codes (rate < {3 / n:.1g}).",
            "A smaller penalty, or for codes that select the largest auxiliary-k or resampling (with dead_after well "
            "below the examples of a run), bring them back; or make the code narrower.",
            None,
            n,
        )


@cause(Stage.LATENT, "a constant carries no information", follows=True)
def constant_latents(e: Evidence) -> Iterator[Look]:
    """Latents are the same for all examples of a batch."""
    if e.latent is None or not e.code.get("samples", 0) > 1 or e.output.batch_size == 1:
        return
    n, dead = int(e.code["samples"]), e.code["dead_fraction"]
    width, constant = len(e.latent.variance()), len(e.latent.constant_latents())
    if e.code["l0"] < 0.5 * width and 0 < dead < 1:
        constant -= round(dead * width)  # most latents of a sparse code are off most of the time
    if dead < 1 and constant > 0:
        yield Look(
            "error" if constant == width else "warning",
            "latent",
            "constant",
            constant / width,
            f"{constant} of {width} latents never vary.",
            "They carry nothing: look at dead or saturated sites in the encoder first; else make the code narrower.",
            None,
            n,
        )


@cause(Stage.LATENT, "a latent that gets no gradient is not read")
def unread_latents(e: Evidence) -> Iterator[Look]:
    """Latents vary, and the loss gives them less than a millionth of the largest gradient."""
    if e.latent is None or not e.code.get("samples", 0) > 1:
        return
    unread, width = len(e.latent.unread_latents()), len(e.latent.variance())
    blocked = len(e.output.stuck_outputs()) or not any(e.saturation.gradient_norm().values())
    if unread == width and blocked:
        return  # what stands between the code and the loss is why
    if unread:
        yield Look(
            "error" if unread >= 0.5 * width and e.unlearnt(0.3) and "kl" not in e.code else "warning",
            "latent",
            "unread",
            unread / width,
            f"{unread} of {width} latents vary, and the decoder takes nothing from them.",
            "Check that the decoder's first layer sees the whole code, or make the code narrower.",
            None,
            int(e.code["samples"]),
        )
