"""Write docs/peers.md and its plots from what measurements have kept in a directory.

python docs/peers.py DIRECTORY
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

HERE = Path(__file__).parent
PLOTS = HERE / "plots"
# Of the tables, those that are shown as bars; the axis is logarithmic where peers are far apart.
SHOWN = {
    "start": True,
    "cold": True,
    "database": True,
    "sustained-fifty-4": True,
    "suite-trivial": True,
    "suite-waiting": False,
    "leases": False,
    "daemon-memory": False,
}
ORDER = (
    *("start", "cold", "database"),
    *("connect-psycopg", "connect-asyncpg", "connect-nodespg", "connect-pgx"),
    *("sustained-fifty-1", "sustained-fifty-4", "sustained-fifty-16", "sustained-empty-4"),
    *("sustained-servers", "suite-trivial", "suite-waiting"),
    *("pytest-trivial", "pytest-waiting", "pytest-computing"),
    *(f"relay-{load}-{clients}" for load in ("select", "tpc-b") for clients in (1, 4, 16, 64)),
    *("relay-copy-out", "relay-copy-in"),
    *("memory", "leases", "daemon-memory", "kill"),
)
OURS, THEIRS = "#1f6f8b", "#b8b8b8"
HEAD = """\
# Against its peers

Written by `docs/peers.py`, as `make bench` does; do not edit. Measured by:

{told}

All ways of a table take turns. The figures are medians with minimum and maximum; the ratio is to
the way in bold. Each peer is used in its own language, by the driver that is usual there, in the
way that its documentation says is best. What each is asked is in
[bench/peers](../bench/peers/README.md), and the versions are in the files of its language's package
manager beside that. A peer that could not be had, or cannot do something, stands in the table with
the reason. PGlite and py-pglite get a tenth of the tests, and no part in what is sustained. HAProxy
has one thread, or as many as it takes by itself, whichever is faster.
"CREATE + DROP, Go" is what PostgreSQL itself can do: two connections that make and drop databases
ahead; in "CREATE + DROP, psql", and in the bare loop of two creators, nobody connects to what is
made.
"""


def plot(name: str, table: dict[str, Any]) -> None:
    """One bar a way, with lines from its minimum to its maximum."""
    samples: dict[str, list[float]] = table["samples"]
    ways = sorted(samples, key=lambda way: statistics.median(samples[way]), reverse=True)
    middles = [statistics.median(samples[way]) for way in ways]
    spread = [
        [middle - min(samples[way]) for way, middle in zip(ways, middles, strict=True)],
        [max(samples[way]) - middle for way, middle in zip(ways, middles, strict=True)],
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.32 * len(ways)))
    colours = [OURS if way.startswith("pgtemp") or name in _OF_PGTEMP else THEIRS for way in ways]
    axes.barh(ways, middles, xerr=spread, color=colours, ecolor="#555555", capsize=2)
    if SHOWN[name]:
        axes.set_xscale("log")
    for y, middle in enumerate(middles):
        axes.annotate(
            f" {middle:.3g}", (middle, y), va="bottom", fontsize=7, color="#333333",
            xytext=(0, 1), textcoords="offset points",
        )  # fmt: skip
    axes.set_title(table["title"], loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


_OF_PGTEMP = ("leases", "daemon-memory", "memory")


def text(name: str, table: dict[str, Any]) -> str:
    """The table in Markdown."""
    samples, base = table["samples"], table["base"]
    unit = statistics.median(samples[base]) if base in samples else None
    rounds = {len(one) for one in samples.values()}
    times = f"{min(rounds)} to {max(rounds)}" if len(rounds) > 1 else f"{max(rounds, default=0)}"
    lines = [f"## {table['title']}", ""]
    if name in SHOWN:
        lines += [f"![{table['title']}](plots/{name}.svg)", ""]
    lines += [f"| {times} samples each | median | min-max | ratio |", "|---|---|---|---|"]
    best_first = sorted(
        samples.items(),
        key=lambda item: statistics.median(item[1]),
        reverse=table["more is better"],
    )
    for way, one in best_first:
        middle = statistics.median(one)
        shown = f"**{way}**" if way == base else way
        ratio = f"{middle / unit:.2f}" if unit else ""
        lines.append(f"| {shown} | {middle:.1f} | {min(one):.1f}-{max(one):.1f} | {ratio} |")
    for way, reason in table["failed"].items():
        lines.append(f"| {way} | {' '.join(reason.split())[:150]} | | |".replace("\\", ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    kept = Path(sys.argv[1])
    # The same file from the same samples, with text that can be searched.
    mpl.rcParams.update({"svg.hashsalt": "pgtemp", "svg.fonttype": "none"})
    PLOTS.mkdir(exist_ok=True)
    paths = {name: kept / f"{name}.json" for name in ORDER}
    tables = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    for name in SHOWN:
        if name in tables and tables[name]["samples"]:
            plot(name, tables[name])
    told = dict.fromkeys(table["told"] for table in tables.values())
    head = HEAD.format(told="\n".join(f"- {one}" for one in told))
    (HERE / "peers.md").write_text(
        "\n".join([head, *(text(name, table) for name, table in tables.items())])
    )


if __name__ == "__main__":
    main()
