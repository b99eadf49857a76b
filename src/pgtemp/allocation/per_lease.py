"""A database or a server a lease, out of one supply for each template."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from pgtemp.allocation.allocation import Allocation, Allocator
from pgtemp.allocation.allocators import DatabaseAllocator, ServerAllocator
from pgtemp.allocation.isolation import DatabaseRequest
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
class _Stock:
    """A template: what servers with it are made from, and where leases of it come from."""

    plan: Plan
    allocator: Allocator
    workshop: TemplateBuilder | None

    def close(self) -> None:
        self.allocator.close()
        if self.workshop is not None:
            self.workshop.close()


class PerLease:
    """A database or a server a lease."""

    single_server: Postmaster | None = None  # each lease has its own, or one that can be replaced

    def __init__(self, plan: Plan, options: DaemonOptions, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._options = options
        self._announce = announce
        self._servers = options.isolation == "cluster"
        self._stocks: dict[str, _Stock] = {}
        self._default: _Stock | None = None
        self._editing: dict[Allocation, TemplateBuilder] = {}
        self._closed = False
        self._changing = threading.Lock()

    def open(self) -> None:
        """Build the templates that are not there yet, and begin to make places."""
        options, begin = self._options, self._plan
        if options.copy_from is not None:
            begin = replace(begin, template=options.dbname, plain=False)
        extensions = Recipe(extensions=tuple(options.extensions))
        loading = replace(extensions, build=options.load) if options.load else extensions
        try:
            self._default = self._stock(begin, options.dbname, loading)
            for name in options.templates:
                self._declared(name.partition(":")[0], extensions)
            for stock in self._stocks.values() or [self._default]:
                # One is waited for, so that what is wrong is said now.
                stock.allocator.release(stock.allocator.claim().result(), used=False)
        except BaseException:
            self.close()
            raise

    def _declared(self, name: str, begin: Recipe) -> _Stock:
        """A template of the options; the one that it starts from comes first."""
        if name not in self._stocks:
            declared = {one.partition(":")[0]: one for one in self._options.templates}
            parent = declared[name].partition(":")[2]
            start = self._declared(parent, begin).plan if parent else self._plan
            build = self._options.templates[declared[name]]
            recipe = replace(begin, build=build, watch=self._watched(name))
            self._stocks[name] = self._stock(start, name, recipe)
        return self._stocks[name]

    def _watched(self, name: str) -> tuple[str, ...]:
        pairs = (one.partition("=") for one in self._options.watch)
        return tuple(pattern for which, _, pattern in pairs if which == name)

    def _stock(self, begin: Plan, name: str, recipe: Recipe) -> _Stock:
        plan, built = build(begin, name, recipe)
        return _Stock(plan, self._supply(plan), built)

    def _supply(self, plan: Plan) -> Allocator:
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
        """A server is shared under any name of a database; a database under its own."""
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
            or request.dbname in self._stocks
            or request.dbname in ALWAYS_THERE
            or request.dbname == self._options.dbname
        )

    def check(self, request: DatabaseRequest) -> None:
        """A database that somebody made by hand is not to be had, least of all an empty clone."""
        for stock in self._all():
            if isinstance(stock.allocator, DatabaseAllocator) and stock.allocator.made_by_hand(
                request.dbname
            ):
                raise NoDatabaseError(
                    f'database "{request.dbname}" was made within a lease, and cannot be reached',
                    remedy="to make databases by hand, start pgtemp with --single, or with "
                    "--isolation cluster and connect with options=-c pgtemp.session=NAME",
                )

    def kind(self, request: DatabaseRequest) -> Hashable:
        if request.edits:
            return None
        stock = self._of(request)
        return (stock, request.dbname, request.session is None) if self._servers else stock

    def _all(self) -> list[_Stock]:
        return [*self._stocks.values(), *([self._default] if self._default else [])]

    def _of(self, request: DatabaseRequest) -> _Stock:
        assert self._default is not None
        return self._stocks.get(request.dbname, self._default)

    def claim(self, request: DatabaseRequest) -> Future[Allocation]:
        """A place; for who edits, a workshop."""
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
            late = self._closed
            if not late:
                self._editing[allocation] = builder
        if late:
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
            self._admit_editor(allocation, request.user)
            return allocation.dbname
        # In a session names are used as they stand in its server, which has one database.
        own = request.session is None or request.dbname in self._stocks
        allocation.allocator.prepare(
            allocation, request.user, request.dbname if own else self._options.dbname
        )
        return request.dbname if self._servers else allocation.dbname

    def _admit_editor(self, allocation: Allocation, user: str) -> None:
        if user not in self._plan.users:
            # Whoever migrates may do so, superuser or not.
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
        # Not by the name: that may stand for another template by now.
        assert allocation.allocator is not None
        allocation.allocator.release(allocation, used=used)

    def _put_in_place(self, allocation: Allocation, name: str, used: bool) -> None:
        """Seal what was edited; from now on it is what the name stands for."""
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
        stock = _Stock(plan, self._supply(plan), builder)
        with self._changing:
            old, self._stocks[name] = self._stocks.get(name), stock
        if old is not None:
            old.close()

    def _dump(self, allocation: Allocation, request: DatabaseRequest) -> None:
        assert self._options.dump is not None
        to = _numbered(self._options.dump, allocation.number)
        if not allocation.alive:
            _log.error("%s was not dumped to %s: its server does not answer", request.dbname, to)
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
        for stock in self._all():
            stock.allocator.interrupt(discard=self._options.dump is None)

    def close(self) -> None:
        with self._changing:
            self._closed = True
            editing, self._editing = list(self._editing.values()), {}
        for builder in editing:
            builder.close()
        for stock in self._all():
            stock.close()


def _numbered(path: str | os.PathLike[str], number: int) -> Path:
    """out.sql becomes out-7.sql, so that each lease has a dump of its own."""
    plain = Path(path)
    return plain.with_name(f"{plain.stem}-{number}{plain.suffix}")
