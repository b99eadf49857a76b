"""What `pgtemp ls` asks daemons, and what it does with the answers of those that are none."""

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
def held_home(base: Path, name: str) -> Iterator[Path]:
    """A directory that looks like that of an owner that lives."""
    home = base / f"pgtemp-{name}"
    (home / SOCKET).mkdir(parents=True)
    lease = locks.create_locked(home / LEASE, b"discard\n1 1\n")
    try:
        yield home
    finally:
        os.close(lease)


def listen_in(home: Path) -> socket.socket:
    """A control socket, by a path that is short enough."""
    directory = os.open(home / SOCKET, os.O_RDONLY)
    try:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(f"/proc/self/fd/{directory}/{control_socket.NAME}")
        listening.listen()
        return listening
    finally:
        os.close(directory)


@contextmanager
def answering(home: Path, answer: bytes, times: int = 1) -> Iterator[None]:
    """A daemon in `home` that says `answer` to one client, `times` times."""

    def serve() -> None:
        with suppress(OSError):
            client, _ = listening.accept()
            with client:
                for _ in range(times):
                    client.sendall(answer)

    with listen_in(home) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last, suppress(OSError):
                last.connect(f"{home}/{SOCKET}/{control_socket.NAME}")
            thread.join()
            (home / SOCKET / control_socket.NAME).unlink()


def said_by(home: Path, answer: bytes, times: int = 1) -> control_socket.Answer | None:
    with answering(home, answer, times):
        return control_socket.ask([home]).get(home)


def test_all_are_asked_at_once(open_dir: Path) -> None:
    """Daemons that accept and are silent, or trickle, hold up neither each other nor an answer.

    Each is silent until all have been asked; asked one after the other, the last never would be.
    """
    with ExitStack() as stack:
        honest = stack.enter_context(held_home(open_dir, "zz-honest"))
        stack.enter_context(answering(honest, json.dumps(HONEST).encode()))
        homes = [stack.enter_context(held_home(open_dir, f"{n}")) for n in range(FAKES)]
        sockets = [stack.enter_context(listen_in(home)) for home in homes]
        asked: list[socket.socket] = []

        def accept() -> None:
            for listening in sockets:
                asked.append(listening.accept()[0])
            for client in asked:
                with suppress(OSError):
                    client.send(b" ")  # and never the rest

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        answers = control_socket.ask([*homes, honest])
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
def test_an_answer_that_is_none(open_dir: Path, answer: bytes) -> None:
    """Another structure, too deep, not text: as if there were no daemon."""
    with held_home(open_dir, "x") as home:
        assert said_by(home, answer) is None


@pytest.mark.parametrize(
    "value",
    [
        "NaN", "-Infinity", "1e999", "9" * 4000, "[" * 900 + "]" * 900, '{"a": {"b": 1}}',
        f'"{"x" * 2000}"',
    ],
    ids=range(7),
)  # fmt: skip
def test_a_fact_that_is_none(open_dir: Path, value: str) -> None:
    """It is left out, whether a number without end or a structure in which one gets lost."""
    answer = f'{{"uri": "x", "leases": [{{"lease": 1, "user": {value}}}, 5, [], null]}}'
    with held_home(open_dir, "x") as home:
        said = said_by(home, answer.encode())
    assert said is not None
    assert said.leases == [{"lease": 1}]


def test_what_is_answered_is_shown_as_valid_json(open_dir: Path) -> None:
    """Half characters, control characters and markup come out as JSON escapes them."""
    name = "\ud800\u202e\x1b[31m\n[red]\x9b"
    answer = json.dumps({"uri": name, "leases": [{"user": name, name: 1}]}).encode()
    with held_home(open_dir, "x") as home:
        with answering(home, answer):
            said = run_pgtemp("ls", "--json", str(open_dir))
        assert said.returncode == 0, said.stderr
        assert said.stdout.isascii()
        (owner,) = (one for one in json.loads(said.stdout)["owners"] if one["uri"] == name)
        assert owner["leases"] == [{"user": name, name: 1}]
        with answering(home, answer):
            table = run_pgtemp("ls", str(open_dir))
    assert table.returncode == 0
    assert table.stdout.replace("\n", "").isprintable()


