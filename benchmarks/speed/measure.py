"""One job of the benchmark, measured: set up, checked against float64, then its memory and its time on the clock.

An implementation that is wrong or raises is named and not timed. A peer that computes something else, or that torch
cannot run on this processor, is named and left out.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import implementations, roofline, targets, timing, variant_loops
from .accuracy import AccuracyCheck
from .bench_cases import CUSTOM, BenchJob
from .implementations import Implementation, Setup
from .rows import BenchRow

Pair = tuple[Implementation, Implementation]
"""An implementation and what it is held against."""
Works = dict[int, timing.Work]
"""What is timed, by the id of its implementation."""
Say = Callable[[str], object]
"""Hears a line for a person."""


@dataclass
class Measurement:
    """How jobs are measured in this run."""

    device: str
    seconds: float
    """For each implementation, on the clock."""
    machines: dict[str, roofline.Machine]
    """What this machine can do, by dtype."""
    about: dict[str, Any]
    """The columns of a row that are the run's."""
    compile: bool = False
    """Whether the reference under torch.compile is measured too."""
    module: str | None = None
    """A class that somebody brings, as my.package:Class."""
    named: bool = False
    """Whether the backends were asked for by name: what they cannot do is said then."""

    def rows(self, job: BenchJob, threads: int, backends: tuple[str, ...], wrong: Say, note: Say) -> list[BenchRow]:
        """The job's rows by these backends. What is wrong, and what else is to be known, is said at once."""
        setup = variant_loops.setup if job.case.group in CUSTOM else implementations.setup
        made = setup(job, self.device, threads, backends, self.compile, self.module)
        for line in made.cannot if self.named else ():
            note(line)
        for line in made.failed:
            wrong(f"{job.name}: {line}")
        check = AccuracyCheck(job, made)
        for line in _drop_wrong(made, check):
            wrong(f"{job.name}: {line}")
        for line in made.unable:
            note(f"{job.name}: {line}")
        for line in _drop_peers(made, check):
            note(f"{job.name}: {line}")
        del check
        pairs = _pairs(made)
        found = self._clock(job, threads, made.x, pairs, note) if pairs else []
        return [dataclasses.replace(row, compile_s=made.compile_seconds.get(row.against)) for row in found]

    def _clock(self, job: BenchJob, threads: int, x: torch.Tensor, pairs: Sequence[Pair], note: Say) -> list[BenchRow]:
        """Memory first, then all in turn: a row for each pair and way of launching."""
        every = list({id(one): one for pair in pairs for one in pair}.values())
        works = {id(one): one.work(x, job.train) for one in every}
        for work in works.values():
            work()
        gc.collect()  # else what earlier jobs left behind is freed at some moment of this one
        peaks, again = self._memory(job, every, works)
        rows = []
        for launch in ("call", "graph") if self.device == "cuda" else ("call",):
            if launch == "graph":
                works = _graphs(job, every, works, note)
            took = dict(zip(works, timing.alternate(list(works.values()), self.device, self.seconds), strict=True))
            for ours, peer in pairs:
                if id(ours) in took and id(peer) in took:
                    row = self._row(job, threads, ours, peer, took[id(ours)], took[id(peer)])
                    rows.append(
                        dataclasses.replace(
                            row,
                            launch=launch,
                            peak_mib=peaks.get(id(ours)),
                            against_peak_mib=peaks.get(id(peer)),
                            recompute_mib=again.get(id(ours)),
                        )
                    )
        return rows

    def _memory(
        self, job: BenchJob, every: Sequence[Implementation], works: Works
    ) -> tuple[dict[int, float], dict[int, float]]:
        """The peak of one call in MiB, and of one with recompute=True where that is asked for."""
        peaks = {}
        for one in every:
            if job.train:
                one.module.zero_grad()
            if one.name != implementations.ORT:  # it takes its memory by itself
                peaks[id(one)] = timing.peak_mib(works[id(one)], self.device)
        return peaks, {id(one): self._recomputed(one, works[id(one)]) for one in every if _recomputes(job, one)}

    def _recomputed(self, one: Implementation, work: timing.Work) -> float:
        """The peak of the same work with recompute=True."""
        before, one.module.recompute = one.module.recompute, True
        try:
            work()
            one.module.zero_grad()
            return timing.peak_mib(work, self.device)
        finally:
            one.module.recompute = before

    def _row(
        self,
        job: BenchJob,
        threads: int,
        ours: Implementation,
        peer: Implementation,
        times: Sequence[float],
        theirs: Sequence[float],
    ) -> BenchRow:
        """Without what memory says; by call."""
        case, seconds, machine = job.case, statistics.median(times), self.machines[job.dtype]
        limit = roofline.roofline_seconds(machine, job, self.device, threads)
        low, middle, high = timing.percentiles([b / a for a, b in zip(times, theirs, strict=True)])
        return BenchRow(
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
            implementation=ours.name,
            ran=ours.ran,
            against=peer.name,
            launch="call",
            ms=seconds * 1e3,
            against_ms=statistics.median(theirs) * 1e3,
            ratio_p20=low,
            ratio_p50=middle,
            ratio_p80=high,
            gflops=job.flops / seconds / 1e9,
            limit_ms=limit * 1e3,
            share=limit / seconds,
            peak_mib=None,
            against_peak_mib=None,
            threads=threads,
            dtype=job.dtype,
            peak_gflops=machine.peak / 1e9,
            **self.about,
        )


