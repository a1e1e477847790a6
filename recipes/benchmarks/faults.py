"""How often `DiagnosticsReport` names the fault that was planted, and how often it cries wolf.

Small networks on scikit-learn's digits and on synthetic data are trained with the report attached: autoencoders of ours
and of nobody's, classifiers, regressions, a recurrent network and a transformer, each healthy and with faults planted
one at a time (`faults_table.py`; the networks and their knobs are in `faults_hosts.py`). By kind of fault:

* `first`, `any`: share of the runs whose first finding, or any finding, names a cause that is a right diagnosis;
* `contra`: runs with two findings that turn the same knob in opposite directions;
* `error`, `healthy`: the held-out error and that of the healthy host after as many steps (after the fewest, for faults
  that stop earlier), medians over the runs: share of wrong answers, or of the variance unexplained, at most 10;
* `raised`: runs that ended in an exception, whose findings do not count for much;
* `harmed`: runs whose error is more than 0.01 above 1.3 times that of the healthy host. `*` marks a fault that by its
  nature shows elsewhere.

Hosts are run healthy with each seed, short and long; faults in turns, the first seed short, the second long, unless
`--full` asks for each length with each seed.

Of healthy runs: the share with an error, with a warning, with any of the two. Fault and host together decide whether a
run belongs to the half on which thresholds may be tuned ("fit") or to that which is held back ("held").

    python recipes/benchmarks/faults.py --half fit
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent))
import faults_run
from faults_hosts import LONG, SHORT
from faults_table import FAULTS, HOSTS, Case

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TINY_KINDS = ("softmax over one unit", "(B, 1) against (B,)", "five steps")
TINY_HOSTS = ("mlp ae", "mlp binary", "mlp regression", "our mlp")


def half_of(kind: str, host: str) -> str:
    """The half to which all runs of a kind in a host belong."""
    return "held" if zlib.crc32(f"{kind}|{host}".encode()) % 2 else "fit"


def cases(args: argparse.Namespace) -> list[Case]:
    """The runs to make; faults with a number of steps of their own have no other length."""
    found = []
    for fault in (None, *FAULTS):
        for host in HOSTS if fault is None else fault.hosts:
            kind = "healthy" if fault is None else fault.name
            own = fault is not None and "steps" in fault.knobs
            if (args.kinds and kind not in args.kinds) or (args.hosts and host not in args.hosts):
                continue
            if args.half not in ("all", half_of(kind, host)):
                continue
            lengths = [fault.knobs["steps"]] if own else args.lengths
            for turn, seed in enumerate(args.seeds):
                some = lengths if fault is None or args.full else [lengths[turn % len(lengths)]]
                found += [Case(fault, host, length, seed) for length in some]
    return found


def measure(todo: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, as rows."""
    knobs, seeds = [case.knobs for case in todo], [case.seed for case in todo]
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            results = [*show(pool.map(faults_run.run, knobs, seeds), todo, args)]
    else:
        results = [*show(map(faults_run.run, knobs, seeds), todo, args)]
    rows = []
    for case, result in zip(todo, results, strict=True):
        causes = [finding["cause"] for finding in result["findings"]]
        expected = [] if case.fault is None else case.fault.causes.split()
        changes = {tuple(f["change"]) for f in result["findings"] if f["change"]}
        row = {
            "kind": case.kind,
            "host": case.host,
            "half": half_of(case.kind, case.host),
            "steps": case.length,
            "seed": case.seed,
            "expected": expected,
            "causes": causes,
            "first": bool(causes) and causes[0] in expected,
            "any": any(cause in expected for cause in causes),
            "contradicts": any((knob, -by) in changes for knob, by in changes),
        }
        rows.append(row | result)
    return rows


def show(results: Any, todo: list[Case], args: argparse.Namespace) -> Any:
    """Pass results on, printing as they come."""
    for count, (case, result) in enumerate(zip(todo, results, strict=True), 1):
        if args.verbose:
            print(f"\n{case.kind} | {case.host} | {case.length} steps | seed {case.seed} | {result['error']:.3f}")
            print("\n".join(f"   {f['cause'] or '-'}: {f['text']}" for f in result["findings"]), result["raised"])
        elif count % 50 == 0:
            print(f"{count} of {len(todo)}", file=sys.stderr, flush=True)
        yield result


