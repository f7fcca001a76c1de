"""Compiles the Triton kernels for every chip ahead of time, without a GPU, and says what each takes.

    python -m rnnkit.benchmarks.compile_table [--part K/N] [--workers N] [--to FILE]     checks, writes the whole
    python -m rnnkit.benchmarks.compile_table --search KERNEL      finds the rows of kernels/table.py for one kernel

Every row of kernels/table.py is compiled for each of its chips, and the step regime's kernels for all of them, by the
launches that a scan makes, with everything on: lengths, resets, states at a reset, all gradients. A row of the result
holds registers a thread, shared memory a block and what spilled (NVIDIA: bytes of stack a thread; AMD: registers).
Exit code 1 where a kernel spills, needs more shared memory than its chip has, or does not compile.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkit.backends.problem import Outputs, Tensors
from rnnkit.cells import CELLS
from rnnkit.kernels import table

from .rows import COMPILED

DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
         torch.int32: "*i32", torch.bool: "*i1"}  # fmt: skip
STEP_SIZES = (100, 40)  # H, and P where there is a projection; a step's kernels are the same for any size


class Job(NamedTuple):
    """One scan to compile for one chip."""

    kernel: str
    side: str
    dtype: str
    kind: str
    chip: str
    hidden: int
    proj: int
    plan: table.Plan


class Line(NamedTuple):
    """One compiled kernel: a row of the result."""

    regime: str
    kernel: str
    side: str
    function: str
    hidden: int
    proj: int
    dtype: str
    kind: str
    chip: str
    block_b: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    limit: int

    @property
    def wrong(self) -> str | None:
        """What speaks against it; None where it fits."""
        if self.spilled:
            return f"spills {self.spilled}"
        if self.shared > self.limit:
            return f"takes {self.shared} bytes of shared memory, the chip has {self.limit}"
        return None


def jobs() -> Iterator[Job]:
    """Everything that the table stands for."""
    for row in table.PERSISTENT:
        for chip in row.chips:
            yield from _of(row, chip)
    for kernel in table.KERNELS:
        for side in table.SIDES:
            for kind, dtypes in DTYPES.items():
                for dtype in dtypes:
                    for chip in table.CHIPS:
                        hidden, proj = STEP_SIZES[0], STEP_SIZES[1] if kernel == "lstm_proj" else 0
                        yield Job(kernel, side, dtype, kind, chip, hidden, proj, table.step(kind, ""))


def launches(job: Job) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that the scan starts, with their arguments, each kind once. Tensors are on `meta`."""
    from rnnkit.kernels import persistent, step

    cell = CELLS[table.CELL_OF[job.kernel]]
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
    seen: dict[str, tuple[Any, dict[str, Any]]] = {}

    def see(kernel: Any, grid: tuple[int, ...], plan: table.Plan, **arguments: Any) -> None:
        seen[f"{kernel.__name__} {arguments.get('RELU')} {[signature(v) for v in arguments.values()]}"] = (
            kernel,
            arguments,
        )

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


def build(job: Job) -> list[Line] | str:
    """Compile the kernels of a job; what went wrong where one does not compile."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rnnkit.kernels import launch

    amd = job.chip.startswith("gfx")
    target = GPUTarget("hip", job.chip, 64) if amd else GPUTarget("cuda", int(job.chip[3:]), 32)
    lines = []
    for kernel, arguments in launches(job):
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        types = {name: "constexpr" if name in fixed else signature(arguments[name]) for name in kernel.arg_names}
        places = list(enumerate(kernel.arg_names))
        source = ASTSource(
            fn=kernel,
            signature=types,
            constexprs={(k,): arguments[name] for k, name in places if types[name] == "constexpr"},
            attrs={(k,): [["tt.divisibility", 16]] for k, name in places if types[name].startswith("*")},
        )
        try:
            compiled = triton_compile(source, target=target, options=launch.options(job.plan, amd=amd))
        except Exception as error:  # whatever the compiler raises is a finding
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        registers, spilled = amd_usage(compiled.asm["amdgcn"]) if amd else nvidia_usage(compiled.asm["cubin"])
        function = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        shared, limit = compiled.metadata.shared, table.SHARED[job.chip]
        what = (job.plan.regime, job.kernel, job.side, function, job.hidden, job.proj, job.dtype, job.kind, job.chip)
        tiles = (job.plan.block_b, job.plan.warps, job.plan.stages)
        lines.append(Line(*what, *tiles, registers, spilled, shared, limit))
    return lines


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


def number(pattern: str, text: str) -> int:
    """What a tool says; an error where it says nothing, so that a spill is never overlooked."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"found no {pattern} in what the tool says")
    return int(found[1])


def search(kernel: str) -> Iterator[table.Row]:
    """For each side, tile and kind the row of the fewest warps that fits most chips, where any fits one."""
    for side in table.SIDES:
        for hidden in table.TILES:
            for size in [s for s in table.TILES if s <= hidden] if kernel == "lstm_proj" else [hidden]:
                for kind in DTYPES:
                    weights = CELLS[table.CELL_OF[kernel]].gates * hidden * size * (2 if kind == "half" else 4)
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
            shared = max(row.shared, *(line.shared for line in lines))
            row = row._replace(chips=(*row.chips, chip), shared=shared)
    return row


def _of(row: table.Row, chip: str) -> list[Job]:
    proj = row.size - 1 if row.kernel == "lstm_proj" else 0
    plan = table.persistent(row, "")
    return [Job(row.kernel, row.side, d, row.kind, chip, row.hidden, proj, plan) for d in DTYPES[row.kind]]


def part(text: str) -> tuple[int, int]:
    """K/N with 1 ≤ K ≤ N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected K/N with 1 ≤ K ≤ N, got {text!r}")
    return int(found[1]), int(found[2])


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
            name = f"{job.plan.regime} {job.kernel} {job.side} H={job.hidden} {job.dtype} {job.kind} {job.chip}"
            if isinstance(found, str):
                wrong.append(f"{name}: {found}")
            else:
                lines += found
                wrong += [f"{name}, {line.function}: {line.wrong}" for line in found if line.wrong]
            if done % 25 == 0 or done == len(mine):
                print(f"{done} of {len(mine)} scans, {time.monotonic() - start:.0f} s, the last {name}", flush=True)
    for text in wrong:
        print(text, file=sys.stderr)
    if not wrong and options.part == (1, 1):
        write(options.to, lines)
        print(f"{options.to}: {len(lines)} kernels compiled by Triton {triton.__version__}, none spills")
    return 1 if wrong else 0


def write(path: Path, lines: list[Line]) -> None:
    """The result, each kernel once: several scans share a product."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Line._fields)
        writer.writerows(dict.fromkeys(lines))


if __name__ == "__main__":
    sys.exit(main())
