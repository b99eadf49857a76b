"""The daemon from beginning to end: start up, serve, shut down."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgtemp.aio import whole
from pgtemp.allocation.isolation import Isolation
from pgtemp.allocation.per_lease import PerLease
from pgtemp.allocation.single_server import SingleServer
from pgtemp.daemon import control_socket, credentials, listeners
from pgtemp.daemon.gateway import Gateway
from pgtemp.daemon.relay import Endpoint
from pgtemp.daemon.shares import THREADS
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
# A server in a state that nothing here foresees must not hold up the end: the warden ends it.
_END_SECONDS = 4.0
_CONNECTIONS = 1000
_LOGIN_SECONDS = "10s"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What whoever started the daemon is told when it serves."""

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
    """Serve until a signal says to stop; the signal's number.

    Args:
        ready: called once the daemon serves.
        announce: called with a line that concerns the user, such as where data was kept.

    Raises:
        PgTempError: it could not start; nothing is left.
    """
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as at_the_end:
        # A pipe may have to be waited for, and a signal is to end that.
        secret, certificate = credentials.password(options), credentials.certificate(options)
        stopping: asyncio.Future[int] = loop.create_future()
        patient = options.persist or options.dump is not None  # what is to be kept takes its time
        seconds = None if patient else _END_SECONDS
        at_the_end.enter_context(_signals(loop, stopping, seconds))

        file_limits.raise_limit()
        # start up: listening comes first, so that a port that is taken costs nothing
        listening = listeners.listen(options) if options.tcp else []
        for bound in listening:
            at_the_end.callback(bound.close)
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "pgtemp-work"))
        # A lease's time is not that of its server.
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
            await loop.create_server(
                lambda: Endpoint(gateway.listener(tcp)), sock=bound, backlog=listeners.BACKLOG
            )
            for bound in listening
        ]
        path = f"{socket_dir}/.s.PGSQL.{options.listen_port}"
        servers.append(
            await loop.create_unix_server(
                lambda: Endpoint(gateway.listener(listeners.of_socket())),
                path,
                backlog=listeners.BACKLOG,
            )
        )
        announcement = _announcement(options, socket_dir, plan.installation, root)
        told = {"uri": redact(announcement.info.uri), "version": announcement.version}
        servers.append(
            await control_socket.listen(socket_dir, lambda: {**told, "leases": gateway.facts()})
        )
        for server in servers:
            at_the_end.callback(server.close)
        if isolation.single_server is not None:
            _watch(loop, isolation.single_server, stopping)
            at_the_end.callback(loop.remove_reader, isolation.single_server.fileno())
        gc.collect()
        gc.freeze()  # what is there now stays, and need not be looked at while clients wait
        ready(announcement)
        return await stopping
        # shut down: the exit stack goes backwards, from listening to the isolation


def exit_status(number: int) -> int:
    """That of a process which a signal has stopped."""
    return 130 if number == signal.SIGINT else 0


def _for_servers(options: DaemonOptions) -> DaemonOptions:
    """What the servers are made with: a shared one has room for the connections of many leases,
    and who has not shown a password yet does not keep one for long."""
    config = dict(options.config)
    if options.password_file is not None:
        config.setdefault("authentication_timeout", _LOGIN_SECONDS)
    if options.shares_servers and options.postgresql_conf is None:
        config.setdefault("max_connections", str(_CONNECTIONS))
    return replace(options, ttl=None, config=config)


def _watch(
    loop: asyncio.AbstractEventLoop, postmaster: Postmaster, stopping: asyncio.Future[int]
) -> None:
    """Stop with an error when the one server that everybody shares has died."""
    descriptor = postmaster.fileno()

    def look() -> None:
        try:
            postmaster.check()
        except PgTempError as error:
            loop.remove_reader(descriptor)
            if not stopping.done():
                stopping.set_exception(error)

    loop.add_reader(descriptor, look)


async def _unless_stopped(work: Coroutine[Any, Any, None], stopping: asyncio.Future[int]) -> None:
    """Do the work; a signal meanwhile cancels it, and it undoes itself."""
    task = asyncio.ensure_future(work)
    both: set[asyncio.Future[Any]] = {task, stopping}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        processes.interrupt()  # a load may take minutes
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
    """A directory for the daemon's own unix socket, closed to other users."""
    caller = identity.Identity(os.geteuid(), os.getegid(), "", switch=False)
    directory = rundir.make(None, caller, keep=False)
    try:  # the lease is held to the end: a warden that is killed must not take the door along
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
    """The first signal stops, within so many seconds; the second does not wait.

    What was before comes back.
    """

    def stop(number: int) -> None:
        if stopping.done():
            os._exit(_FORCED)  # the warden ends all servers
        if seconds is not None:
            limit = threading.Timer(seconds, os._exit, [exit_status(number)])
            limit.daemon = True
            limit.start()
        stopping.set_result(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # whoever started us may have blocked them
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            loop.remove_signal_handler(number)
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
