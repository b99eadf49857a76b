"""The layers: imports go down only, and restricted modules follow their restrictions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgtemp

ROOT = Path(pgtemp.__file__).parent
# From the bottom up; a module may import from its own layer and from those before it.
LOWER = [
    "errors",
    "host",
    "options",
    "uri",
    "libpq",
    "wire",
    "supervisor",
    "programs",
    "images",
    "server",
    "sql",
    "templates",
    "allocation",
]
HANDLES = ["pgtempdb", "database", "template", "cluster", "aio", "doctor"]
DOORS = ["testing", "django", "pytest_plugin", "daemon", "cli", "__main__"]
LAYERS = [*LOWER, *HANDLES, *DOORS]
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer_of(path: Path) -> str:
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
    """No module imports from a layer above its own."""
    own = LAYERS.index(layer_of(path))
    for name in imports_of(path):
        if name.startswith("pgtemp.") and (layer := name.split(".")[1]) in LAYERS:
            assert LAYERS.index(layer) <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "wire").glob("*.py")), ids=lambda path: path.name)
def test_the_wire_is_sans_io(path: Path) -> None:
    """Protocol code imports no sockets, no event loop and no processes."""
    forbidden = {"socket", "asyncio", "subprocess", "os", "threading"}
    assert not {name.split(".")[0] for name in imports_of(path)} & forbidden


def test_only_processes_spawns() -> None:
    """One module runs programs; only the supervisor's process starts postmasters."""
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


