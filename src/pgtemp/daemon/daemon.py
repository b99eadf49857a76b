"""The daemon: start up, serve, shut down."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from pgtemp.aio import whole
from pgtemp.allocation.isolation import Isolation
from pgtemp.allocation.per_lease import PerLease
from pgtemp.allocation.single_server import SingleServer
from pgtemp.daemon import control_socket, credentials, listeners
from pgtemp.daemon.gateway import Gateway
from pgtemp.daemon.listeners import Listener
from pgtemp.daemon.server_threads import THREADS
from pgtemp.errors import PgTempError, WardenError
from pgtemp.host import file_limits, identity, ports, processes
from pgtemp.options.daemon import DaemonOptions
from pgtemp.programs.installation import Installation
from pgtemp.server import rundir
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import server_setup
from pgtemp.supervisor import supervision
from pgtemp.uri import ConnectionInfo, redact

_FORCED = 130
# The daemon exits after this time even if a server does not stop; the supervisor then stops it.
_STOP_SECONDS = 4.0
_CONNECTIONS = 1000
_LOGIN_SECONDS = "10s"


@dataclass(frozen=True, slots=True)
class Announcement:
    """Information for the caller once the daemon serves.

    Attributes:
        info: how clients connect.
        socket_dir: the directory of the daemon's unix socket.
        root: the file with the root certificate, if one was made.
        version: the version of PostgreSQL.
        psql: the command psql.
        each: describes what each connection gets.
    """

    info: ConnectionInfo
    socket_dir: str
    root: Path | None
    version: str
    psql: str
    each: str


async def run(
    options: DaemonOptions,
    *,
    ready: Callable[[Announcement], None],
    announce: Callable[[str], None],
) -> int:
    """Serve until a signal stops the daemon; return the signal's number.

    Args:
        ready: called once the daemon serves.
        announce: called with a line for the user, such as the directory of persisted data.

    Raises:
        PgTempError: the daemon could not start, or its single server exited. No server is left.
    """
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as at_the_end:
        # The files may be pipes, on which reading blocks. The signal handlers are installed later,
        # so that a signal still stops the process.
        secret, certificate = credentials.password(options), credentials.certificate(options)
        stopping: asyncio.Future[int] = loop.create_future()
        persists = options.persist or options.dump is not None  # persisting data may take long
        seconds = None if persists else _STOP_SECONDS
        at_the_end.enter_context(_signals(loop, stopping, seconds))

        file_limits.raise_limit()
        # start up: listening comes first, so that a port in use is reported at once
        listening = listeners.listen(options) if options.tcp else []
        for bound in listening:
            at_the_end.callback(bound.close)
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "pgtemp-work"))

        plan = await whole(lambda: server_setup.plan(_for_servers(options), (), secret))
        isolation = _isolation(options, plan, announce)
        at_the_end.push_async_callback(whole, isolation.close)
        await _unless_stopped(whole(isolation.open), stopping)
        if stopping.done():
            return stopping.result()
        gateway = Gateway(isolation, options, server_version=plan.installation.version)
        at_the_end.push_async_callback(gateway.close)
        socket_dir = at_the_end.enter_context(_socket_dir())
        root = credentials.write_root(certificate, socket_dir)

        # serve
        tls = certificate.context if certificate is not None else None
        tcp = listeners.of_tcp(options, gateway.peers, tls)
        servers = [
            await loop.create_server(gateway.endpoints(tcp), sock=bound, backlog=listeners.BACKLOG)
            for bound in listening
        ]
        path = f"{socket_dir}/.s.PGSQL.{options.listen_port}"
        servers.append(
            await loop.create_unix_server(
                gateway.endpoints(Listener()), path, backlog=listeners.BACKLOG
            )
        )
        announcement = _announcement(options, socket_dir, plan.installation, root)
        status = {"uri": redact(announcement.info.uri), "version": announcement.version}
        servers.append(
            await control_socket.listen(socket_dir, lambda: {**status, "leases": gateway.facts()})
        )
        for server in servers:
            at_the_end.callback(server.close)
        if isolation.single_server is not None:
            _watch(loop, isolation.single_server, stopping)
            at_the_end.callback(loop.remove_reader, isolation.single_server.fileno())
        gc.collect()
        gc.freeze()  # objects of the start-up live as long as the daemon; do not traverse them
        ready(announcement)
        return await stopping
        # shut down: the exit stack unwinds in reverse order, from the listeners to the isolation


def exit_status(number: int) -> int:
    """Return the exit status of a daemon that was stopped by this signal."""
    return 130 if number == signal.SIGINT else 0


def _for_servers(options: DaemonOptions) -> DaemonOptions:
    """Return the options for the servers.

    A shared server allows connections for many leases. If a password is required, a client that
    does not authenticate is disconnected soon. `ttl` limits leases, not servers.
    """
    config = dict(options.config)
    if options.password_file is not None:
        config.setdefault("authentication_timeout", _LOGIN_SECONDS)
    if options.shares_servers and options.postgresql_conf is None:
        config.setdefault("max_connections", str(_CONNECTIONS))
    return replace(options, ttl=None, config=config)


def _watch(
    loop: asyncio.AbstractEventLoop, postmaster: Postmaster, stopping: asyncio.Future[int]
) -> None:
    """Stop the daemon with an error when the single server that all clients share has exited."""
    descriptor = postmaster.fileno()

    def check() -> None:
        try:
            postmaster.check()
        except PgTempError as error:
            loop.remove_reader(descriptor)
            if not stopping.done():
                stopping.set_exception(error)

    loop.add_reader(descriptor, check)


async def _unless_stopped(work: Coroutine[Any, Any, None], stopping: asyncio.Future[int]) -> None:
    """Run `work`. If a signal arrives meanwhile, cancel `work`, which then undoes what it did."""
    task = asyncio.ensure_future(work)
    both: set[asyncio.Future[Any]] = {task, stopping}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        processes.interrupt()  # loading a dump may take minutes
        task.cancel()
        await asyncio.wait([task])
    elif (error := task.exception()) is not None:
        raise error


def _isolation(
    options: DaemonOptions, plan: server_setup.Plan, announce: Callable[[str], None]
) -> Isolation:
    if options.single:
        return SingleServer(plan, announce, options.role_attributes)
    return PerLease(plan, options, announce)


@contextmanager
def _socket_dir() -> Iterator[str]:
    """Make a run directory for the daemon's own unix socket, which other users cannot enter."""
    caller = identity.Identity(os.geteuid(), os.getegid(), "", switch=False)
    directory = rundir.make(None, caller, keep=False)
    try:  # keep the lease file locked: if the supervisor is killed, the directory must stay
        held = supervision.current().hold(
            directory.leftovers(keep=False),
            keep=False,
            lease=directory.lease,
            log=directory.lease,
        )
        try:
            yield str(directory.socket_dir)
        finally:
            try:
                held.stop(keep=False, remove=directory.leftovers(keep=False))
            except WardenError:
                rundir.discard(directory.leftovers(keep=False))
    finally:
        directory.release()


