"""What is aimed at, beside what was measured: each target met or missed, on made-up rows as on real ones.

Groups of the grid are judged by the geometric mean and the worst ratio. Processors differ in what a ratio can be at
all, so a geometric mean of SHARE of the limit is as good as the wanted ratio. A group that was measured in part is not
met, whatever its mean; it is missed where its worst ratio is, since no further shape can mend that. These are of a
CPU. On a GPU the same groups are listed without a mark, and what is aimed at is asked of the fused backends by name
(FUSED): each against cuDNN in time and in memory, against a loop of torch operators, against itself without resets, and
what `auto` would make of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.backends.dispatch_times import TIE

from ..dispatch import fit_dispatch
from .bench_cases import CELLS, MODES, TABLE, BenchCase
from .implementations import CELLS as STEPWISE
from .implementations import COMPILE, NAMES, ORT, TORCH, WITHOUT
from .rows import BenchRow
from .timing import geometric_mean

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
SMALL = 256  # units: what a fused backend on a GPU is to win first


@dataclass(frozen=True)
class Fused:
    """What is asked of a backend on a GPU, in bfloat16 with a backward."""

    mean: float
    """Geometric mean of the ratio to cuDNN over the group `field` with H <= SMALL."""
    free: tuple[str, ...]
    """Groups in which it is at most 5 % slower than without."""
    step: float | None = None
    """Microseconds of a forward step of the group `scan`, where the weights stay on one multiprocessor."""
    nowhere: bool = False
    """Whether `auto` may be below cuDNN on no plain layer by taking it."""
    memory: bool = False
    """Whether its memory in training is to be at most cuDNN's, over the group `field`; half of it, with recompute, is
    asked of all."""


FUSED = {
    "triton": Fused(1.5, ("resets",)),
    "cuda": Fused(2.0, ("resets", "lengths"), step=0.5, nowhere=True, memory=True),
}
HOPPER = 90  # the compute capability of the GPU that the targets are set for
JUDGED = ("bfloat16", "float32")  # what gpu-check measures


@dataclass(frozen=True)
class Verdict:
    """One target: what it is about, what was found, what was wanted.

    met is None where nothing is wanted, and where too little was measured to say.
    """

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
    launch: str = "call"
    dtype: str = "float32"
    shapes: int = 0
    """How many the whole group has; 0 where it is judged by what there is."""

    @property
    def possible(self) -> float | None:
        """The peer's time over the least possible time, geometric mean: the ratio that this machine allows at most."""
        return self.mean / self.share if self.group != "scan" and self.share else None

    @property
    def mark(self) -> str:
        """As it is printed."""
        if self.met is None and self.wanted and self.cases < self.shapes:
            return f"- ({self.cases} of {self.shapes} shapes)"
        return {True: "met", False: "MISSED", None: "-"}[self.met]


