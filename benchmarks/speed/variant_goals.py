"""What is aimed at with custom cells on a CPU: against a loop of torch operators, against that loop compiled, and of
LSTM and GRU against the built-in ones.

A target is over all cells of some shapes. Shapes that no target names are listed, and none may be below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .bench_cases import CUSTOM, MODES, TABLE, VARIANTS
from .goals import Goal
from .rows import BenchRow
from .variant_cells import BUILT_IN as BOTH
from .variant_loops import BUILT_IN, COMPILED_LOOP, LOOP

LARGE = 128  # units: from there on a custom LSTM or GRU has mostly products to do
SHARES = {True: 0.8, False: 0.6}
"""Of the built-in layer's speed, whether H >= LARGE."""
LEAST = {("variants", "4x100x64x64"): 12.0, ("variants", "32x100x128x128"): 1.5}
"""Geometric mean over the cells in training, by group and shape."""


class VariantTarget(NamedTuple):
    """One target: what it is about, its rows, what is wanted of their ratios."""

    group: str
    mode: str
    against: str
    rows: list[BenchRow]
    whole: int
    """How many rows there are to be judged by."""
    goal: Goal | None


def is_custom(row: BenchRow) -> bool:
    """Whether the row is of a custom cell."""
    return row.group in CUSTOM


def all_targets(rows: Sequence[BenchRow]) -> list[VariantTarget]:
    """The targets of rows of one setting (threads, dtype, instruction set) that have a row. Wanted is something of one
    thread in float32 alone."""
    found = []
    judged = bool(rows) and rows[0].threads == 1 and rows[0].dtype == "float32"

    def add(
        group: str, words: str, mode: str, against: str, goal: Goal, cells: int, shape: Callable[[str, int], bool]
    ) -> None:
        some = [
            row
            for row in rows
            if (row.group, row.mode, row.against) == (group, mode, against) and shape(row.case, row.H)
        ]
        cases = [case for case in TABLE if case.group == group and mode in case.modes and shape(case.name, case.hidden)]
        if some:
            label = f"{group}, {words}" if words else group
            found.append(VariantTarget(label, mode, against, some, cells * len(cases), goal if judged else None))

    for (group, case), least in LEAST.items():
        goal = Goal(least, 1.0, f"mean >= {least:g}, worst >= 1")
        add(group, case, "training", LOOP, goal, len(VARIANTS), lambda name, _, case=case: name == case)  # type: ignore[misc]
    each = Goal(1.0, 1.0, "each >= 1")
    named = [case for _, case in LEAST]
    add("variants", "other shapes", "training", LOOP, each, len(VARIANTS), lambda name, _: name not in named)
    add("variants", "", "inference", LOOP, each, len(VARIANTS), lambda *_: True)
    add("compiled", "", "inference", LOOP, each, len(VARIANTS), lambda *_: True)
    compiled = Goal(1.0, 0.9, "mean >= 1, worst >= 0.9")
    add("compiled", "", "inference", COMPILED_LOOP, compiled, len(VARIANTS), lambda *_: True)
    for mode in MODES:
        for large, share in SHARES.items():
            words, goal = f"H {'>=' if large else '<'} {LARGE}", Goal(share, share, f"each >= {share:g}")
            add("variants", words, mode, BUILT_IN, goal, len(BOTH), lambda _, h, large=large: (h >= LARGE) == large)  # type: ignore[misc]
    return found
