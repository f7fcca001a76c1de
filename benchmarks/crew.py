"""Parity in several processes at once: nearly all of its time is compilers of kernels and Python between launches.

A device's minutes are few, and its host has many cores. Each process takes the next problem, in the order in which
they matter, and hands back what it found. It starts afresh (a CUDA context does not survive a fork).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

import torch

from .parity import Findings, examine
from .problems import Problem

MOST = 8  # processes: each has a context on the device, and they take turns on it
EACH = 4  # problems for each at least: it starts for some seconds
GRACE = 60.0  # seconds, for problems that are under way when time is up: a kernel that hangs is one that fails
PATIENCE = 5.0  # seconds, for a process that was told to end


def size(problems: int) -> int:
    """How many processes serve so many problems on this machine."""
    return max(1, min(MOST, (os.cpu_count() or 1) // 2, problems // EACH))


def count(value: str) -> int:
    """An option's value, for argparse: how many processes."""
    if not value.isdecimal() or not int(value):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {value}")
    return int(value)


def work(
    findings: Findings,
    device: str,
    every: Sequence[Problem],
    backends: Sequence[str],
    tell: Callable[[int, str], None],
    seconds: float,
    workers: int,
) -> None:
    """As `parity.examine`, in so many processes."""
    begin = time.monotonic()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    try:
        waiting = {pool.submit(_one, device, problem, tuple(backends)): problem for problem in every}
        done = 0
        while waiting:
            left = seconds - (time.monotonic() - begin)
            ready, _ = wait(waiting, max(left, 0.0), FIRST_COMPLETED)
            for future in ready:
                problem = waiting.pop(future)
                done += 1
                _take(findings, future, problem)
                tell(done, str(problem))
            if findings.ended:
                return
            if not ready:
                _last(findings, waiting)
                return
    finally:
        _stop(pool)


def _last(findings: Findings, waiting: dict[Future[Findings], Problem]) -> None:
    """Time is up: what has begun may end."""
    begun = {future: problem for future, problem in waiting.items() if not future.cancel()}
    findings.left += len(waiting) - len(begun)
    ended, _ = wait(begun, GRACE)
    for future, problem in begun.items():
        if future in ended:
            _take(findings, future, problem)
        else:
            findings.wrong.append(f"did not end within {GRACE:g} s after time was up: {problem}")
            findings.ended = True


def _take(findings: Findings, future: Future[Findings], problem: Problem) -> None:
    try:
        findings.add(future.result())
    except BrokenProcessPool:
        if not findings.ended:
            findings.wrong.append(f"a process ended by itself, and the examination with it, in or near {problem}")
        findings.ended = True
    except Exception as error:  # of the examination, not of what it examines: the rest goes on
        findings.wrong.append(f"{type(error).__name__} where {problem} is examined: {error}")


def _stop(pool: ProcessPoolExecutor) -> None:
    """Nobody is left behind, whatever it waits for."""
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


def _one(device: str, problem: Problem, backends: tuple[str, ...]) -> Findings:
    findings = Findings()
    examine(findings, device, [problem], backends)
    return findings