def _drop_wrong(made: Setup, check: AccuracyCheck) -> Iterator[str]:
    """Leave the implementations whose numbers are right; what is said of the others."""
    for ours in list(made.ours):
        try:
            ratio = check.error_ratio(ours)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its forward or backward; other rows do not depend on it
            made.ours.remove(ours)
            yield implementations.failure(ours.name, error)
            continue
        if ratio > 1:
            made.ours.remove(ours)
            yield f"{ours.name} is WRONG, its error {ratio:.3g} times what is allowed; not timed"


def _drop_peers(made: Setup, check: AccuracyCheck) -> Iterator[str]:
    """Leave the peers that can do the job and do it; what is said of the others."""
    for peer in list(made.peers):
        try:
            ratio = check.error_ratio(peer, peer=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no primitive for this dtype on this processor, say
            made.peers.remove(peer)
            yield implementations.unable(peer.name, error)
            continue
        if ratio > (sys.float_info.max if peer is made.baseline else 1):  # the baseline's own rounding is the budget
            made.peers.remove(peer)
            yield f"{peer.name} computes something else here and is left out"


def _pairs(made: Setup) -> list[Pair]:
    """Each implementation with each peer, and with itself without resets or lengths."""
    return [
        (ours, peer)
        for ours in made.ours
        for peer in (*made.peers, *([made.plain_run[ours.name]] if ours.name in made.plain_run else []))
    ]


def _graphs(job: BenchJob, every: Sequence[Implementation], works: Works, note: Say) -> Works:
    """What can be captured in a CUDA graph; what cannot is noted."""
    captured = {}
    for one in every:
        if one.on_host:
            note(f"{one.name} is not captured in a CUDA graph, since it waits for the device")
            continue
        try:
            captured[id(one)] = timing.graph(works[id(one)])
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            note(f"{job.name}: {one.name} cannot be captured in a CUDA graph: {reason}")
            torch.cuda.synchronize()
    return captured


def _recomputes(job: BenchJob, one: Implementation) -> bool:
    """Whether its memory with recompute=True is asked for: that which a target speaks of."""
    if not job.train:
        return False
    if one.name in targets.FUSED:
        return job.case.group == "field"
    return one.name in ("auto", "cpu") and job.case.group in ("grid", "stacks") and job.dtype == "float32"
