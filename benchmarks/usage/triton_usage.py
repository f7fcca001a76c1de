"""Compiles the Triton kernels for every chip ahead of time, without a GPU, and says what each takes.

    python -m rnnkit.benchmarks.usage.triton_usage [--part K/N] [--workers N] [--to FILE]   checks, writes the whole
    python -m rnnkit.benchmarks.usage.triton_usage --search KERNEL    finds the rows of the table for a kernel

Every row of rnnkit/backends/triton/configs.py is compiled for each of its chips, and the step regime's kernels in each
of its tiles for all of them, by the launches that a scan makes, with everything on: lengths, resets, states at a reset,
all gradients.
What is compiled is what Triton would compile at that launch: its own functions say of which arguments it knows that
they are multiples of 16, or on AMD's GPUs within 2 GiB. Where that leaves a persistent kernel fewer than SPARE
registers, the other forms of a call are compiled too (FORMS); the row of the result says the most that one takes.
A row of the result holds registers a thread, bytes of shared memory a block and of stack a thread, which is what
spilled, by the Triton that compiled it: a run replaces its own version's rows and keeps the others'.
Exit code 1 where a kernel spills, needs more shared memory than its chip has, or does not compile.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkit.backends.spec import LayerInputs, LayerOutputs
from rnnkit.backends.triton import configs
from rnnkit.cells import CELLS

from ..speed.rows import COMPILED
from .kernel_usage import Usage, find_number, from_columns, part_option, read_csv, write_csv

DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRODUCTS = ("product.product", "product.product_back")
STEP_SIZES = (
    ((128, 48), configs.STEP),
    ((127, 45), configs.UNALIGNED_STEP),
)  # H and P, where there is one, and the tiles
SPARE = 64
"""Registers a thread: more than the forms of a call differ by."""
FEW, MANY = 3, 2**28  # rows of a batch: so many that on AMD's GPUs no tensor of theirs is within 2 GiB


class Form(NamedTuple):
    """How calls of one layer differ, such that a row's kernel is another one."""

    rows: int = FEW
    wide: bool = False
    """Whether states are float32, as they pass between the ranges of `recompute`."""
    lengths: bool = True
    resets: bool = True
    states: bool = True
    """At a reset, instead of zeros."""


EVERYTHING = Form()
FORMS = (
    Form(wide=True),
    Form(rows=MANY),
    Form(lengths=False, resets=False, states=False),
    Form(resets=False, states=False),
    Form(lengths=False, states=False),
)


class TritonBuildJob(NamedTuple):
    """One scan to compile for one chip."""

    kernel: str
    cell: str
    side: str
    dtype: str
    kind: str
    chip: str
    hidden: int
    proj: int
    config: configs.LaunchConfig


class TritonKernelName(NamedTuple):
    """One compiled kernel. What every cell's scan may launch, a product of the step regime, names no scan, and in the
    place of H stands what all its sizes are multiples of."""

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


class TritonRecord(NamedTuple):
    """A row of the result."""

    name: TritonKernelName
    usage: Usage

    @property
    def limit(self) -> int:
        """Bytes of shared memory. A step's kernel is also what chips with little of it run, a row need not be."""
        some = self.name.regime == "step" and not self.name.chip.startswith("gfx")
        return configs.SMALL_SHARED if some else configs.SHARED[self.name.chip]

    @property
    def wrong(self) -> str | None:
        """What speaks against it; None where it fits."""
        if self.usage.spilled:
            return f"spills {self.usage.spilled}"
        if self.usage.shared > self.limit:
            return f"takes {self.usage.shared} bytes of shared memory, the chip has {self.limit}"
        return None


