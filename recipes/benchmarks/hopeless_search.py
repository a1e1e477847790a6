"""What `StopHopeless` saves in a random search, and what it costs.

Forty configurations of an autoencoder of scikit-learn's digits are drawn at random, as widely as people draw who do not
know yet what works: learning rate log-uniform from 1e-5 to 10, SGD with momentum, Adam, AdamW or RMSprop, activation,
depth, width, width of the code, factor on the initial weights, output and loss, weight decay, L1 on the code, scale of
the data. Each is trained for as many steps twice, with the same seed: plain, and with `StopHopeless` alone. Which comes
first alternates, so that both share what else the machine does. The held-out error is the share of the variance of 400
images that is left at the end (1 for a constant).

* `search`: seconds of the CPU, and optimizer steps, of all runs;
* `to the best`: until the run that is the best of the plain search has ended, in the mean over 2,000 random orders of
  the same runs, and in the order in which they were drawn, which depends on where the best happens to lie;
* `stopped`, `errors of the stopped`: how many were ended, and what error the same runs reach if they are not;
* `stopped of the best ten`: of the plain search's;
* `cost`: seconds of the runs that were not stopped over those of the same runs without the callback, less 1.

    python recipes/benchmarks/hopeless_search.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import random
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: How the output is squashed, and what scores it: three that are right for digits, two that are not.
PAIRINGS = {
    "linear, squared error": lambda: ([], ae.SquaredError()),
    "sigmoid, squared error": lambda: ([], ae.SquaredError("sigmoid")),
    "sigmoid, cross-entropy": lambda: ([], ae.BernoulliNLL()),
    "ReLU, squared error": lambda: ([nn.ReLU()], ae.SquaredError()),
    "two sigmoids, cross-entropy": lambda: ([nn.Sigmoid()], ae.BernoulliNLL()),
}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def draw_configuration(dice: random.Random) -> dict[str, Any]:
    """One of the search space."""
    (pairing,) = dice.choices(list(PAIRINGS), [4, 4, 4, 1, 1])
    return {
        "lr": 10 ** dice.uniform(-5, 1),
        "optimizer": dice.choice(["sgd", "adam", "adamw", "rmsprop"]),
        "activation": dice.choice(list(ACTIVATIONS)),
        "depth": dice.choice([1, 2, 3]),
        "width": dice.choice([32, 64, 128]),
        "code": dice.choice([4, 8, 16, 32]),
        "gain": dice.choice([1.0, 1.0, 10 ** dice.uniform(-1, 1)]),
        "pairing": pairing,
        "weight_decay": dice.choice([0.0, 10 ** dice.uniform(-6, -1)]),
        "l1": dice.choice([0.0, 0.0, 10 ** dice.uniform(-4, 1)]),
        # where the output has no bounds people try data as they come
        "scale": dice.choice([1.0, 1.0, 16.0]) if pairing == "linear, squared error" else 1.0,
        "batch": dice.choice([16, 32, 64]),
    }


class Searched(ae.Autoencoder):
    """An autoencoder as a configuration has it."""

    def __init__(self, c: dict[str, Any]) -> None:
        last, loss = PAIRINGS[c["pairing"]]()
        sizes = [64, *[c["width"]] * c["depth"], c["code"]]
        encoder = nn.Sequential(nn.Flatten(), *dense(sizes, c["activation"]))
        decoder = nn.Sequential(*dense(sizes[::-1], c["activation"]), *last, nn.Unflatten(1, (1, 8, 8)))
        super().__init__(encoder, decoder, loss, code=ae.L1Code(c["l1"]) if c["l1"] else ae.Identity())
        for p in self.parameters():
            if p.ndim > 1:
                p.data *= c["gain"]
        self.c = c

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The configuration's."""
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
        options = {"weight_decay": self.c["weight_decay"]}
        if self.c["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), self.c["lr"], momentum=0.9, **options)
        return kinds[self.c["optimizer"]](self.parameters(), self.c["lr"], **options)


def dense(sizes: list[int], activation: str) -> list[nn.Module]:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [ACTIVATIONS[activation](), nn.Linear(before, after)] if layers else [nn.Linear(before, after)]
    return layers


@torch.no_grad()
def held_out_error(model: ae.Autoencoder, x: Tensor) -> float:
    """Share of the variance unexplained; 100 at most, also where it is not finite."""
    x_hat = model.eval().reconstruct(x)
    error = float((x_hat - x).square().sum() / (x - x.mean(0)).square().sum())
    return min(error, 100.0) if math.isfinite(error) else 100.0


def train(c: dict[str, Any], seed: int, stop: ae.StopHopeless | None, args: argparse.Namespace) -> dict[str, Any]:
    """One run; its error, steps and seconds of the CPU."""
    L.seed_everything(seed, verbose=False)
    pixels = torch.as_tensor(load_digits().data).float().view(-1, 1, 8, 8) / 16 * c["scale"]
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    model = Searched(c)
    start = time.process_time()
    trainer = L.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if stop is None else [stop],
    )
    trainer.fit(model, DataLoader(TensorDataset(pixels[400:]), c["batch"], shuffle=True))
    return {
        "seconds": time.process_time() - start,
        "steps": trainer.global_step,
        "error": held_out_error(model, pixels[:400]),
    }


