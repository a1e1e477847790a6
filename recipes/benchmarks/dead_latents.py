"""How many latents of a dictionary are dead after training, and what each remedy does.

Data from a known dictionary: 64 dimensions, 2,048 atoms, the n-th with odds 1/n, 8 on in each example; 100,000 of them.
A TopK dictionary of 1,024 latents with k 8 is trained for 6 epochs in batches of 512 with lr 3e-3, five ways:

* `none`: the encoder starts from random numbers of its own; no auxiliary-k, no resampling;
* `transpose`: the encoder starts as the decoder's transpose;
* `auxiliary`: random encoder, and auxiliary-k;
* `resampling`: random encoder, and resampling twice an epoch, but for the last;
* `all`: the transpose, auxiliary-k and resampling.

A latent is dead that is off in 20,000 fresh examples. `fvu` is on these too, `recovered` the share of the 512 most
frequent atoms that a latent has found, |cos| > 0.9.

    python recipes/benchmarks/dead_latents.py
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

import lightning_ae as ae

WAYS = ("none", "transpose", "auxiliary", "resampling", "all")


def train(way: str, data: ae.data.SparseDictionary, args: argparse.Namespace) -> ae.DictionaryAutoencoder:
    """A dictionary, trained in one of the ways."""
    L.seed_everything(args.seed, verbose=False)
    steps = args.examples // args.batch
    model = ae.DictionaryAutoencoder(
        args.features,
        args.latents,
        ae.TopKCode(args.k),
        penalties={"auxiliary": ae.AuxiliaryK()} if way in ("auxiliary", "all") else {},
        dead_after=args.examples // 4,
        resample_every=max(1, steps // 2) if way in ("resampling", "all") else 0,
        lr=args.lr,
    )
    if way in ("none", "auxiliary", "resampling"):
        torch.nn.init.kaiming_uniform_(model.encoder.weight, a=5**0.5)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=Stop((args.epochs - 1) * steps),
    )
    trainer.fit(model, ae.TensorDataModule(data.x[: args.examples], batch_size=args.batch, val_fraction=0.0))
    return model.eval()


class Stop(L.Callback):
    """No resampling from a step on, so that what starts anew has time to learn."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        """Look at the step."""
        if trainer.global_step > self.step:
            pl_module.resample_every = 0


@torch.no_grad()
def measure(model: ae.DictionaryAutoencoder, data: ae.data.SparseDictionary, fresh: Tensor) -> dict[str, float]:
    """Share of the dead, of the variance unexplained, and of the frequent atoms recovered."""
    fired = torch.zeros(model.decoder.num_latents, dtype=torch.bool)
    metric = ae.FractionVarianceUnexplained()
    for x in fresh.split(2000):
        z = model.encode(x)
        fired |= z.fired()
        metric.update(model.decode(z), x)
    best = (data.atoms[: len(data.atoms) // 4] @ model.decoder.weight).abs().amax(1)
    return {
        "dead": float((~fired).float().mean()),
        "fvu": float(metric.compute()),
        "recovered": float((best > 0.9).float().mean()),
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and return shares by way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--atoms", type=int, default=2048)
    parser.add_argument("--active", type=int, default=8)
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--fresh", type=int, default=20_000)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a file for the numbers, as JSON")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|no `val_dataloader`).*")
    data = ae.sparse_dictionary(
        args.examples + args.fresh, args.features, args.atoms, args.active, decay=args.decay, seed=args.seed
    )
    found = {}
    print(f"{'':12s}{'dead':>8s}{'fvu':>8s}{'recovered':>11s}")
    for way in args.ways:
        found[way] = measure(train(way, data, args), data, data.x[args.examples :])
        print(f"{way:12s}" + "{dead:8.2%}{fvu:8.3f}{recovered:11.1%}".format(**found[way]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