def jobs() -> Iterator[TritonBuildJob]:
    """Everything that the table stands for."""
    for row in configs.PERSISTENT:
        for chip in row.chips:
            yield from _of(row, chip)
    scans = [(kernel, cell) for kernel in configs.KERNELS for cell in configs.CELLS_OF[kernel]]
    kinds = [(kind, dtype) for kind, dtypes in DTYPES.items() for dtype in dtypes]
    sizes = [(size, some) for size, tiles in STEP_SIZES for some in tiles]
    every = itertools.product(scans, sizes, configs.SIDES, kinds, configs.CHIPS)
    for (kernel, cell), ((hidden, proj), some), side, (kind, dtype), chip in every:
        proj = proj if kernel == "lstm_proj" else 0
        yield TritonBuildJob(kernel, cell, side, dtype, kind, chip, hidden, proj, configs.step_config(some, kind, ""))


def forms(job: TritonBuildJob, found: Iterable[Usage]) -> Iterator[Form]:
    """Those that are compiled besides everything on, which takes `found`."""
    amd = job.chip.startswith("gfx")
    most = min(2048 // job.config.warps, 512 if amd else 255)  # registers a thread can have
    if job.config.regime == "persistent" and any(usage.registers + SPARE > most for usage in found):
        for form in FORMS:
            if (amd or form.rows != MANY) and (job.kind == "half" or not form.wide):
                yield form


class KernelLaunch(NamedTuple):
    """A kernel as a scan starts it."""

    kernel: Any
    config: configs.LaunchConfig
    arguments: dict[str, Any]

    @property
    def function(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def multiple(self) -> int:
        """Of what a product knows that its sizes are multiples."""
        (terms,) = [p for p in self.kernel.params if p.name == "K"]
        return configs.MULTIPLES[terms.do_not_specialize]


def launches(
    job: TritonBuildJob, form: Form = EVERYTHING, make: Callable[..., Tensor] = torch.empty
) -> list[KernelLaunch]:
    """The kernels that the scan starts, each kind once. Tensors are on `meta`, those that it is given by `make`."""
    from rnnkit.kernels import persistent, step

    cell = CELLS[job.cell]
    steps, batch, hidden, size = 2, form.rows, job.hidden, job.proj or job.hidden

    def some(*sizes: int, dtype: torch.dtype = TORCH[job.dtype]) -> Tensor:
        return make(sizes, dtype=dtype, device="meta")

    state = torch.float32 if form.wide else TORCH[job.dtype]
    t = LayerInputs(
        x=some(steps, batch, 8),
        h_0=some(batch, size, dtype=state),
        c_0=some(batch, hidden, dtype=state) if cell.has_c else None,
        w_ih=some(cell.gates * hidden, 8),
        w_hh=some(cell.gates * hidden, size),
        b_ih=some(cell.gates * hidden),
        b_hh=some(cell.gates * hidden),
        w_hr=some(job.proj, hidden) if job.proj else None,
        lengths=some(batch, dtype=torch.int64) if form.lengths else None,
        reset=some(steps, batch, dtype=torch.bool) if form.resets else None,
        h_reset=some(batch, size) if form.states else None,
        c_reset=some(batch, hidden) if form.states and cell.has_c else None,
    )
    b_hn = some(hidden) if cell.reset_after else None
    seen: dict[tuple[Any, ...], KernelLaunch] = {}

    def see(kernel: Any, grid: tuple[int, ...], config: configs.LaunchConfig, **arguments: Any) -> None:
        key = (id(kernel), *map(_sort, arguments.values()))
        seen[key] = KernelLaunch(kernel, config, arguments)

    regime: Any = persistent if job.config.regime == "persistent" else step
    gx = some(steps, batch, cell.gates * hidden)
    found = regime.forward(cell, gx, t.h_0, t.c_0, t, b_hn, t0=0, reverse=False, save=True, config=job.config, run=see)
    if job.side == "backward":
        seen.clear()
        y, h_n, c_n, c_all, gates = found
        grads = LayerOutputs(y, h_n, c_n, c_all)
        regime.backward(cell, grads, y, c_all, gates, t, b_hn, reverse=False, config=job.config, run=see)
    return list(seen.values())


def _sort(value: Any) -> str:
    """By what two launches of a kernel are alike."""
    return f"{value.dtype} {value.data_ptr()}" if isinstance(value, Tensor) else type(value).__name__


def named(job: TritonBuildJob, launch: KernelLaunch, triton: str) -> TritonKernelName:
    """What the result calls a launch that Triton of this version compiles."""
    shape, config = launch.arguments, launch.config
    scan = (job.kernel, job.cell, job.side, launch.function, job.hidden, job.proj)
    if launch.function in PRODUCTS:
        scan = ("", "", "", launch.function, launch.multiple, 0)
    tile = (shape["BLOCK_B"], shape.get("BLOCK_H") or shape["BLOCK_N"], config.warps, config.stages)
    return TritonKernelName(triton, job.config.regime, *scan, job.dtype, job.kind, job.chip, *tile)


def build(job: TritonBuildJob) -> list[TritonRecord] | str:
    """Compile the kernels of a job; what went wrong where one does not compile."""
    import triton

    def lines(form: Form) -> list[TritonRecord]:
        found = launches(job, form)
        taken = [_usage(launch.kernel, job.chip, *specialized(launch, job.chip)) for launch in found]
        return [
            TritonRecord(named(job, one, triton.__version__), usage) for one, usage in zip(found, taken, strict=True)
        ]

    try:
        found = lines(EVERYTHING)
        return found + [line for form in forms(job, [line.usage for line in found]) for line in lines(form)]
    except Exception as error:  # whatever the compiler raises is a finding
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


Pairs = tuple[tuple[Any, Any], ...]


def specialized(launch: KernelLaunch, chip: str) -> tuple[Pairs, Pairs, Pairs, Pairs]:
    """What Triton's own `JITFunction.run` makes of a launch: types, constants, what is known of arguments, options."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from rnnkit.kernels.launch import options

    kernel, backend = launch.kernel, make_backend(_target(chip))
    asked = options(launch.config, amd=chip.startswith("gfx"))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, found, _ = bind(**launch.arguments, **asked)
    _, types, constants, known = kernel._pack_args(backend, asked, bound, found, asked)
    facts = ((place, tuple(map(tuple, facts))) for place, facts in known.items())
    return tuple(types.items()), tuple(constants.items()), tuple(facts), tuple(asked.items())


def _target(chip: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", chip, 64) if chip.startswith("gfx") else GPUTarget("cuda", int(chip[3:]), 32)


@functools.cache
def _usage(kernel: Any, chip: str, types: Pairs, constants: Pairs, known: Pairs, options: Pairs) -> Usage:
    """Compile a kernel; several scans share one."""
    from triton import compile as triton_compile
    from triton.compiler import ASTSource

    attributes = {place: list(map(list, facts)) for place, facts in known}
    source = ASTSource(fn=kernel, signature=dict(types), constexprs=dict(constants), attrs=attributes)
    compiled = triton_compile(source, target=_target(chip), options=dict(options))
    amd = chip.startswith("gfx")
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
    return find_number(r"REG:(\d+)", said), find_number(r"STACK:(\d+)", said)


def amd_usage(text: str) -> tuple[int, int]:
    """Registers a thread, and bytes of stack. A scalar register that is kept in a lane of a vector register is counted
    with those and never meets memory, though LLVM says of it that it spilled."""
    return find_number(r"\.vgpr_count:\s+(\d+)", text), find_number(r"\.private_segment_fixed_size:\s+(\d+)", text)


def search(kernel: str) -> Iterator[configs.CompiledKernel]:
    """For each side, tile and kind the row of the fewest warps that fits most chips, where any fits one."""
    for side in configs.SIDES:
        for hidden in configs.TILES:
            for size in [s for s in configs.TILES if s <= hidden] if kernel == "lstm_proj" else [hidden]:
                for kind, multiple in itertools.product(DTYPES, configs.MULTIPLES):
                    weights = CELLS[configs.CELLS_OF[kernel][0]].gates * hidden * size * (2 if kind == "half" else 4)
                    if weights > max(configs.SHARED.values()):
                        continue
                    best: configs.CompiledKernel | None = None
                    for warps in (4, 8) if hidden <= 64 else (8, 4, 16):
                        if best is not None and len(best.chips) == len(configs.CHIPS):
                            break
                        row = _tried(configs.CompiledKernel(kernel, side, hidden, size, kind, multiple, (), warps, 0))
                        if best is None or len(row.chips) > len(best.chips):
                            best = row
                    if best is not None and best.chips:
                        yield best


def _tried(row: configs.CompiledKernel) -> configs.CompiledKernel:
    """The row with the chips that it fits."""
    for chip in configs.CHIPS:
        found = [build(job) for job in _of(row, chip)]
        lines = [line for some in found if not isinstance(some, str) for line in some]
        if not any(isinstance(some, str) for some in found) and not any(line.wrong for line in lines):
            shared = max(row.shared, *(line.usage.shared for line in lines))
            row = row._replace(chips=(*row.chips, chip), shared=shared)
    return row


def _of(row: configs.CompiledKernel, chip: str) -> list[TritonBuildJob]:
    hidden, proj = configs.fullest(row)
    config = configs.persistent_config(row, "")
    return [
        TritonBuildJob(row.kernel, cell, row.side, dtype, row.kind, chip, hidden, proj, config)
        for cell in configs.CELLS_OF[row.kernel]
        for dtype in DTYPES[row.kind]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compile, say what was found, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", type=part_option, default=(1, 1), metavar="K/N", help="every N-th job from the K-th on"
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--to", type=Path, default=COMPILED, metavar="FILE", help="of the whole; default: %(default)s")
    parser.add_argument("--search", choices=configs.KERNELS, help="print rows of the table, write nothing")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ModuleNotFoundError:
        print(
            "rnnkit.benchmarks.usage.triton_usage: Triton is not installed: pip install rnnkit[triton]", file=sys.stderr
        )
        return 2
    if options.search:
        for row in search(options.search):
            print(f"    {type(row).__name__}{tuple(row)},", flush=True)
        return 0
    every = list(jobs())
    mine = every[options.part[0] - 1 :: options.part[1]]
    lines: list[TritonRecord] = []
    wrong: list[str] = []
    start = time.monotonic()
    with ProcessPoolExecutor(options.workers) as pool:
        for done, (job, found) in enumerate(zip(mine, pool.map(build, mine), strict=True), 1):
            size = f"H={job.hidden} P={job.proj}" if job.proj else f"H={job.hidden}"
            name = f"{job.config.regime} {job.cell} {job.side} {size} {job.dtype} {job.kind} {job.chip}"
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


COLUMNS = (*TritonKernelName._fields, *Usage._fields, "limit")


def merged(before: Iterable[TritonRecord], lines: Iterable[TritonRecord]) -> list[TritonRecord]:
    """What other Tritons said before, and `lines`: of several that bear one name the most of each."""
    found: dict[TritonKernelName, Usage] = {}
    for name, usage in lines:
        found[name] = Usage(*map(max, usage, found.get(name, usage)))
    mine = {name.triton for name in found}
    return [*(line for line in before if line.name.triton not in mine), *itertools.starmap(TritonRecord, found.items())]


def write(path: Path, lines: Iterable[TritonRecord]) -> None:
    """The result, older Tritons first."""
    ordered = sorted(lines, key=lambda line: [int(v) for v in re.findall(r"\d+", line.name.triton)])
    write_csv(path, COLUMNS, ((*line.name, *line.usage, line.limit) for line in ordered))


def read(path: Path) -> list[TritonRecord]:
    """What a result says; nothing where there is none yet. Raises BadInput where a file is none of ours."""
    return [
        TritonRecord(from_columns(TritonKernelName, row), from_columns(Usage, row)) for row in read_csv(path, COLUMNS)
    ]


if __name__ == "__main__":
    sys.exit(main())
