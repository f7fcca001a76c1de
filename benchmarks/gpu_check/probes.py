"""What a GPU takes for the things that kernels are made of: a table of probes, and the record of their readings.

    python -m rnnkit.benchmarks.gpu_check.probes [--to FILE] [--seconds S]

The kernels are those of csrc/cuda/probes.cu, launches are timed from here. For whoever chooses among designs: what a
neighbour's shared memory gives, and what fences and barriers take, says how far a scan over several multiprocessors
can go. `gpu-check` runs this in a process of its own (`examine`), which may end without harm to others.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from rnnkit.backends.cpu import extension
from rnnkit.backends.cuda import backend as cuda

from ..speed import machine, timing
from ..speed.implementations import first_line
from ..speed.rows import PROBES, RESULTS
from ..usage.kernel_usage import of, put, take
from .parity import works
from .timed_process import Child

REPEATS = 9  # readings
LAUNCHES = 1000  # of an empty kernel in a reading
LEAST = 20.0  # seconds: torch's start and some readings
GRACE = 10.0  # seconds of it for torch's start, which the program's clock does not see, and for its last probe
CLUSTERS = (16, 8, 4, 2)  # blocks
WARPS = (4, 8, 16)

Ask = Callable[[str, int], float]


class Probe(NamedTuple):
    """One thing, in several sizes."""

    name: str
    sizes: tuple[int, ...]
    unit: str
    says: str
    oldest: int = 80
    """The least compute capability that has it."""
    latest: int = 999
    """The last one."""


TABLE = (
    Probe("clock", (0,), "GHz", "clocks of a multiprocessor"),
    Probe("clusters", CLUSTERS, "clusters", "of so many blocks at once on the device, one to a multiprocessor", 90),
    Probe("cluster_read", CLUSTERS, "bytes/clock", "into a block from the others of a cluster of so many", 90),
    Probe("cluster_write", CLUSTERS, "bytes/clock", "the same when the others send them", 90),
    Probe("async_round_trip", CLUSTERS, "clocks", "a word to the last block of a cluster and back, by st.async", 90),
    Probe("cluster_barrier", CLUSTERS, "clocks", "a barrier of a cluster of so many blocks", 90),
    Probe("cluster_barrier_stores", CLUSTERS, "clocks", "the same behind a word of each thread stored to memory", 90),
    Probe("grid_barrier", (0, 64, 16), "clocks", "a barrier of so many blocks at a counter in memory; 0: all SMs"),
    Probe("fence", (0, 1, 4, 16), "clocks", "__threadfence for a block behind so many words stored by each thread"),
    Probe("mma_bf16", WARPS, "clocks", "a multiprocessor's m16n8k16 product, with so many warps"),
    Probe("mma_tf32", WARPS, "clocks", "a multiprocessor's m16n8k8 product, with so many warps"),
    Probe("mma_bf16_latency", (1,), "clocks", "a product that waits for the one before"),
    Probe("mma_tf32_latency", (1,), "clocks", "the same for m16n8k8"),
    Probe("wgmma_registers", WARPS, "clocks", "a product m64n8k16 of four warps, with so many on an SM", 90, 90),
    Probe("wgmma_shared", WARPS, "clocks", "the same with A from shared memory too", 90, 90),
    Probe("shared_read", WARPS, "bytes/clock", "from shared memory, 16 bytes a lane, with so many warps"),
    Probe("launch_call", (1,), "µs", "an empty kernel, each launched from Python"),
    Probe("launch_stream", (LAUNCHES,), "µs", "an empty kernel, launched from C++ one after the other"),
    Probe("launch_graph", (LAUNCHES,), "µs", "an empty kernel of a CUDA graph, one after the other"),
)  # fmt: skip


class ProbeReading(NamedTuple):
    """Readings of a probe in one size."""

    probe: str
    size: int
    unit: str
    p20: float
    p50: float
    p80: float
    readings: int
    says: str
    device: str
    capability: str
    toolkit: str
    torch: str
    commit: str

    def line(self) -> str:
        """For a person."""
        what = f"{self.probe} {self.size}" if self.size else self.probe
        return f"{what:<26} {self.p50:9.4g} {self.unit} ({self.p20:.4g} to {self.p80:.4g}): {self.says}"


def measured(capability: int, ask: Ask, seconds: float = float("inf")) -> Iterator[ProbeReading | str]:
    """Each probe's row, or why there is none; nothing more after so many seconds, or where the device fails."""
    begin = time.monotonic()
    facts = (
        machine.processor("cuda"),
        f"{capability / 10}",
        extension.cuda_built[0],
        torch.__version__,
        machine.commit(),
    )
    every = [(probe, size) for probe in TABLE for size in probe.sizes if probe.oldest <= capability <= probe.latest]
    for done, (probe, size) in enumerate(every):
        if time.monotonic() - begin > seconds:
            yield f"left out for want of time: {len(every) - done} of {len(every)} readings"
            return
        try:
            read = _reader(probe.name, size, ask)
            found = [read() for _ in range(REPEATS)]
        except RuntimeError as error:
            yield f"{probe.name} {size} left out: {first_line(error)}"
            if not works("cuda"):
                yield "the device fails, and the probes end"
                return
            continue
        yield ProbeReading(probe.name, size, probe.unit, *timing.percentiles(found), len(found), probe.says, *facts)


