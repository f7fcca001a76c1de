"""Writes the rows of CPUs in rnnkit/backends/dispatch_times.csv, by which `auto` orders the backends.

    python -m rnnkit.benchmarks.dispatch.record [--isa avx2 ...] [--dtype bfloat16] [--threads 1,2] [--seconds S]

What `python -m rnnkit tune` measures, in a process for each instruction set and number of threads, in which rnnkit,
torch and its libraries are held to that set: so a machine with AVX-512 records what others have. Rows that were
measured take the place of what was recorded of the same instruction set, dtype and number of threads; the rest stays.
Run it on a machine with nothing else to do. All of it takes half an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rnnkit.backends import dispatch_times, user_times
from rnnkit.backends.cpu import extension
from rnnkit.backends.dispatch_times import RecordedShape
from rnnkit.cli import instruction_set
from rnnkit.tune.measure import CELLS, DTYPES, MODES, SHAPES

from ..speed import machine
from .fit_dispatch import save

# As `--isa` holds a command, and one more: without the products of bfloat16, which rows of avx512 must not show.
_AVX512 = instruction_set.SETTINGS["avx512"]
LIMITS = {
    "avx512_bf16": _AVX512,
    **instruction_set.SETTINGS,
    "avx512": {**_AVX512, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
ONLY = {"avx512_bf16": ("bfloat16",)}
"""Dtypes, where the others are those of another instruction set."""
SECONDS = 240.0


def environment(isa: str, threads: int) -> dict[str, str]:
    """What a process is started with that is held to an instruction set and a number of threads."""
    held = {"RNNKIT_CPU_ISA": isa, "RNNKIT_TUNED": "0", "OMP_NUM_THREADS": str(threads)}
    return {**instruction_set.environment(isa, LIMITS[isa]), **held}


def measured(isa: str, threads: int, dtypes: list[str], seconds: float) -> list[RecordedShape]:
    """The rows of an instruction set, from a process of its own. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        command = [sys.executable, "-m", "rnnkit", "tune", "--out", str(path), "--seconds", str(seconds)]
        for dtype in dtypes:
            command += ["--dtype", dtype]
        subprocess.run(command, env=environment(isa, threads), check=True)
        source = machine.file_name("cpu", machine.processor("cpu"))
        return [row._replace(source=source) for row in user_times.read(path)]


def merged(old: list[RecordedShape], new: list[RecordedShape]) -> list[RecordedShape]:
    """Both, without old rows of an instruction set, dtype and number of threads that there are new ones of."""
    groups = {(row.kind.device, row.kind.isa, row.kind.dtype, row.threads) for row in new}
    kept = (row for row in old if (row.kind.device, row.kind.isa, row.kind.dtype, row.threads) not in groups)
    return [*kept, *new]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write after every process, say what was written; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=LIMITS, action="append", help="default: all that this engine has here")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--threads", default="1,2", metavar="N", help="numbers, as 1,2; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="a process; default: %(default)g")
    parser.add_argument("--to", type=Path, default=dispatch_times.FILE, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for isa in options.isa or LIMITS:
        if isa not in extension.variants:
            print(f"{isa} is left out: the engine has {', '.join(extension.variants) or 'nothing'} here")
            continue
        dtypes = [name for name in options.dtype or DTYPES if name in ONLY.get(isa, DTYPES)]
        for threads in map(int, options.threads.split(",")) if dtypes else ():
            try:
                found = measured(isa, threads, dtypes, options.seconds)
            except subprocess.CalledProcessError as error:
                print(f"{isa}, {dispatch_times.said(threads)}: tune ended with {error.returncode}", file=sys.stderr)
                return 1
            wanted = len(SHAPES) * len(CELLS) * len(MODES) * len(dtypes)
            if len(found) < wanted:
                about = f"{isa}, {dispatch_times.said(threads)}: {len(found)} of {wanted} rows"
                print(f"{about}, which are not written; give more than --seconds {options.seconds:g}", file=sys.stderr)
                return 1
            old = dispatch_times.read(options.to) if options.to.exists() else []
            save(options.to, merged(old, found))
            print(f"{options.to}: {len(found)} rows of {isa}, {dispatch_times.said(threads)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
