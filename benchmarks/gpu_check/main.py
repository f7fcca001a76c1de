"""`python -m rnnkit gpu-check`: whether every backend is right on this machine's GPU, and how fast, in one command.

First what is here: device, driver, versions. Then the CUDA kernels under NVIDIA's compute-sanitizer, where that is.
Then parity: outputs, states and all gradients of every backend that runs here, against float64, for every cell, dtype
and extra; of the fused backends every kernel of the table, the same bits twice, in a CUDA graph, compiled and under
autocast. Then probes: what the device takes for the things that kernels are made of. Then the benchmark against
cuDNN, those cases first by which the fused backends are judged, each result checked before it is timed; a backend is
not timed in the cells and dtypes in which something was found. At the end the targets, each met, missed or not
measured. It needs Python and torch alone, nothing is downloaded, nothing is built: without compiled CUDA kernels
backend cuda is not examined, which is said with the command that builds them (`make gpu-check` does both). Skipped
checks print NOT EXAMINED, because time ran out or torch itself failed; the exit code is then 1. Rows go into
benchmarks/results/ of the clone, or into the folder that --out names; Ctrl-C keeps what there is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from rnnkit.backends import BACKENDS, NAMES, gpu
from rnnkit.backends.cpu import extension
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.backends.triton import backend as triton
from rnnkit.backends.triton import configs as triton_configs
from rnnkit.cli import info, values
from rnnkit.cli.progress import Progress
from rnnkit.demo import check_out
from rnnkit.demo.text import InputError

from ..speed import machine, rows, run, targets
from ..speed.bench_cases import DTYPES, BadInput, BenchJob, known, select
from . import multi_gpu, parity, parity_cases, probes, sanitizer, worker_pool

DEVICE = "cuda"
LIMIT, QUICK = 540.0, 100.0  # seconds, all in all
SHARE = 0.55  # of it, at most, for parity: kernels that are compiled when they are first called take minutes
WATCHED = 0.15  # for compute-sanitizer
PROBED = 0.06  # for the probes
OUT = Path("gpu-check-out")
TIMED = {"rnn_tanh": "RNN", "lstm": "LSTM", "gru": "GRU"}  # kind of layer -> cell of the benchmark
BUILD = "RNNKIT_CUDA=1 RNNKIT_CUDA_ARCH=native python setup.py -q build_ext --inplace"
SHOWN = 20  # failures on the console; the file has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--quick", action="store_true", help="in under two minutes: a few problems, the targets' cases")
    parser.add_argument(
        "--limit", type=values.seconds, metavar="S", help=f"all in all; default: {LIMIT:g}, quick {QUICK:g}"
    )
    parser.add_argument("--seconds", type=values.seconds, metavar="S", help="for each that is timed, as in `bench`")
    parser.add_argument("--backend", type=values.names, action="extend", default=[], metavar="B", help="default: all")
    parser.add_argument("--dtype", type=values.names, action="extend", default=[], metavar="D",
                        help=f"of the benchmark: {', '.join(DTYPES)}; default: bfloat16,float32")  # fmt: skip
    parser.add_argument("--workers", type=worker_pool.count, metavar="N",
                        help=f"processes for parity; default: half of the cores, up to {worker_pool.MOST}")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: benchmarks/results/ of a clone, and {OUT}/")


def main(options: argparse.Namespace) -> int:
    """Check, measure, judge; returns the exit code."""
    begin, out = time.monotonic(), options.out or OUT
    try:
        check_out(out)
        backends = known("backend", options.backend, NAMES) or NAMES
        known("dtype", options.dtype, DTYPES)
        missing = machine.no_device()
        if missing is not None:
            return _complain(missing, 3)
        bench = _bench(options, out)
    except (BadInput, InputError) as error:
        return _complain(error, 2)
    said: list[str] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            code = _check(options, out, backends, bench, begin, said)
        finally:
            (out / "gpu-check.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
    except OSError as error:
        return _complain(f"cannot write to {out}: {error.strerror or error}", 2)
    print(f"written: {out / 'gpu-check.txt'}")
    return code


def _check(
    options: argparse.Namespace,
    out: Path,
    backends: tuple[str, ...],
    bench: run.Bench,
    begin: float,
    said: list[str],
) -> int:
    """The parts one after the other; what is said is also put into `said`."""

    def say(line: str = "") -> None:
        said.append(line)
        print(line, flush=True)

    for name, value in facts():
        say(f"{name:<10} {value}")
    findings = parity.Findings()
    if "cuda" in backends and (line := unbuilt()):
        say(line)
    if "cuda" in backends:
        say("\nsanitizer: the CUDA kernels on small problems, watched")
        for line in sanitizer.examine(findings, WATCHED * bench.options.limit, out):
            say(line)
    say("\nparity: errors against float64, over what is allowed (twice torch.nn's, and a rounding band)")
    interrupted = _parity(options, findings, backends, SHARE * bench.options.limit)
    further = [] if interrupted or findings.ended else multi_gpu.examine(findings, backends)
    for line in findings.lines() + kernels(findings) + further:
        say(line)
    for line in findings.wrong[:SHOWN]:
        say(f"WRONG {line}")
    said += [f"WRONG {line}" for line in findings.wrong[SHOWN:]]
    if len(findings.wrong) > SHOWN:
        print(f"and {len(findings.wrong) - SHOWN} more, in {out / 'gpu-check.txt'}")
    if findings.left:
        say(f"NOT EXAMINED for want of time: {findings.left} problems; a larger --limit takes them in")
    if interrupted or findings.ended:
        say("stopped by Ctrl-C" if interrupted else "the device failed: nothing is timed")
        return 130 if interrupted else 1
    if "cuda" in backends:
        say("\nprobes: what this GPU takes for the things that kernels are made of")
        for line in probes.examine(PROBED * bench.options.limit, out, options.out is None and rows.RESULTS.is_dir()):
            say(line)
    bench.backends, bench.barred = backends, barred(findings)
    for cell, dtype in dict.fromkeys((job.cell, job.dtype) for job in bench.jobs):
        unfit = [name for name in backends if (name, cell, dtype) in bench.barred]
        if unfit:
            say(f"not timed, since something is wrong: {cell} in {dtype} by {', '.join(unfit)}")
    say("\nbenchmark")
    bench.options.limit = max(bench.options.limit - (time.monotonic() - begin), 1.0)
    code = bench.run()
    say("\ntargets")
    for line in judged(bench.outcome.rows, findings):
        say(line)
    bad = findings.wrong or findings.left or findings.unwatched or findings.failing
    return 1 if bad and code != 130 else code


def facts() -> list[tuple[str, str]]:
    """What the results depend on, as name and value."""
    found = info.gather()
    major, minor = torch.cuda.get_device_capability()
    kind = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return [
        ("device", f"{torch.cuda.get_device_name()}, capability {major}.{minor}"),
        ("driver", driver()),
        ("torch", f"{found['torch']}, {kind}, cuDNN {torch.backends.cudnn.version() or 'missing'}"),
        ("triton", found["triton"]["version"] or found["triton"]["reason"]),
        ("python", f"{found['python']} on {found['platform']}"),
        ("rnnkit", f"{found['rnnkit']}, commit {machine.commit()}"),
        ("extension", found["extension"]["reason"] or "available"),
        ("kernels", info.kernels(found["cuda_kernels"])),
    ]


def driver() -> str:
    """The version of the GPU's driver, as nvidia-smi or the kernel says it."""
    kernel = Path("/sys/module/nvidia/version")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    if kernel.exists():
        return kernel.read_text().strip()
    served = gpu.driver()
    serves = "" if served is None else f"; it serves {gpu.release(served)}"
    return f"unknown, since there is no nvidia-smi to say it{serves}"