# -- figures --------------------------------------------------------------------------------------------------------


def mean(values: Any) -> float | None:
    """None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def median(values: Any) -> float | None:
    """None of nothing."""
    values = list(values)
    return statistics.median(values) if values else None


def summarise(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """By kind, by half, of the healthy, and which cause came first."""
    planted = [row for row in rows if row["kind"] != "healthy"]
    sound = [row for row in rows if row["kind"] == "healthy"]
    twins: dict[Any, list[float]] = defaultdict(list)
    for row in sound:
        if not row["raised"]:
            twins[row["host"], row["steps"]].append(row["error"])
    kinds = {}
    for kind in dict.fromkeys(row["kind"] for row in planted):
        some = [row for row in planted if row["kind"] == kind]
        beside = [mean(twins[row["host"], max(min(args.lengths), row["steps"])]) for row in some]
        pairs = [(row["error"], error) for row, error in zip(some, beside, strict=True) if error is not None]
        kinds[kind] = {
            **shares(some),
            "error": median(row["error"] for row in some),
            "healthy": median(error for _, error in pairs),
            "harmed": mean(error > 1.3 * healthy + 0.01 for error, healthy in pairs),
        }
    confusion = {kind: Counter[str]() for kind in ["healthy", *kinds]}
    for row in rows:
        serious = row["kind"] != "healthy" or any(f["severity"] != "info" for f in row["findings"])
        name = (
            (row["causes"][0] or "no slug") if row["causes"] and serious else "raised" if row["raised"] else "nothing"
        )
        confusion[row["kind"]][name] += 1
    halves = {
        half: shares([row for row in planted if half in ("all", row["half"])])
        | {f"healthy {k}": v for k, v in alarms([row for row in sound if half in ("all", row["half"])]).items()}
        for half in ("fit", "held", "all")
    }
    return {
        "halves": halves,
        "healthy": {
            "short": alarms([row for row in sound if row["steps"] <= SHORT]),
            "long": alarms([row for row in sound if row["steps"] > SHORT]),
            **{host: alarms([r for r in sound if r["host"] == host]) for host in {r["host"]: 0 for r in sound}},
        },
        "kinds": kinds,
        "confusion": {kind: dict(counts) for kind, counts in confusion.items()},
    }


def shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of runs with a fault."""
    return {
        "runs": len(rows),
        "first": mean(row["first"] for row in rows),
        "any": mean(row["any"] for row in rows),
        "contradictions": sum(row["contradicts"] for row in rows),
        "raised": sum(bool(row["raised"]) for row in rows),
    }


