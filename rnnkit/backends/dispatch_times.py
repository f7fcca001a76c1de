"""What was measured of the backends, as far as `auto` needs it to put them in order.

`dispatch_times.csv` beside this file holds, for each recorded shape of one layer in one direction, the milliseconds of
every backend that ran it. `python -m rnnkit.benchmarks.dispatch.fit_dispatch` writes it from benchmarks/results/.
For a problem the nearest recorded shape decides, nearest in log B, log T, log I and log H. All was measured in
float32; for which other dtypes it holds, select.py says.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .spec import LayerSpec

FILE = Path(__file__).with_name("dispatch_times.csv")
FACTS = ("device", "cell", "train", "B", "T", "I", "H", "source")  # the columns before those of the backends
# A backend comes before one that precedes it in the table only where it is more than 3 % faster. Less is noise: of the
# recorded shapes that the same backend ran in two runs, by name and as `auto`, three of four differ by up to 3 %.
TIE = 1.03
# Cells that are recorded under another one's name: the same products, and an activation that costs little beside them.
ALIKE = {"rnn_relu": "rnn_tanh", "gru_reset_before": "gru"}

Kind = tuple[str, str, bool]  # device, cell, whether a backward follows


class RecordedShape(NamedTuple):
    """One recorded shape, and the milliseconds that each backend took, in the order of the table of backends."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    source: str
    """The file or files under benchmarks/results/, joined by "+"."""
    ms: dict[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {self.ms[name]:.3g} ms" for name in fastest_first(self.ms))
        return f"B={self.batch} T={self.steps} I={self.input_size} H={self.hidden_size} on {self.source}: {times}"


def read(path: Path) -> dict[Kind, list[RecordedShape]]:
    """The rows of a file by device, cell and whether they train."""
    with path.open(newline="", encoding="utf-8") as file:
        return parsed(csv.DictReader(file))


def parsed(lines: Iterable[Mapping[str, str]]) -> dict[Kind, list[RecordedShape]]:
    """The same of lines, by the names of columns."""
    found: dict[Kind, list[RecordedShape]] = {}
    for line in lines:
        ms = {name: float(v) for name, v in line.items() if name not in FACTS and v}
        row = RecordedShape(int(line["B"]), int(line["T"]), int(line["I"]), int(line["H"]), line["source"], ms)
        found.setdefault((line["device"], line["cell"], line["train"] == "1"), []).append(row)
    return found


def fastest_first(cost: Mapping[str, float]) -> tuple[str, ...]:
    """Names by cost. One passes those before it in the mapping's own order only where it beats each of them by TIE."""
    order: list[str] = []
    for name, own in cost.items():
        position = len(order)
        while position and cost[order[position - 1]] > own * TIE:
            position -= 1
        order.insert(position, name)
    return tuple(order)


def typical(rows: list[RecordedShape]) -> tuple[str, ...]:
    """One order for every shape: by the geometric mean of how much slower than a row's fastest each backend is."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        for name, ms in row.ms.items():
            logs.setdefault(name, []).append(math.log(ms / min(row.ms.values())))
    return fastest_first({name: math.exp(sum(some) / len(some)) for name, some in logs.items()})


ROWS = read(FILE)
TYPICAL = {kind: typical(rows) for kind, rows in ROWS.items()}


def nearest(
    device: str,
    cell: str,
    train: bool,
    sizes: tuple[int, int, int, int],
    recorded: dict[Kind, list[RecordedShape]] | None = None,
) -> RecordedShape | None:
    """The recorded shape nearest to sizes (B, T, I, H); None where nothing is recorded of this cell and device.

    recorded: rows as `parsed` gives them; None: those of the package.
    """
    rows = (ROWS if recorded is None else recorded).get((device, ALIKE.get(cell, cell), train), ())
    point = [math.log(max(size, 1)) for size in sizes]

    def distance(row: RecordedShape) -> float:
        return sum((a - math.log(b)) ** 2 for a, b in zip(point, row[:4], strict=True))

    return min(rows, key=distance, default=None)


def unmeasured_reason(name: str, spec: LayerSpec) -> str | None:
    """Why `auto` leaves a plain layer on a GPU to torch's layers: this backend has no recorded time there."""
    known = TYPICAL.get((spec.device, ALIKE.get(spec.cell, spec.cell), spec.train), ())
    if name in known or spec.extras or not spec.steps:
        return None
    return "can run it, but was not measured on a GPU yet, and torch has a layer for it; runs when named"
