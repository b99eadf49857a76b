"""The floors: an import goes down only, and what must stay free of something does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pgtemp

ROOT = Path(pgtemp.__file__).parent
# From the ground up; a module may import from its own floor and from those before it.
LOWER = [
    "errors",
    "host",
    "options",
    "daemonoptions",
    "suiteoptions",
    "uri",
    "server",
    "databases",
    "wire",
]
HANDLES = ["pgtempdb", "works", "database", "cluster", "aio", "doctor"]
DOORS = ["suite", "django", "pytest_plugin", "daemon", "cli", "__main__"]
FLOORS = [*LOWER, *HANDLES, *DOORS]
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    """No module imports from a floor above its own."""
    own = FLOORS.index(floor_of(path))
    for name in imports_of(path):
        if name.startswith("pgtemp.") and (floor := name.split(".")[1]) in FLOORS:
            assert FLOORS.index(floor) <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "wire").glob("*.py")), ids=lambda path: path.name)
def test_the_wire_is_sans_io(path: Path) -> None:
    """Protocol code imports neither sockets nor an event loop nor processes."""
    forbidden = {"socket", "asyncio", "subprocess", "os", "threading"}
    assert not {name.split(".")[0] for name in imports_of(path)} & forbidden


def test_only_processes_spawns() -> None:
    """One module runs programs; the warden's process alone starts postmasters."""
    spawning = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        if {"subprocess.run", "subprocess.Popen"} & _calls(path)
    }
    assert spawning == {"host/processes.py"}


def _calls(path: Path) -> set[str]:
    return {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }  # fmt: skip
