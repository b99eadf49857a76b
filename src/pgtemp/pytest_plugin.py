"""The pytest plugin: options, fixtures and hooks. Their implementation is in `testing/`.

Until a test requests a fixture, only the options are imported, and no server is started.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pgtemp.testing import pytest_config
from pgtemp.testing.run import Run, new_name

if TYPE_CHECKING:
    from pgtemp.cluster import Cluster
    from pgtemp.database import Database
    from pgtemp.templates.recipe import Build, Recipe
    from pgtemp.testing.databases_of_a_test import Case
    from pgtemp.testing.requirements import Needs
    from pgtemp.testing.suite import Suite

_SUITE = pytest.StashKey["Suite"]()
_CASE = pytest.StashKey["Case"]()
_RUN = pytest.StashKey[Run]()
_HAS_WORKERS = pytest.StashKey[bool]()
_OPENS = "pgtemp_open"  # the property of a report with the command that opens a database


@pytest.fixture(scope="session")
def pgtemp_cluster(_pgtemp_suite: Suite) -> Cluster:
    """The server for the tests of this process, a `pgtemp.Cluster`."""
    return _pgtemp_suite.cluster


@pytest.fixture(scope="session")
def pgtemp_template(pytestconfig: pytest.Config) -> Build | Recipe | None:
    """The template of databases; override it to return a function, a path, "cmd:…" or a Recipe.

    Return None for an empty database. The default is the option `--pgtemp-template`.
    """
    return tuple(pytest_config.chosen(pytestconfig).template) or None


@pytest.fixture
def pgtemp(
    request: pytest.FixtureRequest,
    _pgtemp_suite: Suite,
    pgtemp_cluster: Cluster,
    pgtemp_template: Build | Recipe | None,
) -> Iterator[Database]:
    """A database of the test's own: a clone of the template, dropped after the test."""
    for claim in _claims(request, _pgtemp_suite, pgtemp_cluster, pgtemp_template):
        yield claim()


@pytest.fixture
def pgtemp_uri(pgtemp: Database) -> str:
    """The URL of the test's own database."""
    return pgtemp.uri


@pytest.fixture
def pgtemp_factory(
    request: pytest.FixtureRequest,
    _pgtemp_suite: Suite,
    pgtemp_cluster: Cluster,
    pgtemp_template: Build | Recipe | None,
) -> Iterator[Callable[..., Database]]:
    """A function that creates databases for the test; it takes the mark's keyword arguments."""
    yield from _claims(request, _pgtemp_suite, pgtemp_cluster, pgtemp_template)


@pytest.fixture(scope="module")
def pgtemp_module(
    request: pytest.FixtureRequest,
    _pgtemp_suite: Suite,
    pgtemp_cluster: Cluster,
    pgtemp_template: Build | Recipe | None,
) -> Iterator[Database]:
    """A database that the tests of a module share."""
    for claim in _claims(request, _pgtemp_suite, pgtemp_cluster, pgtemp_template):
        yield claim()


@pytest.fixture(scope="session")
def _pgtemp_suite(pytestconfig: pytest.Config) -> Suite:
    from pgtemp.testing.suite import Suite

    suite = Suite(
        pytest_config.chosen(pytestconfig), pytestconfig.rootpath, pytestconfig.stash[_RUN]
    )
    # Closed in pytest_sessionfinish: the report of the last test is created after fixture teardown.
    pytestconfig.stash[_SUITE] = suite
    return suite


def _claims(
    request: pytest.FixtureRequest,
    suite: Suite,
    cluster: Cluster,
    template: Build | Recipe | None,
) -> Iterator[Callable[..., Database]]:
    """Yield the function that claims databases for a test or a module, with its mark's defaults."""
    from pgtemp.testing.databases_of_a_test import Case
    from pgtemp.testing.leaks import left_open
    from pgtemp.testing.requirements import needs_of

    node = request.node
    case = node.stash.setdefault(_CASE, Case(suite, node.nodeid))
    mark = node.get_closest_marker("pgtemp")
    usual = _needs_of_mark(mark)

    claimed: list[Database] = []

    def claim(**kwargs: Any) -> Database:
        claimed.append(case.claim(needs_of(kwargs, usual), cluster, template))
        return claimed[-1]

    yield claim
    try:
        if left := [line for database in claimed for line in left_open(database)]:
            _warn(node, left)
    finally:
        if not isinstance(node, pytest.Item):  # for a test, `end` is called later, after its report
            case.end()


def _needs_of_mark(mark: pytest.Mark | None) -> Needs:
    from pgtemp.testing.requirements import needs_of

    if mark is not None and mark.args:
        raise pytest.UsageError("@pytest.mark.pgtemp takes only keyword arguments")
    return needs_of(mark.kwargs if mark is not None else {})


def _warn(node: Any, left: list[str]) -> None:
    from pgtemp.errors import PgTempWarning

    line = node.location[1] + 1 if isinstance(node, pytest.Item) and node.location[1] else 1
    plural = "s" if len(left) > 1 else ""
    warnings.warn_explicit(
        f"{node.nodeid} left {len(left)} connection{plural} open to its database; close them, or "
        "their pool, before the test ends:\n    " + "\n    ".join(left),
        PgTempWarning,
        str(node.path),
        line,
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    pytest_config.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "pgtemp(template=, isolation=, extensions=[], config={}, keep=False, rollback=False): "
        "requirements for the test's database; see pgtemp's documentation",
    )
    worker = getattr(config, "workerinput", {})
    config.stash[_RUN] = Run(worker.get("pgtemp_run") or new_name(), worker.get("workerid"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the run's name to a worker of pytest-xdist, because all workers belong to one run."""
    node.config.stash[_HAS_WORKERS] = True
    node.workerinput["pgtemp_run"] = node.config.stash[_RUN].name


def pytest_sessionstart(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and terminal.isatty:
        from pgtemp.testing.terminal import show_steps

        show_steps(terminal)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the servers, and remove the templates that workers cached only for this run."""
    stash = session.config.stash
    if (suite := stash.get(_SUITE, None)) is not None:
        from pgtemp.testing.terminal import close

        close(suite, session.config)
    if stash.get(_HAS_WORKERS, False):
        from pgtemp.images import cache

        cache.forget(stash[_RUN].name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if (case := _case_of_module(item)) is not None:
        case.begin()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    own = item.stash.get(_CASE, None)
    for case in (own, _case_of_module(item)):
        if case is not None and report.failed and not (case is own and case.failed):
            report.sections.extend(case.explain())
            report.user_properties.extend((_OPENS, command) for command in case.commands)
    if own is not None and call.when == "teardown":
        own.end()
        report.user_properties.extend((_OPENS, command) for command in own.commands)
        del item.stash[_CASE]
    return report


def _case_of_module(item: pytest.Item) -> Case | None:
    module = item.getparent(pytest.Module)
    if module is None or "pgtemp_module" not in getattr(item, "fixturenames", ()):
        return None
    return module.stash.get(_CASE, None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from pgtemp.testing.terminal import commands_in

    if commands := commands_in(terminalreporter, _OPENS):
        terminalreporter.section("databases persisted by pgtemp")
        for test, command in commands:
            terminalreporter.write_line(f"{test}\n    {command}")
