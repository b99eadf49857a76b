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
        "`make docs` generates this page from `src/pgtemp/options/`. The table lists the keyword",
        "arguments of `PgTempDB` and `Cluster`, and the flags of `pgtemp serve`. A given value",
        "takes precedence over the environment variable, and this over the default.",
        "",
        "| keyword | flag | variable | default | meaning |",
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
        "The options of the pytest plugin. Write them in the ini file without dashes, as in",
        "`pgtemp_keep = all`.",
        "",
        "| flag | variable | default | meaning |",
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
