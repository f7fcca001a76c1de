"""What was measured of the backends, as far as `auto` needs it to put them in order.

`dispatch_times.csv` beside this file holds, for each recorded shape of one layer in one direction, the milliseconds of
every backend that ran it. `python -m rnnkit.benchmarks.dispatch.record` writes the rows of a CPU, by instruction set,
dtype and number of threads; `python -m rnnkit.benchmarks.dispatch.fit_dispatch` those of GPUs from benchmarks/results/,
which were measured in float32 and stand for every dtype. user_times.py adds what was measured on this machine. For a
layer the nearest recorded shape decides, nearest in log B, log T, log I and log H. Which rows say something of a layer,
select.py decides.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .spec import LayerSpec

FILE = Path(__file__).with_name("dispatch_times.csv")
FACTS = ("device", "isa", "dtype", "cell", "train", "threads", "B", "T", "I", "H", "source")
"""The columns before those of the backends. The first five are a kind; a GPU has no isa and counts no threads."""
# A backend comes before one that precedes it in the table only where it is more than 3 % faster. Less is noise: of the
# recorded shapes that the same backend ran in two runs, by name and as `auto`, three of four differ by up to 3 %.
TIE = 1.03
# Cells that are recorded under another one's name: the same products, and an activation that costs little beside them.
ALIKE = {"rnn_relu": "rnn_tanh", "gru_reset_before": "gru"}


class Kind(NamedTuple):
    """What rows must share to stand for one another, but for the threads."""

    device: str
    isa: str
    dtype: str
    cell: str
    train: bool

    @classmethod
    def of(cls, spec: LayerSpec, isa: str, dtype: str) -> Kind:
        """The kind by which a layer is recorded."""
        return cls(spec.device, isa, dtype, ALIKE.get(spec.cell, spec.cell), spec.train)


class RecordedShape(NamedTuple):
    """One recorded shape, and the milliseconds that each backend took, in the order of the table of backends."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    kind: Kind
    threads: int
    source: str
    """Where it was measured: of a GPU the files under benchmarks/results/, joined by "+"; of a CPU its name; or the
    user's own table."""
    ms: dict[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {self.ms[name]:.3g} ms" for name in fastest_first(self.ms))
        where = f"{self.kind.isa}, {said(self.threads)}, " if self.kind.device == "cpu" else ""
        return (
            f"B={self.batch} T={self.steps} I={self.input_size} H={self.hidden_size} in {self.kind.dtype} on "
            f"{where}{self.source}: {times}"
        )

    @property
    def key(self) -> tuple[Kind, int, tuple[int, ...]]:
        """What was measured: a later row of the same key takes the place of an earlier one."""
        return self.kind, self.threads, self[:4]


def said(threads: int) -> str:
    """A number of threads in words."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def parsed(lines: Iterable[Mapping[str, str]]) -> Iterator[RecordedShape]:
    """Rows of lines by the names of columns. Raises ValueError, KeyError or TypeError for what is none."""
    for line in lines:
        kind = Kind(line["device"], line["isa"], line["dtype"], line["cell"], bool(int(line["train"])))
        sizes = (int(line["B"]), int(line["T"]), int(line["I"]), int(line["H"]))
        ms = {name: float(v) for name, v in line.items() if name not in FACTS and v}
        yield RecordedShape(*sizes, kind, int(line["threads"] or 0), line["source"], ms)


def written(row: RecordedShape, names: Sequence[str]) -> list[str]:
    """The line of a row, with columns for these backends."""
    kind = row.kind
    facts = (kind.device, kind.isa, kind.dtype, kind.cell, int(kind.train), row.threads or "", *row[:4], row.source)
    return [*map(str, facts), *(f"{row.ms[name]:.4g}" if name in row.ms else "" for name in names)]


def read(path: Path) -> list[RecordedShape]:
    """All rows of a file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(parsed(csv.DictReader(file)))


@functools.cache
def _lines() -> tuple[str, ...]:
    return tuple(FILE.read_text(encoding="utf-8").splitlines())


@functools.cache
def shipped(kind: Kind) -> tuple[RecordedShape, ...]:
    """The package's rows of a kind. Read when they are first asked for, those alone: there are many."""
    head, *lines = _lines()
    start = ",".join([*kind[:4], str(int(kind.train)), ""])
    return tuple(parsed(csv.DictReader([head, *(line for line in lines if line.startswith(start))])))


def forget() -> None:
    """Read the file again when it is next asked for."""
    _lines.cache_clear()
    shipped.cache_clear()


def at_threads(
    threads: int, shipped: Sequence[RecordedShape], own: Sequence[RecordedShape] = (), *, beyond: bool = False
) -> tuple[RecordedShape, ...]:
    """Of rows of one kind those with the nearest number of threads, by factors; empty where none has as many, unless
    `beyond`.

    own: the user's. Of two numbers as near theirs is taken, and a shape of theirs takes the place of the same shape.
    """
    every = {row.key: row for row in (*shipped, *own)}.values()
    counts = {row.threads for row in every}
    if not counts or (threads > max(counts) and not beyond):
        return ()
    mine = {row.threads for row in own}
    near = min(counts, key=lambda n: (abs(math.log(n / threads)), n not in mine))
    return tuple(row for row in every if row.threads == near)


def fastest_first(cost: Mapping[str, float]) -> tuple[str, ...]:
    """Names by cost. One passes those before it in the mapping's own order only where it beats each of them by TIE."""
    order: list[str] = []
    for name, own in cost.items():
        position = len(order)
        while position and cost[order[position - 1]] > own * TIE:
            position -= 1
        order.insert(position, name)
    return tuple(order)


def typical(rows: Iterable[RecordedShape]) -> tuple[str, ...]:
    """One order for every shape: by the geometric mean of how much slower than a row's fastest each backend is."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        for name, ms in row.ms.items():
            logs.setdefault(name, []).append(math.log(ms / min(row.ms.values())))
    return fastest_first({name: math.exp(sum(some) / len(some)) for name, some in logs.items()})


def nearest(sizes: tuple[int, int, int, int], rows: Iterable[RecordedShape]) -> RecordedShape | None:
    """The row nearest to sizes (B, T, I, H); None where there are none."""
    point = [math.log(max(size, 1)) for size in sizes]

    def distance(row: RecordedShape) -> float:
        return sum((a - math.log(b)) ** 2 for a, b in zip(point, row[:4], strict=True))

    return min(rows, key=distance, default=None)


def gpu_rows(device: str, cell: str, train: bool) -> tuple[RecordedShape, ...]:
    """Those of a GPU, whatever the dtype."""
    return shipped(Kind(device, "", "float32", ALIKE.get(cell, cell), train))


def measured_backends(device: str, cell: str, train: bool) -> tuple[str, ...]:
    """The backends that have a recorded time of a cell on a GPU."""
    return tuple(dict.fromkeys(name for row in gpu_rows(device, cell, train) for name in row.ms))


# As torch.compiler.assume_constant_result does, which would import the compiler with the package. torch.compile does
# not look at how the file is read; what is in it does not change in a process.
measured_backends._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unmeasured_reason(name: str, spec: LayerSpec) -> str | None:
    """Why `auto` leaves a plain layer on a GPU to torch's layers: this backend has no recorded time there."""
    known = measured_backends(spec.device, spec.cell, spec.train)
    if name in known or spec.extras or not spec.steps:
        return None
    return "can run it, but was not measured on a GPU yet, and torch has a layer for it; runs when named"