def capability() -> int | None:
    """The GPU's compute capability, numbered as in triton/configs.py; None where no kernel of that table runs on it."""
    return triton.capability() if triton.missing() is None else None


def built() -> list[cuda_configs.CompiledKernel]:
    """The CUDA kernels that this GPU can hold; none where none can run."""
    return [] if cuda.missing() is not None else cuda_configs.able(cuda.machine.capability(None))


def unbuilt() -> str | None:
    """What is said where the CUDA kernels are not built, and this GPU could run some; None where they are."""
    if not extension.cuda_missing or torch.version.hip is not None:
        return None
    return (
        f"\nnot examined: backend cuda, whose kernels are not built ({extension.cuda_missing}). In a clone, where nvcc "
        f"is, `make gpu-check` builds them first, or `{BUILD}` does"
    )


def kernels(findings: parity.Findings) -> list[str]:
    """How many of the kernels that this GPU can run have run."""
    lines, known, rows = [], capability(), built()
    if known is not None:
        able, chip = set(triton_configs.rows_of(known)), triton_configs.chip_of(known)[0]
        lines.append(f"triton     {len(findings.kernels & able)} of {len(able)} persistent kernels of {chip} ran")
    if rows:
        ran, version = len(findings.kernels & set(rows)), cuda.machine.capability(None) / 10
        lines.append(f"cuda       {ran} of {len(rows)} kernels that a GPU of {version} can hold ran")
    return lines