@contextmanager
def _signals(
    loop: asyncio.AbstractEventLoop, stopping: asyncio.Future[int], seconds: float | None
) -> Iterator[None]:
    """Handle signals: the first stops the daemon within `seconds`, the second exits at once.

    The handlers do not wait for the event loop, which may be busy. The previous handlers are
    restored.
    """
    received: SimpleQueue[int] = SimpleQueue()  # a signal handler may call `put` at any moment
    handled = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal handled
        if handled or stopping.done():
            os._exit(_FORCED)  # the supervisor stops all servers
        handled = True
        received.put(number)
        loop.call_soon_threadsafe(report, number)

    def report(number: int) -> None:
        if not stopping.done():
            stopping.set_result(number)

    def exit_in_time(seconds: float) -> None:
        number = received.get()
        time.sleep(seconds)
        os._exit(exit_status(number))

    if seconds is not None:
        threading.Thread(target=exit_in_time, args=[seconds], daemon=True).start()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # the parent process may have blocked them
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _announcement(
    options: DaemonOptions, socket_dir: str, programs: Installation, root: Path | None
) -> Announcement:
    named = options.listen is not None and not ports.is_any(options.listen)
    host = str(options.listen) if named else options.host
    info = ConnectionInfo(
        host=host if options.tcp else socket_dir,
        port=options.listen_port,
        user=options.user,
        password=options.password if options.password_file is None else None,
        dbname=options.dbname,
    )
    psql = "psql" if shutil.which("psql") else str(programs.bin_dir / "psql")
    each = {"database": "a fresh database", "cluster": "a fresh server"}[options.isolation]
    shown = "one server for all connections" if options.single else f"{each} for every connection"
    return Announcement(info, socket_dir, root, programs.version, psql, shown)
