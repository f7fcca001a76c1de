"""What is aimed at on a CPU: of each group of rows the geometric mean and the worst, and which figure is judged.

Processors differ in what a ratio can be at all, so a geometric mean of a share of the limit is as good as the wanted
ratio. The limit knows little of what a small call costs: the share counts large rows alone, and small rows have a mean
of their own beside it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import NamedTuple

from .bench_cases import CELLS, MODES, PLAIN, TABLE
from .implementations import ORT, TORCH, WITHOUT
from .rows import TRAINING_PEAKS, BenchRow

UNITS, OPERATIONS = 64, 2e6  # from there on a row is large: the limit says what it may take
WIDE = 256  # units: from there on a scan has little but products
PEAK, NARROW, CACHE = "the peak", f"the peak at H < {WIDE}", "the cache"
"""What a scan is held against, by its shape."""
BEFORE, BEFORE_AGAIN = "before", "before, with recompute"
NOISE = 0.995  # peaks are exact, and written with four digits


class Goal(NamedTuple):
    """The least that is wanted, and its words."""

    mean: float
    """Geometric mean of the figure."""
    floor: float
    """Each figure."""
    words: str
    share: float | None = None
    """Of the limit, geometric mean over large rows: as good as `mean`."""


def _goal(mean: float, floor: float, share: float | None = None) -> Goal:
    limit = "" if share is None else f" or {share:.0%} of the limit on large rows"
    return Goal(mean, floor, f"mean >= {mean:g}{limit}, worst >= {floor:g}", share)


def _scan(mean: float, floor: float, of: str) -> Goal:
    alike = f"each >= {floor:.0%} of {of}"
    return Goal(mean, floor, alike if mean == floor else f"mean >= {mean:.0%} of {of}, worst >= {floor:.0%}")


SHARES = {"training": 0.76, "inference": 0.78}
STEP = {"RNN": 1 / 0.7, "LSTM": 2.0, "GRU": 2.0}  # torch's time over ours, one step of a cell
FREE = Goal(0.0, 1 / 1.05, "at most 5 % slower than without")
# (group, peer, mode, cell, dtype) -> what is wanted of the ratio.
RATIOS = {
    **{("grid", TORCH, "training", cell, "float32"): _goal(4.0, 1.0, SHARES["training"]) for cell in ("RNN", "GRU")},
    **{("grid", TORCH, "inference", cell, "float32"): _goal(3.0, 1.0, SHARES["inference"]) for cell in ("RNN", "GRU")},
    ("grid", TORCH, "training", "LSTM", "float32"): _goal(1.3, 0.97, SHARES["training"]),
    ("grid", TORCH, "inference", "LSTM", "float32"): _goal(1.25, 0.97, SHARES["inference"]),
    **{("grid", ORT, "inference", cell, "float32"): _goal(1.05, 0.85) for cell in CELLS},
    **{("grid", TORCH, mode, cell, "bfloat16"): _goal(1.3, 0.97) for cell in CELLS for mode in MODES},
    **{("stacks", TORCH, "inference", cell, "float32"): _goal(1.5, 1.0) for cell in CELLS},
    **{("stacks", TORCH, "training", cell, "float32"): _goal(1.2, 1.0) for cell in CELLS},
    **{
        ("step", TORCH, "inference", cell, "float32"): Goal(least, least, f">= {least:.2f}")
        for cell, least in STEP.items()
    },
}
# (what a scan is held against, dtype) -> what is wanted of the share of it.
SCANS = {
    (PEAK, "float32"): _scan(0.85, 0.80, PEAK),
    (PEAK, "bfloat16"): _scan(0.70, 0.70, PEAK),
    (CACHE, "float32"): _scan(0.80, 0.80, CACHE),
}
MEMORY = Goal(1.0, 1 / 1.05, "mean >= 1, worst at most 5 % more")
NO_MORE = Goal(0.0, NOISE, "each no more than before")


def scan_part(group: str, batch: int, hidden: int) -> str:
    """What a scan of this shape is held against; empty for other groups."""
    if group != "scan":
        return ""
    return CACHE if batch == 1 else PEAK if hidden >= WIDE else NARROW


def wanted(row: BenchRow) -> Goal | None:
    """What is wanted of rows of this kind; None where nothing is."""
    if row.group == "scan":
        return SCANS.get((scan_part(row.group, row.B, row.H), row.dtype))
    if row.group in ("resets", "lengths") and row.against == WITHOUT:
        return FREE
    if row.against == ORT and row.processor_isa == "avx512":
        return None  # it cannot be held to less, and takes all that the processor has
    return RATIOS.get((row.group, row.against, row.mode, row.cell, row.dtype))


def large(row: BenchRow) -> bool:
    """Whether the limit says what this row may take."""
    return row.H >= UNITS and row.operations >= OPERATIONS


class Memory(NamedTuple):
    """What is asked of the memory of a training step, for one group and cell."""

    group: str
    cell: str
    against: str
    figure: dict[BenchRow, float]
    """Of each row: above 1, rnnkit takes less."""
    whole: frozenset[str]
    goal: Goal


def memory(rows: Sequence[BenchRow]) -> list[Memory]:
    """The peaks of training in float32 on one thread, against torch.nn's and against what the engine took before."""
    trained = [
        row
        for row in rows
        if (row.device, row.mode, row.against, row.dtype, row.threads) == ("cpu", "training", TORCH, "float32", 1)
        and row.group in PLAIN
        and row.peak_mib
    ]
    before = peaks_before()
    found = []
    for group in PLAIN:
        for cell in CELLS:
            some = [row for row in trained if (row.group, row.cell) == (group, cell)]
            every = frozenset(
                case.name
                for case in TABLE
                if (case.group, "cpu" in case.devices) == (group, True)
                if cell in case.cells and "training" in case.modes
            )
            theirs = {row: row.against_peak_mib / row.peak_mib for row in some if row.peak_mib and row.against_peak_mib}
            found.append(Memory(group, cell, TORCH, theirs, every, MEMORY))
            known = {row: before[key] for row in some if (key := (group, row.case, cell)) in before}
            once = {row: was / row.peak_mib for row, (was, _) in known.items() if row.peak_mib and row.ran == "cpu"}
            again = {row: was / row.recompute_mib for row, (_, was) in known.items() if row.recompute_mib}
            listed = frozenset(case for of, case, kind in before if (of, kind) == (group, cell))
            others = {row.case for row in known if row.ran != "cpu"}  # torch's layer, whose memory is torch's
            found.append(Memory(group, cell, BEFORE, once, listed - others, NO_MORE))
            found.append(Memory(group, cell, BEFORE_AGAIN, again, listed, NO_MORE))
    return [one for one in found if one.figure]


def peaks_before() -> dict[tuple[str, str, str], tuple[float, float]]:
    """By group, shape and cell: the MiB that the engine took for a training step, and with recompute=True."""
    if not TRAINING_PEAKS.exists():  # an installed package carries no results
        return {}
    with TRAINING_PEAKS.open(newline="", encoding="utf-8") as file:
        return {
            (line["group"], line["case"], line["cell"]): (float(line["peak_mib"]), float(line["recompute_mib"]))
            for line in csv.DictReader(file)
        }
