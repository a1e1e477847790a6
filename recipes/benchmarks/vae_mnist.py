"""How good a small VAE on MNIST is: bound and log-likelihood of test images, in nats, beside a published figure.

784-400-40 perceptrons, one hidden layer each way, Bernoulli likelihood, trained on all 60,000 training images. Pixels
are binarised once: a grey value is the probability of a one, drawn with a fixed seed, the same for every run. The bound
is -ELBO from one draw of the latent for each test image, as `trainer.test` logs it; the negative log-likelihood is by
importance samples from the posterior (`log_likelihood`). AdamW without weight decay, the learning rate falling to zero
along a cosine.

Beside it stands 89.78 nats, which pythae (Chadebec et al. 2022, https://arxiv.org/abs/2206.08309) reports for this
architecture after 500 epochs, with its own binarisation: a distance of tenths of a nat says nothing.

    python recipes/benchmarks/vae_mnist.py --root folder
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import lightning_ae as ae
from lightning_ae.metrics import active_units, kl_per_dimension

PUBLISHED = 89.78


class DecayedVAE(ae.VariationalAutoencoder):
    """A VAE whose learning rate falls to zero along a cosine."""

    def configure_optimizers(self) -> Any:
        """The optimizer of all variants, with the schedule."""
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def binarised(root: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    """Training and test images of zeros and ones, ``(N, 784)``: one draw, whatever the run's own seed."""
    splits = ae.VisionDataModule("MNIST", root=root, flat=True).splits()
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.bernoulli(splits[name][0].float() / 255, generator=generator) for name in ("train", "test"))
    return train[:limit], test[:limit]


@torch.no_grad()
def nll(model: ae.VariationalAutoencoder, x: Tensor, samples: int) -> float:
    """Mean negative log-likelihood of images, nats."""
    return -float(torch.cat([model.log_likelihood(rows, samples) for rows in x.split(100)]).double().mean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and measure; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder with torchvision's MNIST")
    parser.add_argument("--out", type=Path, default=Path("outputs/vae_mnist"), help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the latents")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--latents", type=int, default=40)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--samples", type=int, default=200, help="importance samples of a test image")
    parser.add_argument("--limit", type=int, default=None, help="only so many images of either set")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|torch.jit)")

    train, test = binarised(args.root, args.limit)
    L.seed_everything(args.seed, verbose=False)
    pair = ae.mlp_pair(784, args.latents, (args.hidden,), args.activation, h_dim=2 * args.latents)
    model = DecayedVAE(*pair, ae.BernoulliNLL(), lr=args.lr)
    data = ae.TensorDataModule(train, test=test, batch_size=args.batch_size, val_fraction=0, seed=args.seed)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=args.epochs, accelerator="cpu", enable_model_summary=False, **quiet)
    start = time.perf_counter()
    trainer.fit(model, data)
    train_seconds = time.perf_counter() - start
    train_bound = float(trainer.callback_metrics["train/loss_epoch"])
    tested = trainer.test(model, data, verbose=False)[0]

    model.eval()
    start = time.perf_counter()
    found = nll(model, test, args.samples)
    nll_seconds = time.perf_counter() - start
    with torch.no_grad():
        statistics = model.code.statistics(model.encoder(test))
    rates = kl_per_dimension(statistics["mean"], statistics["log_variance"])
    numbers = {
        "bound": tested["test/loss"],
        "reconstruction": tested["test/reconstruction"],
        "kl": tested["test/kl"],
        "nll": found,
        "distance_to_published": found - PUBLISHED,
        "active_units": int(active_units(statistics["mean"].var(0))),
        "latents_above_0.01_nats": int((rates > 0.01).sum()),
        "train_bound": train_bound,
        "train_seconds": train_seconds,
        "nll_seconds": nll_seconds,
        "epochs": args.epochs,
        "samples": args.samples,
        "threads": args.threads,
    }
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    print(
        f"{args.epochs} epochs in {train_seconds:.0f} s on {args.threads} threads; test: -ELBO {numbers['bound']:.2f} "
        f"({numbers['reconstruction']:.2f} + KL {numbers['kl']:.2f}), -ln p(x) {found:.2f} by {args.samples} samples "
        f"({nll_seconds:.0f} s), {found - PUBLISHED:+.2f} to the published {PUBLISHED}; "
        f"{numbers['active_units']} active units of {args.latents}"
    )
    return numbers


if __name__ == "__main__":
    main()
