"""A client that floods the daemon, as a process: `flooding.py KIND PORT DIRECTORY`.

It connects again after each refusal. It prints a line once its first flood is sent.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from keyupdates import KeyUpdates
from pgtemp.wire.messages import SSL_CODE, frame, startup_message, untyped

COPY_DATA, PASSWORDS, KEY_UPDATES, WALSENDER = "CopyData", "passwords", "KeyUpdate", "walsender"
_HELLO = startup_message({"user": "postgres", "database": "test"})
_REPLICATION = startup_message({"user": "postgres", "database": "test", "replication": "database"})
_SECONDS = 10.0


@contextmanager
def floods(kind: str, port: int, directory: Path, *, clients: int = 8) -> Iterator[None]:
    """In the block, this many clients flood the daemon; each has sent its first flood."""
    with ExitStack() as running:
        started = []
        for number in range(clients):
            (home := directory / str(number)).mkdir()
            command = [sys.executable, __file__, kind, str(port), str(home)]
            started.append(running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE)))
            running.callback(started[-1].kill)
        for one in started:
            assert one.stdout is not None and one.stdout.readline()
        yield


def _flood(kind: str, client: socket.socket, directory: Path) -> Iterator[bytes]:
    """Yield what the client sends after it has connected."""
    if kind == KEY_UPDATES:
        client.sendall(untyped(SSL_CODE))
        client.recv(1)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        (keys := directory / "keys").write_text("")
        updates = KeyUpdates(context, keys)

        def exchange(data: bytes) -> bytes:
            client.sendall(data)
            if not (answer := client.recv(1 << 16)):
                raise ConnectionError
            return answer

        client.sendall(updates.handshake(exchange))
        while True:
            yield updates.update(2000)
    client.sendall(_REPLICATION if kind == WALSENDER else _HELLO)
    client.recv(1 << 16)  # the login, or the request for a password
    while True:
        yield frame(b"p" if kind == PASSWORDS else b"d") * 50_000


def main(kind: str, port: str, directory: str) -> None:
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", int(port))) as client:
            client.settimeout(_SECONDS)
            for sent in _flood(kind, client, Path(directory)):
                with suppress(TimeoutError):
                    client.sendall(sent)
                os.write(1, b"sent\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
