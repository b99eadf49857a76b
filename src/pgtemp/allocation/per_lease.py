"""Give each lease its own database or its own server, from one allocator per template."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from pgtemp.allocation.allocation import Allocation, Allocator
from pgtemp.allocation.database_allocator import DatabaseAllocator
from pgtemp.allocation.isolation import DatabaseRequest
from pgtemp.allocation.server_allocator import ServerAllocator
from pgtemp.errors import ClusterError, NoDatabaseError, PgTempError
from pgtemp.options.daemon import DaemonOptions
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import dump_restore, server_setup
from pgtemp.sql.admin_sql import ALWAYS_THERE
from pgtemp.sql.server_setup import Plan
from pgtemp.templates.builder import TemplateBuilder, build, sealed
from pgtemp.templates.recipe import Recipe

_log = logging.getLogger("pgtemp")


@dataclass(eq=False, slots=True)
class _Template:
    """A template: the plan of its servers, and the allocator of its leases.

    Attributes:
        builder: the builder that owns its image, if the image is not cached.
    """

    plan: Plan
    allocator: Allocator
    builder: TemplateBuilder | None

    def close(self) -> None:
        self.allocator.close()
        if self.builder is not None:
            self.builder.close()


class PerLease:
    """Gives each lease its own database, or its own server with `--isolation cluster`."""

    single_server: Postmaster | None = None  # every server can be replaced

    def __init__(self, plan: Plan, options: DaemonOptions, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._options = options
        self._announce = announce
        self._servers = options.isolation == "cluster"
        self._templates: dict[str, _Template] = {}
        self._default: _Template | None = None
        self._editing: dict[Allocation, TemplateBuilder] = {}
        self._closed = False
        self._changing = threading.Lock()

    def open(self) -> None:
        """Build the templates that are not yet cached, and start to create allocations."""
        options, start = self._options, self._plan
        if options.copy_from is not None:
            start = replace(start, template=options.dbname, plain=False)
        extensions = Recipe(extensions=tuple(options.extensions))
        loading = replace(extensions, build=options.load) if options.load else extensions
        try:
            self._default = self._make_template(start, options.dbname, loading)
            for name in options.templates:
                self._declared(name.partition(":")[0], extensions)
            for template in self._templates.values() or [self._default]:
                # Wait for the first allocation, so that errors are raised when the daemon starts.
                template.allocator.release(template.allocator.claim().result(), used=False)
        except BaseException:
            self.close()
            raise

    def _declared(self, name: str, base: Recipe) -> _Template:
        """Return a template of the options; first build its parent template, then build it."""
        if name not in self._templates:
            declared = {one.partition(":")[0]: one for one in self._options.templates}
            parent = declared[name].partition(":")[2]
            start = self._declared(parent, base).plan if parent else self._plan
            build = self._options.templates[declared[name]]
            recipe = replace(base, build=build, watch=self._watched(name))
            self._templates[name] = self._make_template(start, name, recipe)
        return self._templates[name]

    def _watched(self, name: str) -> tuple[str, ...]:
        pairs = (one.partition("=") for one in self._options.watch)
        return tuple(pattern for template, _, pattern in pairs if template == name)

    def _make_template(self, start: Plan, name: str, recipe: Recipe) -> _Template:
        plan, builder = build(start, name, recipe)
        return _Template(plan, self._make_allocator(plan), builder)

    def _make_allocator(self, plan: Plan) -> Allocator:
        kind: type[ServerAllocator | DatabaseAllocator] = (
            ServerAllocator if self._servers else DatabaseAllocator
        )
        options = self._options
        return kind(
            plan,
            ready=options.pool,
            attributes=options.role_attributes,
            announce=self._announce,
        )

    def share(self, request: DatabaseRequest) -> Hashable:
        """Return the key of a shared session, without the database name if leases are servers."""
        if request.session is None:
            return None
        return (
            request.session
            if self._servers and not request.edits
            else (request.dbname, request.session)
        )

    def knows(self, request: DatabaseRequest) -> bool:
        return (
            self._servers
            or request.dbname in self._templates
            or request.dbname in ALWAYS_THERE
            or request.dbname == self._options.dbname
        )

    def check(self, request: DatabaseRequest) -> None:
        """Raise NoDatabaseError for the name of a database that a client created in its lease.

        Such a database is not reachable, and an empty clone of that name would be misleading.
        """
        for template in self._all():
            allocator = template.allocator
            if isinstance(allocator, DatabaseAllocator) and allocator.made_by_hand(request.dbname):
                raise NoDatabaseError(
                    f'database "{request.dbname}" was created within a lease and is not reachable',
                    remedy="to create databases yourself, start pgtemp with --single, or with "
                    "--isolation cluster and connect with options=-c pgtemp.session=NAME",
                )

    def kind(self, request: DatabaseRequest) -> Hashable:
        if request.edits:
            return None
        template = self._of(request)
        return (template, request.dbname, request.session is None) if self._servers else template

    def _all(self) -> list[_Template]:
        return [*self._templates.values(), *([self._default] if self._default else [])]

    def _of(self, request: DatabaseRequest) -> _Template:
        assert self._default is not None
        return self._templates.get(request.dbname, self._default)

    def claim(self, request: DatabaseRequest) -> Future[Allocation]:
        """Claim an allocation; for a client that edits a template, start a builder."""
        if not request.edits:
            return self._of(request).allocator.claim()
        claimed: Future[Allocation] = Future()
        claimed.set_running_or_notify_cancel()
        threading.Thread(target=self._edit, args=(request, claimed), daemon=True).start()
        return claimed

    def _edit(self, request: DatabaseRequest, claimed: Future[Allocation]) -> None:
        try:
            builder = TemplateBuilder(self._of(request).plan, request.dbname)
            builder.open()
            server_setup.give_password(builder.postmaster, self._plan)
        except BaseException as error:
            claimed.set_exception(error)
            return
        allocation = Allocation(builder.postmaster, builder.dbname)
        with self._changing:
            closed = self._closed
            if not closed:
                self._editing[allocation] = builder
        if closed:
            builder.close()
            claimed.set_exception(ClusterError("pgtemp is shutting down"))
        else:
            claimed.set_result(allocation)

    def is_prepared(self, allocation: Allocation, request: DatabaseRequest) -> str | None:
        if allocation.allocator is None or not allocation.allocator.is_prepared(
            allocation, request.user
        ):
            return None
        return request.dbname if self._servers else allocation.dbname

    def prepare(self, allocation: Allocation, request: DatabaseRequest) -> str:
        if allocation.allocator is None:
            self._ensure_editor(allocation, request.user)
            return allocation.dbname
        # Within a session, database names are used as given, and its server has one database.
        own = request.session is None or request.dbname in self._templates
        allocation.allocator.prepare(
            allocation, request.user, request.dbname if own else self._options.dbname
        )
        return request.dbname if self._servers else allocation.dbname

    def _ensure_editor(self, allocation: Allocation, user: str) -> None:
        """Create the role of a client that edits a template, and make it the owner.

        As the owner, it can run migrations even if it is not a superuser.
        """
        if user not in self._plan.users:
            attributes = self._options.role_attributes
            server_setup.ensure_role(
                allocation.postmaster, self._plan, user, attributes, allocation.dbname
            )

    def release(self, allocation: Allocation, request: DatabaseRequest, *, used: bool) -> None:
        if allocation in self._editing:
            self._put_in_place(allocation, request.dbname, used)
            return
        if used and self._options.dump is not None:
            self._dump(allocation, request)
        # Do not look up the allocator by name: the name may denote another template by now.
        assert allocation.allocator is not None
        allocation.allocator.release(allocation, used=used)

    def _put_in_place(self, allocation: Allocation, name: str, used: bool) -> None:
        """Seal an edited template; from now on, requests for its name get clones of it."""
        with self._changing:
            builder = self._editing.pop(allocation)
        if not used or self._closed:
            builder.close()
            return
        try:
            plan = sealed(self._plan, builder)
        except BaseException:
            builder.close()
            raise
        template = _Template(plan, self._make_allocator(plan), builder)
        with self._changing:
            old, self._templates[name] = self._templates.get(name), template
        if old is not None:
            old.close()

    def _dump(self, allocation: Allocation, request: DatabaseRequest) -> None:
        assert self._options.dump is not None
        to = _numbered(self._options.dump, allocation.number)
        if not allocation.alive:
            _log.error(
                "%s was not dumped to %s, because its server does not answer", request.dbname, to
            )
            return
        info = server_setup.private_info(
            allocation.postmaster, self._plan.superuser, allocation.dbname
        )
        try:
            dump_restore.dump(self._plan.installation, info, to)
            self._announce(f"dumped {request.dbname} to {to}")
        except PgTempError as error:
            _log.error("%s", error)

    def interrupt(self) -> None:
        self._closed = True
        for allocation in list(self._editing):
            allocation.postmaster.abandon()
        for template in self._all():
            template.allocator.interrupt(discard=self._options.dump is None)

    def close(self) -> None:
        with self._changing:
            self._closed = True
            editing, self._editing = list(self._editing.values()), {}
        for builder in editing:
            builder.close()
        for template in self._all():
            template.close()


def _numbered(path: str | os.PathLike[str], number: int) -> Path:
    """Return the path of a lease's own dump: for out.sql and number 7, out-7.sql."""
    plain = Path(path)
    return plain.with_name(f"{plain.stem}-{number}{plain.suffix}")
