"""What `tune` measures: the engine against torch's layers, shape by shape, both taking turns, within a time.

The benchmark's accuracy check comes first, for each mode; what is wrong is not timed. Inputs are random. The shapes are
small examples of their kind, so that a slow machine is through in time too: what decides between two backends is mostly
B, I and H, and T only where it is a few. They come in such an order that a run that ends early has some of each kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..backends import processor
from ..backends.dispatch_times import Kind, RecordedShape
from ..backends.user_times import NAMES
from ..benchmarks.speed import implementations, timing
from ..benchmarks.speed.accuracy import AccuracyCheck
from ..benchmarks.speed.bench_cases import BenchCase, BenchJob
from ..benchmarks.speed.implementations import Setup

Sizes = tuple[int, int, int, int]
SHAPES: tuple[Sizes, ...] = (  # B, T, I, H
    (1, 1, 64, 64),
    (16, 32, 128, 128),
    (32, 16, 256, 256),
    (1, 32, 256, 256),
    (64, 24, 8, 16),
    (64, 6, 512, 512),
    (4, 32, 128, 128),
    (256, 4, 32, 512),
    (1, 64, 40, 64),
    (128, 16, 64, 256),
    (1, 16, 512, 512),
    (512, 10, 4, 32),
    (8, 32, 256, 256),
    (16, 8, 768, 768),
)
CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}
DTYPES = ("float32", "bfloat16")
MODES = ("inference", "training")
LONGEST = 0.6  # seconds for one layer in one mode
CLOCK = 0.6  # of the time is for the clock, the rest for the accuracy checks
ROUNDS = 3  # in which all take their turn, at least
DECIDED = 1.5  # times as long: then one round is enough of work for whose ROUNDS there is no time
SETTLE = 0.01  # seconds: by then the threads of the work before sleep, and those of this one are awake


@dataclass
class Measured:
    """What came of it."""

    rows: list[RecordedShape] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What computed something else than float64, or raised."""
    left: int = 0
    """How many rows there was no time for."""


def layers(dtypes: Sequence[str]) -> list[tuple[Sizes, str, str]]:
    """What `measure_layers` measures: sizes, dtype and cell of each, in its order."""
    return [(sizes, dtype, cell) for sizes in SHAPES for dtype in dtypes for cell in CELLS]


def measure_layers(dtypes: Sequence[str], seconds: float, show: Callable[[int, str], object]) -> Measured:
    """Rows of this machine, with torch's number of threads.

    seconds: no layer is begun later. show: hears after each layer its number, from 1, and which it was.
    """
    jobs = layers(dtypes)
    end, found = time.monotonic() + seconds, Measured()
    for done, (sizes, dtype, cell) in enumerate(jobs):
        now = time.monotonic()
        if now >= end:
            found.left = len(MODES) * (len(jobs) - done)
            break
        both = [BenchJob(BenchCase("grid", *sizes), cell, mode, dtype) for mode in MODES]
        made = implementations.setup(both[1], "cpu", torch.get_num_threads(), NAMES, False, None)
        found.wrong += [f"{both[1].name}: {line}" for line in made.failed]
        share = CLOCK * (end - now) / (len(MODES) * (len(jobs) - done))
        for job in both:
            _add(found, job, made, min(LONGEST, share))
        show(done + 1, f"{cell} {dtype} {'×'.join(map(str, sizes))}")
    return found


def _add(found: Measured, job: BenchJob, made: Setup, seconds: float) -> None:
    """A row of a job, or what is wrong with it."""
    check = AccuracyCheck(job, made)
    right = []
    for one in made.ours:
        ratio = check.error_ratio(one)
        if ratio <= 1:
            right.append(one)
        else:
            found.wrong.append(f"{job.name}: {one.name} is off by {ratio:.2f} times what is allowed, and is not timed")
    if not right:
        return
    times = least([one.work(made.x, job.train) for one in right], seconds)
    isa = processor.instruction_set(getattr(torch, job.dtype))
    kind = Kind("cpu", isa, job.dtype, CELLS[job.cell], job.train)
    sizes = (job.case.batch, job.case.steps, job.case.inputs, job.case.hidden)
    ms = {one.name: 1e3 * t for one, t in zip(right, times, strict=True)}
    found.rows.append(RecordedShape(*sizes, kind, torch.get_num_threads(), "this machine", ms))


def least(works: Sequence[timing.Work], seconds: float) -> list[float]:
    """Seconds a call of each in its best round: what else the machine does makes a round longer, and none shorter.

    seconds: for all of it. Work that takes longer than LONGEST in ROUNDS gets one where that decides.
    """
    begin = time.monotonic()
    best = []
    for work in works:
        work()
        best.append(timing.block(work, 1, "cpu"))
    count = [max(1, int(min(timing.BLOCK, seconds / (2 * ROUNDS)) / max(once, 1e-7))) for once in best]
    settle, rounds = SETTLE if torch.get_num_threads() > 1 else 0.0, 0
    while True:
        late = time.monotonic() - begin >= seconds
        decided = ROUNDS * sum(best) > LONGEST and max(best) > DECIDED * min(best)
        if late and (rounds >= ROUNDS or decided):
            return best
        for k, work in enumerate(works):
            until = time.monotonic() + settle
            while time.monotonic() < until:
                work()
            best[k] = min(best[k], timing.block(work, count[k], "cpu"))
        rounds += 1
