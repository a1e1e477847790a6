"""What trains: which parameters an optimizer holds, which get a gradient, and which have moved."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ae.diagnostics.monitors.base import Monitor
from lightning_ae.diagnostics.watch.site import clean_name


class Held(NamedTuple):
    """An optimizer's settings for a group of parameters.

    Attributes:
        kind: name of the optimizer's class.
        lr: learning rate, the largest that was seen.
        momentum: of SGD; 0 for others.
        weight_decay: as given.
        decoupled: whether the decay acts on the weights themselves, as in AdamW.
        adaptive: whether steps are normalised by the size of the gradient, as in Adam.
    """

    kind: str
    lr: float
    momentum: float
    weight_decay: float
    decoupled: bool
    adaptive: bool

    @property
    def shrinkage(self) -> float:
        """Share of a weight that the decay takes away in a step, about.

        ``lr · decay`` where it is decoupled; for SGD ``lr · decay / (1 − momentum)``; beside a gradient that Adam
        normalises an L2 term acts by its size among the gradients, which are about 1.
        """
        if self.decoupled:
            return self.lr * self.weight_decay
        if self.adaptive:
            return min(1.0, self.lr * 30) * self.weight_decay
        return self.lr * self.weight_decay / max(1e-3, 1 - self.momentum)


class TrainingMonitor(Monitor):
    """Looks at parameters from outside: nothing is logged, it is evidence for a report.

    Args:
        every_n_steps: look at every so many optimizer steps.
        horizon: as in :class:`Monitor`.

    Raises:
        ValueError: if a number is not positive.
    """

    prefix = "training"

    def __init__(self, every_n_steps: int = 25, horizon: int = 500) -> None:
        super().__init__(every_n_steps, horizon)
        self._start()

    def _start(self) -> None:
        #: names of parameters
        self.held: set[str] = set()
        self.frozen: set[str] = set()
        self.without_gradient: dict[str, int] = {}
        self.steps_of: dict[str, int] = {}
        self.ran: set[str] = set()
        self.resting: set[str] = set()
        self.settings: list[Held] = []
        self.unchanged: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.total_steps = 0
        self.clips = False
        self.automatic = True
        #: parameters of each optimizer
        self._held_by: list[set[int]] = []
        self._before: dict[str, Tensor] = {}
        #: of each backward pass the largest gradient of each optimizer before it; None if there was no gradient at all
        self._leftover: list[Tensor | None] = []
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._fresh = True
        self._stepped: set[int] = set()
        self._parameters: list[list[nn.Parameter]] = []
        #: of each optimizer the largest gradient before each backward pass since its last step; None if there was none
        self._windows: list[list[Tensor | float | None]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the probe of this Trainer, with nothing known."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the weights by their norms, and who holds them."""
        super().on_train_start(trainer, pl_module)
        held = self._in_optimizers(trainer, pl_module)
        self.held |= {name for _, name in held}
        self._parameters = [[p for g in o.param_groups for p in g["params"]] for o in trainer.optimizers]
        self._held_by = [{id(p) for p in held} for held in self._parameters]
        self._windows = [[] for _ in self._held_by]
        self.automatic = pl_module.automatic_optimization
        self.clips = trainer.gradient_clip_val is not None
        named = dict(pl_module.named_parameters())
        self.sizes = {clean_name(name): p.numel() for name, p in named.items()}
        self.frozen = {clean_name(name) for name, p in named.items() if not p.requires_grad}
        self._before = _marks(pl_module)

    def _in_optimizers(self, trainer: L.Trainer, module: nn.Module) -> list[tuple[int, str]]:
        names = {id(p): clean_name(name) for name, p in module.named_parameters()}
        given = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        return [(id(p), names[id(p)]) for p in given if id(p) in names]

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note who works, and who rests in evaluation mode."""
        if module._parameters and (self._probe is None or self._probe.watch.learning):
            self.ran.add(name)
            if not module.training:
                self.resting.add(name)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look for gradients that are there before the first backward pass of a step: ``zero_grad`` was forgotten."""
        if self._probe is None:
            return
        looked = self._probe.looks_at(self)
        if not pl_module.automatic_optimization:
            self._before_manual(looked)
            return
        if not looked or not self._fresh:
            return
        with torch._C.DisableTorchFunction():  # the watch need not hear of it
            self._look_for_leftovers(loss)

    def _look_for_leftovers(self, loss: Tensor) -> None:
        there = [
            (id(p), _local(gradient))
            for held in self._parameters
            for p in held
            if (gradient := p.grad) is not None and not gradient.is_sparse
        ]
        self._fresh = False  # what accumulates later in the window is wanted
        if not there:
            self._leftover.append(None)
            return
        # of each optimizer by itself: what another one holds is zeroed before its own backward pass; and of parameters
        # that no optimizer holds nobody zeroes the gradients
        none = torch.zeros((), device=loss.device)
        largest = []
        for held in self._held_by:
            own = [gradient.float().abs().max() for identity, gradient in there if identity in held]
            largest.append(torch.stack([value.to(loss.device) for value in own]).max() if own else none)
        self._leftover.append(torch.stack(largest or [none]))

    def _before_manual(self, looked: bool) -> None:
        """Between two steps of an optimizer one backward pass at least begins anew, if gradients are zeroed at all.

        Gradients that are None are seen without asking the device; others only in steps that are looked at.
        """
        for held, window in zip(self._parameters, self._windows, strict=True):
            if not any(p.grad is not None for p in held):
                window.append(None)
            elif looked:
                there = [p.grad for p in held if p.grad is not None and not p.grad.is_sparse]
                window.append(torch.stack([_local(g).abs().max().float() for g in there]).max() if there else math.nan)
            else:
                window.append(math.nan)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at gradients; with manual optimization, close the window of this optimizer."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if pl_module.automatic_optimization or not self._windows:
            return
        own = [id(p) for group in optimizer.param_groups for p in group["params"]]
        looked = self._probe is not None and self._probe.looks_at(self)
        for number, held in enumerate(self._held_by):
            if held.isdisjoint(own):
                continue
            window, self._windows[number] = self._windows[number], []
            known = [value for value in window if isinstance(value, torch.Tensor)]
            anew = None in window
            if looked and window and (anew or len(known) == len(window)):
                place = _marked({number}, len(self._held_by), pl_module.device)
                self.counters.add("leftover", "looks", place)
                self.counters.add("leftover", "found", place & (False if anew else torch.stack(known).min().gt(0)))

    def on_step(self, trainer: L.Trainer | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note the optimizer's settings, and which of its parameters have no gradient."""
        found = {} if self._probe is None else self._probe.watch.parameters
        names = found or {id(p): clean_name(name) for name, p in module.named_parameters()}
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._stepped |= {i for i, held in enumerate(self._held_by) if held & own}
        for group in optimizer.param_groups:
            self._note(optimizer, group)
            for p in group["params"]:
                name = names.get(id(p))
                if name is not None:
                    self.held.add(name)
                    self.steps_of[name] = self.steps_of.get(name, 0) + 1
                    if p.grad is None:
                        self.without_gradient[name] = self.without_gradient.get(name, 0) + 1

    def _note(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        lr, decay = group.get("lr", 0.0), group.get("weight_decay", 0.0)
        momentum = group.get("momentum", 0.0)
        lr, decay, momentum = (float(v) if isinstance(v, (int, float)) else math.nan for v in (lr, decay, momentum))
        kind = type(optimizer).__name__
        decoupled = bool(group.get("decoupled_weight_decay", kind in ("AdamW", "Muon")))
        adaptive = "betas" in group or kind in ("RMSprop", "Adagrad", "Adadelta", "Rprop")
        found = Held(kind, lr, momentum if kind != "RMSprop" else 0.0, decay, decoupled, adaptive)
        same = [i for i, h in enumerate(self.settings) if h[:1] + h[2:] == found[:1] + found[2:]]
        if not same:
            self.settings.append(found)
        elif found.lr > self.settings[same[0]].lr:
            self.settings[same[0]] = found

    def on_batch(self, trainer: L.Trainer | None, module: nn.Module, outputs: Any, batch: Any) -> None:
        """Add what was left of gradients."""
        left, self._leftover, self._fresh = self._leftover, [], True
        if left:
            # of several backward passes of a batch one at least begins anew, if gradients are zeroed at all
            known = [value for value in left if value is not None]
            # an optimizer that does not step here may be left to accumulate
            device = known[0].device if known else _device(module)
            steps = self._place(self._stepped, device)
            self.counters.add("leftover", "looks", steps)
            anew = len(known) < len(left)
            found = self._place(set(), device) if anew else torch.stack(known).amin(0).gt(0) & steps
            self.counters.add("leftover", "found", found)
        self._stepped = set()
        if trainer is not None:
            self.total_steps = trainer.global_step
            self._fresh = not trainer.fit_loop._should_accumulate()

    def _place(self, numbers: set[int], device: torch.device) -> Tensor:
        """True for these optimizers; made once, and not changed."""
        key = (*sorted(numbers), -1, len(self._held_by))
        if key not in self._places or self._places[key].device != device:
            self._places[key] = _marked(numbers, max(1, len(self._held_by)), device)
        return self._places[key]

    def __getstate__(self) -> dict[str, Any]:
        """Without parameters, which belong to a running fit."""
        return {**super().__getstate__(), "_parameters": [], "_windows": [], "_places": {}}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See which parameters are as they were."""
        self.compare(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def compare(self, trainer: L.Trainer, module: nn.Module) -> None:
        """See which parameters are as they were when the fit began."""
        self.total_steps = trainer.global_step
        # what a schedule has thawed since is not frozen
        self.frozen = {clean_name(name) for name, p in module.named_parameters() if not p.requires_grad}
        now = _marks(module)
        same = [name for name, value in self._before.items() if name in now and now[name].shape == value.shape]
        if same:
            equal = torch.stack([(self._before[n] == now[n].to(self._before[n].device)).all().cpu() for n in same])
            self.unchanged = {name for name, flag in zip(same, equal.tolist(), strict=True) if flag}

    def state_dict(self) -> dict[str, Any]:
        """Sums, and what is known of the parameters."""
        known = {name: sorted(getattr(self, name)) for name in ("held", "ran", "resting")}
        counts = {name: dict(getattr(self, name)) for name in ("without_gradient", "steps_of")}
        return {**super().state_dict(), **known, **counts, "settings": [list(held) for held in self.settings]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was known."""
        super().load_state_dict(state_dict)
        for name in ("held", "ran", "resting"):
            setattr(self, name, set(state_dict[name]))
        for name in ("without_gradient", "steps_of"):
            setattr(self, name, dict(state_dict[name]))
        self.settings = [Held(*row) for row in state_dict["settings"]]

    def scalars(self) -> dict[str, float]:
        """Nothing is logged."""
        return {}

    def piles_up(self) -> bool:
        """Whether gradients of the step before were there in every step looked at."""
        results = self.results()
        if ("leftover", "looks") not in results:
            return False
        # before the very first step there is nothing that could be left, and Lightning zeroes before each validation;
        # with manual optimization some steps may accumulate on purpose
        share = 0.5 if self.automatic else 0.95
        counted = zip(results["leftover", "looks"].tolist(), results["leftover", "found"].tolist(), strict=True)
        return any(looks >= 4 and found >= max(3, share * (looks - 1)) for looks, found in counted)

    @property
    def shrinkage(self) -> tuple[float, float]:
        """Of the setting whose decay takes most of a weight in a step: that share, and the decay as given."""
        found = [(h.shrinkage, h.weight_decay) for h in self.settings if h.shrinkage == h.shrinkage]
        return max(found, default=(0.0, 0.0))

    @property
    def lr(self) -> float:
        """The largest learning rate."""
        return max((h.lr for h in self.settings if h.lr == h.lr), default=math.nan)


def _marked(numbers: set[int], total: int, device: torch.device) -> Tensor:
    """True at these places; made on the device, since a copy from the host would wait for it."""
    marked = torch.zeros(total, dtype=torch.bool, device=device)
    for number in numbers:
        marked[number].fill_(True)
    return marked


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _local(gradient: Tensor) -> Tensor:
    # of a sharded tensor the part that is here
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local


def _marks(module: nn.Module) -> dict[str, Tensor]:
    """Two numbers for each parameter that change when it does; of sharded ones none."""
    found = {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if not hasattr(p, "to_local") and p.numel() and p.is_floating_point() and p.device.type != "meta":
                flat = p.detach().reshape(-1).float()
                found[clean_name(name)] = torch.stack([flat.sum(), flat.square().sum()])
    return found
