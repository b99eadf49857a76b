"""The queries of `pgtemp ls` to daemons, and invalid answers to them."""

from __future__ import annotations

import json
import os
import pwd
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from pgtemp.daemon import control_socket, running_owners
from pgtemp.host import locks
from pgtemp.supervisor import inventory
from pgtemp.supervisor.leftovers import LEASE, SOCKET
from support import run_pgtemp

HONEST = {"uri": "postgresql://me@localhost:1/test", "version": "18", "leases": [{"lease": 7}]}
FAKES = 200


@contextmanager
def locked_run_directory(base: Path, name: str) -> Iterator[Path]:
    """A directory that looks like the run directory of a running owner."""
    run_dir = base / f"pgtemp-{name}"
    (run_dir / SOCKET).mkdir(parents=True)
    lease = locks.create_locked(run_dir / LEASE, b"discard\n1 1\n")
    try:
        yield run_dir
    finally:
        os.close(lease)


def listen_in(run_dir: Path) -> socket.socket:
    """A listening control socket, bound by a path that is short enough."""
    directory = os.open(run_dir / SOCKET, os.O_RDONLY)
    try:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(f"/proc/self/fd/{directory}/{control_socket.NAME}")
        listening.listen()
        return listening
    finally:
        os.close(directory)


@contextmanager
def answering(run_dir: Path, answer: bytes, times: int = 1) -> Iterator[None]:
    """A daemon in a directory that sends `answer` to one client, `times` times."""

    def serve() -> None:
        with suppress(OSError):
            client, _ = listening.accept()
            with client:
                for _ in range(times):
                    client.sendall(answer)

    with listen_in(run_dir) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last, suppress(OSError):
                last.connect(f"{run_dir}/{SOCKET}/{control_socket.NAME}")
            thread.join()
            (run_dir / SOCKET / control_socket.NAME).unlink()


def answer_of(run_dir: Path, answer: bytes, times: int = 1) -> control_socket.Answer | None:
    with answering(run_dir, answer, times):
        return control_socket.ask([run_dir]).get(run_dir)


def test_all_daemons_are_queried_at_once(open_dir: Path) -> None:
    """Silent or slow daemons delay neither each other nor an answer.

    Each daemon is silent until all have been queried; queried one after the other, the last one
    never would be.
    """
    with ExitStack() as stack:
        honest = stack.enter_context(locked_run_directory(open_dir, "zz-honest"))
        stack.enter_context(answering(honest, json.dumps(HONEST).encode()))
        run_dirs = [
            stack.enter_context(locked_run_directory(open_dir, f"{n}")) for n in range(FAKES)
        ]
        sockets = [stack.enter_context(listen_in(run_dir)) for run_dir in run_dirs]
        asked: list[socket.socket] = []

        def accept() -> None:
            for listening in sockets:
                asked.append(listening.accept()[0])
            for client in asked:
                with suppress(OSError):
                    client.send(b" ")  # and never the rest

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        answers = control_socket.ask([*run_dirs, honest])
        accepting.join(30)
        assert not accepting.is_alive()
        assert list(answers) == [honest]
        assert answers[honest].leases == [{"lease": 7}]
        for client in asked:
            client.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not json",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"uri": ' * 900 + b"1" + b"}" * 900,
        b"[1, 2]",
        b'{"uri": 1, "leases": []}',
        b'{"uri": "x", "leases": {"a": 1}}',
        b'{"uri": "x", "leases": [], "n": ' + b"9" * 5000 + b"}",
    ],
    ids=range(9),
)
def test_an_invalid_answer(open_dir: Path, answer: bytes) -> None:
    """Another structure, deep nesting or binary data: treated as if there were no daemon."""
    with locked_run_directory(open_dir, "x") as run_dir:
        assert answer_of(run_dir, answer) is None


@pytest.mark.parametrize(
    "value",
    [
        "NaN", "-Infinity", "1e999", "9" * 4000, "[" * 900 + "]" * 900, '{"a": {"b": 1}}',
        f'"{"x" * 2000}"',
    ],
    ids=range(7),
)  # fmt: skip
def test_an_invalid_value_in_an_answer(open_dir: Path, value: str) -> None:
    """An excessive number or structure is left out."""
    answer = f'{{"uri": "x", "leases": [{{"lease": 1, "user": {value}}}, 5, [], null]}}'
    with locked_run_directory(open_dir, "x") as run_dir:
        received = answer_of(run_dir, answer.encode())
    assert received is not None
    assert received.leases == [{"lease": 1}]


def test_answers_are_shown_as_valid_json(open_dir: Path) -> None:
    """Surrogates, control characters and markup are printed as JSON escapes."""
    name = "\ud800\u202e\x1b[31m\n[red]\x9b"
    answer = json.dumps({"uri": name, "leases": [{"user": name, name: 1}]}).encode()
    with locked_run_directory(open_dir, "x") as run_dir:
        with answering(run_dir, answer):
            listed = run_pgtemp("ls", "--json", str(open_dir))
        assert listed.returncode == 0, listed.stderr
        assert listed.stdout.isascii()
        (owner,) = (one for one in json.loads(listed.stdout)["owners"] if one["uri"] == name)
        assert owner["leases"] == [{"user": name, name: 1}]
        with answering(run_dir, answer):
            table = run_pgtemp("ls", str(open_dir))
    assert table.returncode == 0
    assert table.stdout.replace("\n", "").isprintable()


