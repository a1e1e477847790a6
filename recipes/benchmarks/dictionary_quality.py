"""How good a dictionary the defaults give, at a short and at a long budget, beside peers: same batches, same steps.

Data are activations of a small classifier (64 channels of a layer, one row for each place of scikit-learn's digits;
with ``--root`` 128 channels on MNIST), a known dictionary (512 atoms in 128 dimensions, 8 on, the i-th with odds 1/i),
or any tensor ``(N, d)`` in a file. Each is learned as its users would, with nothing set but sizes and k:

* `ours`: DictionaryAutoencoder with TopKCode; `ours, lr 1e-3` with a rate that is set, of all weights;
* `ours, BatchTopK` and `ours, JumpReLU`, with the same L0 as target;
* dictionary_learning: its TopKTrainer, whose warm-up of 1,000 steps is cut to a tenth of the run;
* sparsify: its SparseCoder and the chores of its Trainer, schedule-free signum at its own rate.

Peers that are not installed, or cannot be imported, are named with the reason. Steps are interleaved in one process,
and CPU seconds are of one thread. `fvu` (variance unexplained), `l0` at inference and `cos` (largest cosine that an
atom of the known dictionary has with a learned one, on average) are on held-out rows; `dead` is the share of latents
that were off in the last 50,000 training rows. Means over seeds, with their standard deviations.

    python recipes/benchmarks/dictionary_quality.py                          # a minute or two; --steps 5000 longer
    python recipes/benchmarks/dictionary_quality.py --data mnist --root data --steps 300 5000

Defaults were chosen on training seeds 100 to 102 (the known dictionary is the same one there), and each peer has one
setting, its own: this compares defaults, not methods. On MNIST after 3,000 steps (seed 0): unexplained .0231, with
BatchTopK .0106, dictionary_learning .0317, sparsify .0745; L0 at inference 16.02 of BatchTopK and 16.03 of JumpReLU for
16; dead .2, 2.4 and 58 % of ours, 5.5 and 62 % of theirs. JumpReLU has no auxiliary-k, and on sparse channels half of
its latents die early: `resample_every` starts them anew. SAELens is not among the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_ae as ae


class Rows(NamedTuple):
    """Training rows, held-out rows, and the atoms if they are known."""

    train: Tensor
    held: Tensor
    atoms: Tensor | None


class Sizes(NamedTuple):
    """Sizes of a dictionary and of its training."""

    latents: int
    k: int
    steps: int


class Learner(NamedTuple):
    """One training step, and what the dictionary makes of rows: latents ``(B, n)`` and reconstruction."""

    step: Callable[[Tensor], Tensor]
    use: Callable[[Tensor], tuple[Tensor, Tensor]]
    atoms: Callable[[], Tensor]


def activations(root: Path | None, seed: int) -> Tensor:
    """What the last convolution of a small classifier puts out: a row of channels for each place."""
    torch.manual_seed(seed)
    if root is None:
        data = ae.DigitsDataModule(batch_size=10_000, val_fraction=0.0, seed=seed)
        ((x, y),) = data.train_dataloader()
        width, epochs, images, batch = 64, 20, len(x), 64
    else:
        splits = ae.VisionDataModule("MNIST", root=root).splits()
        x, y = (torch.as_tensor(part) for part in splits["train"][:2])
        x, y = x.float() / (255 if x.dtype == torch.uint8 else 1), y.long()
        width, epochs, images, batch = 128, 1, 4100, 128
    pooled = [nn.MaxPool2d(2)] if root is not None else []
    body = nn.Sequential(
        nn.Conv2d(1, width // 4, 3, padding=1), nn.ReLU(), *pooled,
        nn.Conv2d(width // 4, width // 2, 3, padding=1), nn.ReLU(), *pooled,
        nn.Conv2d(width // 2, width, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    head(body(x[:1]))
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            cross_entropy(head(body(x[rows])), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        out = torch.cat([body(part) for part in x[:images].split(100)])
    return out.movedim(1, -1).flatten(0, -2)


def load(name: str, root: Path | None) -> Rows:
    """The rows of that name, in a random order that does not depend on a seed."""
    atoms = None
    if name == "known":
        data = ae.sparse_dictionary(120_000, 128, 512, 8, decay=1.0, seed=7)
        x, atoms = data.x, data.atoms
    elif name in ("digits", "mnist"):
        x = activations(root if name == "mnist" else None, seed=0)
    else:
        x = torch.load(name, weights_only=True).float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    held = min(20_000, len(x) // 8)
    return Rows(x[:-held], x[-held:], atoms)


def ours(code: Callable[[Sizes], ae.Code], lr: float | None = None) -> Callable[[Rows, Sizes], Learner]:
    """A DictionaryAutoencoder in a loop as the Trainer's."""

    def make(rows: Rows, sizes: Sizes) -> Learner:
        model = ae.DictionaryAutoencoder(rows.train.shape[1], sizes.latents, code(sizes), lr=lr)
        model.observe(rows.train[:16_384])
        optimizer = model.configure_optimizers()
        steps = iter(range(1, 10**9))

        def step(x: Tensor) -> Tensor:
            model.train()
            output = model(x)
            model.objective(model.terms(x, output)).mean().backward()
            model.project_gradient()
            optimizer.step()
            optimizer.zero_grad()
            model.normalize_atoms()
            model.count(output.z.detach())
            if next(steps) % 50 == 0:
                model.find_dead()
            return model.since_fired == 0

        def use(x: Tensor) -> tuple[Tensor, Tensor]:
            model.eval()
            z = model.encode(x)
            return z.to_dense(), model.decode(z)

        return Learner(step, use, lambda: model.decoder.atoms.detach())

    return make


