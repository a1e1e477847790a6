"""What looking costs: the three monitors, beside a naive hook and Weights & Biases' watch.

A convolutional autoencoder on 28×28 images is trained under the Trainer, looked at on every second step, so that steps
with and without alternate in one run and drift of the machine cancels. The cost of a look is the difference of the
medians; its share of a step is given if every step is looked at, and at the monitors' default (one step in 25), where
the time of a log (one in 50 steps) and of the hooks on steps that are not looked at is added. The whole is checked by
timing fits with and without monitors in turns.

* ours: DeadReLUMonitor, GradientSaturationMonitor, LatentSparsityMonitor, each alone and all together, and the report,
  which looks at data, losses and parameters besides;
* naive: a forward hook on each ReLU that reads `(y > 0).float().mean().item()`;
* wandb: `wandb.watch(model, log="all")`, if installed, with a run that stays offline.

On a machine that others use too, `--clock cpu --threads 1` counts the processor's time of this process instead of what
has passed: a step and a look lose the caches to others alike, but are not stopped meanwhile.

On a GPU time is measured with a synchronisation at both ends of a step, and `--sync-debug` makes any synchronisation
within the hooks an error.

    python recipes/benchmarks/diagnostics.py
    python recipes/benchmarks/diagnostics.py --network mlp --batch-size 100
    python recipes/benchmarks/diagnostics.py --accelerator cuda --sync-debug
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn

import lightning_ae as ae
from lightning_ae.diagnostics.watch.probe import Probe

DEFAULT_EVERY, LOG_EVERY = 25, 50
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
clock = CLOCKS["wall"]


class Stopwatch(L.Callback):
    """Time from the first callback at the start of a batch to the last one at its end."""

    def __init__(self) -> None:
        self.even: list[float] = []
        self.odd: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Start."""
        self._start = now(pl_module)

    def stop(self, pl_module, batch_idx: int) -> None:
        """Stop; warm-up is left out."""
        if batch_idx >= 20:
            (self.odd if batch_idx % 2 else self.even).append(now(pl_module) - self._start)


class Stop(L.Callback):
    """The other end of a stopwatch."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Stop."""
        self.watch.stop(pl_module, batch_idx)


class NaiveHooks(L.Callback):
    """What one writes first: a number read from the device in every hook."""

    def on_train_start(self, trainer, pl_module) -> None:
        """Attach; the hook looks on even batches only."""
        self.looking, self.seen = False, []
        for module in pl_module.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._hook)

    def _hook(self, module, inputs, output) -> None:
        if self.looking:
            self.seen.append((output > 0).float().mean().item())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Look, or not."""
        self.looking = batch_idx % 2 == 0


class WandbWatch(L.Callback):
    """`wandb.watch`, which itself looks on every second step."""

    def on_train_start(self, trainer, pl_module) -> None:
        """Attach."""
        import wandb

        self.run = wandb.init(mode="offline", dir="/tmp", settings=wandb.Settings(silent=True))
        self.run.watch(pl_module, log="all", log_freq=2)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Histograms go out with a log."""
        self.run.log({"step": batch_idx})

    def on_train_end(self, trainer, pl_module) -> None:
        """Finish."""
        self.run.finish()


def now(module: L.LightningModule) -> float:
    """The time, when the device has caught up."""
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return clock()


def monitors(every: int, names: str = "dsl") -> list[L.Callback]:
    """Some of the three."""
    kinds: dict[str, Callable[..., L.Callback]] = {
        "d": ae.DeadReLUMonitor,
        "s": ae.GradientSaturationMonitor,
        "l": ae.LatentSparsityMonitor,
    }
    return [kinds[name](every_n_steps=every) for name in names]