def test_an_endless_answer(open_dir: Path) -> None:
    """`pgtemp ls` stops reading it and does not store it."""
    with locked_run_directory(open_dir, "x") as run_dir:
        assert (
            answer_of(run_dir, b" " * (1 << 16), times=(control_socket._MAX_BYTES >> 16) + 8)
            is None
        )


def test_another_users_endless_answers_cost_only_that_user(open_dir: Path, other_user: str) -> None:
    """An excessive answer of one user's daemons does not reduce the share of other users."""
    uid = pwd.getpwnam(other_user).pw_uid
    with ExitStack() as stack:
        theirs = stack.enter_context(locked_run_directory(open_dir, "theirs"))
        honest = stack.enter_context(locked_run_directory(open_dir, "zz-honest"))
        for path in (theirs, theirs / SOCKET):
            os.chown(path, uid, uid)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgid(uid)
                os.setuid(uid)
                listening = listen_in(theirs)
                os.write(writing, b"ready")
                client, _ = listening.accept()
                with suppress(OSError):
                    while True:
                        client.sendall(b" " * (1 << 16))
            finally:
                os._exit(0)
        os.read(reading, 5)
        for end in (reading, writing):
            os.close(end)
        listening = stack.enter_context(listen_in(honest))

        def answer_last() -> None:
            client, _ = listening.accept()
            with client:
                os.waitpid(child, 0)  # its connection has been closed
                client.sendall(json.dumps(HONEST).encode())

        answering_last = threading.Thread(target=answer_last)
        answering_last.start()
        answers = control_socket.ask([theirs, honest])
        answering_last.join()
    assert list(answers) == [honest]


def test_a_file_that_is_not_a_socket(open_dir: Path) -> None:
    """A pipe, a file, a directory, a link to itself: no answer, and no waiting."""
    for name in ("pipe", "file", "directory", "loop"):
        with locked_run_directory(open_dir, name) as run_dir:
            socket_path = run_dir / SOCKET / control_socket.NAME
            if name == "pipe":
                os.mkfifo(socket_path)
            elif name == "file":
                socket_path.write_text(json.dumps(HONEST))
            elif name == "directory":
                socket_path.mkdir()
            else:
                socket_path.symlink_to(socket_path)
            assert control_socket.ask([run_dir]) == {}


def test_a_link_to_another_socket(open_dir: Path) -> None:
    """`pgtemp ls` does not follow the link; otherwise it would reach any socket as root."""
    private = open_dir / "private"
    (private / SOCKET).mkdir(parents=True)
    with listen_in(private) as victim, locked_run_directory(open_dir, "link") as run_dir:
        (run_dir / SOCKET / control_socket.NAME).symlink_to(private / SOCKET / control_socket.NAME)
        assert control_socket.ask([run_dir]) == {}
        (open_dir / "pgtemp-whole").symlink_to(private)
        assert control_socket.ask([open_dir / "pgtemp-whole"]) == {}
        victim.setblocking(False)
        with pytest.raises(BlockingIOError):
            victim.accept()


def test_a_socket_of_another_user(open_dir: Path, other_user: str) -> None:
    """An answer counts only if the process that sends it runs as the owner of the directory."""
    with locked_run_directory(open_dir, "x") as run_dir:
        assert answer_of(run_dir, json.dumps(HONEST).encode()) is not None
        os.chown(run_dir, pwd.getpwnam(other_user).pw_uid, -1)
        os.chown(run_dir / SOCKET, pwd.getpwnam(other_user).pw_uid, -1)
        assert answer_of(run_dir, json.dumps(HONEST).encode()) is None


def test_a_socket_with_a_full_queue(open_dir: Path) -> None:
    """`pgtemp ls` does not wait for a daemon whose queue is full."""
    with (
        locked_run_directory(open_dir, "x") as run_dir,
        listen_in(run_dir) as listening,
        ExitStack() as stack,
    ):
        listening.listen(0)
        full = False
        while not full:
            filling = stack.enter_context(socket.socket(socket.AF_UNIX))
            filling.setblocking(False)
            try:
                filling.connect(f"{run_dir}/{SOCKET}/{control_socket.NAME}")
            except BlockingIOError:
                full = True
        assert control_socket.ask([run_dir]) == {}


def test_run_directories_of_unknown_owners_are_separate(open_dir: Path, other_user: str) -> None:
    """The answer from another user's directory is not shown for a directory of this user."""
    with (
        locked_run_directory(open_dir, "ours") as ours,
        locked_run_directory(open_dir, "theirs") as theirs,
    ):
        os.chown(theirs, pwd.getpwnam(other_user).pw_uid, -1)
        run_dirs = inventory.run_directories([open_dir])
        found = running_owners.of(one for one in run_dirs if one.path in (ours, theirs))
        assert {one.user for one in found} == {pwd.getpwuid(os.geteuid()).pw_name, other_user}