def both(number: int, c: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The two runs of a configuration."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|once more|no `val_dataloader`).*")
    stop = ae.StopHopeless(patience=args.patience)
    runs = {}
    for way in ("plain", "stopping") if number % 2 else ("stopping", "plain"):
        runs[way] = train(c, args.seed + number, stop if way == "stopping" else None, args)
    return {"configuration": c, **runs, "cause": stop.finding.cause if stop.finding else None}


def search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, by configuration."""
    dice, rows = random.Random(args.seed), []
    drawn = [draw_configuration(dice) for _ in range(args.configurations)]
    todo = (range(args.configurations), drawn, [args] * args.configurations)
    with contextlib.ExitStack() as stack:
        results = map(both, *todo)
        if args.jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            results = stack.enter_context(ProcessPoolExecutor(args.jobs, spawn)).map(both, *todo)
        for number, row in enumerate(results):
            c, rows = row["configuration"], [*rows, row]
            print(
                f"{number:3} {c['optimizer']:8} lr {c['lr']:<8.2g} {c['pairing']:28} {c['activation']:8} error "
                f"{row['plain']['error']:<8.3g} steps {row['stopping']['steps']:5} {row['cause'] or ''}",
                flush=True,
            )
    return rows


# -- figures --------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What was saved, and whether anything was lost."""
    errors = [row["plain"]["error"] for row in rows]
    ranked = sorted(range(len(rows)), key=lambda i: errors[i])
    stopped = [row["cause"] is not None for row in rows]
    whole = [row for row, ended in zip(rows, stopped, strict=True) if not ended]
    dice, orders = random.Random(0), []
    for _ in range(2000):
        orders.append(dice.sample(range(len(rows)), len(rows)))
    found: dict[str, Any] = {}
    for unit in ("seconds", "steps"):
        spent = {way: [row[way][unit] for row in rows] for way in ("plain", "stopping")}
        drawn = {way: to_the_best(spent[way], list(range(len(rows))), ranked[0]) for way in spent}
        mean = {way: statistics.mean(to_the_best(spent[way], order, ranked[0]) for order in orders) for way in spent}
        for name, of in (
            ("search", {way: sum(spent[way]) for way in spent}),
            ("to the best, as drawn", drawn),
            ("to the best", mean),
        ):
            found[f"{name}, {unit}"] = {**of, "saved": 1 - of["stopping"] / of["plain"]}
    return found | {
        "stopped": sum(stopped),
        "stopped of the best ten": sum(stopped[i] for i in ranked[:10]),
        "best rank of a stopped one": min((r for r, i in enumerate(ranked, 1) if stopped[i]), default=None),
        "errors of the stopped": sorted(e for e, ended in zip(errors, stopped, strict=True) if ended),
        "not stopped, and no better than a constant": sum(
            e > 0.9 and not ended for e, ended in zip(errors, stopped, strict=True)
        ),
        "share of the steps until stopped": statistics.median(
            [row["stopping"]["steps"] / args.steps for row, ended in zip(rows, stopped, strict=True) if ended] or [1.0]
        ),
        "best error": {way: min(row[way]["error"] for row in rows) for way in ("plain", "stopping")},
        "other weights without a stop": sum(row["plain"]["error"] != row["stopping"]["error"] for row in whole),
        "cost": sum(r["stopping"]["seconds"] for r in whole) / max(1e-9, sum(r["plain"]["seconds"] for r in whole)) - 1,
    }


def to_the_best(spent: list[float], order: list[int], best: int) -> float:
    """What is spent until the best run has ended."""
    return sum(spent[i] for i in order[: order.index(best) + 1])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Best error so far over seconds, both ways, and where runs were ended."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way, label in (("plain", "plain"), ("stopping", "with StopHopeless")):
        seconds, best, clock, least = [0.0], [1.0], 0.0, 1.0
        for row in rows:
            clock, least = clock + row[way]["seconds"], min(least, row[way]["error"])
            seconds.append(clock)
            best.append(least)
        left.step(seconds, best, where="post", label=label)
    left.set(xlabel="seconds of the CPU", ylabel="best held-out error so far", yscale="log")
    left.legend()
    for ended, marker, label in ((False, "o", "not ended"), (True, "x", "ended")):
        some = [row for row in rows if (row["cause"] is not None) is ended]
        right.scatter(
            [row["stopping"]["steps"] for row in some],
            [row["plain"]["error"] for row in some],
            marker=marker,
            label=label,
        )
    right.set(xlabel="steps with StopHopeless", ylabel="held-out error without", yscale="log")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print, draw, write; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("outputs/hopeless_search"), help="output folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = search(args)
    found = summarise(rows, args)
    for name, value in found.items():
        shown = {k: round(v, 3) for k, v in value.items()} if isinstance(value, dict) else value
        print(f"{name:46}{shown}")
    draw(rows, args.out / "hopeless_search.png")
    text = json.dumps(found | {"runs": rows}, indent=1)
    (args.out / "numbers.json").write_text(text)
    return json.loads(text)


if __name__ == "__main__":
    main()
