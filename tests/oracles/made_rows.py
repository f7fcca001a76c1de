"""What the benchmark's tests share: a machine of round figures, a made-up row, a small shape of the grid."""

from __future__ import annotations

from typing import Any

from rnnkit.benchmarks.speed import rows

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
        ratio_p50=4.0, ratio_p80=4.5, gflops=10.0, limit_ms=0.5, share=0.5, peak_mib=1.0, against_peak_mib=2.0,
        device="cpu", processor="Abacus (Zen 9)", threads=1, tf32="-", torch="2.99", commit="abc", peak_gflops=100.0,
    )  # fmt: skip
    return rows.BenchRow(**{**plain, **facts})