def test_an_answer_without_end(open_dir: Path) -> None:
    """It is given up, not kept in memory."""
    with held_home(open_dir, "x") as home:
        assert said_by(home, b" " * (1 << 16), times=(control_socket._MAX_BYTES >> 16) + 8) is None


def test_another_users_endless_answers_cost_only_that_user(open_dir: Path, other_user: str) -> None:
    """What one user's daemons say too much is not taken from the others' share."""
    uid = pwd.getpwnam(other_user).pw_uid
    with ExitStack() as stack:
        theirs = stack.enter_context(held_home(open_dir, "theirs"))
        honest = stack.enter_context(held_home(open_dir, "zz-honest"))
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
                os.waitpid(child, 0)  # it has been hung up on
                client.sendall(json.dumps(HONEST).encode())

        answering_last = threading.Thread(target=answer_last)
        answering_last.start()
        answers = control_socket.ask([theirs, honest])
        answering_last.join()
    assert list(answers) == [honest]


def test_what_is_no_socket(open_dir: Path) -> None:
    """A pipe, a file, a directory, a link that leads to itself: no answer, and no waiting."""
    for name in ("pipe", "file", "directory", "loop"):
        with held_home(open_dir, name) as home:
            there = home / SOCKET / control_socket.NAME
            if name == "pipe":
                os.mkfifo(there)
            elif name == "file":
                there.write_text(json.dumps(HONEST))
            elif name == "directory":
                there.mkdir()
            else:
                there.symlink_to(there)
            assert control_socket.ask([home]) == {}


def test_a_link_to_another_socket(open_dir: Path) -> None:
    """Nothing is connected to, even if the user may; root would reach every socket so."""
    private = open_dir / "private"
    (private / SOCKET).mkdir(parents=True)
    with listen_in(private) as victim, held_home(open_dir, "link") as home:
        (home / SOCKET / control_socket.NAME).symlink_to(private / SOCKET / control_socket.NAME)
        assert control_socket.ask([home]) == {}
        (open_dir / "pgtemp-whole").symlink_to(private)
        assert control_socket.ask([open_dir / "pgtemp-whole"]) == {}
        victim.setblocking(False)
        with pytest.raises(BlockingIOError):
            victim.accept()


def test_a_socket_of_another_user(open_dir: Path, other_user: str) -> None:
    """An answer counts only if the user of the directory gives it."""
    with held_home(open_dir, "x") as home:
        assert said_by(home, json.dumps(HONEST).encode()) is not None
        os.chown(home, pwd.getpwnam(other_user).pw_uid, -1)
        os.chown(home / SOCKET, pwd.getpwnam(other_user).pw_uid, -1)
        assert said_by(home, json.dumps(HONEST).encode()) is None


def test_a_crowded_socket(open_dir: Path) -> None:
    """A daemon whose queue is full is not waited for."""
    with held_home(open_dir, "x") as home, listen_in(home) as listening, ExitStack() as stack:
        listening.listen(0)
        full = False
        while not full:
            filling = stack.enter_context(socket.socket(socket.AF_UNIX))
            filling.setblocking(False)
            try:
                filling.connect(f"{home}/{SOCKET}/{control_socket.NAME}")
            except BlockingIOError:
                full = True
        assert control_socket.ask([home]) == {}


def test_homes_without_an_owner_are_not_thrown_together(open_dir: Path, other_user: str) -> None:
    """What another user's directory answers is not said to be of ours."""
    with held_home(open_dir, "ours") as ours, held_home(open_dir, "theirs") as theirs:
        os.chown(theirs, pwd.getpwnam(other_user).pw_uid, -1)
        homes = inventory.run_directories([open_dir])
        found = running_owners.of(one for one in homes if one.path in (ours, theirs))
        assert {one.user for one in found} == {pwd.getpwuid(os.geteuid()).pw_name, other_user}
