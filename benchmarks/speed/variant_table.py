"""The table of custom cells: of each cell, how many times as fast as what it is held against, shape by shape."""

from __future__ import annotations

from collections.abc import Sequence

from .bench_cases import MODES, VARIANTS
from .rows import BenchRow
from .variant_goals import is_custom
from .variant_loops import BUILT_IN, COMPILED_LOOP, LOOP


def table(rows: Sequence[BenchRow]) -> tuple[list[str], list[list[str]]] | None:
    """Head and lines: a line for each cell, a column for each shape, mode and peer; None where nothing was measured."""
    some = [row for row in rows if is_custom(row) and row.implementation == "auto"]
    if not some:
        return None
    columns = [
        (peer, mode, case)
        for peer in (LOOP, COMPILED_LOOP, BUILT_IN)
        for mode in reversed(MODES)
        for case in dict.fromkeys(row.case for row in some if (row.against, row.mode) == (peer, mode))
    ]
    found = {(row.cell, row.against, row.mode, row.case): row for row in some}
    lines = []
    for cell in VARIANTS:
        own = [found.get((cell, *column)) for column in columns]
        if any(own):
            lines.append([cell, *("" if row is None else _figure(row) for row in own)])
    return ["cell", *(f"{peer}, {mode}, {case.replace('x', '×')}" for peer, mode, case in columns)], lines


def _figure(row: BenchRow) -> str:
    """The ratio, and what compiling the peer took."""
    return f"{row.ratio_p50:.2f}" + ("" if row.compile_s is None else f" ({row.compile_s:.0f} s)")
