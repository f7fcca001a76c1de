"""NVIDIA's compute-sanitizer over the CUDA kernels: accesses out of bounds, races in shared memory, wrong barriers.

`examine` finds the tool, and has it watch this file, run as a program, once for each kind of check, all at the same
time; it reads what the tool reports. The program runs every CUDA kernel that the GPU can hold, forward and backward, on
small cases of parity_cases.py. Each tensor has memory of its own there, with some bytes behind it that are nobody's: in
torch's shared blocks one tensor's end is another's beginning. initcheck is not asked: parity fills new memory with NaN,
and what cuBLAS writes by bulk copies may look unwritten to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs

from ..usage import cuda_usage
from .parity import Findings, precision_and_regime
from .parity_cases import KINDS, ParityCase, compiled_for, draw, resident, stepping
from .reference_runs import named, numbers
from .timed_process import TimedProcess

KERNELS = "rnnkit"  # in the names of our kernels, mangled or not; others are not looked at
PADDING = "512"  # bytes behind a tensor that are nobody's
CHECKS = {
    "memcheck": ("--padding", PADDING, "--report-api-errors", "no"),  # torch tries calls that may fail
    "racecheck": (),
    "synccheck": (),
}
FOUND = 77  # the exit code where the tool has reported something
LEAST = 40.0  # seconds: below that torch has started under the tool, and little more
GRACE = 25.0  # seconds of it for the program's start, which its own clock does not see, and for its last case
WANTED = "compute-sanitizer is not here: it comes with CUDA's toolkit, or by pip install nvidia-cuda-sanitizer-api"
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "tf32": "tf32", "ieee": "float32", "f64": "float64"}


def tool() -> Path | None:
    """Where compute-sanitizer is: on the PATH, in CUDA_HOME or beside the nvcc that builds, or installed by pip."""
    nvcc = cuda_usage.compiler()
    homes = [os.environ.get("CUDA_HOME"), None if nvcc is None else nvcc.home()]
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    homes += [home for place in wheels for home in sorted(place.glob("cu*"))]
    path = os.pathsep.join(str(Path(home, "bin")) for home in homes if home)
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=path)
    return None if found is None else Path(found)


def examine(findings: Findings, seconds: float, out: Path) -> list[str]:
    """Put down what the tool finds within so many seconds; what was said goes into `out`. Returns lines for a person,
    for each check what was watched and what not, or why none was made."""
    found = tool()
    why = cuda.missing() or (WANTED if found is None else None)
    if why is None and seconds < LEAST:
        why = f"{seconds:.0f} s are too few, it takes {LEAST:.0f}; a larger --limit takes it in"
    if why is not None or found is None:
        return [f"sanitizer  left out: {why}"]
    budget, end = ["--seconds", f"{seconds - GRACE:.0f}"], time.monotonic() + seconds
    children = {}
    try:
        for check, more in CHECKS.items():
            watched = [str(found), "--tool", check, "--kernel-name", f"kernel_substring={KERNELS}", *more]
            watched += ["--error-exitcode", str(FOUND), "--show-backtrace", "no", "--destroy-on-device-error", "kernel"]
            said, alone = out / f"{check}.txt", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            children[check] = TimedProcess("rnnkit.benchmarks.gpu_check.sanitizer", budget, said, watched, alone)
        return [line for check, child in children.items() for line in _judge(findings, check, child.wait(end), child)]
    finally:
        for child in children.values():
            child.stop()


def _judge(findings: Findings, check: str, code: int | None, child: TimedProcess) -> list[str]:
    """The outcome of a check, and what it did not watch; what it found is recorded."""
    text = child.text()
    ours, others = reports(text)
    for report, count in ours.items():
        findings.wrong.append(f"cuda: {check}: {report}" + (f", {count} times" if count > 1 else ""))
        findings.culprits |= {("cuda", kind, precision) for kind, precision in culprits(report)}
    begun = re.findall(BEGUN.format(r"(\d+)", r"(\d+)", "(.*)"), text)
    line = f"{check:<10} {len(begun)} of {begun[-1][1] if begun else 0} problems, {len(ours)} findings in the kernels"
    if others:
        line += f", {others} elsewhere"
    ended = re.search(ENDED, text) is not None
    if code is None:
        line += f"; stopped in the last, for want of time: {begun[-1][2]}" if begun else "; it did not begin in time"
    elif not ended and begun:  # a kernel that fails, by the tool's hand or its own
        findings.wrong.append(f"cuda: {check}: ended with {code} in {begun[-1][2]}, see {child.said}")
        findings.culprits |= {("cuda", kind, precision) for kind, precision in culprits("")}
    elif not ended:
        return [f"{check:<10} left out: the tool could not run it, see {child.said}"]
    elif code == FOUND and not ours:
        line += f", see {child.said}"
    return [line, *_unwatched(findings, check, text, len(begun) - (code is None), code is None or ended)]


def _unwatched(findings: Findings, check: str, text: str, done: int, late: bool) -> list[str]:
    """The kernels that a check has not watched to their end, recorded and named. late: because time ran out."""
    order = re.search(ORDER.format("(.*)"), text)
    more = "; a larger --limit takes them in" if late else ""
    if order is None:
        findings.unwatched += 1
        return [f"NOT EXAMINED by {check}: any kernel, it did not begin in time{more}"]
    every = order[1].split()
    rest = every[max(done, 0) :]
    findings.unwatched += len(rest)
    why = "for want of time" if late else "since it ended"
    some = f"{len(rest)} of {len(every)} kernels: {' '.join(rest)}"
    return [f"NOT EXAMINED by {check}, {why}: {some}{more}"] if rest else []


def reports(text: str) -> tuple[Counter[str], int]:
    """What was reported of our kernels, each with how often, and how many reports are of something else."""
    ours: Counter[str] = Counter()
    others = 0
    for what, rest in _blocks(text):
        whole = " ".join([what, *rest])
        if f"{KERNELS}::" not in whole:
            others += 1
            continue
        kernel = re.search(rf"{KERNELS}::cuda::(\w+)", whole)
        parts = re.findall(r"(?:cell|kind)::(\w+)", whole)
        lines = dict.fromkeys(re.findall(r" in (\S+?:\d+)", whole) or re.findall(r"\+(0x[0-9a-f]+)", whole))
        first = re.split(rf" (?:between|at|in) |:? ?void {KERNELS}", what)[0]
        name = f"{kernel[1] if kernel else 'a kernel'} {' '.join(dict.fromkeys(parts))}".strip()
        ours[f"{first} in {name}" + (f" ({', '.join(lines)})" if lines else "")] += 1
    return ours, others


HEADS = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application returned")
LINE = re.compile(r"^=========(.*)$", re.MULTILINE)


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """First line and further lines of each report. The tool indents further ones."""
    block: list[str] = []
    for line in [match[1] for match in LINE.finditer(text)] + [" "]:
        if line.startswith("     ") and line.strip():
            block.append(line.strip())
            continue
        if block and not block[0].startswith(HEADS):
            yield block[0], block[1:]
        block = [line.strip()] if line.strip() else []


def culprits(report: str) -> set[tuple[str, str]]:
    """The kinds of layer and precisions that a kernel serves, by its name; all where it does not tell."""
    words = report.split()
    cells = [cell for cell, kernel in cuda_configs.KERNEL_OF.items() if kernel in words]
    kinds = {kind for kind, facts in KINDS.items() if facts.cell in (cells or cuda_configs.KERNEL_OF)}
    precisions = {PRECISIONS[word] for word in words if word in PRECISIONS} or set(PRECISIONS.values())
    return {(kind, precision) for kind in kinds for precision in precisions}


# The program that is watched.

ORDER, BEGUN, ENDED = "kernels, in this order: {}", "problem {} of {}: {}", "all that there was time for"


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, one after the other, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="S", help="begin none after; default: all"
    )
    options = parser.parse_args(arguments)
    begin, capability = time.monotonic(), cuda.machine.capability(None)
    every = small(capability)
    print(ORDER.format(" ".join(compiled_for(case, capability).name for case in every)), flush=True)
    for done, case in enumerate(every, 1):
        if time.monotonic() - begin > options.seconds:
            break
        print(BEGUN.format(done, len(every), case), flush=True)
        with precision_and_regime(case):
            numbers(named("cuda"), case, draw(case, 0), case.dtype, cuda.machine.device)
    print(ENDED, flush=True)
    return 0


def small(capability: int) -> list[ParityCase]:
    """A case for each kernel, in an order in which any part of them has all regimes, cells and kinds."""
    rows = cuda_configs.able(capability)
    every = [*resident(rows), *stepping(rows)]
    stride = 7  # no divisor of the number of kinds, of a cell's rows or of a regime's
    return [case for k in range(stride) for case in every[k::stride]]


if __name__ == "__main__":
    sys.exit(main())