def judged(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """What users get: `auto`; every implementation where auto was not measured."""
    return [row for row in rows if row.implementation == "auto"] or list(rows)


def brought(row: BenchRow) -> bool:
    """Whether the row is of a module that somebody brought, of which nothing is wanted."""
    return row.implementation not in (*NAMES, COMPILE)


def judge(rows: Sequence[BenchRow]) -> list[Verdict]:
    """A verdict for each group of rows that differ in their shape alone, in the order of the tables."""
    groups: dict[tuple, list[BenchRow]] = {}
    for row in dict.fromkeys([*judged(rows), *filter(brought, rows)]):
        narrow = row.group == "scan" and row.B == 1
        how = (row.threads, row.launch, row.dtype)
        key = (how, row.group, narrow, row.against, row.mode, row.cell, row.implementation)
        groups.setdefault(key, []).append(row)
    order = {name: k for k, name in enumerate((*MODES, *CELLS))}
    verdicts = []
    for ((threads, launch, dtype), group, narrow, against, mode, cell, who), some in sorted(
        groups.items(),
        key=lambda g: (g[0][0], RANK[g[0][1]], *g[0][2:4], order[g[0][4]], order[g[0][5]]),
    ):
        scan = group == "scan"
        if scan and against != TORCH:
            continue
        figure = {row: row.share if scan else row.ratio_p50 for row in some}
        worst = min(some, key=lambda row: figure[row])
        mean, share = geometric_mean(figure.values()), geometric_mean(row.share for row in some)
        whole = _whole(some[0].device, group, narrow, cell, mode)
        measured = whole & {row.case for row in some}
        wanted, met = "", None
        if some[0].device == "cpu" and not brought(some[0]):
            wanted, enough, floor = _wanted(group, narrow, cell, mode, against, mean, share)
            if wanted:
                met = False if figure[worst] < floor else enough if measured == whole else None
        verdicts.append(
            Verdict(
                group=group,
                cell=cell,
                mode=mode,
                threads=threads,
                implementation=who,
                against=("the cache" if narrow else "the peak") if scan else against,
                cases=len({row.case for row in some}),
                mean=mean,
                worst=figure[worst],
                worst_case=worst.case,
                share=share,
                wanted=wanted,
                met=met,
                launch=launch,
                dtype=dtype,
                shapes=len(whole),
            )
        )
    return verdicts + fused([row for row in rows if row.device != "cpu"])


class Asked(NamedTuple):
    """One target of a fused backend: what is judged, by which figures, what they must come to."""

    group: str
    mode: str
    dtype: str
    against: str
    figure: dict[BenchRow, float]
    """Of each row that it is judged by: above 1 the backend is better."""
    wanted: str
    least: float
    """Of the geometric mean."""
    floor: float
    """Of each figure."""
    whole: int
    """How many jobs there are to be judged by."""


def fused(rows: Sequence[BenchRow]) -> list[Verdict]:
    """The verdicts on the fused backends of a GPU, by call and by graph; none on what was not measured."""
    return [_verdict(name, launch, asked) for name, launch, asked in every(rows) if asked.figure]


def every(rows: Sequence[BenchRow]) -> list[tuple[str, str, Asked]]:
    """All targets of the fused backends that have a row, measured or not: backend, launch, target."""
    found = []
    for name, goal in FUSED.items():
        for launch in ("call", "graph"):
            own = [row for row in rows if (row.implementation, row.launch) == (name, launch)]
            if own:
                found += [(name, launch, asked) for asked in _asked(goal, name, launch, own, rows)]
    return found


def _asked(goal: Fused, name: str, launch: str, own: list[BenchRow], rows: Sequence[BenchRow]) -> Iterator[Asked]:
    narrow = [row for row in own if row.dtype == "bfloat16"]
    best = [row for row in narrow if row.mode == "training"]
    field = {row: row.ratio_p50 for row in best if (row.group, row.against) == FIELD}
    small = {row: ratio for row, ratio in field.items() if row.H <= SMALL}
    trained, whole = ("training", "bfloat16"), _trained("field", SMALL)
    yield Asked(f"field, H <= {SMALL}", *trained, TORCH, small, f"mean >= {goal.mean:g}", goal.mean, 0.0, whole)
    loops = {_job(row): row.ms for row in rows if row.implementation == LOOP}
    looped = {row: loops[_job(row)] / row.ms for row in own if _job(row) in loops}
    looped |= {row: row.ratio_p50 for row in own if row.against == STEPWISE}
    loop, jobs = "a loop of torch operators", len({_job(row) for row in own})
    yield Asked("all", "all", "all", loop, looped, "each >= 1", 0.0, 1.0, jobs)
    for group in goal.free:
        without = {row: row.ratio_p50 for row in best if (row.group, row.against) == (group, WITHOUT)}
        yield Asked(group, *trained, WITHOUT, without, "at most 5 % slower than without", 0.0, EXTRA, _trained(group))
    if goal.step is not None:
        steps = {row: goal.step * row.T / (1e3 * row.ms) for row in narrow if row.against == TORCH and _resident(row)}
        least = f"{goal.step:g} µs a step"
        whole = sum(_fits(cell, case.hidden) for case in TABLE if case.group == "scan" for cell in case.cells)
        yield Asked("scan, where cta fits", "inference", "bfloat16", least, steps, "each >= 1", 0.0, 1.0, whole)
    if launch == "graph":  # as by call: what is left is no matter of it
        return
    if goal.nowhere:
        taken = {row: row.ratio_p50 if by == name else 1.0 for row, by in choices(own, rows).items()}
        wanted, whole = f"each >= {1 / TIE:.2f}, less is noise", sum(len(c.cells) * len(c.modes) for c in _plain())
        yield Asked("plain, as auto", "all", "all", TORCH, taken, wanted, 0.0, 1 / TIE, whole * len(JUDGED))
    memory = {row: row.against_peak_mib / row.peak_mib for row in field if row.peak_mib and row.against_peak_mib}
    again = {row: row.against_peak_mib / row.recompute_mib for row in memory if row.recompute_mib}  # type: ignore[operator]
    whole = _trained("field")
    if goal.memory:
        yield Asked("memory, field", *trained, TORCH, memory, "each >= 1", 0.0, 1.0, whole)
    yield Asked("memory, field, recompute", *trained, TORCH, again, "each >= 2", 0.0, 2.0, whole)


def _verdict(name: str, launch: str, asked: Asked) -> Verdict:
    figure = asked.figure
    count, mean = len({_job(row) for row in figure}), geometric_mean(figure.values())
    worst = min(figure, key=lambda row: figure[row])
    enough = mean >= asked.least if count >= asked.whole else None
    return Verdict(
        group=asked.group,
        cell="all",
        mode=asked.mode,
        threads=1,
        implementation=name,
        against=asked.against,
        cases=count,
        mean=mean,
        worst=figure[worst],
        worst_case=f"{worst.cell} {worst.case}",
        share=geometric_mean(row.share for row in figure),
        wanted=asked.wanted,
        met=False if figure[worst] < asked.floor else enough,
        launch=launch,
        dtype=asked.dtype,
        shapes=asked.whole,
    )


def choices(own: Iterable[BenchRow], rows: Sequence[BenchRow]) -> dict[BenchRow, str]:
    """Of a backend's rows against cuDNN on plain layers, what `auto` takes there once fit_dispatch.py has all rows."""
    taken = fit_dispatch.orders(list(rows))
    plain = (row for row in own if (row.against, row.launch) == (TORCH, "call") and row.group in fit_dispatch.GROUPS)
    return {row: taken(row) for row in plain if row.dtype in JUDGED}


def behind(rows: Sequence[BenchRow], name: str) -> tuple[list[BenchRow], list[BenchRow]]:
    """The rows in which a backend is slower than cuDNN by more than noise: those that `auto` leaves to others, and
    those in which it takes it all the same."""
    found = choices([row for row in rows if row.implementation == name], rows)
    slow = [row for row in found if row.ratio_p50 < 1 / TIE]
    return [row for row in slow if found[row] != name], [row for row in slow if found[row] == name]


def _plain() -> list[BenchCase]:
    """The plain cases of a GPU that `auto` is ordered by."""
    return [case for case in TABLE if case.group in fit_dispatch.GROUPS and "cuda" in case.devices]


def _resident(row: BenchRow) -> bool:
    """Whether it is a scan alone that stays on one multiprocessor, of a cell that is asked to be fast there."""
    return (row.group, row.mode) == ("scan", "inference") and _fits(row.cell, row.H)


def _fits(cell: str, hidden: int) -> bool:
    if cell not in ("LSTM", "GRU"):
        return False
    row, _ = cuda_configs.plan(cell.lower(), hidden, 0, "bf16", 1, HOPPER)
    return row.regime == "cta"


LOOP = "reference"  # the backend that is a loop of torch operators
FIELD = ("field", TORCH)


def _job(row: BenchRow) -> tuple[object, ...]:
    """What was done and how, whoever did it."""
    return (row.processor, row.group, row.case, row.cell, row.mode, row.dtype, row.tf32, row.launch)


RANK = {name: k for k, name in enumerate(("grid", "step", "scan", "resets", "lengths", "field", "sweep"))}


def _whole(device: str, group: str, narrow: bool, cell: str, mode: str) -> set[str]:
    """The shapes of a group on a device; `narrow`: of `scan` those with B = 1."""
    return {
        case.name
        for case in TABLE
        if case.group == group and device in case.devices and cell in case.cells and mode in case.modes
        if group != "scan" or narrow == (case.batch == 1)
    }


def _trained(group: str, most: float = math.inf) -> int:
    """How many jobs a group has on a GPU in training, up to `most` units."""
    some = [case for case in TABLE if case.group == group and "cuda" in case.devices and "training" in case.modes]
    return sum(len(case.cells) for case in some if case.hidden <= most)


def _wanted(
    group: str, narrow: bool, cell: str, mode: str, against: str, mean: float, share: float
) -> tuple[str, bool, float]:
    """The target in words, empty where there is none; whether the means are enough; the least of each figure."""
    if group == "grid" and (cell, mode, against) in GRID:
        least, floor = GRID[cell, mode, against]
        said = f"mean >= {least:g} or {SHARE:.0%} of the limit, worst >= {floor:g}"
        return said, mean >= least or share >= SHARE, floor
    if group == "scan":
        return f"each >= {SCAN:.0%} of the {'cache' if narrow else 'peak'}", True, SCAN
    if group == "step":
        return f">= {STEP[cell]:.2f}", True, STEP[cell]
    if group in ("resets", "lengths") and against == WITHOUT:
        return "at most 5 % slower than without", True, EXTRA
    return "", True, 0.0