def _parity(options: argparse.Namespace, findings: parity.Findings, backends: tuple[str, ...], seconds: float) -> bool:
    """Whether Ctrl-C came before the end."""
    every = parity_cases.select(options.quick, capability(), built())
    workers = options.workers or worker_pool.size(len(every))
    progress = Progress("parity", len(every), sys.stderr, "problem")
    try:
        if workers > 1:
            worker_pool.work(findings, DEVICE, every, backends, progress.show, seconds, workers)
        else:
            parity.examine(findings, DEVICE, every, backends, progress.show, seconds)
    except KeyboardInterrupt:
        return True
    finally:
        progress.close()
    return False


def _bench(options: argparse.Namespace, out: Path) -> run.Bench:
    """The benchmark with its jobs in the order in which they matter. float32 is measured as float32, TF32 off."""
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    limit = options.limit or (QUICK if options.quick else LIMIT)
    words = ["--device", DEVICE, "--tf32", "off", "--out", str(out), "--limit", str(limit)]
    words += ["--quick"] * options.quick + ["--record"] * (options.out is None and rows.RESULTS.is_dir())
    words += ["--seconds", str(options.seconds)] if options.seconds else []
    bench = run.Bench(parser.parse_args(words))
    jobs = select(DEVICE, dtypes=options.dtype or ("bfloat16", "float32"))
    bench.jobs = sorted((job for job in jobs if urgency(job) < 2 or not options.quick), key=urgency)
    if options.quick:
        bench.jobs = [job for job in bench.jobs if urgency(job) == 0 or job.case.quick]
    return bench


def barred(findings: parity.Findings) -> frozenset[tuple[str, str, str]]:
    """The backend, cell and dtype of what failed parity, of the kinds that the benchmark has; and `auto`, which may
    take that backend."""
    wrong = {(name, TIMED[kind], precision) for name, kind, precision in findings.culprits if kind in TIMED}
    return frozenset(wrong | {("auto", cell, dtype) for _, cell, dtype in wrong})


def urgency(job: BenchJob) -> int:
    """0 and 1: what the fused backends are judged by. Sorts the jobs of a run that may not have time for all."""
    if job.dtype == "bfloat16" and job.train:
        if job.case.group == "field" and job.case.hidden <= targets.SMALL:
            return 0
        if job.case.group in ("resets", "lengths", "field"):
            return 1
    if job.dtype == "bfloat16" and job.case.group == "scan":
        return 1
    return 2 if job.dtype == "bfloat16" else 3


def judged(found: list[rows.BenchRow], findings: parity.Findings) -> list[str]:
    """Each target met, missed or not measured; what `auto` does where a backend is slower than cuDNN; and why nothing
    is said of a backend that has no row."""
    lines = []
    for v in targets.fused(found):
        lines.append(
            f"{v.mark:<6} {v.implementation} by {v.launch}: {v.group}, {v.mode}, {v.dtype}, against {v.against}, "
            f"{v.cases} cases: mean {v.mean:.2f}, worst {v.worst:.2f} at {v.worst_case}; wanted: {v.wanted}"
        )
    for name, launch, target in targets.all_targets(found):
        if not target.figure:
            what = f"{target.group}, {target.mode}, {target.dtype}, against {target.against}"
            lines.append(f"not measured: {name} by {launch}: {what}; wanted: {target.wanted}")
    for name in targets.FUSED:
        left, taken = targets.behind(found, name)
        for some, what in ((left, "auto leaves it to another"), (taken, "auto takes it all the same")):
            lines += [f"{name} is slower than cuDNN, {what}: {', '.join(map(_slow, some))}"] if some else []
    measured = {row.implementation for row in found}
    for backend in BACKENDS:
        if backend.name in targets.FUSED and backend.name not in measured:
            failed = any(name == backend.name for name, *_ in findings.culprits)
            why = backend.available() or ("it failed parity" if failed else "it has no row")
            lines.append(f"-      {backend.name}: not judged, no target of it was measured: {why}")
    return lines


def _slow(row: rows.BenchRow) -> str:
    return f"{row.cell} {row.group} {row.case} {row.mode} in {row.dtype} {row.ratio_p50:.2f}"


def _complain(error: Exception | str, code: int) -> int:
    print(f"rnnkit gpu-check: {error}", file=sys.stderr)
    return code
