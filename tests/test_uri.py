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
    """libpq reads back from the URL what was put into it."""
    info = ConnectionInfo(host="127.0.0.1", port=5432, user=user, password=password, dbname=dbname)
    said = conninfo_to_dict(info.uri)
    assert (said["user"], said["password"], said["dbname"]) == (user, password, dbname)


@given(user=names, password=names, dbname=names)
def test_parse_reads_what_uri_writes(user: str, password: str, dbname: str) -> None:
    """Our own parser agrees, and a repr never shows the password."""
    info = ConnectionInfo(host="::1", port=1, user=user, password=password, dbname=dbname)
    said = parse(info.uri)
    assert (said.host, said.port, said.user, said.dbname) == ("::1", 1, user, dbname)
    assert said.password == password
    assert "password" not in repr(info)


def test_a_socket_directory_goes_into_the_query() -> None:
    """A host that is a directory is written so that every driver understands it."""
    info = ConnectionInfo(host="/tmp/x y", port=5433, user="me", dbname="app")
    said = conninfo_to_dict(info.uri)
    assert (said["host"], said["port"]) == ("/tmp/x y", "5433")


def test_conninfo_has_no_password() -> None:
    """What goes on a command line never holds the password."""
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
def test_a_bad_uri_is_one_line_with_a_remedy(uri: str) -> None:
    """The error names the URL without its password, and says how to write one."""
    with pytest.raises(OptionError) as caught:
        parse(uri)
    assert "\n" not in str(caught.value)
    assert "postgresql://user:password@localhost" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_redact_hides_every_form_of_password() -> None:
    assert "geheim" not in redact("postgresql://me:geheim@h/d")
    assert "geheim" not in redact("postgresql://me@h/d?password=geheim&x=1")
    assert "geheim" not in redact("postgresql://me:ge@heim@h/d").replace("ge@heim", "geheim")
