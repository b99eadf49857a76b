"""Connection information and URLs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from pgtemp.errors import OptionError
from pgtemp.uri import ConnectionInfo, parse, redact

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(user=names, password=names, dbname=names)
def test_any_name_survives_the_url(user: str, password: str, dbname: str) -> None:
    """libpq reads the original values back from the URL."""
    info = ConnectionInfo(host="127.0.0.1", port=5432, user=user, password=password, dbname=dbname)
    parsed = conninfo_to_dict(info.uri)
    assert (parsed["user"], parsed["password"], parsed["dbname"]) == (user, password, dbname)


@given(user=names, password=names, dbname=names)
def test_parse_is_the_inverse_of_uri(user: str, password: str, dbname: str) -> None:
    """pgtemp's own parser agrees, and a repr does not show the password."""
    info = ConnectionInfo(host="::1", port=1, user=user, password=password, dbname=dbname)
    parsed = parse(info.uri)
    assert (parsed.host, parsed.port, parsed.user, parsed.dbname) == ("::1", 1, user, dbname)
    assert parsed.password == password
    assert "password=" not in repr(info)


def test_a_socket_directory_is_part_of_the_query() -> None:
    """A host that is a directory is written in a form that every driver accepts."""
    info = ConnectionInfo(host="/tmp/x y", port=5433, user="me", dbname="app")
    parsed = conninfo_to_dict(info.uri)
    assert (parsed["host"], parsed["port"]) == ("/tmp/x y", "5433")


def test_conninfo_has_no_password() -> None:
    """A string for a command line does not contain the password."""
    info = ConnectionInfo(host="h", port=1, user="u", password="geheim", dbname="d")
    assert "geheim" not in info.conninfo
    assert info.environment()["PGPASSWORD"] == "geheim"


@pytest.mark.parametrize(
    "uri",
    [
        "mysql://localhost/x",
        "localhost:6543",
        "postgresql://localhost:abc/x",
        "postgresql://localhost:0/x",
        "postgresql://localhost:99999/x",
        "postgresql://me:secret@localhost/x?nonsense=1",
        "postgresql://[::1/x",
    ],
)
def test_an_invalid_uri_is_one_line_with_a_remedy(uri: str) -> None:
    """The error has the URL without its password, and an example of a valid URL."""
    with pytest.raises(OptionError) as caught:
        parse(uri)
    assert "\n" not in str(caught.value)
    assert "postgresql://user:password@localhost" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql+asyncpg://me:geheim@localhost:6543/app",
        "postgres+psycopg2://me:geheim@localhost:6543/app",
        "postgresql+psycopg://me:geheim@localhost:6543/app?sslmode=disable",
        "jdbc:postgresql://localhost:6543/app?user=me&password=geheim",
        "jdbc:postgresql://localhost:6543/app?user=me&password=geheim&currentSchema=x&ssl=false",
        "postgresql://me:geheim@localhost:6543/app?schema=public",
        "postgresql://me:geheim@localhost:6543/app?connection_limit=5&pgbouncer=true",
        "postgresql://me:geheim@localhost:6543/app?schema=public&pool_timeout=2&socket_timeout=3",
        "postgresql://me:geheim@localhost:6543/app?serverVersion=16&charset=utf8",
        "POSTGRES://me:geheim@localhost:6543/app",
    ],
)
def test_forms_for_drivers_are_read(uri: str) -> None:
    parsed = parse(uri)
    assert (parsed.host, parsed.port, parsed.user) == ("localhost", 6543, "me")
    assert (parsed.password, parsed.dbname) == ("geheim", "app")


@pytest.mark.parametrize("character", "@/?#:%& \"'")
@pytest.mark.parametrize("rest", ["@localhost/app", "@localhost:6543/app?x=1", "@localhost"])
def test_no_part_of_a_password_is_shown(character: str, rest: str) -> None:
    """A password with a character that is not encoded makes the URL wrong in many ways."""
    uri = f"postgresql://me:gehe{character}imnis{rest}"
    try:
        parsed = parse(uri)
    except OptionError as error:
        message = str(error)
        assert "gehe" not in message and "imnis" not in message
        assert "%40" in message or "remove" in message
    else:
        assert parsed.password is not None and "gehe" in parsed.password
    assert "gehe" not in redact(uri) and "imnis" not in redact(uri)


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        ("postgresql://a:1,b:2/app", "several hosts; keep one"),
        ("postgresql://localhost/app?nonsense=1", "the parameter nonsense is not known; remove it"),
        ("postgresql://localhost:x/app", "'x' is not a port"),
    ],
)
def test_the_cause_is_named(uri: str, cause: str) -> None:
    with pytest.raises(OptionError, match=cause):
        parse(uri)


def test_redact_hides_every_form_of_password() -> None:
    assert "geheim" not in redact("postgresql://me:geheim@h/d")
    assert "geheim" not in redact("postgresql://me@h/d?password=geheim&x=1")
    assert "geheim" not in redact("postgresql://me:ge@heim@h/d").replace("ge@heim", "geheim")
