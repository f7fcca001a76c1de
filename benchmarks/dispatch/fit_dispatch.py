"""Writes rnnkit/backends/dispatch_times.csv, by which `auto` orders the backends, from rows of benchmarks/results/.

    python -m rnnkit.benchmarks.dispatch.fit_dispatch [--results DIR] [--to FILE]

Taken are plain layers of one layer and direction in float32, by call. Several processors that measured one shape, and
several numbers of threads, give it the geometric mean of their times.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

from rnnkit.backends import BY_NAME, dispatch_times

from ..speed.bench_cases import BadInput
from ..speed.rows import RESULTS, BenchRow, read, recorded
from ..speed.timing import geometric_mean

GROUPS = ("grid", "field", "sweep")  # plain layers
CELLS = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}


def table(files: dict[str, list[BenchRow]]) -> list[list[str]]:
    """The lines of dispatch_times.csv, without its head, of rows by the file that holds them."""
    found: dict[tuple, dict[tuple[str, int], dict[str, float]]] = {}  # shape -> source, threads -> backend -> ms
    for source, rows in sorted(files.items()):
        for row in rows:
            single = row.layers == row.directions == 1
            single = single and (row.launch, row.dtype) == ("call", "float32")
            if row.group in GROUPS and single and row.implementation in BY_NAME:
                shape = (row.device, CELLS[row.cell], int(row.mode == "training"), row.B, row.T, row.I, row.H)
                found.setdefault(shape, {}).setdefault((source, row.threads), {})[row.implementation] = row.ms
    lines = []
    for shape, sources in sorted(found.items()):
        everywhere = [name for name in BY_NAME if all(name in ms for ms in sources.values())]
        times = {name: geometric_mean(ms[name] for ms in sources.values()) for name in everywhere}
        if times:
            ms = [f"{times[name]:.4g}" if name in times else "" for name in BY_NAME]
            lines.append([*map(str, shape), "+".join(dict.fromkeys(name for name, _ in sources)), *ms])
    return lines


def orders(rows: list[BenchRow]) -> Callable[[BenchRow], str]:
    """The backend `auto` would choose if only these rows were recorded."""
    lines = (dict(zip([*dispatch_times.FACTS, *BY_NAME], line, strict=True)) for line in table({"these": rows}))
    known = dispatch_times.parsed(lines)

    def taken(row: BenchRow) -> str:
        sizes = (row.B, row.T, row.I, row.H)
        near = dispatch_times.nearest(row.device, CELLS[row.cell], row.mode == "training", sizes, known)
        return "torch" if near is None else dispatch_times.fastest_first(near.ms)[0]

    return taken


def main(arguments: list[str] | None = None) -> int:
    """Read, write, say what was written; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--to", type=Path, default=dispatch_times.FILE, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        files = {path.stem: read(path) for path in recorded(options.results)}
        lines = table(files)
        if not lines:
            raise BadInput(
                f"{options.results} has no rows of plain layers by backend; `python -m rnnkit bench --record`"
            )
    except BadInput as error:
        print(f"rnnkit.benchmarks.dispatch.fit_dispatch: {error}", file=sys.stderr)
        return 2
    with options.to.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([[*dispatch_times.FACTS, *BY_NAME], *lines])
    print(f"{options.to}: {len(lines)} shapes from {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
