"""Options: checked once, declared once."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from pgtemp import PgTempDB
from pgtemp.cli.serve import serve
from pgtemp.errors import OptionError
from pgtemp.options.daemon import DaemonOptions
from pgtemp.options.server import ServerOptions


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"port": 0}, "port=0"),
        ({"port": 70000}, "port=70000"),
        ({"user": ""}, "user="),
        ({"dbname": "x" * 64}, "63 bytes"),
        ({"password": ""}, "the password is empty"),
        ({"password": "a\0b"}, "the password contains a NUL byte"),
        ({"ttl": 0}, "ttl=0"),
        ({"config": {"max connections": "1"}}, "max connections"),
        ({"config": {"work_mem": "1\n2"}}, "work_mem"),
        ({"load": "/nowhere/dump.sql"}, "/nowhere/dump.sql"),
        ({"dump": "/nowhere/dump.sql"}, "/nowhere"),
        ({"log_path": "/nowhere/log"}, "/nowhere"),
        ({"copy_from": "/"}, "PG_VERSION"),
        ({"pg_hba_conf": "/nowhere/hba"}, "/nowhere/hba"),
    ],
)
def test_an_invalid_value_is_one_line_with_a_remedy(given: dict[str, Any], word: str) -> None:
    """It is refused before anything starts, with cause and remedy."""
    with pytest.raises(OptionError) as caught:
        ServerOptions(**given)
    assert word in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_the_environment_sets_options_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable takes precedence over the default, and an argument over the variable."""
    monkeypatch.setenv("PGTEMP_VERSION", "17")
    assert ServerOptions().version == "17"
    assert ServerOptions(version="16").version == "16"


def test_describe_leaves_the_password_out() -> None:
    assert "geheim" not in ServerOptions(password="geheim", user="me").describe()
    assert "user='me'" in ServerOptions(user="me").describe()


def test_the_handle_takes_exactly_the_options() -> None:
    """PgTempDB's signature shows every option, so that help() and editors show them."""
    names = [spec.name for spec in fields(ServerOptions)]
    assert list(inspect.signature(PgTempDB.__init__).parameters)[1:] == names


def test_every_option_reaches_the_command_line() -> None:
    """All options that the URI does not contain are flags of the daemon with a help text."""
    flags = {param.name: param for param in serve.params if isinstance(param, click.Option)}
    in_uri = {"host", "port", "user", "password", "dbname"}
    for spec in fields(DaemonOptions):
        if spec.name not in in_uri:
            assert flags[spec.name].help, spec.name


def test_a_handle_with_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        PgTempDB(no_such_option=1)  # type: ignore[call-arg]


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    dump = tmp_path / "dump.sql"
    dump.write_text("select 1;")
    assert ServerOptions(load=dump).load == dump


@pytest.mark.parametrize(
    "given",
    [
        {"port": "7255"},
        {"port": True},
        {"ttl": "5"},
        {"config": "a=b"},
        {"user": 5},
        {"load": 5},
        {"persist": "yes"},
        {"config": {"port": 5}},
        {"config": {"Listen_Addresses": "*"}},
    ],
)
def test_a_value_of_a_wrong_type_is_refused(given: dict[str, Any]) -> None:
    """A wrong type, or a setting that pgtemp itself decides, is an OptionError."""
    with pytest.raises(OptionError):
        ServerOptions(**given)


def test_a_version_may_be_a_number() -> None:
    assert ServerOptions(version=16).version == "16"  # type: ignore[arg-type]