def dictionary_learning(rows: Rows, sizes: Sizes) -> Learner:
    """The TopK trainer of dictionary_learning."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    trainer = TopKTrainer(
        steps=sizes.steps, activation_dim=rows.train.shape[1], dict_size=sizes.latents, k=sizes.k, layer=0,
        lm_name="none", dict_class=AutoEncoderTopK, device="cpu", warmup_steps=min(1000, sizes.steps // 10),
    )  # fmt: skip
    # its trainer takes data of mean squared norm 1
    scale = rows.train.square().sum(1).mean().sqrt()
    numbers = iter(range(10**9))

    def step(x: Tensor) -> Tensor:
        trainer.update(next(numbers), x / scale)
        return trainer.num_tokens_since_fired == 0

    def use(x: Tensor) -> tuple[Tensor, Tensor]:
        z = trainer.ae.encode(x / scale)
        return z, trainer.ae.decode(z) * scale

    return Learner(step, use, lambda: trainer.ae.decoder.weight.detach().t())


def sparsify(rows: Rows, sizes: Sizes) -> Learner:
    """A SparseCoder of sparsify with signum, and what its trainer does in a step."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    coder = SparseCoder(rows.train.shape[1], SparseCoderConfig(num_latents=sizes.latents, k=sizes.k))
    optimizer = ScheduleFreeWrapper(
        SignSGD(coder.parameters(), lr=5e-3 / (sizes.latents / 2**14) ** 0.5), momentum=0.95
    )
    optimizer.train()
    first = [True]

    def step(x: Tensor) -> Tensor:
        if first:
            coder.b_dec.data = x.mean(0)
            first.clear()
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return torch.zeros(sizes.latents, dtype=torch.bool).index_fill_(0, out.latent_indices.flatten(), True)

    def use(x: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.eval()
        out = coder(x)
        z = torch.zeros(len(x), sizes.latents).scatter_(1, out.latent_indices, out.latent_acts)
        optimizer.train()
        return z, out.sae_out

    return Learner(step, use, lambda: coder.W_dec.detach() / coder.W_dec.detach().norm(dim=1, keepdim=True))


LEARNERS: dict[str, Callable[[Rows, Sizes], Learner]] = {
    "ours": ours(lambda s: ae.TopKCode(s.k)),
    "ours, lr 1e-3": ours(lambda s: ae.TopKCode(s.k), 1e-3),
    "ours, BatchTopK": ours(lambda s: ae.BatchTopKCode(s.k)),
    "ours, JumpReLU": ours(lambda s: ae.JumpReLUCode(s.latents, 0.1, target_l0=s.k)),
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}


def batches(x: Tensor, steps: int, size: int, seed: int) -> Iterator[Tensor]:
    """So many batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            if steps == 0:
                return
            if len(rows) == size:
                steps -= 1
                yield x[rows]


@torch.no_grad()
def measure(learner: Learner, rows: Rows) -> dict[str, float]:
    """Numbers on held-out rows."""
    error = active = 0.0
    for x in rows.held.split(2048):
        z, x_hat = learner.use(x)
        error += float((x - x_hat).square().sum())
        active += float((z != 0).sum())
    cos = float("nan") if rows.atoms is None else float((rows.atoms @ learner.atoms().t()).amax(1).mean())
    whole = float((rows.held - rows.held.mean(0)).square().sum())
    return {"fvu": error / whole, "l0": active / len(rows.held), "cos": cos}


def compare(rows: Rows, sizes: Sizes, batch: int, seed: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Train all on the same batches, a step of each in turn."""
    learners: dict[str, Learner] = {}
    for name in names:
        torch.manual_seed(seed)
        try:
            learners[name] = LEARNERS[name](rows, sizes)
        except ImportError as error:
            print(f"{name}: left out ({error})")
    seconds = dict.fromkeys(learners, 0.0)
    since = {name: torch.zeros(sizes.latents) for name in learners}
    for x in batches(rows.train, sizes.steps, batch, seed):
        for name, learner in learners.items():
            start = time.process_time()
            fired = learner.step(x)
            seconds[name] += time.process_time() - start
            since[name].add_(len(x)).masked_fill_(fired, 0)
    return {
        name: {
            **measure(learner, rows),
            "dead": float((since[name] >= 50_000).float().mean()),
            "cpu": seconds[name],
        }
        for name, learner in learners.items()
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print a table for each data set and budget, and return its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=["digits", "known"], help="digits, known, mnist, or files")
    parser.add_argument("--root", type=Path, default=None, help="of MNIST")
    parser.add_argument("--steps", nargs="*", type=int, default=[300])
    parser.add_argument("--latents", type=int, default=None, help="1024; 512 for the known dictionary")
    parser.add_argument("--k", type=int, default=None, help="16; 8 for the known dictionary")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(LEARNERS), choices=list(LEARNERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="a file for the numbers, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    for data in args.data:
        rows = load(data, args.root)
        known = rows.atoms is not None
        for steps in args.steps:
            sizes = Sizes(args.latents or (512 if known else 1024), args.k or (8 if known else 16), steps)
            runs = [compare(rows, sizes, args.batch, seed, args.only) for seed in args.seeds]
            print(f"{data}: {tuple(rows.train.shape)} rows, {sizes.latents} latents, k {sizes.k}, {steps} steps")
            print(f"  {'':22s}{'fvu':>15s}{'l0':>13s}{'cos':>15s}{'dead':>16s}{'cpu s':>8s}")
            for name in runs[0]:
                table = {key: torch.tensor([run[name][key] for run in runs]) for key in runs[0][name]}
                mean = {key: float(value.mean()) for key, value in table.items()}
                spread = {key: float(value.std(correction=0)) for key, value in table.items()}
                print(
                    f"  {name:22s}{mean['fvu']:8.4f}±{spread['fvu']:.4f}{mean['l0']:8.2f}±{spread['l0']:.2f}"
                    f"{mean['cos']:9.3f}±{spread['cos']:.3f}{mean['dead']:9.2%}±{spread['dead']:.2%}{mean['cpu']:8.1f}",
                    flush=True,
                )
                found[f"{data}, {steps}, {name}"] = {"mean": mean, "spread": spread}
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
