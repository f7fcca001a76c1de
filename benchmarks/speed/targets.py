"""What is aimed at, beside what was measured: each target met or missed, on made-up rows as on real ones.

A group is judged by the geometric mean and the worst figure. One that was measured in part is not met, whatever its
mean; it is missed where its worst figure is, since no further shape can mend that. goals.py has what is wanted on a
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
from .goals import Memory, large, memory, scan_part, wanted
from .implementations import COMPILE, NAMES, STEPWISE, TORCH, WITHOUT
from .rows import BenchRow
from .timing import geometric_mean
from .variant_goals import all_targets as variant_targets
from .variant_goals import is_custom

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
    """Geometric mean of the ratio; of the share of the limit in group `scan`; of torch.nn's memory over rnnkit's."""
    worst: float
    worst_case: str
    share: float
    """Geometric mean of the share of the limit, over large rows where there are any."""
    wanted: str
    met: bool | None
    launch: str = "call"
    dtype: str = "float32"
    shapes: int = 0
    """How many the whole group has; 0 where it is judged by what there is."""
    small: float | None = None
    """Geometric mean of the ratio over small rows, of which the limit knows little."""
    possible: float | None = None
    """The peer's time over the least possible time, geometric mean over the rows of `share`: the ratio that this
    machine allows at most."""

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
    custom, rows = [row for row in rows if is_custom(row)], [row for row in rows if not is_custom(row)]
    for row in dict.fromkeys([*judged(rows), *filter(brought, rows)]):
        how = (row.threads, row.launch, row.dtype, row.isa, row.processor_isa)
        part = scan_part(row.group, row.B, row.H)
        if not part or row.against == TORCH:
            key = (how, row.group, part, row.against, row.mode, row.cell, row.implementation)
            groups.setdefault(key, []).append(row)
    order = {name: k for k, name in enumerate((*MODES, *CELLS))}
    ordered = sorted(
        groups.items(),
        key=lambda g: (g[0][0][0], RANK[g[0][1]], *g[0][2:4], order[g[0][4]], order[g[0][5]]),
    )
    verdicts = [_ratios(some) for _, some in ordered] + [_memory(one) for one in memory(judged(rows))]
    return verdicts + fused([row for row in rows if row.device != "cpu"]) + _custom(custom)


def _custom(rows: Sequence[BenchRow]) -> list[Verdict]:
    """The verdicts on custom cells, of each setting by itself, over all cells at once."""
    settings: dict[tuple[object, ...], list[BenchRow]] = {}
    for row in judged(rows):
        settings.setdefault((row.threads, row.launch, row.dtype, row.isa, row.processor_isa), []).append(row)
    found = []
    for _, some in sorted(settings.items()):
        for target in variant_targets(some):
            worst = min(target.rows, key=lambda row: row.ratio_p50)
            mean, goal = geometric_mean(row.ratio_p50 for row in target.rows), target.goal
            every = len({(row.case, row.cell) for row in target.rows})
            met = None
            if goal is not None:
                met = _met(mean >= goal.mean, worst.ratio_p50 >= goal.floor, every >= target.whole)
            found.append(
                Verdict(
                    group=target.group,
                    cell="all",
                    mode=target.mode,
                    threads=worst.threads,
                    implementation=worst.implementation,
                    against=target.against,
                    cases=every,
                    mean=mean,
                    worst=worst.ratio_p50,
                    worst_case=f"{worst.cell} {worst.case}",
                    share=geometric_mean(row.share for row in target.rows),
                    wanted="" if goal is None else goal.words,
                    met=met,
                    launch=worst.launch,
                    dtype=worst.dtype,
                    shapes=target.whole,
                )
            )
    return found


def _ratios(some: Sequence[BenchRow]) -> Verdict:
    """The verdict on rows that differ in their shape alone: on their ratios, of a scan on its share of the limit."""
    first = some[0]
    part = scan_part(first.group, first.B, first.H)
    figure = {row: row.share if part else row.ratio_p50 for row in some}
    worst, mean = min(some, key=lambda row: figure[row]), geometric_mean(figure.values())
    some_large = list(some) if part else [row for row in some if large(row)] or list(some)
    share = geometric_mean(row.share for row in some_large)
    small = [figure[row] for row in some if not part and not large(row)]
    whole = _whole(first.device, first.group, part, first.cell, first.mode)
    goal = wanted(first) if first.device == "cpu" and not brought(first) else None
    met = None
    if goal is not None:
        enough = mean >= goal.mean or (goal.share is not None and share >= goal.share)
        met = _met(enough, figure[worst] >= goal.floor, whole <= {row.case for row in some})
    return Verdict(
        group=first.group,
        cell=first.cell,
        mode=first.mode,
        threads=first.threads,
        implementation=first.implementation,
        against=part or first.against,
        cases=len({row.case for row in some}),
        mean=mean,
        worst=figure[worst],
        worst_case=worst.case,
        share=share,
        wanted="" if goal is None else goal.words,
        met=met,
        launch=first.launch,
        dtype=first.dtype,
        shapes=len(whole),
        small=geometric_mean(small) if small else None,
        possible=None if part or not share else geometric_mean(row.ratio_p50 for row in some_large) / share,
    )


def _memory(asked: Memory) -> Verdict:
    figure, goal = asked.figure, asked.goal
    worst, mean = min(figure, key=lambda row: figure[row]), geometric_mean(figure.values())
    return Verdict(
        group=f"memory, {asked.group}",
        cell=asked.cell,
        mode="training",
        threads=worst.threads,
        implementation=worst.implementation,
        against=asked.against,
        cases=len({row.case for row in figure}),
        mean=mean,
        worst=figure[worst],
        worst_case=worst.case,
        share=geometric_mean(row.share for row in figure),
        wanted=goal.words,
        met=_met(mean >= goal.mean, figure[worst] >= goal.floor, asked.whole <= {row.case for row in figure}),
        dtype=worst.dtype,
        shapes=len(asked.whole),
    )


def _met(enough: bool, no_worse: bool, everything: bool) -> bool | None:
    """Whether a target is met; None where too little was measured to say."""
    return False if not no_worse else enough if everything else None


class Target(NamedTuple):
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
    return [_verdict(name, launch, target) for name, launch, target in all_targets(rows) if target.figure]


def all_targets(rows: Sequence[BenchRow]) -> list[tuple[str, str, Target]]:
    """All targets of the fused backends that have a row, measured or not: backend, launch, target."""
    found = []
    for name, goal in FUSED.items():
        for launch in ("call", "graph"):
            own = [row for row in rows if (row.implementation, row.launch) == (name, launch)]
            if own:
                found += [(name, launch, target) for target in _targets_of(goal, name, launch, own, rows)]
    return found


def _targets_of(goal: Fused, name: str, launch: str, own: list[BenchRow], rows: Sequence[BenchRow]) -> Iterator[Target]:
    narrow = [row for row in own if row.dtype == "bfloat16"]
    best = [row for row in narrow if row.mode == "training"]
    field = {row: row.ratio_p50 for row in best if (row.group, row.against) == FIELD}
    small = {row: ratio for row, ratio in field.items() if row.H <= SMALL}
    trained, whole = ("training", "bfloat16"), _trained("field", SMALL)
    yield Target(f"field, H <= {SMALL}", *trained, TORCH, small, f"mean >= {goal.mean:g}", goal.mean, 0.0, whole)
    loops = {_job(row): row.ms for row in rows if row.implementation == LOOP}
    looped = {row: loops[_job(row)] / row.ms for row in own if _job(row) in loops}
    looped |= {row: row.ratio_p50 for row in own if row.against == STEPWISE}
    loop, jobs = "a loop of torch operators", len({_job(row) for row in own})
    yield Target("all", "all", "all", loop, looped, "each >= 1", 0.0, 1.0, jobs)
    for group in goal.free:
        without = {row: row.ratio_p50 for row in best if (row.group, row.against) == (group, WITHOUT)}
        yield Target(group, *trained, WITHOUT, without, "at most 5 % slower than without", 0.0, EXTRA, _trained(group))
    if goal.step is not None:
        steps = {row: goal.step * row.T / (1e3 * row.ms) for row in narrow if row.against == TORCH and _resident(row)}
        least = f"{goal.step:g} µs a step"
        whole = sum(_fits(cell, case.hidden) for case in TABLE if case.group == "scan" for cell in case.cells)
        yield Target("scan, where cta fits", "inference", "bfloat16", least, steps, "each >= 1", 0.0, 1.0, whole)
    if launch == "graph":  # as by call: what is left is no matter of it
        return
    if goal.nowhere:
        taken = {row: row.ratio_p50 if by == name else 1.0 for row, by in choices(own, rows).items()}
        wanted, whole = f"each >= {1 / TIE:.2f}, less is noise", sum(len(c.cells) * len(c.modes) for c in _plain())
        yield Target("plain, as auto", "all", "all", TORCH, taken, wanted, 0.0, 1 / TIE, whole * len(JUDGED))
    memory = {row: row.against_peak_mib / row.peak_mib for row in field if row.peak_mib and row.against_peak_mib}
    again = {row: row.against_peak_mib / row.recompute_mib for row in memory if row.recompute_mib}  # type: ignore[operator]
    whole = _trained("field")
    if goal.memory:
        yield Target("memory, field", *trained, TORCH, memory, "each >= 1", 0.0, 1.0, whole)
    yield Target("memory, field, recompute", *trained, TORCH, again, "each >= 2", 0.0, 2.0, whole)


def _verdict(name: str, launch: str, target: Target) -> Verdict:
    figure = target.figure
    count, mean = len({_job(row) for row in figure}), geometric_mean(figure.values())
    worst = min(figure, key=lambda row: figure[row])
    enough = mean >= target.least if count >= target.whole else None
    share = geometric_mean(row.share for row in figure)
    return Verdict(
        group=target.group,
        cell="all",
        mode=target.mode,
        threads=1,
        implementation=name,
        against=target.against,
        cases=count,
        mean=mean,
        worst=figure[worst],
        worst_case=f"{worst.cell} {worst.case}",
        share=share,
        wanted=target.wanted,
        met=False if figure[worst] < target.floor else enough,
        launch=launch,
        dtype=target.dtype,
        shapes=target.whole,
        possible=mean / share if share else None,
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
    row, _ = cuda_configs.find_kernel(cell.lower(), hidden, 0, "bf16", 1, HOPPER)
    return row.regime == "cta"


LOOP = "reference"  # the backend that is a loop of torch operators
FIELD = ("field", TORCH)


def _job(row: BenchRow) -> tuple[object, ...]:
    """What was done and how, whoever did it."""
    return (row.processor, row.group, row.case, row.cell, row.mode, row.dtype, row.tf32, row.launch)


RANK = {name: k for k, name in enumerate(("grid", "stacks", "step", "scan", "resets", "lengths", "field", "sweep"))}


def _whole(device: str, group: str, part: str, cell: str, mode: str) -> set[str]:
    """The shapes of a group on a device, of `scan` those that are held against the same."""
    return {
        case.name
        for case in TABLE
        if case.group == group and device in case.devices and cell in case.cells and mode in case.modes
        if scan_part(group, case.batch, case.hidden) == part
    }


def _trained(group: str, most: float = math.inf) -> int:
    """How many jobs a group has on a GPU in training, up to `most` units."""
    some = [case for case in TABLE if case.group == group and "cuda" in case.devices and "training" in case.modes]
    return sum(len(case.cells) for case in some if case.hidden <= most)
