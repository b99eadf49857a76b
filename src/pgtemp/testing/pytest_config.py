"""The options of a suite as pytest's options.

`--pgtemp-keep` on the command line is `pgtemp_keep` in the ini file. The command line has
precedence over the ini file, and the ini file over the environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field
from typing import TYPE_CHECKING, Any

from pgtemp.errors import OptionError
from pgtemp.options.pytest import SuiteOptions, suite_fields
from pgtemp.options.server import default_of

if TYPE_CHECKING:
    import pytest


def add(parser: pytest.Parser) -> None:
    """Add the options to pytest."""
    group = parser.getgroup("pgtemp", "temporary PostgreSQL databases (pgtemp)")
    for name, spec in suite_fields():
        default, text = default_of(spec), spec.metadata["help"].replace("%", "%%")
        several = isinstance(default, dict | tuple)
        choices = spec.metadata["choices"]
        group.addoption(
            "--" + name.replace("_", "-"),
            dest=name,
            default=None,
            action="append" if several else "store",
            choices=choices or None,
            metavar=None if choices else "NAME=VALUE" if isinstance(default, dict) else "VALUE",
            type=int if isinstance(default, int) else str,
            help=text + (f" (default {default})" if default not in (None, (), {}) else ""),
        )
        if several:
            parser.addini(name, text, type="linelist", default=[])
        else:
            parser.addini(name, text, default="")


def chosen(config: pytest.Config) -> SuiteOptions:
    """Return the suite's options from pytest's configuration. Raises OptionError."""
    given: dict[str, Any] = {}
    for name, spec in suite_fields():
        value = config.getoption(name)
        if value is None:
            value = _from_ini(config.getini(name), name, spec)
        if value in (None, "", []):
            continue
        given[spec.name] = _mapping(value, name) if isinstance(default_of(spec), dict) else value
    return SuiteOptions(**given)


def _from_ini(value: Any, name: str, spec: Field[Any]) -> Any:
    choices: Sequence[str] = spec.metadata["choices"]
    if choices and value and value not in choices:
        raise OptionError(
            f"{name} = {value} in the ini file: not an allowed value",
            remedy="specify " + " or ".join(choices),
        )
    if isinstance(default_of(spec), int) and value:
        if not value.isdecimal():
            raise OptionError(f"{name} = {value} in the ini file: not a number")
        return int(value)
    return value


def _mapping(pairs: Sequence[str], name: str) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise OptionError(f"{name}: {pair!r} is not NAME=VALUE")
    return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}
