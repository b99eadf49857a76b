"""The messages that a client may send to a walsender of a shared server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtemp.wire.messages import TERMINATE, frame
from pgtemp.wire.replication import Inspection, inspection, refused

MANY = 1 << 20
COMMANDS = (
    b"BASE_BACKUP",
    b"BASE_BACKUP (CHECKPOINT 'fast', WAL false)",
    b"base_backup;",
    b"\t\r\n\f\v Base_Backup LABEL 'x'",
    b"UPLOAD_MANIFEST",
    b"TIMELINE_HISTORY 1",
    b"READ_REPLICATION_SLOT s",
    b"START_REPLICATION 0/0",
    b"START_REPLICATION PHYSICAL 0/0 TIMELINE 1",
    b"START_REPLICATION SLOT s 0/0",
    b"START_REPLICATION SLOT s PHYSICAL 0/0",
    b"START_REPLICATION SLOT \"LOGICAL\" PHYSICAL 0/0",
    b"START_REPLICATION SLOT \"s LOGICAL\" 0/0",
    b"START_REPLICATION SLOT \"s\"\" LOGICAL 0/0",
    b"START_REPLICATION SLOT s LOGICAL_ 0/0",
    b"START_REPLICATION SLOT s /* */ LOGICAL 0/0",
    b"CREATE_REPLICATION_SLOT s PHYSICAL",
    b"CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL RESERVE_WAL",
    b"CREATE_REPLICATION_SLOT \"LOGICAL \" PHYSICAL",
    b"CREATE_REPLICATION_SLOT",
    b"A_LATER_COMMAND",
    b"BASE_BACKUP\0SELECT 1",
    "\u00e4 SELECT 1".encode(),
)  # fmt: skip
ALLOWED = (
    b"",
    b";",
    b"SELECT 'BASE_BACKUP'",
    b"-- BASE_BACKUP\nSELECT 1",
    b"/* x */ BASE_BACKUP",  # SQL for the server, too, and an error there
    b"SELECT 1; BASE_BACKUP",
    b"\"BASE_BACKUP\"",
    b"(SELECT 1)",
    b"IDENTIFY_SYSTEM",
    b"identify_system;",
    b"SHOW wal_segment_size",
    b"DROP_REPLICATION_SLOT s WAIT",
    b"ALTER_REPLICATION_SLOT s (FAILOVER true)",
    b"CREATE_REPLICATION_SLOT s LOGICAL pgoutput NOEXPORT_SNAPSHOT",
    b"CREATE_REPLICATION_SLOT \"s\" TEMPORARY LOGICAL \"test_decoding\" (SNAPSHOT 'nothing')",
    b"START_REPLICATION SLOT \"s\" LOGICAL 0/0 (proto_version '1', publication_names 'p')",
    b" START_REPLICATION  SLOT s\tlogical 0/0",
)  # fmt: skip


def query(text: bytes) -> bytes:
    return frame(b"Q", text + b"\0")


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_that_reads_the_whole_server_does_not_pass(text: bytes) -> None:
    """No byte of it passes, and nothing that follows it."""
    for data in ([query(text)], [query(text)[at : at + 1] for at in range(len(query(text)))]):
        one = Inspection()
        assert b"".join(map(one.feed, [query(b"SELECT 1"), *data])) == query(b"SELECT 1")
        assert one.refused
        assert one.feed(query(b"SELECT 2")) == b""


@pytest.mark.parametrize("text", ALLOWED)
def test_sql_and_logical_replication_pass(text: bytes) -> None:
    one = Inspection()
    assert one.feed(query(text) + TERMINATE) == query(text) + TERMINATE
    assert not one.refused


def test_the_refusal_names_the_command() -> None:
    assert refused(b" base_backup (WAL)") == "BASE_BACKUP"
    assert refused(b"Timeline_History\t1") == "TIMELINE_HISTORY"


@pytest.mark.parametrize(
    ("value", "walsender", "physical"),
    [
        *((value, False, False) for value in ("", "false", "off", "No", "0")),
        *((value, True, True) for value in ("true", "t", "on", "1", "yes", "y", " database", "x")),
        *((value, True, False) for value in ("database", "DATABASE")),
    ],
)
def test_the_parameter_replication(value: str, walsender: bool, physical: bool) -> None:
    """Only false values need no inspection; only `database` is not physical replication."""
    made = inspection({"user": "me", "replication": value})
    assert (made is not None, bool(made and made.refused)) == (walsender, physical)
    assert inspection({"user": "me"}) is None


def test_a_large_statement_passes_as_it_arrives() -> None:
    """It is not buffered until its end."""
    text = b"INSERT INTO t VALUES ('" + b"x" * MANY + b"')"
    one = Inspection()
    assert len(one.feed(query(text)[:100_000])) == 100_000
    one.feed(query(text)[100_000:])
    assert one.feed(query(b"BASE_BACKUP")) == b"" and one.refused == "BASE_BACKUP"


@pytest.mark.parametrize("word", [b"BASE_BACKUP", b"SELECT 1"])
@pytest.mark.parametrize("spaces", [8186, 8191, 8192, MANY])
def test_a_command_after_much_white_space_is_refused(word: bytes, spaces: int) -> None:
    """This holds even if the word starts before the end of the buffer and ends after it."""
    one = Inspection()
    data = query(b" " * spaces + word)
    passed = one.feed(data[:9000]) + one.feed(data[9000:])
    assert passed == b"" and one.refused


@given(
    st.lists(
        st.one_of(
            st.sampled_from(COMMANDS + ALLOWED).map(query),
            st.builds(frame, st.sampled_from([b"d", b"p", b"c", b"H", b"X", b"P"]), st.binary()),
        )
    ),
    st.lists(st.integers(1, 40)),
)
def test_pieces_make_no_difference(messages: list[bytes], cuts: list[int]) -> None:
    """Whole messages pass, up to the first that is refused, in pieces of any size."""
    refused_messages = {query(text) for text in COMMANDS}
    first = next((at for at, one in enumerate(messages) if one in refused_messages), len(messages))
    data, one, passed = b"".join(messages), Inspection(), b""
    for size in [*cuts, len(data) + 1]:
        passed += one.feed(data[:size])
        data = data[size:]
    assert passed == b"".join(messages[:first])
    assert bool(one.refused) == (first < len(messages))


@given(st.binary(max_size=300), st.integers(1, 20))
def test_garbage_is_passed_on_unchanged(data: bytes, size: int) -> None:
    """The server checks it: nothing is added or reordered, and no error is raised."""
    one = Inspection()
    passed = b"".join(one.feed(data[at : at + size]) for at in range(0, len(data), size))
    assert data.startswith(passed)


@given(
    st.text(" \t\n\r\f\v"),
    st.sampled_from([b"BASE_BACKUP", b"UPLOAD_MANIFEST", b"START_REPLICATION"]),
    st.lists(st.booleans(), min_size=20, max_size=20),
    st.binary(max_size=20).filter(lambda rest: not rest[:1].isalnum() and rest[:1] not in b"_$"),
)  # fmt: skip
def test_no_spelling_of_a_command_passes(
    space: str, word: bytes, upper: list[bool], rest: bytes
) -> None:
    """Case, white space before the command and bytes after it make no difference."""
    letters = zip(word.decode(), upper, strict=False)
    spelled = "".join(one.upper() if up else one.lower() for one, up in letters)
    one = Inspection()
    assert one.feed(query(space.encode() + spelled.encode() + rest)) == b"" and one.refused
