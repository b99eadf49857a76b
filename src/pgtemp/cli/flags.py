"""Derive click's flags from the fields of the options, and options from the given values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from typing import Any, TypeVar, get_type_hints

import click

from pgtemp.errors import OptionError
from pgtemp.options.server import ServerOptions, default_of

F = TypeVar("F", bound=Callable[..., object])


class _Setting(click.ParamType[tuple[str, str]]):
    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, equals, rest = str(value).partition("=")
        if not equals or not name:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, rest


def flags_of(options: type[ServerOptions], leave_out: Iterable[str] = ()) -> Callable[[F], F]:
    """Return a decorator that adds a flag to a command for each option that has a flag."""
    hints = get_type_hints(options)
    skip = frozenset(leave_out)

    def decorate(command: F) -> F:
        for spec in reversed(fields(options)):
            if spec.metadata["flag"] and spec.name not in skip:
                command = _flag(spec, hints[spec.name])(command)
        return command

    return decorate


def _flag(spec: Field[Any], hint: Any) -> Callable[[F], F]:
    names = [spec.metadata["flag"], spec.name]
    text = spec.metadata["help"]
    if spec.metadata["env"]:
        text += f" [{spec.metadata['env']}]"
    default = default_of(spec)
    if isinstance(default, bool):
        return click.option(*names, is_flag=True, default=None, help=text)
    if isinstance(default, dict):
        return click.option(*names, type=_Setting(), multiple=True, help=text)
    if isinstance(default, tuple):
        return click.option(*names, multiple=True, help=text)
    if default is not None:
        text += f" (default {default})"
    if spec.metadata["choices"]:
        return click.option(*names, type=click.Choice(spec.metadata["choices"]), help=text)
    kinds: dict[Any, Any] = {
        int | None: int, float | None: float, int: int, float: float
    }  # fmt: skip
    return click.option(*names, type=kinds.get(hint, str), default=None, help=text)


def values_given(given: dict[str, Any]) -> dict[str, Any]:
    """Return the values given on the command line, as keyword arguments for the options.

    Raises OptionError if a template is given twice. If a server setting is given twice, the last
    value applies, as in PostgreSQL.
    """
    names = [name for name, _ in given.get("templates") or ()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(
            f"the template {twice[0]} is given twice", remedy="specify each template once"
        )
    return {
        name: dict(value) if isinstance(value, tuple) and isinstance(value[0], tuple) else value
        for name, value in given.items()
        if value is not None and value != ()
    }
