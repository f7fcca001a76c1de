"""Clocks: several pieces of work in turn in one process, what they cost in time, and in memory.

On a GPU time is taken by CUDA events, and a piece of work can be captured once and replayed as a graph.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

Work = Callable[[], object]
Result = TypeVar("Result")
BLOCK = 0.01  # seconds: short work is repeated to fill a block, one reading of the clock
ROUNDS = 5  # at least
SETTLE = 0.02  # seconds: by then the threads of the work before sleep, and those of this one are awake
ASIDE = 20_000_000  # clocks, some 10 ms: longer than the host takes to launch a layer
MEMORY = {
    "cpu": "peak of torch's CPU allocator during one call, above what it held before, by torch.profiler: exact for "
    "tensors; what a library takes for itself (oneDNN's and MKL's scratch) is not in it",
    "cuda": "torch.cuda.max_memory_allocated during one call, less what was allocated before",
}


def block(work: Work, repeats: int, device: str) -> float:
    """Seconds a call, over one block of `repeats` calls."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begin) / repeats


def least(work: Work, device: str, seconds: float, repeats: int = 1) -> float:
    """Seconds a call in the shortest of many blocks: for limits, where whatever disturbs makes it longer."""
    work()
    found, begin = [block(work, repeats, device)], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(found) < ROUNDS:
        found.append(block(work, repeats, device))
    return min(found)


def alternate(works: Sequence[Work], device: str, seconds: float) -> list[list[float]]:
    """For each piece of work its seconds a call, one reading for each round in which all took their turn.

    seconds: what a piece of work may take in all; there are at least ROUNDS rounds whatever they cost. Every piece
    is first called to warm up, and to find how many calls fill a block. With several threads it is also called before
    each reading, for SETTLE: the idle threads of the work before it, of another pool, spin for a while on the cores
    that it wants (the first calls of ONNX Runtime after torch's take half as long again as its later ones).
    """
    settle = SETTLE if device == "cpu" and torch.get_num_threads() > 1 else 0.0
    repeats = []
    for work in works:
        work()
        once = block(work, 1, device)
        if once < BLOCK / 10:  # one short call says little
            once = block(work, 10, device)
        repeats.append(max(1, int(min(BLOCK, seconds / ROUNDS) / max(once, 1e-7))))
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds * len(works) or len(rounds) < ROUNDS:
        rounds.append([])
        for work, count in zip(works, repeats, strict=True):
            _warm(work, settle)
            rounds[-1].append(block(work, count, device))
    return [list(column) for column in zip(*rounds, strict=True)]


def _warm(work: Work, seconds: float) -> None:
    """Call it for so long, without a reading."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        work()


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; 0 where one is not."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def graph(work: Work) -> Work:
    """The same work as a CUDA graph's replay. Raises RuntimeError where it cannot be captured.

    A capture that fails leaves torch on the graph's stream, and its generator as if it were still being captured: both
    are put back, or what is called next would be launched elsewhere and could draw no random number.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # gradients get their memory, libraries choose their algorithms
            work()
    torch.cuda.current_stream().wait_stream(stream)
    captured, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.clone_state()
    try:
        with torch.cuda.graph(captured):
            work()
    except BaseException:
        torch.cuda.set_stream(before)
        generator.graphsafe_set_state(state)
        raise
    captured.replay()
    torch.cuda.synchronize()
    return captured.replay


def aside(work: Callable[[], Result], device: torch.device) -> Result:
    """What work gives on a stream of its own that is busy for ASIDE clocks first; where there are none, as it is."""
    if device.type != "cuda":
        return work()
    main, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(ASIDE)
        found = work()
    main.wait_stream(stream)
    return found


def peak_mib(work: Work, device: str) -> float:
    """By how much the memory of tensors grows at its highest during one call, in MiB; MEMORY says how it is known."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own start and stop on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        raise RuntimeError("torch.profiler has kept no results")
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    now = highest = 0
    for _, change in sorted(changes, key=lambda at: at[0]):
        now += change
        highest = max(highest, now)
    return highest / 2**20
