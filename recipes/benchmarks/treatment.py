"""How often `ae.treat` cures the fault that was planted, and whether it ever does harm.

The faulty programs of `faults.py` are treated with as many steps and a handful of trials. Beside each stands its
healthy twin: the same host, seed and steps without the fault (the fewest steps where the fault is to stop earlier). By
kind of fault, medians over the runs:

* `before`, `after`, `healthy`: error on validation data, by the benchmark's own measure and not by treat's: share of
  wrong answers, or of the variance unexplained, at most 10;
* `cured`: share of the runs whose error after treatment is at most 1.1 times that of the healthy twin, plus 0.01;
* `needed`: runs that do not meet this without treatment;
* `worse`: runs whose error after treatment is more than 2 % (and 0.002) above that before;
* `reach`: runs that a remedy can reach. It cannot where each remedy of each right diagnosis is to be made by hand, or
  was refused by the model, or where what is missing is not in the data. Why is listed below the table. A run whose
  fault is not recognised counts as reachable, and most likely as not cured.

A remedy that trains longer makes more steps than the twin made; the share of cures without such runs is given, too.
Healthy hosts are treated as well: they should come out as they went in, mostly without a trial.

    python recipes/benchmarks/treatment.py --half fit
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))
from faults import arguments, cases, half_of, mean, number
from faults_hosts import SHORT, split
from faults_run import build, fit, held_out_error
from faults_table import Case

import lightning_ae as ae
from lightning_ae.diagnostics.remedies import ByHand
from lightning_ae.diagnostics.remedies.prescribe import BY_HAND
from lightning_ae.diagnostics.treat import treat

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TINY_KINDS = ("healthy", "(B, 1) against (B,)", "softmax over one unit", "dead ReLUs")
TINY_HOSTS = ("mlp binary", "mlp regression")
#: Kinds whose diagnosis has a remedy that can be applied, though none can bring back what is missing.
LOST = {
    "twenty examples": "1080 of the examples are not there",
    "rounded outputs": "the rounding is a module of somebody's that is no activation",
    "divergence with the wrong sign": "the sign is written in training_step",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """One thread, and no word from Lightning."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def twin_error(host: str, steps: int, seed: int) -> float:
    """Error of a host without a fault."""
    k = Case(None, host, steps, seed).knobs
    L.seed_everything(seed, verbose=False)
    model, (train, val) = build(k), split(k)
    fit(model, train, val, k)
    return held_out_error(model, val, k)


class Reports(L.Callback):
    """Keeps the reports of the fits that treat makes."""

    def __init__(self) -> None:
        self.found: list[ae.DiagnosticsReport] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Reports:
        return self  # each fit is given a copy

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """One more."""
        self.found += [c for c in trainer.callbacks if isinstance(c, ae.DiagnosticsReport)]


def run(case: Case, trials: int) -> dict[str, Any]:
    """A faulty program before and after treatment, and its healthy twin."""
    k, seed, fault = case.knobs, case.seed, case.fault
    expected = [] if fault is None else fault.causes.split()
    models, reports, raised, treatment = [], Reports(), "", None

    def make_model() -> L.LightningModule:
        models.append(build(k))
        return models[-1]

    with quiet():
        train, val = split(k)
        loaders = DataLoader(train, k.batch, shuffle=True), DataLoader(val, 1000)
        start = time.perf_counter()
        try:
            how = {"trials": trials, "steps": k.steps, "seed": seed, "trainer_options": {"callbacks": [reports]}}
            treatment = treat(make_model, loaders, latent=k.told, **how)
        except Exception as problem:  # a refusal is a result, too
            raised = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        seconds = time.perf_counter() - start
        before = held_out_error(models[0], val, k)
        after = before if treatment is None else held_out_error(treatment.model, val, k)
        healthy = before if fault is None else twin_error(case.host, max(SHORT, k.steps), seed)
    findings = reports.found[0].findings
    told = [] if treatment is None else treatment.trials
    kept = [] if treatment is None else treatment.remedies
    right = [f for f in findings if f.cause in expected and f.severity != "info"]
    bound = 1.1 * healthy + 0.01
    return {
        "kind": case.kind,
        "host": case.host,
        "half": half_of(case.kind, case.host),
        "steps": k.steps,
        "seed": seed,
        "before": before,
        "after": after,
        "healthy": healthy,
        "cured": after <= bound,
        "needed": before > bound,
        "worse": after > 1.02 * before + 0.002,
        "out of reach": out_of_reach(case.kind, expected, right, told),
        "recognised": bool(right),
        "kept": [repr(remedy) for remedy in kept],
        "longer": "TrainLonger" in repr(kept),
        "trials": sum(not math.isnan(trial.error) for trial in told) - bool(told),
        "told": [f"{'kept' if t.kept else '-'} {t.error:.3g} {t.what} [{t.finding and t.finding.cause}]" for t in told],
        "left": [f"{f.severity} {f.cause}" for f in treatment.report.findings] if treatment is not None else [],
        "raised": raised,
        "seconds": seconds,
    }


