"""Writes the rows of GPUs in rnnkit/backends/dispatch_times.csv, by which `auto` orders the backends, from rows of
benchmarks/results/.

    python -m rnnkit.benchmarks.dispatch.fit_dispatch [--results DIR] [--to FILE]

Taken are plain layers of one layer and direction in float32, by call. Several GPUs that measured one shape give it the
geometric mean of their times. The rows of CPUs, which `record` writes, are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rnnkit.backends import BY_NAME, dispatch_times
from rnnkit.backends.dispatch_times import Kind, RecordedShape

from ..speed.bench_cases import BadInput
from ..speed.rows import RESULTS, BenchRow, read, recorded
from ..speed.timing import geometric_mean

GROUPS = ("grid", "field", "sweep")  # plain layers
CELLS = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}


def table(files: dict[str, list[BenchRow]]) -> list[RecordedShape]:
    """The rows of GPUs in dispatch_times.csv, of rows by the file that holds them."""
    found: dict[tuple[Kind, tuple[int, int, int, int]], dict[str, dict[str, float]]] = {}  # -> source -> backend -> ms
    for source, rows in sorted(files.items()):
        for row in rows:
            single = row.layers == row.directions == 1
            single = single and (row.launch, row.dtype) == ("call", "float32") and row.device != "cpu"
            if row.group in GROUPS and single and row.implementation in BY_NAME:
                kind = Kind(row.device, "", row.dtype, CELLS[row.cell], row.mode == "training")
                shape = (kind, (row.B, row.T, row.I, row.H))
                found.setdefault(shape, {}).setdefault(source, {})[row.implementation] = row.ms
    lines = []
    for (kind, sizes), sources in sorted(found.items()):
        everywhere = [name for name in BY_NAME if all(name in ms for ms in sources.values())]
        times = {name: geometric_mean(ms[name] for ms in sources.values()) for name in everywhere}
        if times:
            lines.append(RecordedShape(*sizes, kind, 0, "+".join(sources), times))
    return lines


def orders(rows: list[BenchRow]) -> Callable[[BenchRow], str]:
    """The backend `auto` would choose on a GPU if only these rows were recorded."""
    known = table({"these": rows})

    def taken(row: BenchRow) -> str:
        kind = Kind(row.device, "", "float32", CELLS[row.cell], row.mode == "training")
        alike = [one for one in known if one.kind == kind]
        near = dispatch_times.nearest((row.B, row.T, row.I, row.H), alike)
        return "torch" if near is None else dispatch_times.fastest_first(near.ms)[0]

    return taken


def save(path: Path, rows: Iterable[RecordedShape]) -> None:
    """Write dispatch_times.csv whole: sorted, so that a change shows as what it is."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*dispatch_times.FACTS, *BY_NAME])
        writer.writerows(dispatch_times.written(row, tuple(BY_NAME)) for row in sorted(rows, key=lambda row: row.key))
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Read, write, say what was written; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--to", type=Path, default=dispatch_times.FILE, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        files = {path.stem: read(path) for path in recorded(options.results)}
        found = table(files)
        if not found:
            raise BadInput(f"{options.results} has no rows of plain layers by backend on a GPU; `make gpu-check`")
    except BadInput as error:
        print(f"rnnkit.benchmarks.dispatch.fit_dispatch: {error}", file=sys.stderr)
        return 2
    others = dispatch_times.read(options.to) if options.to.exists() else []
    save(options.to, [*(row for row in others if row.kind.device == "cpu"), *found])
    print(f"{options.to}: {len(found)} shapes from {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