def fit(callbacks: list[L.Callback], steps: int, args: argparse.Namespace, log_every: int = 10**6) -> float:
    """Seconds of a fit."""
    torch.manual_seed(0)
    shape, loss = (1, 28, 28), ae.BernoulliNLL()
    model = (
        ae.MLPAutoencoder(shape, 16, hidden=(128,), activation="relu", loss=loss)
        if args.network == "mlp"
        else ae.ConvAutoencoder(shape, 32, channels=tuple(args.channels), loss=loss)
    )
    data = ae.TensorDataModule(
        torch.rand(steps * args.batch_size, 1, 28, 28), val_fraction=0.0, batch_size=args.batch_size
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=args.accelerator,
        devices=1,
        callbacks=callbacks,
        log_every_n_steps=log_every,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = clock()
    trainer.fit(model, data)
    return clock() - start


def look(callbacks: list[L.Callback], args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a step without and with a look."""
    watch = Stopwatch()
    # a histogram of everything on every second step takes its time
    steps = min(args.steps, 60) if isinstance(callbacks[0], WandbWatch) else args.steps
    fit([watch, *callbacks, Stop(watch)], steps, args)
    without, looked = statistics.median(watch.odd), statistics.median(watch.even)
    if isinstance(callbacks[0], WandbWatch):  # which counts backward passes from one
        without, looked = looked, without
    return 1e3 * without, 1e3 * looked


def idle_time(callbacks: list[L.Callback], args: argparse.Namespace) -> float:
    """Milliseconds of the hooks in a step that is not looked at, with what Lightning asks of a callback for each."""
    times: dict[tuple[int, str], list[float]] = {}

    def timed(hook: Callable[..., None], callback: L.Callback, where: list[float]) -> Callable[..., None]:
        def run(*given: Any) -> None:
            start = clock()
            _ = callback.state_key
            hook(*given)
            where.append(clock() - start)

        return run

    for i, callback in enumerate(callbacks):
        for name in HOOKS:
            setattr(callback, name, timed(getattr(callback, name), callback, times.setdefault((i, name), [])))
    fit(callbacks, args.steps // 2, args)
    return 1e3 * sum(statistics.median(found) for found in times.values())


def log_time(callbacks: list[L.Callback], args: argparse.Namespace) -> float:
    """Milliseconds of a log: reduction, copy, figures."""
    times: list[float] = []
    read = Probe.log

    def timed(self: Probe, *given: Any, **named: Any) -> None:
        start = clock()
        read(self, *given, **named)
        times.append(clock() - start)

    Probe.log = timed  # type: ignore[method-assign]
    try:
        fit(callbacks, args.steps // 2, args, log_every=2)
    finally:
        Probe.log = read  # type: ignore[method-assign]
    return 1e3 * statistics.median(times[2:])


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print a table; returns shares of a step by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=220, help="steps of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved measurements")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--network", choices=["conv", "mlp"], default="conv", help="mlp: 784-128-16-128-784")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--sync-debug", action="store_true", help="on CUDA, a synchronisation within the hooks raises")
    args = parser.parse_args(argv)
    global clock
    clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ["WANDB_SILENT"] = "true"
    if args.sync_debug:
        check_synchronisation(args)

    measured: dict[str, Callable[[], list[L.Callback]]] = {
        "DeadReLUMonitor": lambda: monitors(2, "d"),
        "GradientSaturationMonitor": lambda: monitors(2, "s"),
        "LatentSparsityMonitor": lambda: monitors(2, "l"),
        "all three": lambda: monitors(2),
        "DiagnosticsReport": lambda: [ae.DiagnosticsReport(every_n_steps=2, quiet=True)],
        "naive .item() hook": lambda: [NaiveHooks()],
    }
    try:
        import wandb  # noqa: F401

        measured["wandb.watch(all)"] = lambda: [WandbWatch()]
    except ImportError:
        print("wandb is not installed: left out")
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
    for _ in range(args.repeats):
        for name, make in measured.items():
            rounds[name].append(look(make(), args))
    whole: dict[str, Callable[[int], list[L.Callback]]] = {
        "all three": monitors,
        "DiagnosticsReport": lambda every: [ae.DiagnosticsReport(every_n_steps=every, quiet=True)],
    }
    logs = {name: log_time(make(2), args) for name, make in whole.items()}
    idles = {name: idle_time(make(10**6), args) for name, make in whole.items()}

    shares: dict[str, float] = {"log_ms": logs["all three"]}
    what = "784-128-16-128-784" if args.network == "mlp" else f"channels {args.channels}"
    print(
        f"{args.accelerator}, {args.threads} threads, {args.clock} clock, batch {args.batch_size}, {what}, "
        f"{args.repeats} × {args.steps} steps"
    )
    print(f"{'':28}{'step':>9}{'look':>9}   every step{f'every {DEFAULT_EVERY}th, with logs':>26}")
    for name, pairs in rounds.items():
        step = statistics.median(without for without, _ in pairs)
        cost = statistics.median(looked - without for without, looked in pairs)
        every = statistics.median((looked - without) / without for without, looked in pairs)
        rest = (logs[name] / LOG_EVERY + idles[name]) / step if name in whole else 0.0
        default = every / DEFAULT_EVERY + rest
        shares[name], shares[f"{name}, default"] = every, default
        print(f"{name:28}{step:7.2f}ms{cost:7.2f}ms{every:12.1%}{default:22.2%}")
    for name in whole:
        print(f"{name}: a log {logs[name]:.2f} ms, hooks in a step that is not looked at {1e3 * idles[name]:.0f} µs")

    pairs = []
    for _ in range(args.repeats):
        bare = fit([], args.steps, args, LOG_EVERY)
        pairs.append(fit(monitors(DEFAULT_EVERY), args.steps, args, LOG_EVERY) / bare)
    shares["fit"] = statistics.median(pairs) - 1
    print(
        f"check, whole fits with monitors at defaults: {shares['fit']:+.1%} (noise of this machine: "
        f"{max(pairs) - min(pairs):.1%})"
    )
    return shares


def check_synchronisation(args: argparse.Namespace) -> None:
    """Every synchronisation within a step raises; logs, which read from the device, are left out."""

    class Strict(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx > 3 else "default")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            torch.cuda.set_sync_debug_mode("default")

    class Last(Strict):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            return None

    class First(Strict):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            return None

    fit([First(), *monitors(1), Last()], 20, args)
    print("no synchronisation within 16 steps that were looked at")


if __name__ == "__main__":
    main()
