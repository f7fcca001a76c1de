"""A make-believe CUDA whose clock is the CPU's, for what would run on a GPU where there is none.

Streams, events and graphs are stand-ins; the tensors stay on the CPU. `CALLS` lists what the stand-ins were asked for.
A fused backend is the reference in the place of `triton`, as it is or with a fault planted in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from made_rows import Made
from torch import Tensor

from rnnkit.backends import BACKENDS, BY_NAME, LayerInputs, LayerOptions, LayerOutputs, Result, select
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.reference import Reference
from rnnkit.backends.triton import backend as triton
from rnnkit.benchmarks.gpu_check import main as gpu_check
from rnnkit.benchmarks.gpu_check import parity
from rnnkit.benchmarks.speed import implementations, roofline, timing

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


class Generator:
    """Its state is whether random numbers are being captured."""

    capturing = False

    def clone_state(self) -> Generator:
        clone = Generator()
        clone.capturing = self.capturing
        return clone

    def graphsafe_set_state(self, state: Generator) -> None:
        self.capturing = state.capturing


STREAMS = [Stream()]
"""The last is the current one."""
GENERATOR = Generator()


class CUDAGraph:
    def replay(self) -> None:
        CALLS.append("replay")


@contextlib.contextmanager
def capture(_: CUDAGraph) -> Iterator[None]:
    """As torch's: what fails inside leaves the stream and the generator as they are in a capture."""
    CALLS.append("capture")
    STREAMS.append(Stream())
    GENERATOR.capturing = True
    yield
    STREAMS.pop()
    GENERATOR.capturing = False


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.cuda of this file's making, on a machine of round figures."""
    CALLS.clear()
    STREAMS[1:], GENERATOR.capturing = [], False
    real = implementations.setup
    stand_ins: dict[str, Any] = dict(
        Event=Event, Stream=Stream, CUDAGraph=CUDAGraph, graph=capture, current_stream=lambda: STREAMS[-1],
        set_stream=STREAMS.append, current_device=lambda: 0, default_generators=(GENERATOR,),
        is_available=lambda: True, stream=contextlib.nullcontext, synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 2**20, max_memory_allocated=lambda: 3 * 2**20,
        get_device_name=lambda: "NVIDIA Abacus", get_device_capability=lambda: (9, 9),
    )  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "missing", lambda index=None: "no kernel runs on this GPU, which is made up")
    monkeypatch.setattr(implementations, "setup", lambda job, _, *rest: real(job, "cpu", *rest))
    monkeypatch.setattr(roofline, "Machine", Made)


def rerun(work: timing.Work) -> timing.Work:
    """What a graph's replay does: the work again, on what now stands in its memory."""
    work()
    return work


class Fused(Reference):
    """The reference by another name, and what goes wrong in it."""

    name = "triton"

    def __init__(
        self,
        before: Callable[[LayerInputs], LayerInputs] = lambda t: t,
        after: Callable[[LayerOutputs], LayerOutputs] = lambda v: v,
        gradients: Callable[[list[Any]], list[Any]] = lambda v: v,
        options: Callable[[LayerOptions], LayerOptions] = lambda o: o,
    ) -> None:
        self.before, self.after, self.gradients, self.options = before, after, gradients, options

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        result = super().forward(cell, self.before(t), self.options(o), train=train)
        return result._replace(outputs=self.after(result.outputs))

    def backward(
        self,
        cell: str,
        t: LayerInputs,
        o: LayerOptions,
        y: Tensor,
        result: Result | None,
        grads: LayerOutputs,
        needs: list[bool],
    ) -> list[Any]:
        return self.gradients(super().backward(cell, t, o, y, result, grads, needs))


class Restless(Fused):
    """Every call's last bits are its own."""

    count = 0

    def __init__(self, what: str) -> None:
        super().__init__(**{what: self.shake})

    def shake(self, v: Any) -> Any:
        self.count += 1
        one = isinstance(v, LayerOutputs)
        return v._replace(y=self.grown(v.y)) if one else [g if g is None else self.grown(g) for g in v]

    def grown(self, v: Tensor) -> Tensor:
        return v * (1 + self.count % 5 * torch.finfo(v.dtype).eps)


def put(monkeypatch: pytest.MonkeyPatch, backend: Fused, name: str = "triton") -> None:
    """Into the table, in the place of `triton`, or of another."""
    backend.name = name
    table = tuple(backend if other.name == name else other for other in BACKENDS)
    for module in (select, parity, gpu_check):
        monkeypatch.setattr(module, "BACKENDS", table)
    monkeypatch.setitem(BY_NAME, name, backend)
    monkeypatch.setattr(select, "preference", lambda problem: table)
    monkeypatch.setattr(select, "_selected", {})
