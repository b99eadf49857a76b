"""Turn options into a running server with its user and database.

The library, the pytest plugin and the daemon all use it. A `Plan` (programs, user, image, settings)
is determined once and is used for any number of servers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host import disk_space, identity, paths, ports, user_paths
from pgtemp.host.tree import Tree
from pgtemp.images import cache, initdb
from pgtemp.images.source import Directory, Source
from pgtemp.options.server import ServerOptions
from pgtemp.programs import search
from pgtemp.programs.installation import Installation
from pgtemp.server import config, rundir
from pgtemp.server.postmaster import Postmaster
from pgtemp.server.spec import ServerSpec
from pgtemp.sql import admin_sql, dump_restore, extensions
from pgtemp.sql.connection import Connection, connected
from pgtemp.sql.passwords import Secret
from pgtemp.sql.timeouts import LONG_SECONDS
from pgtemp.supervisor.leftovers import DATA
from pgtemp.uri import ConnectionInfo


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of servers with given options.

    Attributes:
        superuser: the superuser of the servers; pgtemp itself connects as this role.
        template: the database in the source that databases are cloned from; None for the empty
            template1.
        plain: whether new databases are empty.
        secret: the password that every TCP client must give; None if none is required.
    """

    options: ServerOptions
    spec: ServerSpec
    superuser: str
    template: str | None = None
    plain: bool = True
    secret: Secret | None = None

    @property
    def users(self) -> set[str]:
        """The roles that exist in every new server."""
        return {self.options.user, self.superuser}

    @property
    def installation(self) -> Installation:
        return self.spec.installation


def plan(options: ServerOptions, addresses: Sequence[str], secret: Secret | None = None) -> Plan:
    """Determine the plan of servers with given options.

    Args:
        addresses: loopback addresses to listen on. If there are none, servers listen on the unix
            socket only; with a secret they then also listen on ports.LOOPBACK.
        secret: the password of all users.

    Raises:
        PgTempError: the programs, the user or a file are not available.
    """
    paths.check_umask()
    owner = identity.choose(options.run_as)
    copied = Path(options.copy_from).absolute() if options.copy_from is not None else None
    if copied is not None and not (copied / "PG_VERSION").exists():
        copied = copied / DATA  # the run directory of persisted data
    if secret is not None and not addresses:
        addresses = [ports.LOOPBACK]
    version = options.version
    if copied is not None and version is None:
        version = Directory(copied).version
    rundir.find_base(options.data_dir_prefix, owner, keep=options.persist)  # raise errors early
    programs = search.find(options.bin_dir, version).within_reach(owner)
    source: Source
    if copied is not None:
        check_copied(copied, programs)
        source = Directory(copied)
    else:
        source = cache.Cached(programs, options.initdb_args, owner)
    # The superuser of a copied data directory is not always initdb's default.
    superuser = options.user if copied is not None else initdb.SUPERUSER
    spec = ServerSpec(
        installation=programs,
        owner=owner,
        source=source,
        conf=_conf(options, programs.major),
        hba=config.pg_hba_conf(_text(options.pg_hba_conf) or None, superuser),
        addresses=addresses,
        port=options.port if addresses and secret is None else None,
        prefix=options.data_dir_prefix,
        keep=options.persist,
        ttl=options.ttl,
        log_path=Path(options.log_path).absolute() if options.log_path is not None else None,
    )
    return Plan(options, spec, superuser, secret=secret)


def provision(plan: Plan, secret: Secret | None) -> Postmaster:
    """Start a server with the options' user, database and extensions; load the dump.

    Args:
        secret: the user's password; None if clients do not connect over TCP.

    Raises:
        PgTempError: the server could not be started or prepared; nothing is left behind.
    """
    options = plan.options
    _cache_relcache(plan)
    postmaster = start(plan, secret)
    try:
        prepare_database(postmaster, plan, options.dbname, options.user)
        to = private_info(postmaster, plan.superuser, options.dbname)
        if options.extensions:
            with connected(to) as connection, connection.given(LONG_SECONDS):
                extensions.create(connection, options.extensions, plan.installation.major)
        if options.load is not None:
            to = private_info(postmaster, options.user, options.dbname)
            dump_restore.load(plan.installation, to, options.load, all_or_nothing=False)
    except BaseException:
        discard(postmaster)
        raise
    return postmaster


def start(plan: Plan, secret: Secret | None) -> Postmaster:
    """Start a server with the options' user. Raises PgTempError; nothing is then left behind."""
    user = plan.options.user
    own = secret if user == plan.superuser else None
    postmaster = Postmaster(plan.spec, verifier=own.verifier if own is not None else None)

    def prepare(started: Postmaster) -> None:
        prepare_role(started, plan, user, secret)
        give_password(started, plan)

    postmaster.start(meanwhile=prepare)
    return postmaster


