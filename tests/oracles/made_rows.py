"""What the benchmark's tests share: a machine of round figures, a made-up row, a small shape of the grid."""

from __future__ import annotations

from typing import Any

from rnnkit.benchmarks.speed import goals, rows
from rnnkit.benchmarks.speed.bench_cases import TABLE

SHAPE = "grid/7x33x19x45"


class Made:
    """A machine of round figures: 100 GFLOP/s, 50 GB/s."""

    peak = 1e11
    unable: tuple[str, ...] = ()

    def __init__(self, *_: object) -> None: ...

    def measure(self, seconds: float) -> None: ...

    def stream(self, size: int) -> float:
        return 5e10

    def __str__(self) -> str:
        return "made up"


def row(**facts: Any) -> rows.BenchRow:
    """A made-up row."""
    plain: dict[str, Any] = dict(
        group="grid", case="1x1x64x64", B=1, T=1, I=64, H=64, layers=1, directions=1, cell="GRU", mode="training",
        implementation="auto", ran="cpu", against="torch.nn", launch="call", ms=1.0, against_ms=4.0, ratio_p20=3.5,
        ratio_p50=4.0, ratio_p80=4.5, gflops=10.0, limit_ms=0.5, share=0.5, peak_mib=None, against_peak_mib=None,
        device="cpu", processor="Abacus (Zen 9)", threads=1, tf32="-", torch="2.99", commit="abc", peak_gflops=100.0,
    )  # fmt: skip
    return rows.BenchRow(**{**plain, **facts})


def whole(group: str, wide: bool = True, **facts: Any) -> list[rows.BenchRow]:
    """A row for each shape of a group on a CPU; of `scan`, those that are held against the peak, or with B = 1."""
    against = goals.PEAK if wide else goals.CACHE
    every = [case for case in TABLE if case.group == group and "cpu" in case.devices]
    some = [case for case in every if goals.scan_part(group, case.batch, case.hidden) in ("", against)]
    return [row(**{**dict(group=group, case=c.name, B=c.batch, H=c.hidden), **facts}) for c in some]
