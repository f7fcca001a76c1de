"""A make-believe CUDA whose clock is the CPU's, for what would run on a GPU where there is none.

Streams, events and graphs are stand-ins; the tensors stay on the CPU. `CALLS` lists what the stand-ins were asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_benchmarks import Made

from rnnkit.backends import triton
from rnnkit.benchmarks import machine, sides

CALLS: list[str] = []


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        CALLS.append("synchronize")

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


class CUDAGraph:
    def replay(self) -> None:
        CALLS.append("replay")


@contextlib.contextmanager
def capture(_: CUDAGraph) -> Iterator[None]:
    CALLS.append("capture")
    yield


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.cuda of this file's making, on a machine of round figures."""
    CALLS.clear()
    real = sides.setup
    stand_ins: dict[str, Any] = dict(
        Event=Event, Stream=Stream, CUDAGraph=CUDAGraph, graph=capture, current_stream=Stream,
        is_available=lambda: True, stream=contextlib.nullcontext, synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 2**20, max_memory_allocated=lambda: 3 * 2**20,
        get_device_name=lambda: "NVIDIA Abacus", get_device_capability=lambda: (9, 9),
    )  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(
        triton, "missing", lambda: "no kernel runs on this GPU, which is made up"
    )  # asked once otherwise
    monkeypatch.setattr(sides, "setup", lambda job, _, *rest: real(job, "cpu", *rest))
    monkeypatch.setattr(machine, "Machine", Made)
