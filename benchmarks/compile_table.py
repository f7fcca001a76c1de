"""Compiles the Triton kernels for every chip ahead of time, without a GPU, and says what each takes.

    python -m rnnkit.benchmarks.compile_table [--part K/N] [--workers N] [--to FILE]     checks, writes the whole
    python -m rnnkit.benchmarks.compile_table --search KERNEL      finds the rows of kernels/table.py for one kernel

Every row of kernels/table.py is compiled for each of its chips, and the step regime's kernels in each of its tiles for
all of them, by the launches that a scan makes, with everything on: lengths, resets, states at a reset, all gradients.
A row of the result holds registers a thread, shared memory a block and what spilled (NVIDIA: bytes of stack a thread;
AMD: registers), by the Triton that compiled it: a run replaces its own version's rows and keeps the others'.
Exit code 1 where a kernel spills, needs more shared memory than its chip has, or does not compile.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkit.backends.problem import Outputs, Tensors
from rnnkit.cells import CELLS
from rnnkit.kernels import table

from .compiled import Usage, number, of, part, put, take
from .rows import COMPILED

DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
         torch.int32: "*i32", torch.bool: "*i1"}  # fmt: skip
PRODUCTS = ("product.product", "product.product_back")
Pairs = tuple[tuple[str, Any], ...]
STEP_SIZES = (100, 40)  # H, and P where there is a projection; a step's kernels are the same for any size


class Job(NamedTuple):
    """One scan to compile for one chip."""

    kernel: str
    cell: str
    side: str
    dtype: str
    kind: str
    chip: str
    hidden: int
    proj: int
    plan: table.Plan


class Name(NamedTuple):
    """One compiled kernel. What every cell's scan may launch, a product of the step regime, names no scan."""

    triton: str
    regime: str
    kernel: str
    cell: str
    side: str
    function: str
    hidden: int
    proj: int
    dtype: str
    kind: str
    chip: str
    block_b: int
    block_n: int
    """Rows and units of its tile."""
    warps: int
    stages: int


class Line(NamedTuple):
    """A row of the result."""

    name: Name
    usage: Usage

    @property
    def limit(self) -> int:
        """Bytes of shared memory. A step's kernel is also what chips with little of it run, a row need not be."""
        some = self.name.regime == "step" and not self.name.chip.startswith("gfx")
        return table.SMALL_SHARED if some else table.SHARED[self.name.chip]

    @property
    def wrong(self) -> str | None:
        """What speaks against it; None where it fits."""
        if self.usage.spilled:
            return f"spills {self.usage.spilled}"
        if self.usage.shared > self.limit:
            return f"takes {self.usage.shared} bytes of shared memory, the chip has {self.limit}"
        return None


def jobs() -> Iterator[Job]:
    """Everything that the table stands for."""
    for row in table.PERSISTENT:
        for chip in row.chips:
            yield from _of(row, chip)
    for kernel in table.KERNELS:
        hidden, proj = STEP_SIZES[0], STEP_SIZES[1] if kernel == "lstm_proj" else 0
        for some in table.STEP:
            for cell in table.CELLS_OF[kernel]:
                for side in table.SIDES:
                    for kind, dtypes in DTYPES.items():
                        plan = table.step(some, kind, "")
                        for dtype in dtypes:
                            for chip in table.CHIPS:
                                yield Job(kernel, cell, side, dtype, kind, chip, hidden, proj, plan)


