"""A database or a server a lease, out of one supply for each template."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from pgtemp.allocation.allocation import Place, Supply
from pgtemp.allocation.allocators import Clusters, Databases
from pgtemp.allocation.isolation import Wish
from pgtemp.errors import ClusterError, NoDatabaseError, PgTempError
from pgtemp.options.daemon import DaemonOptions
from pgtemp.server.postmaster import Cluster
from pgtemp.sql import dump_restore, server_setup
from pgtemp.sql.admin_sql import ALWAYS_THERE
from pgtemp.sql.server_setup import Plan
from pgtemp.templates import builder
from pgtemp.templates.builder import Workshop
from pgtemp.templates.recipe import Recipe

_log = logging.getLogger("pgtemp")


@dataclass(eq=False, slots=True)
class _Stock:
    """A template: what servers with it are made from, and where leases of it come from."""

    plan: Plan
    supply: Supply
    workshop: Workshop | None

    def close(self) -> None:
        self.supply.close()
        if self.workshop is not None:
            self.workshop.close()


class Apart:
    """A database or a server a lease."""

    pillar: Cluster | None = None  # each lease has its own, or one that can be replaced

    def __init__(self, plan: Plan, options: DaemonOptions, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._options = options
        self._announce = announce
        self._servers = options.isolation == "cluster"
        self._stocks: dict[str, _Stock] = {}
        self._default: _Stock | None = None
        self._editing: dict[Place, Workshop] = {}
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
                stock.supply.release(stock.supply.claim().result(), used=False)
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
        plan, built = builder.build(begin, name, recipe)
        return _Stock(plan, self._supply(plan), built)

    def _supply(self, plan: Plan) -> Supply:
        kind: type[Clusters | Databases] = Clusters if self._servers else Databases
        options = self._options
        return kind(
            plan,
            ready=options.pool,
            attributes=options.role_attributes,
            announce=self._announce,
        )

    def share(self, wish: Wish) -> Hashable:
        """A server is shared under any name of a database; a database under its own."""
        if wish.session is None:
            return None
        return wish.session if self._servers and not wish.edits else (wish.dbname, wish.session)

    def knows(self, wish: Wish) -> bool:
        return (
            self._servers
            or wish.dbname in self._stocks
            or wish.dbname in ALWAYS_THERE
            or wish.dbname == self._options.dbname
        )

    def check(self, wish: Wish) -> None:
        """A database that somebody made by hand is not to be had, least of all an empty clone."""
        for stock in self._all():
            if isinstance(stock.supply, Databases) and stock.supply.made_by_hand(wish.dbname):
                raise NoDatabaseError(
                    f'database "{wish.dbname}" was made within a lease, and cannot be reached',
                    remedy="to make databases by hand, start pgtemp with --single, or with "
                    "--isolation cluster and connect with options=-c pgtemp.session=NAME",
                )

    def kind(self, wish: Wish) -> Hashable:
        if wish.edits:
            return None
        stock = self._of(wish)
        return (stock, wish.dbname, wish.session is None) if self._servers else stock

    def _all(self) -> list[_Stock]:
        return [*self._stocks.values(), *([self._default] if self._default else [])]

    def _of(self, wish: Wish) -> _Stock:
        assert self._default is not None
        return self._stocks.get(wish.dbname, self._default)

    def claim(self, wish: Wish) -> Future[Place]:
        """A place; for who edits, a workshop."""
        if not wish.edits:
            return self._of(wish).supply.claim()
        claimed: Future[Place] = Future()
        claimed.set_running_or_notify_cancel()
        threading.Thread(target=self._edit, args=(wish, claimed), daemon=True).start()
        return claimed

    def _edit(self, wish: Wish, claimed: Future[Place]) -> None:
        try:
            bench = Workshop(self._of(wish).plan, wish.dbname)
            bench.open()
            server_setup.give_password(bench.cluster, self._plan)
        except BaseException as error:
            claimed.set_exception(error)
            return
        place = Place(bench.cluster, bench.dbname)
        with self._changing:
            late = self._closed
            if not late:
                self._editing[place] = bench
        if late:
            bench.close()
            claimed.set_exception(ClusterError("pgtemp is shutting down"))
        else:
            claimed.set_result(place)

    def furnished(self, place: Place, wish: Wish) -> str | None:
        if place.supply is None or not place.supply.furnished(place, wish.user):
            return None
        return wish.dbname if self._servers else place.dbname

    def furnish(self, place: Place, wish: Wish) -> str:
        if place.supply is None:
            self._admit_editor(place, wish.user)
            return place.dbname
        # In a session names are used as they stand in its server, which has one database.
        own = wish.session is None or wish.dbname in self._stocks
        place.supply.furnish(place, wish.user, wish.dbname if own else self._options.dbname)
        return wish.dbname if self._servers else place.dbname

    def _admit_editor(self, place: Place, user: str) -> None:
        if user not in self._plan.users:
            # Whoever migrates may do so, superuser or not.
            attributes = self._options.role_attributes
            server_setup.admit(place.cluster, self._plan, user, attributes, place.dbname)

    def release(self, place: Place, wish: Wish, *, used: bool) -> None:
        if place in self._editing:
            self._put_in_place(place, wish.dbname, used)
            return
        if used and self._options.dump is not None:
            self._dump(place, wish)
        # Not by the name: that may stand for another template by now.
        assert place.supply is not None
        place.supply.release(place, used=used)

    def _put_in_place(self, place: Place, name: str, used: bool) -> None:
        """Seal what was edited; from now on it is what the name stands for."""
        with self._changing:
            bench = self._editing.pop(place)
        if not used or self._closed:
            bench.close()
            return
        try:
            plan = builder.sealed(self._plan, bench)
        except BaseException:
            bench.close()
            raise
        stock = _Stock(plan, self._supply(plan), bench)
        with self._changing:
            old, self._stocks[name] = self._stocks.get(name), stock
        if old is not None:
            old.close()

    def _dump(self, place: Place, wish: Wish) -> None:
        assert self._options.dump is not None
        to = _numbered(self._options.dump, place.number)
        if not place.alive:
            _log.error("%s was not dumped to %s: its server does not answer", wish.dbname, to)
            return
        info = server_setup.private_info(place.cluster, self._plan.superuser, place.dbname)
        try:
            dump_restore.dump(self._plan.installation, info, to)
            self._announce(f"dumped {wish.dbname} to {to}")
        except PgTempError as error:
            _log.error("%s", error)

    def interrupt(self) -> None:
        self._closed = True
        for place in list(self._editing):
            place.cluster.abandon()
        for stock in self._all():
            stock.supply.interrupt(discard=self._options.dump is None)

    def close(self) -> None:
        with self._changing:
            self._closed = True
            editing, self._editing = list(self._editing.values()), {}
        for bench in editing:
            bench.close()
        for stock in self._all():
            stock.close()


def _numbered(path: str | os.PathLike[str], number: int) -> Path:
    """out.sql becomes out-7.sql, so that each lease has a dump of its own."""
    plain = Path(path)
    return plain.with_name(f"{plain.stem}-{number}{plain.suffix}")
