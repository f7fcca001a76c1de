"""A row of results, and the CSV files that hold them: written whole after every job, read back for the reports."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .bench_cases import BadInput

RESULTS = Path(__file__).resolve().parents[1] / "results"
COMPILED, CUDA_COMPILED = RESULTS / "triton-compile.csv", RESULTS / "cuda-compile.csv"
"""No times: what usage/triton_usage.py and usage/cuda_usage.py found."""
TRAINING_PEAKS = RESULTS / "training-peaks.csv"
"""No times: the memory of training steps that none may exceed, see goals.py."""
PROBES = "-probes.csv"
"""How the file of a device's probes ends (gpu_check/probes.py): no rows either."""


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """One implementation against one peer. A ratio is the peer's time over the implementation's."""

    group: str
    case: str
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    layers: int
    directions: int
    cell: str
    mode: str
    implementation: str
    ran: str
    """The backend of rnnkit that did the work; empty for what is not rnnkit."""
    against: str
    launch: str
    """"call", or "graph" for the replay of a CUDA graph."""
    ms: float
    against_ms: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    gflops: float
    limit_ms: float
    share: float
    """Of the limit: limit_ms over ms."""
    peak_mib: float | None
    against_peak_mib: float | None
    """Of one call, as timing.MEMORY says; None for what takes its memory out of torch's sight."""
    device: str
    processor: str
    threads: int
    tf32: str
    torch: str
    commit: str
    peak_gflops: float
    """What one core (or the GPU) was measured to reach in this run, in this dtype."""
    dtype: str = "float32"
    recompute_mib: float | None = None
    """peak_mib with recompute=True, where it was asked: in training, in groups that a target speaks of."""
    isa: str = "avx512"
    """The instruction set that both sides were held to, or that the processor has; "-" on a GPU."""
    processor_isa: str = "avx512"
    """The widest that the processor has: what a library takes that cannot be held."""
    compile_s: float | None = None
    """Seconds that torch.compile took for the peer, where it was compiled."""

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured, without the figures: a later row of the same key takes the place of an earlier one."""
        return (self.device, self.processor, self.group, self.case, self.cell, self.mode, self.threads, self.launch,
                self.implementation, self.against, self.tf32, self.dtype, self.isa)  # fmt: skip

    @property
    def operations(self) -> float:
        """Of the products, two for each multiply-add."""
        return self.gflops * self.ms * 1e6

    def line(self) -> str:
        """For a person who watches."""
        who = self.implementation + (f" ({self.ran})" if self.implementation == "auto" else "")
        how = ("" if self.dtype == "float32" else f"  {self.dtype}") + (
            "" if self.launch == "call" else f"  {self.launch}"
        )
        made = "" if self.compile_s is None else f"  compiled in {self.compile_s:.0f} s"
        return (
            f"{self.group + ' ' + self.case:<27} {self.cell:<4} {self.mode:<9} {self.threads}t {who:<17} "
            f"{self.ms:9.3f} ms  {self.ratio_p50:6.2f} × {self.against:<16} {self.gflops:7.1f} GFLOP/s  "
            f"{self.share:4.0%} of the limit{how}{made}"
        )


PARSE: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "float | None": lambda v: float(v) if v else None,
    "str": str,
}
TYPES = {field.name: PARSE[str(field.type)] for field in dataclasses.fields(BenchRow)}
LATER = {field.name for field in dataclasses.fields(BenchRow) if field.default is not dataclasses.MISSING}
"""Columns that a file written before they were thought of does not have. All rows of a CPU were of AVX-512 then."""


def write(path: Path, rows: Iterable[BenchRow]) -> None:
    """Write a file whole; whoever reads it meanwhile sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(TYPES)
        for row in rows:
            writer.writerow(f"{v:.4g}" if isinstance(v, float) else v for v in dataclasses.astuple(row))
    partial.replace(path)


def read(path: Path) -> list[BenchRow]:
    """The rows of a file. Raises BadInput where it is none of ours."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            names = list(lines.fieldnames or ())
            if names != [name for name in TYPES if name in names or name not in LATER]:
                raise BadInput(f"{path} has the columns {lines.fieldnames}, expected {', '.join(TYPES)}")
            every = [BenchRow(**{name: TYPES[name](line[name]) for name in names}) for line in lines]
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    return [row if row.device == "cpu" else dataclasses.replace(row, isa="-", processor_isa="-") for row in every]


def recorded(folder: Path) -> list[Path]:
    """The files of rows in a folder."""
    others = (COMPILED.name, CUDA_COMPILED.name, TRAINING_PEAKS.name)
    return [path for path in sorted(folder.glob("*.csv")) if path.name not in others and not path.name.endswith(PROBES)]


def merge(old: Iterable[BenchRow], new: Iterable[BenchRow]) -> list[BenchRow]:
    """Both, a new row in the place of an old one of the same key."""
    return list({row.key: row for row in (*old, *new)}.values())
