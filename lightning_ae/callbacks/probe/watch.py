"""Seeing every activation of a step, module or function, without leaving a trace on the model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torchmetrics import Metric

from lightning_ae.callbacks.probe.activations import FUNCTIONS, LOSSES, MODULES, Activation
from lightning_ae.callbacks.probe.flow import Flow, Origin, Reader, unit_dim

# torch warns that global hooks hear a compiled module twice, as itself and as what it wraps: wrappers are skipped
_HEARD_TWICE = r"Using `torch\.compile\(module\)` when there are global hooks"
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def clean_name(name: str) -> str:
    """A module's name without what compilers and wrappers put into it.

    Example:
        >>> clean_name("encoder._orig_mod.0._checkpoint_wrapped_module")
        'encoder.0'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(eq=False)
class Site:
    """A place in the model where an activation is applied.

    Attributes:
        name: the activation module's name, or that of the module around a call and the function's, as
            ``decoder.relu``; ``#1``, ``#2`` … after it where the same comes again.
        activation: which function.
        units: how many: channels for a convolution, features otherwise.
        unit_dim: their axis, counted from the end.
        origin: weight, bias and normalisation that make the pre-activation, as far as known.
        interval: outputs strictly inside have a slope; None if there is no hard zero.
        readers: weights that read the output.
        unknown_readers: whether something that is no parameter of the model reads it too.
    """

    name: str
    activation: Activation
    units: int
    unit_dim: int
    origin: Origin | None = None
    interval: tuple[float, float] | None = None
    readers: set[Reader] = field(default_factory=set)
    unknown_readers: bool = False

    def other_dims(self, y: Tensor) -> list[int]:
        """All axes of an output but that of the units."""
        return [dim for dim in range(y.ndim) if dim != self.unit_dim + y.ndim]


class Event:
    """One call of an activation in a forward pass; what several listeners need is computed once.

    Attributes:
        site: where.
        z: pre-activation, None if it was overwritten; detached.
        y: output; detached.
        options: arguments of the call.
        mask: 1 where a position counts, broadcastable to ``y``; or None.
    """

    def __init__(
        self,
        site: Site,
        z: Tensor | None,
        y: Tensor,
        options: dict[str, Any],
        mask: Tensor | None,
        scratch: dict[Any, Tensor] | None = None,
    ) -> None:
        self.site, self.z, self.y, self.options, self.mask = site, z, y, options, mask
        self._scratch = {} if scratch is None else scratch
        self._live: Tensor | None = None

    def live(self) -> Tensor:
        """Elements of each unit that have a slope, ``(units,)`` int64, for an activation with a hard zero."""
        if self._live is None:
            assert self.site.interval is not None
            low, high = self.site.interval
            if low == 0 and high == float("inf"):
                # the sign of a ReLU's output is 1 where it fires, and 0 for NaN; summing it is fastest by far
                fires = torch.sign(self.y, out=self._room())
            else:
                fires = (self.y.gt(low) & self.y.lt(high)).to(torch.float32)
            self._live = self.sum(fires)
        return self._live

    def _room(self) -> Tensor:
        """Memory as large as the output, which is used again: fresh pages cost more than the sum itself."""
        key = (self.y.device, self.y.dtype)
        room = self._scratch.get(key)
        if room is None or room.numel() < self.y.numel():
            with torch.inference_mode(False):
                room = self._scratch[key] = torch.empty(self.y.numel(), device=self.y.device, dtype=self.y.dtype)
        if self.y.ndim == 4 and self.y.is_contiguous(memory_format=torch.channels_last):
            return room.as_strided(self.y.shape, self.y.stride())
        return room[: self.y.numel()].view(self.y.shape)

    def sum(self, elements: Tensor) -> Tensor:
        """Sum of 0s and 1s over all but the units, ``(units,)`` int64."""
        if self.mask is not None:
            elements = elements * self.mask
        return self._add_up(elements, whole=True)

    def magnitude(self) -> Tensor:
        """Sum of absolute outputs over all but the units, ``(units,)``, float32 or float64."""
        name = self.site.activation.name
        size = self.y if name in ("relu", "relu6", "sigmoid", "softplus") else torch.abs(self.y, out=self._room())
        if self.mask is not None:
            size = torch.where(self.mask > 0, size, 0.0)  # padding may hold NaN
        return self._add_up(size, whole=False)

    def _add_up(self, elements: Tensor, whole: bool) -> Tensor:
        dims = self.site.other_dims(elements)
        if not dims:
            return elements.round().long() if whole else elements.float()
        # float32 is exact up to 2²⁴; what has more positions is added up in two stages, whole numbers in the second,
        # and so is a map, since one sum over batch and space is slower
        staged = elements.ndim > 2 and dims[0] == 0 and dims[-1] == elements.ndim - 1
        inner = dims[1:] if staged or elements.numel() >= 2**24 * self.site.units else dims
        total = elements.sum(inner, dtype=torch.float32) if inner else elements
        total = total.long() if whole else total
        return total if inner == dims else total.sum(0 if dims[0] < elements.ndim + self.site.unit_dim else 1)

    def positions(self) -> int | Tensor:
        """Elements that each unit has in this call."""
        each = self.y.numel() // self.site.units
        if self.mask is None:
            return each
        shape = [size if dim != self.y.ndim + self.site.unit_dim else 1 for dim, size in enumerate(self.y.shape)]
        return self.mask.expand(shape).sum(dtype=torch.float64).long()

    def examples(self) -> int | Tensor:
        """Examples in this call, those without a position that counts left out."""
        first = self.y.shape[0] if self.y.ndim + self.site.unit_dim > 0 else 1
        if self.mask is None:
            return first
        return (self.mask.expand(first, *self.mask.shape[1:]).flatten(1) > 0).any(1).sum()


