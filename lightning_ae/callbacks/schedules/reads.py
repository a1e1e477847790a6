"""Whether a number in a model is read while a batch runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from lightning_ae.callbacks.schedules.targets import Step, Target, read, write


class Read:
    """Whether it was seen."""

    def __init__(self) -> None:
        self.seen = False


class Reads:
    """Sees who reads which targets, from :meth:`watch` to :meth:`close`.

    Attributes are seen by a ``__getattribute__`` that their class has meanwhile (so that objects keep their type, and
    can be copied and pickled), entries of a ``dict`` by one that stands in its place; of other containers it is seen
    that they are asked for. What cannot be told counts as read.

    Compiled code has to run eagerly meanwhile.

    Example:
        >>> from torch import nn
        >>> model = nn.Module()
        >>> model.beta = 1.0
        >>> reads = Reads()
        >>> read = reads.watch(Target(model, "beta"))
        >>> read.seen, model.beta, read.seen
        (False, 1.0, True)
        >>> reads.close()
    """

    def __init__(self) -> None:
        self._dicts: dict[int, _WatchedDict] = {}
        self._undo: list[Callable[[], None]] = []

    def watch(self, target: Target) -> Read:
        """Begin to look at a target."""
        found = Read()
        self._watch(target.trail, found)
        return found

    def close(self) -> None:
        """Leave everything as it was; may be called again."""
        while self._undo:
            self._undo.pop()()
        self._dicts.clear()

    def _watch(self, trail: Sequence[Step], found: Read) -> None:
        owner, key = trail[-1]
        if type(owner) is dict and len(trail) > 1:
            self._watch_dict(owner, key, trail[-2], found)
        elif isinstance(owner, (Mapping, Sequence)):
            self._watch(trail[:-1], found)
        elif isinstance(getattr(type(owner), key, None), property):
            found.seen = True  # what is behind it may be read past it
        else:
            self._watch_attribute(owner, key, found)

    def _watch_attribute(self, owner: Any, key: str, found: Read) -> None:
        try:
            self._undo.append(_Ears.put_on(owner, key, found))
        except TypeError:  # a class written in C
            found.seen = True

    def _watch_dict(self, owner: dict[Any, Any], key: Any, above: Step, found: Read) -> None:
        watched = self._dicts.get(id(owner))
        if watched is None:
            holder, name = self._dicts.get(id(above[0]), above[0]), above[1]
            watched = _WatchedDict(owner)
            try:
                write(holder, name, watched)
            except (AttributeError, TypeError):
                found.seen = True
                return
            self._dicts[id(owner)] = watched
            self._undo.append(lambda: _put_back(holder, name, watched, owner))
        watched.listeners.setdefault(key, []).append(found)


def _put_back(holder: Any, name: Any, watched: _WatchedDict, original: dict[Any, Any]) -> None:
    if read(holder, name) is watched:
        write(holder, name, original)
        now = watched.plain()
        if now != original:
            original.clear()
            original.update(now)


class _Ears:
    """A class's ``__getattribute__`` for as long as somebody listens to one of its instances."""

    _of: ClassVar[dict[type, _Ears]] = {}

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.listeners: list[tuple[Any, str, Read]] = []
        self.own = cls.__dict__.get("__getattribute__")
        inherited: Any = cls.__getattribute__
        listeners = self.listeners

        def __getattribute__(instance: Any, name: str) -> Any:
            for owner, key, found in listeners:
                if owner is instance and key == name:
                    found.seen = True
            return inherited(instance, name)

        cls.__getattribute__ = __getattribute__  # type: ignore[assignment, method-assign]

    @classmethod
    def put_on(cls, owner: Any, key: str, found: Read) -> Callable[[], None]:
        """Listen to an attribute; returns what ends it. A ``TypeError`` if the class cannot be changed."""
        kind = type(owner)
        ears = cls._of.get(kind)
        if ears is None:
            ears = cls._of[kind] = cls(kind)
        entry = (owner, key, found)
        ears.listeners.append(entry)
        return lambda: ears._take_off(entry)

    def _take_off(self, entry: tuple[Any, str, Read]) -> None:
        self.listeners[:] = [other for other in self.listeners if other is not entry]
        if self.listeners:
            return
        del self._of[self.cls]
        if self.own is None:
            del self.cls.__getattribute__
        else:
            self.cls.__getattribute__ = self.own  # type: ignore[method-assign]


class _WatchedDict(dict[Any, Any]):
    """A dict that knows whose entries were asked for; copied and pickled as an ordinary one."""

    def __init__(self, entries: dict[Any, Any]) -> None:
        super().__init__(entries)
        self.listeners: dict[Any, list[Read]] = {}

    def plain(self) -> dict[Any, Any]:
        """The entries now, without counting as read."""
        return dict(super().items())

    def _note(self, *keys: Any) -> None:
        for key in keys or tuple(self.listeners):
            for found in self.listeners.get(key, ()):
                found.seen = True

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        # with one of its own, dict(...) and {**...} ask for each entry instead of copying them all unheard
        return super().__iter__()

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._note(key)
        return super().pop(key, *default)

    def items(self) -> Any:
        self._note()
        return super().items()

    def values(self) -> Any:
        self._note()
        return super().values()

    def copy(self) -> dict[Any, Any]:
        self._note()
        return self.plain()

    def __or__(self, other: Any) -> Any:
        self._note()
        return self.plain() | other

    def __ror__(self, other: Any) -> Any:
        self._note()
        return other | self.plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the one mapping beside dict itself, which has no constructor there, that torch.load reads with weights_only
        return OrderedDict, (), None, None, iter(self.plain().items())