def _cache_relcache(plan: Plan) -> None:
    """When an image is first used, start a server on it and add its relation cache to the image.

    The files save the first connection to each database four milliseconds (see image.py).
    """
    source = plan.spec.source
    if not isinstance(source, cache.Cached) or source.resolve().relcache:
        return
    plain = replace(plan.options, config={}, postgresql_conf=None)
    postmaster = Postmaster(
        replace(
            plan.spec,
            conf=_conf(plain, plan.installation.major),
            hba=config.HBA,
            addresses=(),
            keep=False,
            log_path=None,
        )
    )
    postmaster.start()
    try:
        for dbname in ("template1", admin_sql.MAINTENANCE):
            with connected(private_info(postmaster, initdb.SUPERUSER, dbname)) as connection:
                connection.execute("SELECT 1")
        with Tree.open(postmaster.data_dir) as data:
            source.resolve().learn(data)
    finally:
        postmaster.stop()


def prepare_role(postmaster: Postmaster, plan: Plan, user: str, secret: Secret | None) -> None:
    """Create a user in a server, unless it exists and needs no password."""
    if user == plan.superuser and (secret is None or postmaster.has_password):
        return
    with administered(postmaster, plan) as connection:
        admin_sql.ensure_role(connection, user, secret)


def give_password(postmaster: Postmaster, plan: Plan) -> None:
    """Set the plan's password, if it has one, for the roles that exist in every new server."""
    if plan.secret is not None:
        with administered(postmaster, plan) as connection:
            for user in sorted(plan.users):
                admin_sql.ensure_role(connection, user, plan.secret)


def prepare_database(postmaster: Postmaster, plan: Plan, dbname: str, user: str) -> None:
    """Create a database in a server, unless it exists: rename the plan's template.

    A server has one template, so only the first database is created from it; others are empty.
    """
    if dbname == "template1" or (dbname == admin_sql.MAINTENANCE and plan.plain):
        return  # initdb has created it
    # A session cannot drop or rename the database it is connected to.
    other = "template1" if dbname == admin_sql.MAINTENANCE else admin_sql.MAINTENANCE
    with administered(postmaster, plan, other) as connection:
        if plan.template is None or not admin_sql.exists(connection, plan.template):
            admin_sql.ensure_database(connection, dbname, user)
            return
        if dbname == admin_sql.MAINTENANCE != plan.template:
            admin_sql.drop_empty(connection, dbname)
        admin_sql.take_over(connection, plan.template, dbname, user)


@contextmanager
def administered(
    postmaster: Postmaster, plan: Plan, dbname: str = admin_sql.MAINTENANCE
) -> Iterator[Connection]:
    """Open a connection as superuser for a `with` block. Raises ClusterError."""
    with connected(private_info(postmaster, plan.superuser, dbname)) as connection:
        yield connection


def ensure_role(
    postmaster: Postmaster, plan: Plan, user: str, attributes: str, owns: str | None
) -> None:
    """Create a role for a client that connects, unless it exists. Raises ClusterError.

    Args:
        owns: a database that the role will own; None for none.
    """
    with administered(postmaster, plan) as connection:
        admin_sql.ensure_login(connection, user, attributes, plan.secret)
        if owns is not None:
            admin_sql.set_owner(connection, owns, user)


def discard(postmaster: Postmaster) -> None:
    """Stop a server and remove its data, even if its options persist them."""
    postmaster.spec = replace(postmaster.spec, keep=False)
    postmaster.stop()


def private_info(postmaster: Postmaster, user: str, dbname: str) -> ConnectionInfo:
    """Return the connection parameters of pgtemp itself: through the socket, without a password."""
    return ConnectionInfo(
        host=str(postmaster.socket_dir), port=postmaster.port, user=user, dbname=dbname
    )


def _conf(options: ServerOptions, major: int) -> Callable[[str], str]:
    return partial(
        config.postgresql_conf,
        major=major,
        given=_text(options.postgresql_conf),
        settings=options.config,
        existing_first=options.copy_from is None,
        disk=disk_space.size_bytes(
            paths.scratch_base(options.data_dir_prefix, keep=options.persist)
        ),
    )


def check_copied(path: Path, programs: Installation) -> None:
    """Raise OptionError if a data directory has another version or is in use."""
    made_by = Directory(path).version
    if made_by != str(programs.major):
        raise OptionError(
            f"{path} was created by PostgreSQL {made_by}, not {programs.major}",
            remedy=f"request version {made_by}",
        )
    if Directory(path).is_in_use():
        raise OptionError(
            f"a server is running on {path}", remedy="stop it before copying its data directory"
        )


def _text(path: str | os.PathLike[str] | None) -> str:
    """Return the text of a file that an option specifies. Raises OptionError."""
    if path is None:
        return ""
    try:
        return user_paths.read_file(path).decode(errors="surrogateescape")
    except OSError as error:
        raise OptionError(
            f"{os.fspath(path)} cannot be read: {error.strerror}", remedy="specify another file"
        ) from error
