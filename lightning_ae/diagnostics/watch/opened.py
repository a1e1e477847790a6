"""A watch while it is open: which module runs, what it calls, and which gradients come back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_ae.diagnostics.watch.activations import FUNCTIONS, MODULES, Activation
from lightning_ae.diagnostics.watch.comparisons import Comparisons
from lightning_ae.diagnostics.watch.flow import Flow, Origin, unit_dim
from lightning_ae.diagnostics.watch.lineage import Lineage
from lightning_ae.diagnostics.watch.patterns import Patterns
from lightning_ae.diagnostics.watch.registry import Registry
from lightning_ae.diagnostics.watch.site import EVENTS, Event, Listener, Site, hears

#: What gives a tensor and is no function of one.
_PLAIN = {Tensor.grad.__get__, Tensor.backward}  # type: ignore[union-attr]


@dataclass
class _Frame:
    name: str | None  # None: not a part of the model
    module: nn.Module | None
    calls: dict[Any, int] = field(default_factory=dict)
    replays: bool = False  # has put the mode back for what runs again in a backward pass


class _Mode(TorchFunctionMode):
    def __init__(self, watching: OpenWatch) -> None:
        super().__init__()
        self._watching = watching

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._watching.on_function(func, args, kwargs or {})


class OpenWatch:
    """A watch that is open on a model, for these listeners."""

    def __init__(
        self,
        watch: Registry,
        root: nn.Module,
        listeners: Sequence[Listener],
        mask: Tensor | None,
        flow: Flow,
        batch: Any = None,
    ) -> None:
        self.watch, self.root, self.mask, self.flow = watch, root, mask, flow
        #: who is told of what: to follow a step for nobody would cost as much as all the rest
        self._told = {what: [getattr(who, what) for who in listeners if hears(who, what)] for what in EVENTS}
        self._follows = any(self._told[what] for what in ("on_loss", "on_entry", "on_pattern"))
        self._counts = bool(self._told["on_activation"] or self._told["on_gradient"])
        self.lineage = Lineage(batch, memory=32 if root.training else 8)
        self._comparisons = Comparisons(self.lineage, evaluating=not root.training)
        self._patterns = Patterns(self.lineage)
        self.active = True
        self._stack = [_Frame("", None)]
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._mode = _Mode(self)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> OpenWatch:
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
        self.lineage.clear()
        self._comparisons.clear()
        self._patterns.clear()

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
        self.watch.learning = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            x = args[0] if args and self._told["on_entry"] else None
            if module._parameters and isinstance(x, Tensor) and x.is_floating_point() and self.lineage.is_data(x):
                self._tell("on_entry", frame.name, module, x.detach())
            self._tell("on_module", frame.name, module, args, output)

    def _tell(self, what: str, *args: Any) -> None:
        """Tell all; what they make of it is never a reason for training to end."""
        for tell in self._told[what]:
            try:
                tell(*args)
            except Exception as error:
                self.watch.complain(type(getattr(tell, "__self__", tell)).__name__, error)

    # -- what it calls ----------------------------------------------------------------------------------------

    def on_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it, and look."""
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            if self._follows and isinstance(out, (tuple, list)) and self.active:
                self.lineage.parts(args, out)
            return out
        if not self.active or func in _PLAIN:
            return out
        if torch._C._functorch.is_functorch_wrapped_tensor(out):
            return out  # a derivative of the model, not a pass through it
        if self._follows and not _in_backward():
            try:
                self._follow(func, args, kwargs, out)
            except Exception as error:
                self.watch.complain("The watch", error)
        if (frame := self._stack[-1]).name is None:
            return out  # no part of the model
        if not self._counts:
            if frame.module is not None and func in FUNCTIONS:
                self.watch.ran.add(id(frame.module))
            return out
        activation = FUNCTIONS.get(func)
        if activation is None:
            self.flow.called(func, args, kwargs, out)
        else:
            self._on_activation(activation, args, kwargs, out)
        return out

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Follow data and comparisons through a call."""
        frame = self._stack[-1].name
        made = self.lineage.called(func, args, kwargs, out, frame or "")
        if frame is None and self._stack[-1].module is None:
            return  # inside a metric, say
        with torch._C.DisableTorchFunction():
            found = list(self._patterns.of(func, args, kwargs, out, frame, made)) if frame is not None else []
            comparison = self._comparisons.of(func, args, kwargs, out)
            if comparison is not None and (skip := self._patterns.skip(comparison.key)) is not None:
                found.append(skip)
        if found or comparison is not None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                for pattern in found:
                    self._tell("on_pattern", pattern)
                if comparison is not None:
                    self._tell("on_loss", comparison)

    def _on_activation(self, activation: Activation, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        source: Tensor = args[0] if args else kwargs["input"]
        if isinstance(source, nn.Parameter) or y.layout is not torch.strided:
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
            if self._told["on_gradient"] and (node := _node(y)) is not None:
                whole = seen if activation.name == "softsign" else None
                node.register_hook(_GradientHook(self, site, seen.shape, whole))
            if again:
                return
            z = None if overwritten else source.detach().unsqueeze(-1) if flat else source.detach()
            mask = self._mask_for(seen, site)
            event = Event(site, z, seen, options, mask, self.watch.scratch, self.watch.number)
            self._tell("on_activation", event)

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

    def __init__(self, watching: OpenWatch, site: Site, shape: torch.Size, composite: Tensor | None) -> None:
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
        with torch._C.DisableTorchFunction():
            if grad_z.shape != self._shape:
                grad_z, grad_y = grad_z.reshape(self._shape), grad_y.reshape(self._shape)
            if self._composite is not None and self._site.activation.slope is not None:
                # torch makes it of several functions, of which this node is the last
                slope = self._site.activation.slope(None, self._composite, {})
                assert slope is not None
                grad_z = grad_y * slope
            for tell in watching._told["on_gradient"]:
                tell(self._site, grad_z, grad_y)
