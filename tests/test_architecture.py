"""The rooms and who may enter which; what is public and how it is documented."""

from __future__ import annotations

import ast
import graphlib
import inspect
from pathlib import Path

import pytest

import lightning_ae

PACKAGE = Path(lightning_ae.__file__).parent
FOR_ALL = {"rebuildable", "hooks", "boxes", "checks", "files", "limits", "exporting"}
LOW = {"data", "corruption", "networks", "codes", "losses", "metrics"}
BELOW_PARETO = LOW | FOR_ALL | {"checkpoint", "settings", "penalties", "models", "diagnostics", "callbacks"}
ALLOWED = {
    "rebuildable": {"files"},
    "checks": set(),
    "files": set(),
    "hooks": set(),  # data collect from a layer and metrics splice into it, and neither may import the other
    "exporting": set(),
    "limits": set(),  # of learned scales, in codes and losses
    "boxes": set(),  # penalties and causes ask of models, which import penalties
    **{room: FOR_ALL for room in LOW},
    "settings": {"rebuildable"},
    "checkpoint": {"rebuildable", "files", "settings"},
    "penalties": LOW | FOR_ALL,
    "models": LOW | FOR_ALL | {"checkpoint", "penalties", "settings"},
    "diagnostics": {"metrics", "losses", "models", "boxes", "hooks", "networks", "rebuildable"},
    "callbacks": {"metrics", "losses", "models", "boxes", "hooks", "checks", "files", "diagnostics"},
    "pareto": BELOW_PARETO,
    "cli": BELOW_PARETO | {"pareto", ""},
    "__main__": {"cli"},
    "__init__": BELOW_PARETO | {"pareto"},
}


class Sources(dict[str, ast.Module]):
    """The files of a package by their dotted names, a package's ``__init__`` with that as the last part."""

    @classmethod
    def of(cls, texts: dict[str, str]) -> Sources:
        return cls({name: ast.parse(text) for name, text in texts.items()})

    def imports(self, name: str) -> set[tuple[str, str]]:
        """``(module, name in it)``, in type hints and functions as well; no name where the module is imported."""
        found = set()
        for node in ast.walk(self[name]):
            if isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                here = name.split(".")[: -node.level] if node.level else []
                module = ".".join([*here, *([node.module] if node.module else [])])
                found |= {(module, alias.name) for alias in node.names}
        return {(module, attribute) for module, attribute in found if module.split(".")[0] == name.split(".")[0]}

    def file(self, module: str, attribute: str) -> str:
        """Where a name is defined, as far as ``__init__`` files say; the module itself if they do not."""
        if attribute and self.file(f"{module}.{attribute}", "") in self:
            return self.file(f"{module}.{attribute}", "")
        if f"{module}.__init__" not in self:
            return module
        for node in self[f"{module}.__init__"].body:
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    if attribute == (alias.asname or alias.name):
                        return self.file(node.module, alias.name)
        return f"{module}.__init__"

    def circles(self) -> set[frozenset[str]]:
        """The largest sets of files each of which imports, by way of others, every other."""
        direct = {name: {self.file(*imported) for imported in self.imports(name)} & set(self) for name in self}
        reached = {}
        for name in self:
            seen, todo = set(), list(direct[name])
            while todo:
                if (file := todo.pop()) not in seen:
                    seen.add(file)
                    todo += direct[file]
            reached[name] = seen
        return {frozenset(b for b in reached[a] if a in reached[b]) for a in self if a in reached[a]}


def _name(path: Path) -> str:
    return ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts))


def _room(name: str) -> str:
    return [*name.split("."), ""][1]


SOURCES = Sources.of({_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))})


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name: str):
    room = _room(name)
    assert room in ALLOWED, f"{room} is a new room: say what it may import"
    rooms = {
        _room(f"{module}.{attribute}" if attribute in ALLOWED else module)
        for module, attribute in SOURCES.imports(name)
    }
    assert rooms - {room} <= ALLOWED[room]


def test_rooms_stand_in_an_order():
    graphlib.TopologicalSorter(ALLOWED).prepare()


def test_no_files_import_each_other_in_a_circle():
    circles = SOURCES.circles()
    assert not circles, [sorted(circle) for circle in circles]


@pytest.mark.parametrize(
    "back",
    [
        "from p.low import a",
        "from p.low.a import A",
        "import p.low.a",
        "from .low.a import A",
        "from p.low import A",
        "from p import A",
        "from p import A as B",
        "if TYPE_CHECKING:\n    from p.low.a import A",
        "def f():\n    from p.low import A",
    ],
)
def test_a_circle_is_seen_whatever_closes_it(back: str):
    files = {
        "p.__init__": "from p.low import A",
        "p.low.__init__": "from p.low.a import A\nfrom p.low.c import C",
        "p.low.a": "from p.b import B",
        "p.low.c": "from p.low import A",  # a sibling, through their own room's door
        "p.b": "import torch",
    }
    assert not Sources.of(files).circles()
    assert Sources.of({**files, "p.b": back}).circles() == {frozenset({"p.b", "p.low.a"})}


def test_all_lists_what_is_public():
    public = {
        name for name, value in vars(lightning_ae).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(lightning_ae.__all__)


@pytest.mark.parametrize("name", lightning_ae.__all__)
def test_public_names_are_documented(name: str):
    documentation = inspect.getdoc(getattr(lightning_ae, name)) or ""
    assert documentation.strip()
    value = getattr(lightning_ae, name)
    if inspect.isclass(value) and (inspect.isabstract(value) or issubclass(value, tuple)):
        return
    if name in ("load_predictions", "PointwiseLoss", "ReconstructionLoss", "Likelihood", "Code", "Penalty"):
        return  # contracts, shown at work in their subclasses; the reader in its writer's example
    assert ">>>" in documentation, f"{name} has no runnable example"


def test_modules_are_short_enough_to_read():
    long = {str(path): n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 350}
    assert not long
