"""What a test asks for, in the keyword arguments of its mark."""

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
    """What a test asks for.

    Attributes:
        template: as of `pgtemp.Recipe`, or one; None is an empty database.
        isolation: "database" or "cluster"; None is the suite's.
        extensions: to create, beside those of the suite.
        config: settings of a server of its own.
        keep: keep the database however the test comes out.
        rollback: a connection whose work is rolled back, in a database that others have too.
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
                f"isolation={self.isolation!r}: there is no such isolation",
                remedy="give " + " or ".join(repr(one) for one in ISOLATIONS),
            )
        if self.rollback and self.isolation == "cluster":
            raise OptionError(
                "rollback=True is for a database that tests share", remedy="leave isolation out"
            )
        if isinstance(self.extensions, str):
            raise OptionError(
                f"extensions={self.extensions!r}: not a list", remedy="give a list of names"
            )

    @property
    def settings(self) -> dict[str, str]:
        return {name: str(value) for name, value in (self.config or {}).items()}


def needs_of(kwargs: Mapping[str, Any], usual: Needs | None = None) -> Needs:
    """The needs that a mark or a call names. Raises OptionError where it names none."""
    known = [spec.name for spec in fields(Needs)]
    for name in kwargs:
        if name not in known:
            raise OptionError(
                f"pgtemp knows no {name}= for a test", remedy="give " + ", ".join(known)
            )
    return replace(usual or Needs(), **kwargs)


def recipe_of(build: Build | Recipe | None, root: Path, watch: Sequence[str] = ()) -> Recipe:
    """A recipe whose paths start at the suite's root directory, wherever pytest was started.

    Args:
        watch: of what has no key and watches nothing itself.
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
