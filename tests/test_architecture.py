"""The rooms and who may enter which; what is public and how it is documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import lightning_ae

PACKAGE = Path(lightning_ae.__file__).parent
LOW = {"data", "corruption", "networks", "codes", "losses", "metrics"}
ALLOWED = {
    **{room: {"rebuildable", "hooks"} for room in LOW},
    "rebuildable": set(),
    "hooks": set(),  # data collect from a layer and metrics splice into it, and neither may import the other
    "checkpoint": {"rebuildable"},
    "penalties": LOW | {"checkpoint", "rebuildable"},
    "models": LOW | {"checkpoint", "rebuildable", "penalties"},
    "diagnostics": {"metrics", "losses", "models"},
    "callbacks": {"metrics", "losses", "models", "diagnostics"},
    "pareto": LOW | {"checkpoint", "rebuildable", "penalties", "models", "diagnostics", "callbacks"},
    "cli": LOW | {"checkpoint", "rebuildable", "penalties", "models", "diagnostics", "callbacks", "pareto", ""},
    "__main__": {"cli"},
    "__init__": LOW | {"checkpoint", "rebuildable", "penalties", "models", "diagnostics", "callbacks", "pareto"},
}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.Module) -> set[str]:
    """Rooms of this package that are imported when the module is; ``if TYPE_CHECKING`` is not."""
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(child) for node in checked for child in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    ours = [name.split(".") for name in names if name.split(".")[0] == "lightning_ae"]
    return {(name[1] if len(name) > 1 else "") for name in ours}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    room = _room(path)
    assert room in ALLOWED, f"{room} is a new room: say what it may import"
    assert _imports(ast.parse(path.read_text())) - {room} <= ALLOWED[room]


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
