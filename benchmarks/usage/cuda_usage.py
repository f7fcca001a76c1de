"""Compiles the CUDA kernels for every chip, without a GPU, and says what each takes.

    python -m rnnkit.benchmarks.usage.cuda_usage [--part K/N] [--workers N] [--to FILE]      checks, writes the whole
    python -m rnnkit.benchmarks.usage.cuda_usage --search ROW     what a row of the regime cta can keep in registers

Every row of rnnkit/backends/cuda/configs.py is compiled for each chip by nvcc, with the flags of setup.py, in a clone.
A row of the result holds registers a thread, bytes that spilled, and shared memory a block: what ptxas says of a
kernel, and what its configuration asks for when it is launched. A row of the table may be too large for a chip that has
less than others; its line says so, and it does not run there. Last comes a digest of what was compiled
(source_digest.py).
Exit code 1 where a kernel spills, needs more shared memory than any chip has, or does not compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from rnnkit.backends.cuda import configs

from ..speed.rows import CUDA_COMPILED
from .kernel_usage import Usage, find_number, from_columns, part_option, read_csv, write_csv
from .source_digest import digest

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NO_CLONE = f"{SOURCES} is not there: it compiles in a clone"
SIDES = ("forward", "backward")
WITHOUT = ("each",)  # kernels that are launched without shared memory
MOST_KEPT = 28  # fragments in registers: each takes 8 of a thread's 255


class CudaBuildJob(NamedTuple):
    """One source to compile for one chip."""

    row: configs.CompiledKernel
    chip: str

    @property
    def name(self) -> str:
        return f"{self.row.name} {self.chip}"


class CudaKernelName(NamedTuple):
    """A function of a row on a chip, and the side of the scan that launches it."""

    nvcc: str
    row: str
    regime: str
    kernel: str
    kind: str
    units: int
    warps: int
    rows: int
    chip: str
    side: str
    function: str


class CudaRecord(NamedTuple):
    """A row of the result."""

    name: CudaKernelName
    usage: Usage
    source: str
    """A digest of all that was compiled, and of how."""

    @property
    def limit(self) -> int:
        """Bytes of shared memory."""
        return configs.CHIPS[self.name.chip]

    @property
    def fits(self) -> bool:
        """Whether it can run there."""
        return self.usage.shared <= self.limit

    @property
    def wrong(self) -> str | None:
        """What speaks against it."""
        if self.usage.spilled:
            return f"spills {self.usage.spilled} bytes"
        if self.usage.shared > max(configs.CHIPS.values()):
            return f"takes {self.usage.shared} bytes of shared memory, and no chip has more than {self.limit}"
        return None


FunctionUsage = tuple[str, str, Usage]
"""Side, function, and what it takes."""
COLUMNS = (*CudaKernelName._fields, *Usage._fields, "limit", "fits", "source")


def jobs() -> Iterator[CudaBuildJob]:
    """Everything that the table stands for."""
    for row in configs.ROWS:
        for chip in configs.CHIPS:
            yield CudaBuildJob(row, chip)


def source(row: configs.CompiledKernel) -> str:
    """A row's source, and behind it an array for each side, a byte longer than the shared memory that it asks for."""
    arrays = [
        f'extern "C" __device__ char {side}_asks[{size} + 1];'
        for side, size in zip(SIDES, configs.REGIMES[row.regime].asks, strict=True)
    ]
    return "\n".join([configs.source(row), "namespace rnnkit::cuda {", *arrays, "}", ""])


