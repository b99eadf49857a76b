"""Write docs/peers.md and its plots from the files that the measurements wrote to a directory.

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
# The tables that are also plotted as bars, and whether the axis is logarithmic, which it is if the
# figures of the peers differ widely.
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
# pgtemp compared with its peers

`docs/peers.py` generates this page as part of `make bench`; do not edit it. Environment and command
of each run:

{told}

The methods of a table run in alternation. The figures are medians with minimum and maximum; the
ratio is to the method in bold. Each peer is used in its own language, with the usual driver of
that language, and in the way that the peer's documentation recommends.
[bench/peers](../bench/peers/README.md) describes the measurements; the versions of the peers are in
the files of each language's package manager in the same directory. If a peer is not available, or
cannot do something, the table contains the reason. PGlite and py-pglite run a tenth of the tests,
and are not part of the sustained measurements. HAProxy runs with one thread or with its default
number of threads; the table contains the faster of the two.

"original pgtemp" is the Rust crate `pgtemp`, a different project with the same name.

"CREATE + DROP, Go" shows how fast PostgreSQL itself is: two connections create databases in
advance and drop the used ones. No client connects to the databases of "CREATE + DROP, psql" in the
sustained measurements, nor to those of the bare loop, which also does not wait: in the table of
waiting tests, it shows only how long PostgreSQL takes to create and drop a database.
"""


def plot(name: str, table: dict[str, Any]) -> None:
    """Plot one bar per method, with a line from its minimum to its maximum."""
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
    """Return the table in Markdown."""
    samples, base = table["samples"], table["base"]
    unit = statistics.median(samples[base]) if base in samples else None
    rounds = {len(one) for one in samples.values()}
    times = f"{min(rounds)} to {max(rounds)}" if len(rounds) > 1 else f"{max(rounds, default=0)}"
    lines = [f"## {table['title']}", ""]
    if name in SHOWN:
        lines += [f"![{table['title']}](plots/{name}.svg)", ""]
    plural = "" if times == "1" else "s"
    lines += [f"| {times} sample{plural} per row | median | min-max | ratio |", "|---|---|---|---|"]
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
        shown = " ".join(reason.split())[:150].replace("cannot: ", "not measured: ")
        lines.append(f"| {way} | {shown} | | |".replace("\\", ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    kept = Path(sys.argv[1])
    # Equal samples give an equal file, and the text in it can be searched.
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
