"""The benchmark's way through a GPU, where there is none: a make-believe CUDA whose clock is the CPU's.

Streams, events and graphs are stand-ins; what is checked is that each job is timed by call and by graph replay, that
what cannot be captured is said and left out, and that the TF32 setting stands in the row.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmarks import SHAPE, Made

from rnnkit.__main__ import main
from rnnkit.benchmarks import machine, rows, sides, timing

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


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.cuda of this file's making; the tensors stay on the CPU."""
    CALLS.clear()
    real = sides.setup
    stand_ins: dict[str, Any] = dict(
        Event=Event, Stream=Stream, CUDAGraph=CUDAGraph, graph=capture, current_stream=Stream,
        is_available=lambda: True, stream=contextlib.nullcontext, synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 2**20, max_memory_allocated=lambda: 3 * 2**20,
        get_device_name=lambda: "NVIDIA Abacus",
    )  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(sides, "setup", lambda job, _, *rest: real(job, "cpu", *rest))
    monkeypatch.setattr(machine, "Machine", Made)


def measure(folder: Path, *options: str) -> list[rows.Row]:
    plain = ["bench", "--device", "cuda", "--seconds", "0.001", "--cell", "gru", "--backend", "auto"]
    assert main([*plain, "--out", str(folder), "--case", SHAPE, *options]) == 0
    return rows.read(folder / "rows.csv")


@pytest.mark.parametrize("setting", ["on", "off"])
def test_each_job_by_call_and_by_graph(cuda: None, tmp_path: Path, setting: str) -> None:
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    try:
        found = [r for r in measure(tmp_path, "--tf32", setting) if r.against == "torch.nn"]
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert [(r.mode, r.launch) for r in found] == [
        ("inference", "call"), ("inference", "graph"), ("training", "call"), ("training", "graph"),
    ]  # fmt: skip
    for r in found:
        assert (r.device, r.processor, r.peak_mib) == ("cuda", "NVIDIA Abacus", 2.0)
        assert r.tf32 == f"cudnn {setting}, matmul {setting}"
    assert CALLS.count("capture") >= 4 and CALLS.count("replay") > 40 and "synchronize" in CALLS


def test_what_cannot_be_captured_is_said(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: timing.Work) -> timing.Work:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(timing, "graph", refuse)
    assert {r.launch for r in measure(tmp_path, "--mode", "training")} == {"call"}
    said = capsys.readouterr().out
    assert "auto cannot be captured in a CUDA graph: operation not permitted when stream is capturing\n" in said
