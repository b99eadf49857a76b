"""The requirements of a test, from the keyword arguments of its mark."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from pgtemp.errors import OptionError
from pgtemp.options.pytest import ISOLATIONS
from pgtemp.templates.recipe import COMMAND, Build, Recipe, Step


class Usual(Enum):
    """The template that the whole suite starts from."""

    TEMPLATE = "usual"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The requirements of a test.

    Attributes:
        template: a `pgtemp.Recipe`, or a value for its `build`; None for an empty database.
        isolation: "database" or "cluster"; None for the isolation of the suite.
        extensions: the extensions to create, in addition to those of the suite.
        config: settings for a server of its own.
        keep: persist the database whether the test passes or fails.
        rollback: use one connection, whose changes are rolled back, to a database that tests share.
    """

    template: Build | Recipe | Usual | None = Usual.TEMPLATE
    isolation: str | None = None
    extensions: Sequence[str] = ()
    config: Mapping[str, str] | None = None
    keep: bool = False
    rollback: bool = False

    def __post_init__(self) -> None:
        if self.isolation is not None and self.isolation not in ISOLATIONS:
            raise OptionError(
                f"isolation={self.isolation!r}: unknown isolation",
                remedy="specify " + " or ".join(repr(one) for one in ISOLATIONS),
            )
        if self.rollback and self.isolation == "cluster":
            raise OptionError(
                'rollback=True cannot be combined with isolation="cluster"',
                remedy="omit one of them",
            )
        if isinstance(self.extensions, str):
            raise OptionError(
                f"extensions={self.extensions!r}: not a list", remedy="specify a list of names"
            )

    @property
    def settings(self) -> dict[str, str]:
        return {name: str(value) for name, value in (self.config or {}).items()}


def needs_of(kwargs: Mapping[str, Any], usual: Needs | None = None) -> Needs:
    """Return the requirements in a mark or a call. Raises OptionError for an unknown argument."""
    known = [spec.name for spec in fields(Needs)]
    for name in kwargs:
        if name not in known:
            raise OptionError(
                f"unknown keyword argument {name} for a test", remedy="specify " + ", ".join(known)
            )
    return replace(usual or Needs(), **kwargs)


def recipe_of(build: Build | Recipe | None, root: Path, watch: Sequence[str] = ()) -> Recipe:
    """Return a recipe whose paths are relative to the suite's root directory, not to pytest's cwd.

    Args:
        watch: the patterns for a recipe that has no `key` and no `watch` of its own.
    """
    if build is None:
        return Recipe()
    recipe = build if isinstance(build, Recipe) else Recipe(build)
    made: Build
    if isinstance(recipe.build, list | tuple):
        made = tuple(_from(root, one) for one in recipe.build)
    else:
        made = _from(root, recipe.build)  # type: ignore[arg-type]
    watched = recipe.watch or (watch if recipe.key is None else ())
    escaped = Path(glob.escape(str(root)))
    cwd = root / recipe.cwd if recipe.cwd is not None else root
    return replace(recipe, build=made, watch=[escaped / pattern for pattern in watched], cwd=cwd)


def _from(root: Path, step: Step) -> Step:
    if callable(step) or str(step).startswith(COMMAND):
        return step
    return root / step