class Listener(Protocol):
    """What hears of a step."""

    def on_activation(self, event: Event) -> None:
        """An activation was applied in a forward pass."""

    def on_gradient(self, site: Site, grad_z: Tensor, grad_y: Tensor) -> None:
        """A gradient has passed an activation, from its output to its input."""

    def on_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A module of the model has returned, in a forward pass."""

    def on_loss(self, name: str, prediction: Tensor, target: Tensor, site: Site | None) -> None:
        """One of torch's losses was called, on what has passed a site or not."""


@dataclass
class _Frame:
    name: str | None  # None: not a part of the model
    module: nn.Module | None
    calls: dict[Any, int] = field(default_factory=dict)
    replays: bool = False  # has put the mode back for what runs again in a backward pass


class Watch:
    """Tells listeners of every activation while it is open.

    Two hooks that are global to the process follow which module runs, and a ``TorchFunctionMode`` sees the functions
    that it calls; nothing is registered on the model, so it can be copied and pickled meanwhile. What runs again inside
    the backward pass (activation checkpointing) is not counted again. Sites are found once and keep their order.

    Args:
        exclude: names of submodules whose calls, and what they call, are not looked at.
        unit_dim: the axis of the units for the sites with these names (or inside modules with these names), or for all.

    Example:
        >>> class Print:
        ...     def on_activation(self, event): print(event.site.name, event.live().tolist())
        ...     def on_gradient(self, site, grad_z, grad_y): print(site.name, grad_z.tolist())
        ...     def on_module(self, name, module, inputs, output): pass
        ...     def on_loss(self, name, prediction, target, site): pass
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> nn.init.eye_(model[0].weight).sum().item()
        2.0
        >>> with Watch().open(model, [Print()]):
        ...     model(torch.tensor([[1.0, -1.0]])).sum().backward()
        1 [1, 0]
        1 [[1.0, 0.0]]
    """

    def __init__(self, exclude: Sequence[str] = (), unit_dim: int | Mapping[str, int] | None = None) -> None:
        self.exclude = tuple(exclude)
        self.unit_dim = unit_dim
        self.sites: dict[tuple[Any, ...], Site] = {}
        self.ran: set[int] = set()
        self.scratch: dict[Any, Tensor] = {}
        self._names: dict[int, list[str]] = {}
        self._excluded: set[int] = set()
        self._wrappers: set[int] = set()

    def open(self, root: nn.Module, listeners: Sequence[Listener], mask: Tensor | None = None) -> _Open:
        """Start to watch; leave the context, or call ``close()``, to stop."""
        self._find(root)
        known = [getattr(message, "pattern", message) for _, message, *_ in warnings.filters]
        if self._wrappers and _HEARD_TWICE not in known:
            warnings.filterwarnings("ignore", _HEARD_TWICE)
        parameters = {id(p): clean_name(name) for name, p in root.named_parameters()}
        return _Open(self, root, listeners, mask, Flow(parameters))

    def _find(self, root: nn.Module) -> None:
        modules = dict(root.named_modules(remove_duplicate=False))
        metrics = [clean_name(name) for name, module in modules.items() if name and isinstance(module, Metric)]
        outside = (*self.exclude, *metrics)
        self._names, self._excluded, self._wrappers = {}, set(), set()
        for name, module in modules.items():
            above, _, last = name.rpartition(".")
            if last in _WRAPPERS:
                self._wrappers.add(id(modules[above]))
            cleaned = clean_name(name)
            if any(cleaned == e or cleaned.startswith(f"{e}.") for e in outside):
                self._excluded.add(id(module))
            elif cleaned not in self._names.setdefault(id(module), []):
                self._names[id(module)].append(cleaned)
        self._excluded -= set(self._names)

    def names_of(self, module: nn.Module) -> list[str]:
        """All names of a module; none if it is no part of the model."""
        return self._names.get(id(module), [])

    def excluded(self, module: nn.Module) -> bool:
        """Whether it is not to be looked at, with all that it calls: metrics, and what the user has excluded."""
        return id(module) in self._excluded or isinstance(module, Metric)

    def wraps(self, module: nn.Module) -> bool:
        """Whether it only stands around a module of the same name, as ``torch.compile`` and checkpointing put it."""
        return id(module) in self._wrappers

    def chosen_dim(self, name: str, ndim: int) -> int | None:
        """The axis that the user has chosen, counted from the end."""
        chosen = self.unit_dim
        if isinstance(chosen, Mapping):
            fits = [k for k in chosen if k == name or name.startswith((f"{k}.", f"{k}#"))]
            chosen = chosen[max(fits, key=len)] if fits else None
        if chosen is None:
            return None
        if not -ndim <= chosen < ndim:
            raise ValueError(f"unit_dim: {name} has {ndim} axes, got {chosen}.")
        return chosen if chosen < 0 else chosen - ndim

    def silent(self, root: nn.Module) -> list[str]:
        """Names of activation modules that have never been seen at work."""
        self._find(root)
        return [
            self.names_of(module)[0]
            for module in root.modules()
            if isinstance(module, MODULES) and id(module) not in self.ran and self.names_of(module)
        ]