def alarms(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of healthy runs."""
    found = [{finding["severity"] for finding in row["findings"]} for row in rows]
    return {
        "runs": len(rows),
        "errors": mean("error" in some for some in found),
        "warnings": mean("warning" in some for some in found),
        "either": mean(bool(some & {"error", "warning"}) for some in found),
        "held-out error": mean(row["error"] for row in rows),
        "raised": sum(bool(row["raised"]) for row in rows),
    }


def number(value: float | None, form: str = ".0%") -> str:
    """A dash for what was not measured."""
    return "-" if value is None else format(value, form)


def print_tables(found: dict[str, Any]) -> None:
    """By kind, the healthy, the halves, and what is taken for what."""
    hidden = {fault.name for fault in FAULTS if fault.hidden}
    print(f"{'':44}{'runs':>5}{'first':>7}{'any':>7}{'contra':>8}{'raised':>8}{'error':>8}{'healthy':>9}{'harmed':>8}")
    for kind, row in found["kinds"].items():
        mark = "*" if kind in hidden else ""
        print(
            f"{kind:44}{row['runs']:5}{number(row['first']):>7}{number(row['any']):>7}{row['contradictions']:8}"
            f"{row['raised']:8}{number(row['error'], '.3f'):>8}{number(row['healthy'], '.3f'):>9}"
            f"{number(row['harmed']):>8}{mark}"
        )
    print(f"\n{'healthy':44}{'runs':>5}{'errors':>8}{'warnings':>10}{'either':>8}{'held-out error':>16}{'raised':>8}")
    for host, row in found["healthy"].items():
        print(
            f"{host:44}{row['runs']:5}{number(row['errors']):>8}{number(row['warnings']):>10}{number(row['either']):>8}"
            f"{number(row['held-out error'], '.3f'):>16}{row['raised']:8}"
        )
    print(f"\n{'half':44}{'runs':>5}{'first':>7}{'any':>7}{'contra':>8}{'healthy':>9}{'errors':>8}{'warnings':>10}")
    for half, row in found["halves"].items():
        print(
            f"{half:44}{row['runs']:5}{number(row['first'], '.1%'):>7}{number(row['any'], '.1%'):>7}"
            f"{row['contradictions']:8}{row['healthy runs']:9}{number(row['healthy errors']):>8}"
            f"{number(row['healthy warnings']):>10}"
        )
    print("\nthe first cause, by kind")
    for kind, counts in found["confusion"].items():
        print(f"{kind:44}" + ", ".join(f"{name} {n}" for name, n in Counter(counts).most_common()))


def draw(confusion: dict[str, dict[str, int]], path: Path) -> None:
    """Kind planted against cause found first; a ring marks what is right."""
    expected = {fault.name: set(fault.causes.split()) for fault in FAULTS} | {"healthy": {"nothing"}}
    causes = list(dict.fromkeys(cause for fault in FAULTS for cause in fault.causes.split()))
    given = {name for counts in confusion.values() for name in counts}
    causes = [c for c in causes if c in given or any(c in expected[k] for k in confusion)]
    causes += sorted(given - set(causes))
    share = [[row.get(cause, 0) / max(1, sum(row.values())) for cause in causes] for row in confusion.values()]
    size = (3.5 + 0.27 * len(causes), 2.5 + 0.22 * len(confusion))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for line, kind in enumerate(confusion):
        right = [column for column, cause in enumerate(causes) if cause in expected[kind]]
        axis.scatter(right, [line] * len(right), s=50, facecolors="none", edgecolors="tab:orange", linewidths=1)
    axis.set_xticks(range(len(causes)), causes, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(confusion)), list(confusion), fontsize=8)
    axis.set(xlabel="cause of the first finding", ylabel="planted fault")
    axis.set_title("Which cause is found first; rings mark right diagnoses", fontsize=10)
    figure.colorbar(image, label="share of the runs", shrink=0.5)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print, draw, write; returns what is written."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = measure(cases(args), args)
    found = summarise(rows, args)
    print_tables(found)
    messages = Counter(row["raised"] for row in rows if row["raised"])
    print("".join(f"\nraised in {n} runs: {message}" for message, n in messages.most_common()))
    draw(found["confusion"], args.out / "faults.png")
    text = json.dumps(found | {"cases": rows}, indent=1)
    (args.out / "numbers.json").write_text(text)
    return json.loads(text)


def arguments(description: str | None, half: str, out: str) -> argparse.ArgumentParser:
    """The arguments of all benchmarks on these runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("fit", "held", "all"), default=half, help="tune on fit only")
    parser.add_argument("--kinds", nargs="*", help="names of faults, or 'healthy'; all unless given")
    parser.add_argument("--hosts", nargs="*", choices=list(HOSTS), help="all unless given")
    parser.add_argument("--lengths", nargs="*", type=int, default=[SHORT, LONG], help="steps of a run")
    parser.add_argument("--seed", "--seeds", dest="seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--full", action="store_true", help="faults at each length with each seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--tiny", action="store_true", help="a handful of short runs")
    parser.add_argument("--verbose", action="store_true", help="print what was found, or tried")
    parser.add_argument("--out", type=Path, default=Path("outputs") / out, help="output folder")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = arguments(__doc__, half="all", out="faults")
    args = parser.parse_args(argv)
    if args.tiny:
        args.kinds, args.hosts = args.kinds or ["healthy", *TINY_KINDS], args.hosts or TINY_HOSTS
        args.lengths, args.seeds = [SHORT], [0]
    return args


if __name__ == "__main__":
    main()