def build(job: CudaBuildJob, nvcc: ModuleType, home: Path, version: str) -> list[CudaRecord] | str:
    """Compile a row; what went wrong where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, f"{job.row.name}.cu"), Path(folder, "cubin")
        text.write_text(source(job.row), encoding="utf-8")
        command = [str(home / "bin" / "nvcc"), *flags(job, nvcc), "-Xptxas=-v", f"-I{SOURCES}", "-cubin"]
        done = subprocess.run([*command, "-o", cubin, text], capture_output=True, text=True, check=False)
        found = list(said(done.stderr))
        if done.returncode and not any(usage.spilled for _, _, usage in found):
            wrong = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return wrong[0] if wrong else f"nvcc ends with {done.returncode} and says nothing"
        asked = {} if done.returncode else sizes(cubin)
    return lines(job, version, found, asked)


def flags(job: CudaBuildJob, nvcc: ModuleType) -> list[str]:
    """What nvcc is told of a job, as setup.py tells it."""
    return [*nvcc.FLAGS, nvcc.gencode(job.chip)]


def digest_of(job: CudaBuildJob) -> str:
    """What decides a job's figures, beside the compiler. Raises ValueError where there is no clone."""
    nvcc = compiler()
    if nvcc is None:
        raise ValueError(NO_CLONE)
    return digest(source(job.row), SOURCES, flags(job, nvcc))


def lines(job: CudaBuildJob, version: str, found: Iterable[FunctionUsage], asked: dict[str, int]) -> list[CudaRecord]:
    """What is known of a row's functions, of several instantiations of one the most of each."""
    row, most = job.row, dict[tuple[str, str], Usage]()
    for side, function, usage in found:
        dynamic = 0 if function in WITHOUT or not asked else asked[f"{side}_asks"] - 1
        usage = usage._replace(shared=usage.shared + dynamic)
        most[side, function] = Usage(*map(max, usage, most.get((side, function), usage)))
    facts = (version, row.name, row.regime, row.kernel, row.kind, row.units, row.warps, row.rows, job.chip)
    compiled = digest_of(job)
    order = sorted(most, key=lambda name: (SIDES.index(name[0]), name[1]))
    return [CudaRecord(CudaKernelName(*facts, *name), most[name], compiled) for name in order]


def said(text: str) -> Iterator[FunctionUsage]:
    """Each kernel and what ptxas -v says of it; shared memory is what the kernel itself declares."""
    for block in text.split("Compiling entry function ")[1:]:
        spilled = max(find_number(rf"(\d+) bytes spill {what}", block) for what in ("stores", "loads"))
        static = re.search(r"(\d+) bytes smem", block)
        name = block.partition("\n")[0]
        side = next(side for side in SIDES if side in name.lower())
        yield (
            side,
            function(name),
            Usage(find_number(r"Used (\d+) registers", block), spilled, int(static[1]) if static else 0),
        )


def function(name: str) -> str:
    """A function without its namespaces and template arguments, from its mangled name."""
    start = re.search(r"_ZN?", name)
    if start is None:
        raise ValueError(f"found no C++ function in {name!r}")
    at, found = start.end(), ""
    while (length := re.match(r"\d+", name[at:])) is not None:
        begin = at + length.end()
        at = begin + int(length[0])
        found = name[begin:at]
    return found


def sizes(cubin: Path) -> dict[str, int]:
    """The arrays in a compiled file and how long they are."""
    symbols = subprocess.run(["readelf", "-sW", cubin], capture_output=True, text=True, check=True).stdout
    fields = (line.split() for line in symbols.splitlines())
    return {f[7]: int(f[2], 0) for f in fields if len(f) >= 8 and f[3] == "OBJECT"}


