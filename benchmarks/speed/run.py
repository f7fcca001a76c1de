"""`python -m rnnkit bench`: how fast every backend is, against torch.nn, ONNX Runtime, and what the machine can do.

For each case, cell, mode and dtype: first every implementation's output and gradients are held against float64 (at most
twice torch.nn's error, and a rounding band); what is wrong is not timed. Then all take turns in one process, and the
ratio is that of paired times, the peer's over the implementation's: above 1, rnnkit is faster. Written are
rows.csv, after every job, so that Ctrl-C keeps what was measured; at the end report.md and, with matplotlib,
pictures. Those with a target take a quarter of an hour on one core by `auto`, all cases by all backends about an
hour, --quick a minute. Results depend on what else runs on the machine: a p20 far from a p80 says so.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rnnkit.cli import instruction_set
from rnnkit.cli.progress import Progress
from rnnkit.cli.values import names, seconds
from rnnkit.demo import check_out
from rnnkit.demo.text import InputError

from . import implementations, machine, report, roofline, targets
from .bench_cases import CELLS, CUSTOM, DTYPES, GROUPS, MODES, VARIANTS, BadInput, BenchJob, known, select
from .measure import Measurement
from .outcome import Outcome
from .rows import RESULTS, BenchRow, write

SECONDS = 0.25  # for each implementation and peer of a job
QUICK = 0.02
LOOK = 20  # jobs between two looks at what the machine can do
LOOP = 6e-3  # seconds a step, on a GPU: operators launched one by one from Python, in all calls of a job
OPERATORS = 5e-3  # seconds a step, on a CPU: the loop of torch operators of a custom cell, in all calls of a job
COMPILING = 30.0  # seconds: such a loop
NAMED = 5  # of the jobs that were left out


class NoDevice(RuntimeError):
    """--device names what is not here; exit code 3."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for name, letter, about in (
        (
            "case",
            "C",
            f"groups ({', '.join(GROUPS)}; judged: those with a target), shapes as 32x100x256x256, or both as "
            "grid/32x100x256x256",
        ),
        ("cell", "C", f"{', '.join(CELLS)}; variants: all custom cells, or one of them: {', '.join(VARIANTS)}"),
        ("mode", "M", ", ".join(MODES)),
        ("dtype", "D", f"{', '.join(DTYPES)}; default: {DTYPES[0]}"),
        ("backend", "B", f"{', '.join(implementations.NAMES)}; default: all that can run a case"),
        ("threads", "N", "numbers, as 1,2; default: 1"),
    ):
        parser.add_argument(f"--{name}", type=names, action="extend", default=[], metavar=letter, help=about)
    instruction_set.add_argument(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few small cases, in under a minute")
    parser.add_argument("--seconds", type=seconds, metavar="S", help=f"for each that is timed; default: {SECONDS}")
    parser.add_argument("--limit", type=seconds, metavar="S", help="start no job that would end after S seconds")
    parser.add_argument("--module", metavar="M", help="measure this class too: my.package:Class, made as nn.LSTM is")
    parser.add_argument(
        "--compile",
        action="store_true",
        help=f"measure the reference under torch.compile too, up to {implementations.COMPILED_STEPS} steps: its loop "
        "is unrolled, and compiling takes seconds a case; of custom cells, the loop that they are held against: half "
        "a minute a case",
    )
    parser.add_argument("--tf32", choices=("on", "off"), help="on a GPU; default: as torch is set")
    parser.add_argument("--targets", action="store_true", help="exit with 1 also where a target is missed")
    parser.add_argument(
        "--record", action="store_true", help="also put the rows into benchmarks/results/ of this clone"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"), metavar="DIR", help="default: %(default)s/")
    parser.add_argument("--json", action="store_true", help="print rows and targets as a JSON object")


def main(options: argparse.Namespace) -> int:
    """Measure, report; returns the exit code."""
    try:
        if options.isa is not None:
            instruction_set.hold(options.isa)
        check_out(options.out)
        bench = Bench(options)
    except (BadInput, InputError, instruction_set.CannotHold) as error:
        return _complain(error, 2)
    except NoDevice as error:
        return _complain(error, 3)
    try:
        return bench.run()
    except BadInput as error:
        return _complain(error, 2)
    except OSError as error:
        return _complain(f"cannot write to {options.out}: {error.strerror or error}", 2)


class Bench:
    """One run: the jobs, one after the other, and what came of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.jobs = select(
            options.device, options.case, options.cell, options.mode, options.quick, options.dtype, options.compile
        )
        self.backends = known("backend", options.backend, implementations.NAMES) or implementations.NAMES
        if options.record and not RESULTS.is_dir():
            raise BadInput(
                f"--record puts rows into a clone, and there is no {RESULTS}; rows.csv in --out has them too"
            )
        self.barred: frozenset[tuple[str, str, str]] = frozenset()
        """Backend, cell and dtype of what is not to be timed."""
        self.threads = [_count(n) for n in options.threads] or [1]
        if self.device == "cuda":
            if options.isa is not None:
                raise BadInput(f"--isa {options.isa} holds a processor; --device cuda has no such sets")
            missing = machine.no_device()
            if missing is not None:
                raise NoDevice(f"--device cuda: {missing}")
            if options.tf32:
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32 == "on"
        why = implementations.incapable(self.backends, self.jobs, self.device)
        if why is not None:
            raise BadInput(why)
        if options.module is not None:
            fitting = [job for job in self.jobs if implementations.custom(options.module, job) is not None]
            if not fitting:
                raise BadInput(f"--module {options.module} has the gates of none of the cells that were asked for")
        self.outcome = Outcome()
        self.about: dict[str, Any] = {}
        self.machines: dict[str, roofline.Machine] = {}
        """What this machine can do, by dtype."""
        self.measurement = Measurement(
            self.device,
            options.seconds or (QUICK if options.quick else SECONDS),
            self.machines,
            self.about,
            options.compile,
            options.module,
            bool(options.backend),
        )

    def run(self) -> int:
        """All jobs; report and write what was reached, also after Ctrl-C."""
        interrupted, outcome = False, self.outcome
        self.begin = time.monotonic()
        before = torch.get_num_threads()
        self.options.out.mkdir(parents=True, exist_ok=True)
        progress = None
        try:
            self._look_first()
            about = self.about
            where = report.where(about["processor"], about["isa"], about["processor_isa"])
            _say(f"{where}: {self._machines()}")
            progress = Progress("bench", len(self.threads) * len(self.jobs), sys.stderr, "job")
            self._measure(progress)
        except KeyboardInterrupt:
            interrupted = True
        except BaseException as error:  # what was measured is kept, whatever it is that ends the run
            self._close(before, progress)
            outcome.wrong.append(f"the run ended early, by {type(error).__name__}: {error}")
            self._report(interrupted)
            raise
        self._close(before, progress)
        before_report = signal.getsignal(signal.SIGINT)
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one does not spoil what is being written
        try:
            self._report(interrupted)
        finally:
            if interrupted:
                signal.signal(signal.SIGINT, before_report)
        if not (outcome.rows or outcome.wrong or interrupted):
            return _complain("nothing could be measured, for the reasons above", 2)
        missed = self.options.targets and any(v.met is False for v in targets.judge(outcome.rows))
        return 130 if interrupted else 1 if outcome.wrong or missed else 0

    def _look_first(self) -> None:
        """What this machine is and can do in each dtype. A dtype in which torch has no product here is left out."""
        _say("measuring what this machine can do")
        for name in dict.fromkeys(job.dtype for job in self.jobs):
            try:
                found = roofline.Machine(self.device, 0.1 if self.options.quick else 0.5, getattr(torch, name))
            except roofline.NoProduct as error:
                self.outcome.notes.append(f"{name} is left out: {error}")
                self.jobs = [job for job in self.jobs if job.dtype != name]
                continue
            self.machines[name] = found
            self.outcome.notes += [f"the limit goes without {line}" for line in found.unable]
        cpu = self.device == "cpu"
        mixed = instruction_set.mixed() if cpu else None
        if mixed is not None:
            self.outcome.notes.append(mixed)
        self.about.update(
            device=self.device,
            processor=machine.processor(self.device),
            isa=instruction_set.in_use() if cpu else "-",
            processor_isa=instruction_set.widest() if cpu else "-",
            tf32=machine.tf32(self.device),
            torch=torch.__version__,
            commit=machine.commit(),
        )

    def _close(self, threads: int, progress: Progress | None) -> None:
        torch.set_num_threads(threads)
        if progress:
            progress.close()

    def _measure(self, progress: Progress) -> None:
        everything = [(threads, job) for threads in self.threads for job in self.jobs]
        costs = [self._cost(threads, job) for threads, job in everything]
        left: list[str] = []
        for done, (threads, job) in enumerate(everything, 1):
            if done % LOOK == 0:
                self._look()
            spent, limit = time.monotonic() - self.begin, self.options.limit
            if limit is not None and spent + costs[done - 1] > limit:
                left.append(job.name)
                continue
            torch.set_num_threads(threads)
            try:
                found = self._job(job, threads, progress)
            except torch.OutOfMemoryError as error:
                self.outcome.notes.append(
                    f"{job.name}: left out for want of memory: {implementations.first_line(error)}"
                )
                torch.cuda.empty_cache()
                continue
            self.outcome.add(job, found)
            for row in found:
                progress.say(row.line())
            if found:
                write(self.options.out / "rows.csv", self.outcome.rows)
            progress.show(done, job.name, sum(costs[:done]) / sum(costs))
        self._look()
        if left:
            self.outcome.notes.append(
                f"--limit {self.options.limit:g}: {len(left)} of {len(everything)} jobs were left out for want of "
                f"time: {', '.join(left[:NAMED])}{', ...' if len(left) > NAMED else ''}"
            )

    def _job(self, job: BenchJob, threads: int, progress: Progress) -> list[BenchRow]:
        """A job's rows, by the backends that it may be timed with."""
        custom = job.case.group in CUSTOM
        wanted = ("auto",) if custom and not self.options.backend else self.backends
        fit = tuple(name for name in wanted if (name, job.cell, job.dtype) not in self.barred)
        if self._compiles(job):
            progress.say(f"{job.name}: compiling the loop, some half a minute")

        def wrong(line: str) -> None:
            self.outcome.wrong.append(line)
            progress.say(line)

        return self.measurement.rows(job, threads, fit, wrong, self.outcome.notes.append)

    def _compiles(self, job: BenchJob) -> bool:
        return bool(self.options.compile) and job.case.group == "compiled"

    def _look(self) -> None:
        for found in self.machines.values():
            found.measure(0.1)

    def _machines(self) -> str:
        """What the machine can do, in each dtype where there are several."""
        several = len(self.machines) > 1
        return "; ".join(f"{name}: {found}" if several else str(found) for name, found in self.machines.items())

    def _cost(self, threads: int, job: BenchJob) -> float:
        """About how many seconds a job takes: its time on the clock, and its work many times over."""
        clock, loop = self.measurement.seconds * (len(self.backends) + 2) + 0.1, 0.0
        if job.case.group in CUSTOM:
            clock, loop = self.measurement.seconds * 3 + 0.1, OPERATORS * job.case.steps
            loop += COMPILING if self._compiles(job) else 0.0
        if self.device == "cuda":
            clock, loop = 2 * clock, LOOP * job.case.steps * job.case.layers * job.case.directions
        return clock + loop + 60 * job.flops / (self.machines[job.dtype].peak * threads)

    def _report(self, interrupted: bool) -> None:
        outcome, recorded = self.outcome, None
        outcome.hold_against(self.machines, self.device)
        if self.options.record and self.about:
            name = machine.file_name(self.device, self.about["processor"], self.about["isa"])
            recorded = RESULTS / f"{name}.csv"
        written = outcome.write(self.options.out, self._machines(), recorded)
        if self.options.json:
            print(outcome.as_json(interrupted, self._machines() if self.about else None, self.device))
            return
        outcome.print(interrupted, written, self._machines())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complain(error: Exception | str, code: int) -> int:
    print(f"rnnkit bench: {error}", file=sys.stderr)
    return code


def _count(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise BadInput(f"--threads takes numbers of at least 1, as 1,2; got {value!r}")
    return int(value)