class _Mode(TorchFunctionMode):
    def __init__(self, watching: _Open) -> None:
        super().__init__()
        self._watching = watching

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._watching.on_function(func, args, kwargs or {})


class _Open:
    """An open watch."""

    def __init__(
        self, watch: Watch, root: nn.Module, listeners: Sequence[Listener], mask: Tensor | None, flow: Flow
    ) -> None:
        self.watch, self.root, self.listeners, self.mask, self.flow = watch, root, listeners, mask, flow
        self.active = True
        self._stack = [_Frame("", None)]
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._mode = _Mode(self)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; gradients that come later are not heard. May be called again."""
        if not self.active:
            return
        self.active = False
        for handle in self._handles:
            handle.remove()
        self._leave_mode()
        self.flow.clear()

    def _leave_mode(self) -> None:
        above: list[TorchFunctionMode] = []  # entered since by someone else, who is going to leave them
        while self._mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if (mode := _pop_mode()) is not self._mode:  # type: ignore[no-untyped-call]
                above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]

    # -- which module runs ------------------------------------------------------------------------------------

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        names = self.watch.names_of(module)
        above = self._stack[-1]
        if above.name is None and (len(self._stack) > 1 and above.module is None):
            self._stack.append(_Frame(None, None))  # inside what is excluded, all is
        elif self.watch.excluded(module):
            self._stack.append(_Frame(None, None))
        elif self.watch.wraps(module) or (above.name is not None and not names and _stateless(module)):
            self._stack.append(_Frame(above.name, above.module, above.calls))  # looked through
        elif names:
            self._stack.append(_Frame(_alias(names, above, module), module))
        else:
            # a wrapper around the model (DDP) is looked through; a module that is no part of it is not ours
            outside = above.name == "" and above.module is None and any(m is self.root for m in module.modules())
            self._stack.append(_Frame("", None) if outside else _Frame(None, module))
        # torch leaves modes aside in a backward pass
        if _in_backward() and self._mode not in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            _push_mode(self._mode)  # type: ignore[no-untyped-call]
            self._stack[-1].replays = True

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self._stack.pop() if len(self._stack) > 1 else self._stack[0]
        if frame.replays:
            _pop_mode()  # type: ignore[no-untyped-call]
        if frame.name is None or frame.module is not module or _in_backward() or not self.watch.names_of(module):
            return
        if output is None:
            return  # it has raised
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for listener in self.listeners:
                listener.on_module(frame.name, module, args, output)

    # -- what it calls ----------------------------------------------------------------------------------------

    def on_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it, and look."""
        activation = FUNCTIONS.get(func)
        out = func(*args, **kwargs)
        if func in LOSSES and self.active:
            self._on_loss(LOSSES[func], args, kwargs)
        if not self.active or not isinstance(out, Tensor) or self._stack[-1].name is None:
            return out
        if torch._C._functorch.is_functorch_wrapped_tensor(out):
            return out  # a derivative of the model, not a pass through it
        if activation is None:
            self.flow.called(func, args, kwargs, out)
        else:
            self._on_activation(activation, args, kwargs, out)
        return out

    def _on_loss(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prediction, target = (
            (*args, kwargs.get("input"), kwargs.get("target"))[:2]
            if len(args) != 1
            else (
                args[0],
                kwargs.get("target"),
            )
        )
        if not isinstance(prediction, Tensor) or not isinstance(target, Tensor) or _in_backward():
            return
        origin = self.flow.of(prediction)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for listener in self.listeners:
                listener.on_loss(name, prediction, target, None if origin is None else origin.site)

    def _on_activation(self, activation: Activation, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        source: Tensor = args[0] if args else kwargs["input"]
        if isinstance(source, nn.Parameter):
            return  # a weight kept in range, no unit
        options = activation.bind(args, kwargs)
        frame = self._stack[-1]
        again = _in_backward()
        if frame.module is not None:
            self.watch.ran.add(id(frame.module))
        # (B,) that no layer has made is (B, 1) without its last axis: one unit
        origin = self.flow.of(source)
        flat = y.ndim == 0 or (y.ndim == 1 and origin is None)
        overwritten = y is source or options.get("inplace", False)
        with torch.no_grad():
            seen = y.detach().unsqueeze(-1) if flat else y.detach()
            site = self._site(activation, origin, seen, options, again)
            if site is None:
                return
            if not flat:
                self.flow.mark(y, Origin(site.unit_dim, site=site))
            if (node := _node(y)) is not None:
                whole = seen if activation.name == "softsign" else None
                node.register_hook(_GradientHook(self, site, seen.shape, whole))
            if again:
                return
            z = None if overwritten else source.detach().unsqueeze(-1) if flat else source.detach()
            event = Event(site, z, seen, options, self._mask_for(seen, site), self.watch.scratch)
            for listener in self.listeners:
                listener.on_activation(event)

    def _site(
        self, activation: Activation, origin: Origin | None, y: Tensor, options: dict[str, Any], again: bool
    ) -> Site | None:
        frame = self._stack[-1]
        owner, what = frame, cast("Any", activation.name)
        if isinstance(frame.module, MODULES) and len(self._stack) > 1:
            owner, what = self._stack[-2], id(frame.module)
        if again and owner is self._stack[0]:
            return self._replayed(what, origin, y)
        count = owner.calls.get(what, 0)
        owner.calls[what] = count + 1
        key = (owner.name, what, count)
        site = self.watch.sites.get(key)
        if site is None and again:
            return None
        if site is None:
            name = self._name(owner, frame, what, count, activation)
            dim = self.watch.chosen_dim(name, y.ndim)
            dim = dim if dim is not None else unit_dim(origin, y.ndim)
            site = Site(name, activation, y.shape[dim], dim, origin, activation.interval(options))
            self.watch.sites[key] = site
        if y.ndim < -site.unit_dim or y.shape[site.unit_dim] != site.units:
            return None  # another shape in the same place
        return site

    def _replayed(self, what: Any, origin: Origin | None, y: Tensor) -> Site | None:
        """The site of what runs again by itself, last first, without the modules that were around it."""
        same = [s for (_, w, _), s in self.watch.sites.items() if w == what and y.shape[s.unit_dim] == s.units]
        if len(same) > 1:
            weight = None if origin is None else origin.weight
            same = [s for s in same if s.origin is not None and s.origin.weight == weight is not None]
        return same[0] if len(same) == 1 else None

    def _name(self, owner: _Frame, frame: _Frame, what: Any, count: int, activation: Activation) -> str:
        if what == activation.name:
            name = f"{owner.name}.{what}" if owner.name else str(what)
        else:
            assert frame.module is not None
            inside = f"{owner.name}." if owner.name else ""
            aliases = [n for n in self.watch.names_of(frame.module) if n.startswith(inside)]
            aliases = [n for n in aliases if "." not in n.removeprefix(inside)] or aliases
            if count < len(aliases):
                return self._unused(aliases[count])
            name = aliases[0] if aliases else str(frame.name)
        return self._unused(name)

    def _unused(self, name: str) -> str:
        taken = {site.name for site in self.watch.sites.values()}
        number = 0
        while (numbered := f"{name}#{number}" if number else name) in taken:
            number += 1
        return numbered

    def _mask_for(self, y: Tensor, site: Site) -> Tensor | None:
        """The mask with an axis for each of the output's: (B, T) for (B, T, D), (B, D, T), (B, D) or (B T, D)."""
        mask = self.mask
        if mask is None or y.ndim + site.unit_dim == 0:
            return None
        axes = site.other_dims(y)
        if [y.shape[dim] for dim in axes[: mask.ndim]] == list(mask.shape):
            return mask.view([y.shape[dim] if dim in axes[: mask.ndim] else 1 for dim in range(y.ndim)])
        ones = [1] * (y.ndim - 1)
        if y.shape[0] == mask.numel():
            return mask.view(-1, *ones)
        # where positions are gone, an example counts unless all of it is padding
        return mask.flatten(1).amax(1).view(-1, *ones) if y.shape[0] == mask.shape[0] else None


def _alias(names: list[str], above: _Frame, module: nn.Module) -> str:
    inside = f"{above.name}." if above.name else ""
    return next((name for name in names if name.startswith(inside)), names[0])


def _stateless(module: nn.Module) -> bool:
    """Whether it is a function in the form of a module, made on the spot as in ``nn.ReLU()(x)``."""
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _node(y: Tensor) -> Any:
    """The node of the graph that is the activation itself."""
    if y.grad_fn is None or not y._is_view():
        return y.grad_fn
    # a view that was overwritten: its own node is that of the view, the activation's is that of what it views
    base = y._base
    whole = base is not None and base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous()
    return base.grad_fn if base is not None and whole else None


class _GradientHook:
    """Hears a gradient pass one node of the graph, in this step only."""

    def __init__(self, watching: _Open, site: Site, shape: torch.Size, composite: Tensor | None) -> None:
        self._watching = weakref.ref(watching)
        self._site, self._shape, self._composite = site, shape, composite

    def __call__(self, grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
        watching = self._watching()
        # a gradient that is to be differentiated again belongs to a term of the loss, not to its backward pass
        if watching is None or not watching.active or torch.is_grad_enabled():
            return
        grad_z, grad_y = grad_inputs[0], grad_outputs[0]
        if grad_z is None or grad_y is None:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            grad_z, grad_y = grad_z.reshape(self._shape), grad_y.reshape(self._shape)
            if self._composite is not None and self._site.activation.slope is not None:
                # torch makes it of several functions, of which this node is the last
                slope = self._site.activation.slope(None, self._composite, {})
                assert slope is not None
                grad_z = grad_y * slope
            for listener in watching.listeners:
                listener.on_gradient(self._site, grad_z, grad_y)