def search(
    row: configs.CompiledKernel, compile: Callable[[CudaBuildJob], list[CudaRecord] | str], chip: str
) -> Iterator[configs.CompiledKernel]:
    """For each number of warps the row with most fragments of weights in registers, on either side, that spills
    nothing and leaves shared memory within the chip's; no row where there is none.
    """
    fragment = 64 // (4 if row.kind == "tf32" else 2)  # terms of a sum
    blocks, parts = row.units // 16, -(-row.units // fragment)
    for warps in range(1, 17):
        if blocks % warps:
            continue
        every = blocks // warps * configs.GATES[row.kernel] * parts
        sides = range(len(SIDES))

        def held(kept: int, side: int, warps: int = warps) -> int:
            return configs.shared_bytes(row._replace(warps=warps, resident=(kept, kept)), side)

        least = [
            next((k for k in range(every + 1) if held(k, side) <= configs.CHIPS[chip]), every + 1) for side in sides
        ]
        low, high = [k - 1 for k in least], [min(every, MOST_KEPT)] * 2
        while any(low[side] < high[side] for side in sides):
            middle = [max((low[side] + high[side] + 1) // 2, 0) for side in sides]
            tried = row._replace(warps=warps, resident=(middle[0], middle[1]))
            found = compile(CudaBuildJob(tried, chip))
            for side in sides:
                good = not isinstance(found, str) and not any(
                    line.usage.spilled for line in found if line.name.side == SIDES[side]
                )
                if low[side] < high[side]:
                    low[side], high[side] = (middle[side], high[side]) if good else (low[side], middle[side] - 1)
        if all(low[side] >= least[side] for side in sides):
            yield row._replace(warps=warps, resident=(low[0], low[1]))


def compiler() -> ModuleType | None:
    """csrc/cuda/nvcc.py; None where there is no clone."""
    path = SOURCES / "nvcc.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("rnnkit_nvcc", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    """Compile, say what was found, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", type=part_option, default=(1, 1), metavar="K/N", help="every N-th job from the K-th on"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="at a time (%(default)s)")
    parser.add_argument("--to", type=Path, default=CUDA_COMPILED, metavar="FILE", help="of the whole; %(default)s")
    parser.add_argument("--search", metavar="ROW", help="try other warps and residents for a row, write nothing")
    parser.add_argument("--chip", choices=configs.CHIPS, default="sm_90a", help="of the search; default: %(default)s")
    options = parser.parse_args(arguments)
    named = [row for row in configs.ROWS if row.name == options.search and row.regime == "cta" and row.kind != "ieee"]
    if options.search and not named:
        parser.error(f"expected a row of the regime cta that uses tensor cores, got {options.search!r}")
    nvcc = compiler()
    home = None if nvcc is None else nvcc.home()
    if nvcc is None or home is None:
        missing = NO_CLONE if nvcc is None else nvcc.MISSING
        print(f"rnnkit.benchmarks.usage.cuda_usage: {missing}", file=sys.stderr)
        return 2
    start, version = time.monotonic(), nvcc.version(home)
    for row in named:
        for fit in search(row, lambda job: build(job, nvcc, home, version), options.chip):
            shared = [configs.shared_bytes(fit, side) for side in range(len(SIDES))]
            print(
                f"{row.name} on {options.chip}: warps {fit.warps}, resident {fit.resident}, shared {shared}", flush=True
            )
    if named:
        return 0
    mine = list(jobs())[options.part[0] - 1 :: options.part[1]]
    found: list[CudaRecord] = []
    wrong: list[str] = []
    with ThreadPoolExecutor(options.workers) as pool:
        results = pool.map(lambda job: build(job, nvcc, home, version), mine)
        for done, (job, some) in enumerate(zip(mine, results, strict=True), 1):
            if isinstance(some, str):
                wrong.append(f"{job.name}: {some}")
            else:
                found += some
                wrong += [
                    f"{job.name}, {line.name.side} {line.name.function}: {line.wrong}" for line in some if line.wrong
                ]
            if done % 25 == 0 or done == len(mine):
                print(
                    f"{done} of {len(mine)} sources, {time.monotonic() - start:.0f} s, the last {job.name}", flush=True
                )
    for text in wrong:
        print(text, file=sys.stderr)
    if not wrong and options.part == (1, 1):
        write(options.to, found)
        print(f"{options.to}: {len(found)} kernels compiled by nvcc {version}, none spills")
    return 1 if wrong else 0


def write(path: Path, every: Iterable[CudaRecord]) -> None:
    """The result."""
    facts = ((*line.name, *line.usage, line.limit, "yes" if line.fits else "no", line.source) for line in every)
    write_csv(path, COLUMNS, facts)


def read(path: Path) -> list[CudaRecord]:
    """What a result says; nothing where there is none yet. Raises BadInput where a file is none of ours."""
    return [
        CudaRecord(from_columns(CudaKernelName, row), from_columns(Usage, row), row["source"])
        for row in read_csv(path, COLUMNS)
    ]


if __name__ == "__main__":
    sys.exit(main())