def out_of_reach(kind: str, expected: list[str], right: list[Any], told: list[Any]) -> str:
    """Why no remedy can reach the fault; empty if one can."""
    if kind in LOST:
        return LOST[kind]
    if not right:  # the diagnosis missed it
        by_hand = [BY_HAND[cause] for cause in expected if cause in BY_HAND]
        return by_hand[0] if by_hand and len(by_hand) == len(expected) else ""
    refused = {repr(t.remedy): t.what.partition("Not applied: ")[2] for t in told if "Not applied: " in t.what}
    why = [
        remedy.why if isinstance(remedy, ByHand) else refused.get(repr(remedy), "")
        for finding in right
        for remedy in finding.remedies
    ]
    return why[0].rstrip(".") if why and all(why) else ""


def measure(todo: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, as rows."""
    trials = [args.trials] * len(todo)
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            return [*show(pool.map(run, todo, trials), todo, args)]
    return [*show(map(run, todo, trials), todo, args)]


def show(rows: Any, todo: list[Case], args: argparse.Namespace) -> Any:
    """Pass rows on, printing as they come."""
    for count, row in enumerate(rows, 1):
        if args.verbose:
            mark = "cured" if row["cured"] else "beyond" if row["out of reach"] else "NOT CURED"
            figures = f"{row['before']:.3f} → {row['after']:.3f} (healthy {row['healthy']:.3f})"
            print(f"\n{mark} {row['kind']} | {row['host']} | {row['steps']} | {row['seed']} | {figures}", row["raised"])
            print("\n".join(f"   {line}" for line in row["told"]), "\n   left:", ", ".join(row["left"]), flush=True)
        elif count % 25 == 0:
            print(f"{count} of {len(todo)}", file=sys.stderr, flush=True)
        yield row


# -- figures --------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By kind, of all that can be reached, and of the healthy."""
    kinds = {}
    planted, sound = [r for r in rows if r["kind"] != "healthy"], [r for r in rows if r["kind"] == "healthy"]
    for kind in dict.fromkeys(row["kind"] for row in planted):
        some = [row for row in planted if row["kind"] == kind]
        kept = Counter(name for row in some for name in row["kept"])
        kinds[kind] = {
            **shares(some),
            **{name: statistics.median(row[name] for row in some) for name in ("before", "after", "healthy")},
            "kept": dict(kept.most_common()),
            "why not": dict(Counter(row["out of reach"] for row in some if row["out of reach"])),
        }
    in_reach = [row for row in planted if not row["out of reach"]]
    return {
        "reachable": shares(in_reach),
        "reachable, needed": shares([row for row in in_reach if row["needed"]]),
        "reachable, needed, no more steps": shares([row for row in in_reach if row["needed"] and not row["longer"]]),
        "out of reach": shares([row for row in planted if row["out of reach"]]),
        "healthy": shares(sound) | {"kept": dict(Counter(name for row in sound for name in row["kept"]))},
        "kinds": kinds,
    }


def shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of some runs."""
    return {
        "runs": len(rows),
        "reach": sum(not row["out of reach"] for row in rows),
        "needed": sum(row["needed"] for row in rows),
        "cured": mean(row["cured"] for row in rows),
        "worse": sum(row["worse"] for row in rows),
        "trials": mean(row["trials"] for row in rows),
        "raised": sum(bool(row["raised"]) for row in rows),
        "seconds": mean(row["seconds"] for row in rows),
    }


def print_tables(found: dict[str, Any]) -> None:
    """By kind, why some are out of reach, and the headline."""
    head = f"{'runs':>5}{'reach':>6}{'needed':>7}{'cured':>7}{'worse':>6}{'trials':>7}{'seconds':>8}"
    print(f"{'':44}{head}{'before':>8}{'after':>8}{'healthy':>8}")
    for kind, row in found["kinds"].items():
        errors = "".join(f"{row[name]:8.3f}" for name in ("before", "after", "healthy"))
        print(f"{kind:44}{line(row)}{errors}")
    print("\nout of reach, because")
    for kind, row in found["kinds"].items():
        print("".join(f"{kind:44}{why} ({n})\n" for why, n in row["why not"].items()), end="")
    print("\nkept")
    for kind, row in found["kinds"].items():
        print("".join(f"{kind:44}{names_in(what)} ({n})\n" for what, n in row["kept"].items()), end="")
    print(f"\n{'':44}{head}")
    for name in ("reachable", "reachable, needed", "reachable, needed, no more steps", "out of reach", "healthy"):
        print(f"{name:44}{line(found[name])}")


def names_in(what: str) -> str:
    """The kinds of remedies in one that is written out."""
    names = [name for name in re.findall(r"([A-Z]\w+)\(", what) if name != "Together"]
    return what if len(names) == 1 and len(what) < 60 else ", ".join(names)


def line(row: dict[str, Any]) -> str:
    """Of some runs."""
    return (
        f"{row['runs']:5}{row['reach']:6}{row['needed']:7}{number(row['cured']):>7}{row['worse']:6}"
        f"{number(row['trials'], '.1f'):>7}{number(row['seconds'], '.1f'):>8}"
    )


def draw(kinds: dict[str, dict[str, Any]], path: Path) -> None:
    """Error before and after treatment and of the healthy twin, by kind."""
    figure, axis = plt.subplots(figsize=(8, 1.5 + 0.2 * len(kinds)), layout="constrained")
    for place, row in enumerate(kinds.values()):
        colour = "0.75" if row["reach"] == 0 else "tab:blue"
        axis.plot([row["before"], row["after"]], [place] * 2, color=colour, linewidth=1.5, zorder=1)
        axis.scatter(row["before"], place, s=22, color="tab:red", zorder=2)
        axis.scatter(row["after"], place, s=22, color=colour, zorder=3)
        axis.scatter(row["healthy"], place, s=60, marker="|", color="black", zorder=4)
    for label, colour, mark in (
        ("before", "tab:red", "o"),
        ("after", "tab:blue", "o"),
        ("after, out of reach", "0.75", "o"),
        ("healthy twin", "black", "|"),
    ):
        axis.scatter([], [], color=colour, marker=mark, label=label)
    axis.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.set(xscale="log", xlabel="held-out error: share of wrong answers, or of the variance; median over the runs")
    axis.set_title("What treatment makes of planted faults", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print, draw, write; returns what is written."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = measure(cases(args), args)
    found = summarise(rows)
    print_tables(found)
    draw(found["kinds"], args.out / "treatment.png")
    text = json.dumps(found | {"cases": rows}, indent=1)
    (args.out / "numbers.json").write_text(text)
    return json.loads(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = arguments(__doc__, half="held", out="treatment")
    parser.add_argument("--trials", type=int, default=4, help="fits after the first")
    args = parser.parse_args(argv)
    if args.tiny:
        args.kinds, args.hosts = args.kinds or TINY_KINDS, args.hosts or TINY_HOSTS
        args.half, args.lengths, args.seeds = "all", [SHORT], [0]
    return args


if __name__ == "__main__":
    main()