# Calls that open, list, make, change or remove a path, by their last name.
_FILE_CALLS = {
    "open", "fdopen", "read_text", "read_bytes", "write_text", "write_bytes", "unlink", "rename",
    "rmdir", "removedirs", "rmtree", "chmod", "lchmod", "chown", "lchown", "fchown", "fchmod",
    "mkdir", "mkdtemp", "makedirs", "mkfifo", "symlink", "symlink_to", "hardlink_to", "link",
    "utime", "touch", "truncate", "scandir", "listdir", "iterdir", "glob", "iglob", "rglob", "walk",
    "fwalk", "copyfile", "copytree", "copy2", "move",
}  # fmt: skip
# Receivers whose methods of these names do nothing with a path of the file system.
_NOT_FILES = {"admin_sql", "builder", "workshop", "Tree", "above", "images", "place", "image"}
# The modules in which every function uses descriptors, or runs as the user of the files.
_MECHANISM = {
    "host/tree.py": "owns the mechanism",
    "host/user_paths.py": "walks the path that an option names, by descriptors",
    "host/openat.py": "opens one name in an open directory",
    "host/removal.py": "removes one name in an open directory",
    "supervisor/recycle_files.py": "runs in a process of the server's user",
    "programs/nameless_user.py": "copies programs within the cache",
}
# The functions that use paths, and which: never below a data directory, nor in an image.
_PATHS = {
    "allocation/shared_server.py:SharedServer.now": "a run directory itself, which is the owner's",
    "cli/main.py:_open_standard_streams": "/dev/null",
    "daemon/control_socket.py:_connect": "the run directory of a daemon, by a descriptor",
    "daemon/credentials.py:password": "a file that an option names",
    "daemon/credentials.py:write_root": "the daemon's own run directory",
    "allocation/persisted.py:store": "the folder of kept data, which is the caller's",
    "templates/recipe.py:Recipe._parts": "files that a recipe names",
    "templates/recipe.py:_files": "files that a recipe names",
    "templates/recipe.py:_watched": "files that a recipe names",
    "templates/recycle.py:Reuse._begin": "/dev/null",
    "sql/dump_restore.py:_connects": "a file that the user specified",
    "sql/dump_restore.py:_decompressed": "a file that the user specified, and a temporary copy",
    "sql/dump_restore.py:uncompressed": "a file that the user specified",
    "sql/dump_restore.py:head": "a dump that an option names",
    "sql/dump_restore.py:dump": "the directory of a dump, by a descriptor",
    "sql/dump_restore.py:psql_on_terminal": "the terminal",
    "django/creation.py:_files": "the project's migrations",
    "doctor.py:_cache": "names of images in the cache",
    "host/pid1.py:_lead": "the terminal",
    "host/locks.py:create_locked": "lock files in directories of the caller's",
    "host/locks.py:is_locked": "lock files in directories of the caller's",
    "host/locks.py:locked": "lock files in directories of the caller's",
    "host/locks.py:locked_at_once": "lock files in directories of the caller's",
    "host/paths.py:make_dirs": "the cache and the folder of kept data",
    "host/ports.py:_files_of": "/proc",
    "host/ports.py:holder": "/proc",
    "host/procfs.py:read": "/proc",
    "host/foreground.py:_is_on_terminal": "the terminal",
    "host/disk_space.py:put_aside": "a file in a run directory itself, which is the owner's",
    "host/disk_space.py:size_of": "sizes alone",
    "host/disk_space.py:reserve_released": "a file in a run directory itself, which is the owner's",
    "options/server.py:ServerOptions._check_readable": "files that options name",
    "server/status.py:read_log": "a file in a run directory itself, or an option's",
    "supervisor/crash.py:all_postgres": "/proc",
    "supervisor/crash.py:open_data": "a data directory itself, by a descriptor",
    "supervisor/crash.py:_pipes_of": "/proc",
    "supervisor/crash.py:_processes": "/proc",
    "supervisor/children.py:Server._become_postmaster": "/dev/null",
    "supervisor/children.py:Server.rename_for_removal": "run directories and links to them",
    "server/rundir.py:RunDirectory._sockets": "names in a run directory, which is the owner's",
    "server/rundir.py:RunDirectory.link_socket": "a link in a run directory, by a descriptor",
    "server/rundir.py:_let_group_enter": "a run directory itself, by a descriptor",
    "server/rundir.py:make": "a run directory itself",
    "server/rundir.py:_socket_dir": "a link to a run directory",
    "server/rundir.py:reopen": "the lease in a run directory, which is the owner's",
    "images/image.py:Image.begin": "the directory of an image itself",
    "images/publish.py:building_at": "the directory of an image itself, by a descriptor",
    "images/cache.py:_load": "the manifest of an image, which is the owner's",
    "images/cache.py:_remove": "a lock in the cache",
    "images/cache.py:_sizes": "manifests of images, which are the owner's",
    "images/cache.py:forget": "names of locks in the cache",
    "images/cache.py:sweep": "names in the cache",
    "programs/search.py:_read_version": "a note in the cache",
    "programs/search.py:_candidates": "folders of programs",
    "programs/search.py:_in_wheel": "folders of programs",
    "programs/search.py:_search": "folders of programs",
    "supervisor/inventory.py:Found.databases": "names alone",
    "supervisor/inventory.py:_below": "directories in a run directory, by descriptors",
    "supervisor/inventory.py:run_directories": "names of run directories",
    "supervisor/leftovers.py:_remove_dangling_link": "links to run directories",
    "supervisor/leftovers.py:_sweep_abandoned": "a run directory, by a descriptor",
    "supervisor/leftovers.py:is_unfinished": "names alone",
    "supervisor/leftovers.py:sweep": "names of run directories",
    "supervisor/leftovers.py:sweep_directory": "a run directory, by a descriptor",
    "supervisor/supervision.py:guarded": "/dev/null",
    "templates/migrations.py:_any_contains": "a directory that the user specified",
    "templates/migrations.py:_has": "a directory that the user specified",
    "templates/migrations.py:_is_named": "a directory that the user specified",
    "templates/migrations.py:_sql_in": "a directory that the user specified",
    "testing/persisted.py:_remove_old_runs": "names in the caller's folder of persisted data",
    "testing/persisted.py:directory_for": "the folder of kept data, which is the caller's",
}


def test_one_module_works_with_files_that_another_user_can_change() -> None:
    """A function that uses paths must be in the list above, with the kind of the paths."""
    found = {
        f"{path.relative_to(ROOT).as_posix()}:{name}"
        for path in MODULES
        if path.relative_to(ROOT).as_posix() not in _MECHANISM
        for name in _with_file_calls(ast.parse(path.read_text()), "")
    }
    assert found - _PATHS.keys() == set(), "use host/tree.py, or add the kind of these paths"
    assert _PATHS.keys() - found == set(), "these no longer use paths"


def test_functions_of_os_are_called_by_their_modules_names() -> None:
    """The test above recognizes functions of os and shutil by the names of their modules."""
    for path in MODULES:
        hidden = {name for name in imports_of(path) if name.split(".")[0] in ("os", "shutil")}
        assert hidden <= {"os", "shutil"}, path


def _with_file_calls(tree: ast.AST, inside: str) -> Iterator[str]:
    """The functions in which a path is used."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{inside}.{node.name}".lstrip(".") if named else inside  # type: ignore[union-attr]
        if isinstance(node, ast.Call) and _is_file_call(node.func):
            yield inside
        yield from _with_file_calls(node, name)


def _is_file_call(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute) or function.attr not in _FILE_CALLS:
        return False
    return ast.unparse(function.value).partition(".")[0] not in _NOT_FILES
