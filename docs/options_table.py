"""Write docs/options.md from the options themselves."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from pgtemp.options.daemon import DaemonOptions
from pgtemp.options.pytest import suite_fields
from pgtemp.options.server import ServerOptions, default_of


def table() -> str:
    """The options as a Markdown page."""
    lines = [
        "# Options",
        "",
        "Made from `src/pgtemp/options/` by `make docs`. Keyword",
        "arguments of `PgTempDB` and `Cluster`, and flags of `pgtemp serve`. What is given beats",
        "the environment variable, which beats the default.",
        "",
        "| keyword | flag | variable | default | what it is |",
        "|---|---|---|---|---|",
    ]
    library = {spec.name for spec in fields(ServerOptions)}
    for spec in fields(DaemonOptions):
        keyword = f"`{spec.name}`" if spec.name in library else "(daemon only)"
        flag = spec.metadata["flag"]
        shown = f"`{flag}`" if flag else "in the URI"
        variable = f"`{spec.metadata['env']}`" if spec.metadata["env"] else ""
        lines.append(
            f"| {keyword} | {shown} | {variable} | {_default(default_of(spec))} "
            f"| {spec.metadata['help']} |"
        )
    return "\n".join([*lines, *_in_a_suite(), ""])


def _in_a_suite() -> list[str]:
    lines = [
        "",
        "## In a suite",
        "",
        "Of the pytest plugin; in the ini file without the dashes, as in `pgtemp_keep = all`.",
        "",
        "| flag | variable | default | what it is |",
        "|---|---|---|---|",
    ]
    for name, spec in suite_fields():
        variable = f"`{spec.metadata['env']}`" if spec.metadata["env"] else ""
        lines.append(
            f"| `--{name.replace('_', '-')}` | {variable} | {_default(default_of(spec))} "
            f"| {spec.metadata['help']} |"
        )
    return lines


def _default(value: Any) -> str:
    return "" if value in (None, {}, ()) else f"`{value}`"


if __name__ == "__main__":
    (Path(__file__).parent / "options.md").write_text(table())