def _reader(name: str, size: int, ask: Ask) -> Callable[[], float]:
    """What gives one reading."""
    if not name.startswith("launch"):
        return lambda: ask(name, size)
    work: timing.Work = lambda: ask("empty", size)  # noqa: E731
    calls = LAUNCHES if size == 1 else 1
    if name == "launch_graph":
        work = timing.graph(work)
    timing.block(work, calls, "cuda")
    return lambda: timing.block(work, calls, "cuda") * 1e6 / size


def examine(seconds: float, out: Path, record: bool) -> list[str]:
    """Measure in a process of its own, within so many seconds, into `out`, and into benchmarks/results where `record`
    says so. Returns lines for a person."""
    why = cuda.missing()
    if why is None and seconds < LEAST:
        why = f"{seconds:.0f} s are too few, they take {LEAST:.0f}; a larger --limit takes them in"
    if why is not None:
        return [f"left out: {why}"]
    path, end = out / "probes.csv", time.monotonic() + seconds
    path.unlink(missing_ok=True)
    child = Child(
        "rnnkit.benchmarks.gpu_check.probes",
        ["--to", str(path), "--seconds", f"{seconds - GRACE:.0f}"],
        out / "probes.txt",
    )
    code = child.wait(end)
    lines = child.text().splitlines()
    if code != 0:
        how = "they did not end in time" if code is None else f"they ended with {code}"
        lines.append(f"{how}: what there is stands in {path}" if path.exists() else f"{how}, see {child.said}")
    if record and path.exists():
        RESULTS.joinpath(file_name()).write_bytes(path.read_bytes())
    return lines


def file_name() -> str:
    """Of this device's record in benchmarks/results."""
    return machine.file_name("cuda", machine.processor("cuda")) + PROBES


def read(path: Path) -> list[ProbeReading]:
    """A record. Raises BadInput where a file is none of ours."""
    return [of(ProbeReading, row) for row in take(path, ProbeReading._fields)]


def main(arguments: list[str] | None = None) -> int:
    """Measure, say, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: none, what is found is said")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="S", help="begin none after; default: all"
    )
    options = parser.parse_args(arguments)
    missing = machine.no_device() or cuda.missing()
    if missing is not None:
        print(f"rnnkit.benchmarks.gpu_check.probes: {missing}", file=sys.stderr)
        return 3
    found: list[ProbeReading] = []
    for row in measured(
        cuda.machine.capability(torch.cuda.current_device()), torch.ops.rnnkit.cuda_probe, options.seconds
    ):
        if isinstance(row, str):
            print(row, flush=True)
            continue
        print(row.line(), flush=True)
        found.append(row)
        if options.to is not None:  # whole each time: what comes after may end the process
            put(
                options.to,
                ProbeReading._fields,
                ([f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in found),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
