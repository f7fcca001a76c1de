"""What is aimed at, beside what was measured: each target met or missed, on made-up rows as on real ones.

Groups of the grid are judged by the geometric mean and the worst ratio. Processors differ in what a ratio can be at
all, so a geometric mean of SHARE of the limit is as good as the wanted ratio. All on a CPU; figures of a GPU are
listed without a mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cases import CELLS, MODES
from .rows import Row
from .sides import ORT, TORCH, WITHOUT

SHARE = 0.75  # of the limit, geometric mean: as good as the mean ratio
# (cell, mode, peer) -> geometric mean and worst of the ratio over the grid.
GRID = {
    **{(cell, "training", TORCH): (4.0, 1.0) for cell in ("RNN", "GRU")},
    **{(cell, "inference", TORCH): (3.0, 1.0) for cell in ("RNN", "GRU")},
    ("LSTM", "training", TORCH): (1.3, 0.97),
    ("LSTM", "inference", TORCH): (1.2, 0.97),
    **{(cell, "inference", ORT): (1.3, 0.9) for cell in CELLS},
}
SCAN = 0.8  # of the peak at B >= 32 and H >= 128; of the cache's bandwidth at B = 1
STEP = {"RNN": 1 / 0.7, "LSTM": 2.0, "GRU": 2.0}  # torch's time over ours, one step of a cell
EXTRA = 1 / 1.05  # with resets or lengths: at most 5 % slower than without


@dataclass(frozen=True)
class Verdict:
    """One target: what it is about, what was found, what was wanted. met is None where nothing is wanted."""

    group: str
    cell: str
    mode: str
    threads: int
    implementation: str
    against: str
    cases: int
    mean: float
    """Geometric mean of the ratio; of the share of the limit in group `scan`."""
    worst: float
    worst_case: str
    share: float
    """Geometric mean of the share of the limit."""
    wanted: str
    met: bool | None

    @property
    def mark(self) -> str:
        """As it is printed."""
        return {True: "met", False: "MISSED", None: "-"}[self.met]


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; 0 where one is not."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def judged(rows: Sequence[Row]) -> list[Row]:
    """What users get: `auto`; every implementation where auto was not measured."""
    return [row for row in rows if row.implementation == "auto"] or list(rows)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for each group of rows that differ in their shape alone, in the order of the tables."""
    groups: dict[tuple, list[Row]] = {}
    for row in judged(rows):
        narrow = row.group == "scan" and row.B == 1
        key = (row.threads, row.launch, row.group, narrow, row.against, row.mode, row.cell, row.implementation)
        groups.setdefault(key, []).append(row)
    order = {name: k for k, name in enumerate((*MODES, *CELLS))}
    verdicts = []
    for (threads, _, group, narrow, against, mode, cell, who), some in sorted(
        groups.items(),
        key=lambda g: (g[0][0], g[0][1], RANK[g[0][2]], g[0][3], g[0][4], order[g[0][5]], order[g[0][6]]),
    ):
        scan = group == "scan"
        if scan and against != TORCH:
            continue
        figure = {row: row.share if scan else row.ratio_p50 for row in some}
        worst = min(some, key=lambda row: figure[row])
        mean, share = geometric_mean(figure.values()), geometric_mean(row.share for row in some)
        wanted, met = _wanted(group, narrow, cell, mode, against, mean, figure[worst], share)
        if some[0].device != "cpu":
            wanted, met = "", None
        verdicts.append(
            Verdict(
                group=group,
                cell=cell,
                mode=mode,
                threads=threads,
                implementation=who,
                against=("the cache" if narrow else "the peak") if scan else against,
                cases=len(some),
                mean=mean,
                worst=figure[worst],
                worst_case=worst.case,
                share=share,
                wanted=wanted,
                met=met,
            )
        )
    return verdicts


RANK = {name: k for k, name in enumerate(("grid", "step", "scan", "resets", "lengths", "field", "sweep"))}


def _wanted(
    group: str, narrow: bool, cell: str, mode: str, against: str, mean: float, worst: float, share: float
) -> tuple[str, bool | None]:
    """The target in words, and whether it is met."""
    if group == "grid" and (cell, mode, against) in GRID:
        least, floor = GRID[cell, mode, against]
        said = f"mean >= {least:g} or {SHARE:.0%} of the limit, worst >= {floor:g}"
        return said, (mean >= least or share >= SHARE) and worst >= floor
    if group == "scan":
        return f"each >= {SCAN:.0%} of the {'cache' if narrow else 'peak'}", worst >= SCAN
    if group == "step":
        return f">= {STEP[cell]:.2f}", worst >= STEP[cell]
    if group in ("resets", "lengths") and against == WITHOUT:
        return "at most 5 % slower than without", worst >= EXTRA
    return "", None
