"""The first statement of a client, as drivers send it."""

from __future__ import annotations

import pytest

from pgtemp.wire.firststatement import FirstStatement
from pgtemp.wire.messages import frame

SYNC = frame(b"S")
INT4 = b"\0\1\0\0\0\x17"  # one parameter of this type


def query(text: bytes) -> bytes:
    return frame(b"Q", text + b"\0")


def parse(text: bytes, name: bytes = b"", types: bytes = b"\0\0") -> bytes:
    return frame(b"P", name + b"\0" + text + b"\0" + types)


def bind(values: bytes, name: bytes = b"", portal: bytes = b"") -> bytes:
    return frame(b"B", portal + b"\0" + name + b"\0" + values)


NOTHING = b"\0\0\0\0\0\0"  # no formats, no values, no formats of results
VALUE = b"\0\1\0\1\0\1\0\0\0\4\0\0\0\7\0\0"
BEGIN = query(b"BEGIN"), parse(b"begin isolation level serializable") + bind(NOTHING) + SYNC, b""


@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize(
    ("sent", "plan"),
    [
        (query(b" select 1 "), parse(b" select 1 ") + bind(NOTHING)),
        (query(b"SELECT 1;\n"), parse(b"SELECT 1;\n") + bind(NOTHING)),
        (parse(b"TABLE t") + bind(NOTHING) + SYNC, parse(b"TABLE t") + bind(NOTHING)),
        (
            parse(b"INSERT INTO t VALUES ($1)", b"s1", INT4) + frame(b"D", b"Ss1\0") + SYNC
            + bind(VALUE, b"s1", b"p1") + frame(b"E", b"p1\0\0\0\0\0") + SYNC,
            parse(b"INSERT INTO t VALUES ($1)", types=INT4) + bind(VALUE),
        ),
    ],
)  # fmt: skip
def test_the_first_statement_is_planned_as_the_client_sent_it(
    begin: bytes, sent: bytes, plan: bytes
) -> None:
    """The same text, types and values, without a name; the start of a transaction is skipped."""
    first = FirstStatement()
    first.feed(begin + sent)
    assert (first.done, first.plan) == (True, plan)
    first.feed(query(b"SELECT 2"))
    assert first.plan == plan


@pytest.mark.parametrize(
    "sent",
    [
        query(b"SET search_path = a") + query(b"SELECT 1"),
        query(b"CREATE TABLE t (n int)") + query(b"TABLE t"),
        query(b"selected"),
        query(b"SELECT 1; DROP TABLE t"),
        query(b"BEGIN; CREATE TABLE t (n int)") + query(b"TABLE t"),
        query(b"SELECT ';'"),  # for all that the reader knows, it might be two statements
        parse(b"SET a = b") + bind(NOTHING) + parse(b"TABLE t") + bind(NOTHING),
        parse(b"TABLE t", b"s1") + parse(b"SELECT 1", b"s2") + bind(NOTHING, b"s1"),
        query(b"SELECT " + bytes(10_000)) + query(b"SELECT 1"),
        b"Q\0\0\0\0",
    ],
)
def test_a_statement_that_cannot_be_planned_alone_ends_the_search(sent: bytes) -> None:
    first = FirstStatement()
    first.feed(sent)
    assert (first.done, first.plan) == (True, b"")


def test_a_name_means_the_last_statement_prepared_under_it() -> None:
    first = FirstStatement()
    first.feed(parse(b"TABLE t") + parse(b"BEGIN") + bind(NOTHING))
    assert not first.done
    first.feed(parse(b"TABLE t", b"s1") + parse(b"BEGIN") + bind(NOTHING, b"s1"))
    assert first.plan == parse(b"TABLE t") + bind(NOTHING)


def test_an_incomplete_bind_is_waited_for() -> None:
    first = FirstStatement()
    first.feed(parse(b"TABLE t") + SYNC + bind(NOTHING)[:-1])
    assert (first.done, first.plan) == (False, b"")
