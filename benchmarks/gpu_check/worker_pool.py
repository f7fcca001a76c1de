"""Parity in several processes at once: nearly all of its time is compilers of kernels and Python between launches.

A device's minutes are few, and its host has many cores. Each process takes the next case, in the order in which
they matter, and hands back what it found. It starts afresh (a CUDA context does not survive a fork). One that
crashes (a compiler can take its process with it) or runs out of time is reported with its case; the rest goes on
where the device still runs.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

import torch

from ..speed.targets import FUSED
from .parity import Findings, examine, works
from .parity_cases import ParityCase

MOST = 8  # processes: each has a context on the device, and they take turns on it
EACH = 4  # cases for each at least: it starts for some seconds
GRACE = 60.0  # seconds, for cases that are under way when time is up: a kernel that hangs is one that fails
PATIENCE = 5.0  # seconds, for a process that was told to end


def size(cases: int) -> int:
    """How many processes serve so many cases on this machine."""
    return max(1, min(MOST, (os.cpu_count() or 1) // 2, cases // EACH))


def count(value: str) -> int:
    """An option's value, for argparse: how many processes."""
    if not value.isdecimal() or not int(value):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {value}")
    return int(value)


def work(
    findings: Findings,
    device: str,
    every: Sequence[ParityCase],
    backends: Sequence[str],
    tell: Callable[[int, str], None],
    seconds: float,
    workers: int,
) -> None:
    """As `parity.examine`, in so many processes."""
    end, done, waves = time.monotonic() + seconds, itertools.count(1), _waves(every)

    def say(case: ParityCase) -> None:
        tell(next(done), str(case))

    while waves and not findings.ended:
        wave = waves.pop(0)
        lost, late = _wave(findings, device, wave, tuple(backends), say, end, min(workers, len(wave)))
        broke = [(case, "ended its process") for case in lost if len(wave) == 1]
        slow = [(case, f"did not end within {GRACE:g} s after time was up") for case in late]
        for case, what in broke + slow:
            say(case)
            for name in [name for name in backends if name in FUSED] or backends:  # who else has kernels to compile
                findings.blame(name, case, what)
        if (lost or late) and not works(device):
            findings.wrong.append(f"the device fails, and the examination ends, in or near {(lost + late)[0]}")
            findings.ended = True
        elif lost and not broke:  # whichever of the first had begun is found by itself
            waves = [*([case] for case in lost[:workers]), *([lost[workers:]] if lost[workers:] else []), *waves]
        if time.monotonic() > end and not findings.ended:
            findings.left += sum(map(len, waves))
            return


def _waves(every: Sequence[ParityCase]) -> list[list[ParityCase]]:
    """What is examined at once: a large case has the device's memory for itself, and its process ends with it."""
    waves: list[list[ParityCase]] = []
    for large, some in itertools.groupby(every, lambda case: case.memory > 0):
        wave = list(some)
        waves += [[case] for case in wave] if large else [wave]
    return waves


def _wave(
    findings: Findings,
    device: str,
    every: Sequence[ParityCase],
    backends: tuple[str, ...],
    say: Callable[[ParityCase], None],
    end: float,
    workers: int,
) -> tuple[list[ParityCase], list[ParityCase]]:
    """The cases that were lost with a process, first those that had begun, and those that came to no end."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    lost: list[ParityCase] = []
    try:
        waiting = {pool.submit(_one, device, case, backends): case for case in every}
        while waiting:
            ready, _ = wait(waiting, max(end - time.monotonic(), 0.0), FIRST_COMPLETED)
            if not ready:
                break
            for future in [future for future in waiting if future in ready]:
                case = waiting.pop(future)
                if not _take(findings, future, case):
                    lost.append(case)
                    continue
                say(case)
                if findings.ended:
                    return lost, []
        begun = {future: case for future, case in waiting.items() if not future.cancel()}
        findings.left += len(waiting) - len(begun)
        ended, _ = wait(begun, GRACE)
        lost += [case for future, case in begun.items() if future in ended and not _take(findings, future, case)]
        return lost, [case for future, case in begun.items() if future not in ended]
    finally:
        _stop(pool)


def _take(findings: Findings, future: Future[Findings], case: ParityCase) -> bool:
    """Whether there was something to take: not where the process ended by itself."""
    try:
        findings.add(future.result())
    except BrokenProcessPool:
        return False
    except Exception as error:  # of the examination, not of what it examines: the rest goes on
        findings.stumbled(case, error)
    return True


def _stop(pool: ProcessPoolExecutor) -> None:
    """Kill the processes that are left, whatever they wait for."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.terminate()
    for process in processes:
        if not connection.wait([process.sentinel], PATIENCE):  # in a driver's call, maybe
            process.kill()
    pool.shutdown(cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that began it
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or each process would start as many as there are cores
    torch.set_num_threads(1)


def _one(device: str, case: ParityCase, backends: tuple[str, ...]) -> Findings:
    findings = Findings()
    examine(findings, device, [case], backends)
    return findings
