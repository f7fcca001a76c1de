"""`python -m rnnkit bench`: how fast every backend is, against torch.nn, ONNX Runtime, and what the machine can do.

For each case, cell, mode and dtype: first every implementation's output and gradients are held against float64 (at most
twice torch.nn's error, and a rounding band); what is wrong is not timed. Then all sides take turns in one process,
and the ratio is that of paired times, the peer's over the implementation's: above 1, rnnkit is faster. Written are
rows.csv, after every job, so that Ctrl-C keeps what was measured; at the end report.md and, with matplotlib,
pictures. All cases take about half an hour on one core, --quick a minute. Results depend on what else runs on the
machine: a p20 far from a p80 says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rnnkit.cli.progress import Progress
from rnnkit.demo import check_out
from rnnkit.demo.text import InputError

from . import machine as limits
from . import report, sides, targets, timing
from .cases import CELLS, DTYPES, GROUPS, MODES, BadInput, Job, known, select
from .gate import Gate
from .rows import RESULTS, Row, merge, read, write

SECONDS = 0.25  # for each side of a job
QUICK = 0.02
LOOK = 20  # jobs between two looks at what the machine can do
LOOP = 6e-3  # seconds a step, on a GPU: operators launched one by one from Python, in all calls of a job
NAMED = 5  # of the jobs that were left out


class NoDevice(RuntimeError):
    """--device names what is not here; exit code 3."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for name, letter, about in (
        ("case", "C", f"groups ({', '.join(GROUPS)}), shapes as 32x100x256x256, or both as grid/32x100x256x256"),
        ("cell", "C", ", ".join(CELLS)),
        ("mode", "M", ", ".join(MODES)),
        ("dtype", "D", f"{', '.join(DTYPES)}; default: {DTYPES[0]}"),
        ("backend", "B", f"{', '.join(sides.NAMES)}; default: all that can run a case"),
        ("threads", "N", "numbers, as 1,2; default: 1"),
    ):
        parser.add_argument(f"--{name}", type=names, action="extend", default=[], metavar=letter, help=about)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few small cases, in under a minute")
    parser.add_argument("--seconds", type=seconds, metavar="S", help=f"for each side of a row; default: {SECONDS}")
    parser.add_argument("--limit", type=seconds, metavar="S", help="start no job that would end after S seconds")
    parser.add_argument("--module", metavar="M", help="measure this class too: my.package:Class, made as nn.LSTM is")
    parser.add_argument(
        "--compile",
        action="store_true",
        help=f"measure the reference under torch.compile too, up to {sides.COMPILED_STEPS} steps: its loop is "
        "unrolled, and compiling takes seconds a case",
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
        check_out(options.out)
        bench = Bench(options)
    except (BadInput, InputError) as error:
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
    """One run: the jobs, what came of them, and what is said and written."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.jobs = select(options.device, options.case, options.cell, options.mode, options.quick, options.dtype)
        self.backends = known("backend", options.backend, sides.NAMES) or sides.NAMES
        if options.record and not RESULTS.is_dir():
            raise BadInput(
                f"--record puts rows into a clone, and there is no {RESULTS}; rows.csv in --out has them too"
            )
        self.barred: frozenset[tuple[str, str, str]] = frozenset()
        """Backend, cell and dtype of what is not to be timed."""
        self.threads = [_count(n) for n in options.threads] or [1]
        if self.device == "cuda":
            missing = limits.no_device()
            if missing is not None:
                raise NoDevice(f"--device cuda: {missing}")
            if options.tf32:
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32 == "on"
        if options.module is not None:
            fitting = [job for job in self.jobs if sides.custom(options.module, job) is not None]
            if not fitting:
                raise BadInput(f"--module {options.module} has the gates of none of the cells that were asked for")
        self.seconds = options.seconds or (QUICK if options.quick else SECONDS)
        self.rows: list[Row] = []
        self.done: list[Job] = []
        """The job of each row."""
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self.about: dict[str, Any] = {}
        self.machines: dict[str, limits.Machine] = {}
        """What this machine can do, by dtype."""
        self.left: list[str] = []
        """Jobs for which --limit left no time."""

    def run(self) -> int:
        """All jobs; report and write what was reached, also after Ctrl-C."""
        interrupted = False
        self.begin = time.monotonic()
        before = torch.get_num_threads()
        self.options.out.mkdir(parents=True, exist_ok=True)
        progress = None
        try:
            self._say("measuring what this machine can do")
            look = 0.1 if self.options.quick else 0.5
            for name in dict.fromkeys(job.dtype for job in self.jobs):
                self.machines[name] = limits.Machine(self.device, look, getattr(torch, name))
            self.about = {
                "device": self.device,
                "processor": limits.processor(self.device),
                "tf32": limits.tf32(self.device),
                "torch": torch.__version__,
                "commit": limits.commit(),
            }
            self._say(f"{self.about['processor']}: {self._machines()}")
            progress = Progress("bench", len(self.threads) * len(self.jobs), sys.stderr, "job")
            self._measure(progress)
        except KeyboardInterrupt:
            interrupted = True
        except BaseException as error:  # what was measured is kept, whatever it is that ends the run
            self._close(before, progress)
            self.wrong.append(f"the run ended early, by {type(error).__name__}: {error}")
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
        if not (self.rows or self.wrong or interrupted):
            return _complain("nothing could be measured, for the reasons above", 2)
        missed = self.options.targets and any(v.met is False for v in targets.judge(self.rows))
        return 130 if interrupted else 1 if self.wrong or missed else 0

    def _close(self, threads: int, progress: Progress | None) -> None:
        torch.set_num_threads(threads)
        if progress:
            progress.close()

    def _measure(self, progress: Progress) -> None:
        everything = [(threads, job) for threads in self.threads for job in self.jobs]
        costs = [self._cost(threads, job) for threads, job in everything]
        for done, (threads, job) in enumerate(everything, 1):
            if done % LOOK == 0:
                self._look()
            spent, limit = time.monotonic() - self.begin, self.options.limit
            if limit is not None and spent + costs[done - 1] > limit:
                self.left.append(job.name)
                continue
            torch.set_num_threads(threads)
            try:
                found = self._job(job, threads, progress)
            except torch.OutOfMemoryError as error:
                self.notes.append(f"{job.name}: left out for want of memory: {sides.first_line(error)}")
                torch.cuda.empty_cache()
                continue
            self.rows += found
            self.done += [job] * len(found)
            for row in found:
                progress.say(row.line())
            if found:
                write(self.options.out / "rows.csv", self.rows)
            progress.show(done, job.name, sum(costs[:done]) / sum(costs))
        self._look()
        if self.left:
            self.notes.append(
                f"--limit {self.options.limit:g}: {len(self.left)} of {len(everything)} jobs were left out for want of "
                f"time: {', '.join(self.left[:NAMED])}{', ...' if len(self.left) > NAMED else ''}"
            )

    def _look(self) -> None:
        for machine in self.machines.values():
            machine.measure(0.1)

    def _machines(self) -> str:
        """What the machine can do, in each dtype where there are several."""
        several = len(self.machines) > 1
        return "; ".join(f"{name}: {machine}" if several else str(machine) for name, machine in self.machines.items())

    def _cost(self, threads: int, job: Job) -> float:
        """About how many seconds a job takes: its time on the clock, and its work many times over."""
        clock, loop = self.seconds * (len(self.backends) + 2) + 0.1, 0.0
        if self.device == "cuda":
            clock, loop = 2 * clock, LOOP * job.case.steps * job.case.layers * job.case.directions
        return clock + loop + 60 * job.flops / (self.machines[job.dtype].peak * threads)

    def _job(self, job: Job, threads: int, progress: Progress) -> list[Row]:
        """Set up, gate, memory, clock: the rows of one job."""
        fit = tuple(name for name in self.backends if (name, job.cell, job.dtype) not in self.barred)
        made = sides.setup(job, self.device, threads, fit, self.options.compile, self.options.module)
        if self.options.backend:
            self.notes += made.cannot
        for line in made.failed:
            self.wrong.append(f"{job.name}: {line}")
            progress.say(self.wrong[-1])
        gate = Gate(job, made)
        for side in list(made.ours):
            try:
                excess = gate.excess(side)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # its forward or backward; other rows do not depend on it
                made.ours.remove(side)
                self.wrong.append(f"{job.name}: {sides.failure(side.name, error)}")
                progress.say(self.wrong[-1])
                continue
            if excess > 1:
                made.ours.remove(side)
                self.wrong.append(
                    f"{job.name}: {side.name} is WRONG, its error {excess:.3g} times what is allowed; not timed"
                )
                progress.say(self.wrong[-1])
        for side in list(made.peers):
            if gate.excess(side, peer=True) > 1:
                made.peers.remove(side)
                self.notes.append(f"{job.name}: {side.name} computes something else here and is left out")
        del gate
        pairs = [
            (side, peer)
            for side in made.ours
            for peer in (*made.peers, *([made.without[side.name]] if side.name in made.without else []))
        ]
        return self._time(job, threads, made.x, pairs) if pairs else []

    def _time(self, job: Job, threads: int, x: torch.Tensor, pairs: list[tuple[sides.Side, sides.Side]]) -> list[Row]:
        every = list({id(side): side for pair in pairs for side in pair}.values())
        works = {id(side): side.work(x, job.train) for side in every}
        for work in works.values():
            work()
        gc.collect()  # else what earlier jobs left behind is freed at some moment of this one
        peaks = {}
        for side in every:
            if job.train:
                side.module.zero_grad()
            if side.name != sides.ORT:  # it takes its memory by itself
                peaks[id(side)] = timing.peak_mib(works[id(side)], self.device)
        again = {id(side): self._recomputed(side, works[id(side)]) for side in every if _recomputes(job, side)}
        limit = limits.limit(self.machines[job.dtype], job, self.device, threads)
        rows = []
        for launch in ("call", "graph") if self.device == "cuda" else ("call",):
            if launch == "graph":
                works = self._graphs(job, every, works)
            took = dict(zip(works, timing.alternate(list(works.values()), self.device, self.seconds), strict=True))
            for side, peer in pairs:
                if id(side) in took and id(peer) in took:
                    rows.append(
                        self._row(job, threads, side, peer, launch, took[id(side)], took[id(peer)], peaks, limit)
                    )
                    rows[-1] = dataclasses.replace(rows[-1], recompute_mib=again.get(id(side)))
        return rows

    def _recomputed(self, side: sides.Side, work: timing.Work) -> float:
        """The peak of the same work with recompute=True."""
        before, side.module.recompute = side.module.recompute, True
        try:
            work()
            side.module.zero_grad()
            return timing.peak_mib(work, self.device)
        finally:
            side.module.recompute = before

    def _graphs(self, job: Job, every: list[sides.Side], works: dict[int, timing.Work]) -> dict[int, timing.Work]:
        """The sides that can be captured."""
        captured = {}
        for side in every:
            if side.on_host:
                self.notes.append(f"{side.name} is not captured in a CUDA graph, since it waits for the device")
                continue
            try:
                captured[id(side)] = timing.graph(works[id(side)])
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                self.notes.append(f"{job.name}: {side.name} cannot be captured in a CUDA graph: {reason}")
                torch.cuda.synchronize()
        return captured

    def _row(
        self,
        job: Job,
        threads: int,
        side: sides.Side,
        peer: sides.Side,
        launch: str,
        times: Sequence[float],
        theirs: Sequence[float],
        peaks: dict[int, float],
        limit: float,
    ) -> Row:
        case, seconds = job.case, statistics.median(times)
        low, middle, high = timing.percentiles([b / a for a, b in zip(times, theirs, strict=True)])
        return Row(
            group=case.group,
            case=case.name,
            B=case.batch,
            T=case.steps,
            I=case.inputs,
            H=case.hidden,
            layers=case.layers,
            directions=case.directions,
            cell=job.cell,
            mode=job.mode,
            implementation=side.name,
            ran=side.ran,
            against=peer.name,
            launch=launch,
            ms=seconds * 1e3,
            against_ms=statistics.median(theirs) * 1e3,
            ratio_p20=low,
            ratio_p50=middle,
            ratio_p80=high,
            gflops=job.flops / seconds / 1e9,
            limit_ms=limit * 1e3,
            share=limit / seconds,
            peak_mib=peaks.get(id(side)),
            against_peak_mib=peaks.get(id(peer)),
            threads=threads,
            dtype=job.dtype,
            peak_gflops=self.machines[job.dtype].peak / 1e9,
            **self.about,
        )

    def _report(self, interrupted: bool) -> None:
        out, written = self.options.out, []
        self.rows = [self._limited(row, job) for row, job in zip(self.rows, self.done, strict=True)]
        verdicts = targets.judge(self.rows)
        if self.rows:
            write(out / "rows.csv", self.rows)
            beyond = sum(row.share > 1.05 for row in self.rows)
            if beyond and self.device == "cpu":
                self.notes.append(
                    f"{beyond} rows are faster than the limit: the machine was busy whenever it was measured, or the "
                    "clock was higher since; take no share of the limit from this run"
                )
            text = report.markdown(self.rows, verdicts, self._machines(), self.wrong, self.notes)
            (out / "report.md").write_text(text, encoding="utf-8")
            written = [out / "rows.csv", out / "report.md"]
            try:
                from . import plots

                written += plots.draw(out, self.rows)
            except ImportError as error:
                if error.name is None or not error.name.startswith("matplotlib"):
                    raise
                self.notes.append(report.NO_PLOTS)
            if self.options.record:
                recorded = RESULTS / f"{limits.file_name(self.device, self.about['processor'])}.csv"
                write(recorded, merge(read(recorded) if recorded.exists() else [], self.rows))
                written.append(recorded)
        if self.options.json:
            print(json.dumps(self._result(verdicts, interrupted), indent=2))
            return
        if interrupted:
            print(f"stopped by Ctrl-C after {len(self.rows)} rows; so far:\n")
        if verdicts:
            print(report.aligned(report.HEAD, [report.cells(v) for v in verdicts]))
        for line in [*self.wrong, *dict.fromkeys(self.notes)]:
            print(line)
        if written:
            print("written:", ", ".join(map(str, written)))

    def _limited(self, row: Row, job: Job) -> Row:
        """The row against the best that the machine has shown by now."""
        machine = self.machines[job.dtype]
        limit = limits.limit(machine, job, self.device, row.threads) * 1e3
        return dataclasses.replace(row, limit_ms=limit, share=limit / row.ms, peak_gflops=machine.peak / 1e9)

    def _result(self, verdicts: list[targets.Verdict], interrupted: bool) -> dict[str, Any]:
        return {
            "interrupted": interrupted,
            "wrong": self.wrong,
            "notes": list(dict.fromkeys(self.notes)),
            "machine": self._machines() if self.about else None,
            "memory": timing.MEMORY[self.device],
            "targets": [{**dataclasses.asdict(v), "possible": v.possible, "mark": v.mark} for v in verdicts],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _recomputes(job: Job, side: sides.Side) -> bool:
    """Whether its memory with recompute=True is asked for."""
    return side.name in targets.FUSED and job.train and job.case.group == "field"


def _complain(error: Exception | str, code: int) -> int:
    print(f"rnnkit bench: {error}", file=sys.stderr)
    return code


def names(value: str) -> list[str]:
    """An option's value, for argparse: names with commas between them."""
    return [name for name in value.split(",") if name]


def _count(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise BadInput(f"--threads takes numbers of at least 1, as 1,2; got {value!r}")
    return int(value)


def seconds(value: str) -> float:
    """An option's value, for argparse: a time above 0."""
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {value}")
    return number