class Launch(NamedTuple):
    """A kernel as a scan starts it."""

    kernel: Any
    plan: table.Plan
    arguments: dict[str, Any]

    @property
    def function(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


def launches(job: Job) -> list[Launch]:
    """The kernels that the scan starts, each kind once. Tensors are on `meta`."""
    from rnnkit.kernels import persistent, step

    cell = CELLS[job.cell]
    steps, batch, hidden, size = 2, 3, job.hidden, job.proj or job.hidden

    def some(*sizes: int, dtype: torch.dtype = TORCH[job.dtype]) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    t = Tensors(
        x=some(steps, batch, 8),
        h_0=some(batch, size),
        c_0=some(batch, hidden) if cell.has_c else None,
        w_ih=some(cell.gates * hidden, 8),
        w_hh=some(cell.gates * hidden, size),
        b_ih=some(cell.gates * hidden),
        b_hh=some(cell.gates * hidden),
        w_hr=some(job.proj, hidden) if job.proj else None,
        lengths=some(batch, dtype=torch.int64),
        reset=some(steps, batch, dtype=torch.bool),
        h_r=some(batch, size),
        c_r=some(batch, hidden) if cell.has_c else None,
    )
    b_hn = some(hidden) if cell.reset_after else None
    seen: dict[str, Launch] = {}

    def see(kernel: Any, grid: tuple[int, ...], plan: table.Plan, **arguments: Any) -> None:
        seen[f"{kernel.__name__} {[signature(v) for v in arguments.values()]}"] = Launch(kernel, plan, arguments)

    regime: Any = persistent if job.plan.regime == "persistent" else step
    gx = some(steps, batch, cell.gates * hidden)
    found = regime.forward(cell, gx, t.h_0, t.c_0, t, b_hn, t0=0, reverse=False, save=True, plan=job.plan, run=see)
    if job.side == "backward":
        seen.clear()
        y, h_n, c_n, c_all, gates = found
        grads = Outputs(y, h_n, c_n, c_all)
        regime.backward(cell, grads, y, c_all, gates, t, b_hn, reverse=False, plan=job.plan, run=see)
    return list(seen.values())


def signature(value: Any) -> str:
    """The type of an argument as Triton writes it."""
    return TYPES[value.dtype] if isinstance(value, Tensor) else "constexpr" if value is None else "i32"


def named(job: Job, launch: Launch, triton: str) -> Name:
    """What the result calls a launch that Triton of this version compiles."""
    shape, plan = launch.arguments, launch.plan
    scan = (job.kernel, job.cell, job.side, launch.function, job.hidden, job.proj)
    if launch.function in PRODUCTS:
        scan = ("", "", "", launch.function, 0, 0)
    tile = (shape["BLOCK_B"], shape.get("BLOCK_H") or shape["BLOCK_N"], plan.warps, plan.stages)
    return Name(triton, job.plan.regime, *scan, job.dtype, job.kind, job.chip, *tile)


def build(job: Job) -> list[Line] | str:
    """Compile the kernels of a job; what went wrong where one does not compile."""
    import triton

    from rnnkit.kernels.launch import options

    lines = []
    for launch in launches(job):
        kernel, arguments = launch.kernel, launch.arguments
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        types = {name: "constexpr" if name in fixed else signature(arguments[name]) for name in kernel.arg_names}
        constants = {name: arguments[name] for name, kind in types.items() if kind == "constexpr"}
        asked = options(launch.plan, amd=job.chip.startswith("gfx"))
        try:
            usage = _usage(kernel, job.chip, *(tuple(some.items()) for some in (types, constants, asked)))
        except Exception as error:  # whatever the compiler raises is a finding
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        lines.append(Line(named(job, launch, triton.__version__), usage))
    return lines


@functools.cache
def _usage(kernel: Any, chip: str, types: Pairs, constants: Pairs, options: Pairs) -> Usage:
    """Compile a kernel; several scans share one."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = chip.startswith("gfx")
    place = {name: k for k, (name, _) in enumerate(types)}
    source = ASTSource(
        fn=kernel,
        signature=dict(types),
        constexprs={(place[name],): value for name, value in constants},
        attrs={(place[name],): [["tt.divisibility", 16]] for name, kind in types if kind.startswith("*")},
    )
    target = GPUTarget("hip", chip, 64) if amd else GPUTarget("cuda", int(chip[3:]), 32)
    compiled = triton_compile(source, target=target, options=dict(options))
    found = amd_usage(compiled.asm["amdgcn"]) if amd else nvidia_usage(compiled.asm["cubin"])
    return Usage(*found, compiled.metadata.shared)


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return number(r"REG:(\d+)", said), number(r"STACK:(\d+)", said)


def amd_usage(text: str) -> tuple[int, int]:
    """Registers a thread, and how many of them spilled."""
    spilled = number(r"\.vgpr_spill_count:\s+(\d+)", text) + number(r"\.sgpr_spill_count:\s+(\d+)", text)
    return number(r"\.vgpr_count:\s+(\d+)", text), spilled


def search(kernel: str) -> Iterator[table.Row]:
    """For each side, tile and kind the row of the fewest warps that fits most chips, where any fits one."""
    for side in table.SIDES:
        for hidden in table.TILES:
            for size in [s for s in table.TILES if s <= hidden] if kernel == "lstm_proj" else [hidden]:
                for kind in DTYPES:
                    weights = CELLS[table.CELLS_OF[kernel][0]].gates * hidden * size * (2 if kind == "half" else 4)
                    if weights > max(table.SHARED.values()):
                        continue
                    best: table.Row | None = None
                    for warps in (4, 8) if hidden <= 64 else (8, 4, 16):
                        if best is not None and len(best.chips) == len(table.CHIPS):
                            break
                        row = _tried(table.Row(kernel, side, hidden, size, kind, (), warps, 0))
                        if best is None or len(row.chips) > len(best.chips):
                            best = row
                    if best is not None and best.chips:
                        yield best


def _tried(row: table.Row) -> table.Row:
    """The row with the chips that it fits."""
    for chip in table.CHIPS:
        found = [build(job) for job in _of(row, chip)]
        lines = [line for some in found if not isinstance(some, str) for line in some]
        if not any(isinstance(some, str) for some in found) and not any(line.wrong for line in lines):
            shared = max(row.shared, *(line.usage.shared for line in lines))
            row = row._replace(chips=(*row.chips, chip), shared=shared)
    return row


def _of(row: table.Row, chip: str) -> list[Job]:
    proj = row.size - 1 if row.kernel == "lstm_proj" else 0
    plan = table.persistent(row, "")
    which = [(cell, dtype) for cell in table.CELLS_OF[row.kernel] for dtype in DTYPES[row.kind]]
    return [Job(row.kernel, cell, row.side, dtype, row.kind, chip, row.hidden, proj, plan) for cell, dtype in which]


def main(arguments: list[str] | None = None) -> int:
    """Compile, say what was found, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=part, default=(1, 1), metavar="K/N", help="every N-th job from the K-th on")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--to", type=Path, default=COMPILED, metavar="FILE", help="of the whole; default: %(default)s")
    parser.add_argument("--search", choices=table.KERNELS, help="print rows for kernels/table.py, write nothing")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ModuleNotFoundError:
        print("rnnkit.benchmarks.compile_table: Triton is not installed: pip install rnnkit[triton]", file=sys.stderr)
        return 2
    if options.search:
        for row in search(options.search):
            print(f"    Row{tuple(row)},", flush=True)
        return 0
    every = list(jobs())
    mine = every[options.part[0] - 1 :: options.part[1]]
    lines: list[Line] = []
    wrong: list[str] = []
    start = time.monotonic()
    with ProcessPoolExecutor(options.workers) as pool:
        for done, (job, found) in enumerate(zip(mine, pool.map(build, mine), strict=True), 1):
            size = f"H={job.hidden} P={job.proj}" if job.proj else f"H={job.hidden}"
            name = f"{job.plan.regime} {job.cell} {job.side} {size} {job.dtype} {job.kind} {job.chip}"
            if isinstance(found, str):
                wrong.append(f"{name}: {found}")
            else:
                lines += found
                wrong += [f"{name}, {line.name.function}: {line.wrong}" for line in found if line.wrong]
            if done % 25 == 0 or done == len(mine):
                print(f"{done} of {len(mine)} scans, {time.monotonic() - start:.0f} s, the last {name}", flush=True)
    for text in wrong:
        print(text, file=sys.stderr)
    if not wrong and options.part == (1, 1):
        write(options.to, merged(read(options.to), lines))
        count = len({line.name for line in lines})
        print(f"{options.to}: {count} kernels compiled by Triton {triton.__version__}, none spills")
    return 1 if wrong else 0


COLUMNS = (*Name._fields, *Usage._fields, "limit")


def merged(before: Iterable[Line], lines: Iterable[Line]) -> list[Line]:
    """What other Tritons said before, and `lines`: of several that bear one name the one of most registers."""
    found: dict[Name, Line] = {}
    for line in lines:
        if line.name not in found or line.usage > found[line.name].usage:
            found[line.name] = line
    mine = {name.triton for name in found}
    return [*(line for line in before if line.name.triton not in mine), *found.values()]


def write(path: Path, lines: Iterable[Line]) -> None:
    """The result, older Tritons first."""
    ordered = sorted(lines, key=lambda line: [int(v) for v in re.findall(r"\d+", line.name.triton)])
    put(path, COLUMNS, ((*line.name, *line.usage, line.limit) for line in ordered))


def read(path: Path) -> list[Line]:
    """What a result says; nothing where there is none yet. Raises BadInput where a file is none of ours."""
    return [Line(of(Name, row), of(Usage, row)) for row in take(path, COLUMNS)]


if __name__ == "__main__":
    sys.exit(main())
