"""The literal table of backends and the choice among them.

`auto` takes the first backend, in the order of recorded measurements, whose list of reasons against the problem is
empty and that is not reluctant; a named backend runs or raises with its reasons. Nothing falls back silently. What was
found for a problem is remembered, for eager calls (`choose`).
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from torch._C import _get_mkldnn_enabled
from torch.compiler import is_compiling  # `torch` is here the name of a backend's file

from . import measured
from .cpu import CPU
from .cuda import CUDA
from .problem import Options, Outputs, Problem, Result, Tensors, describe
from .products import Backend
from .reference import Reference
from .torch import Torch
from .triton import Triton

REFERENCE = Reference()
BACKENDS: tuple[Backend, ...] = (
    CUDA(),
    Triton(),
    CPU(),
    Torch(),
    REFERENCE,
)
BY_NAME: dict[str, Backend] = {backend.name: backend for backend in BACKENDS}
NAMES = ("auto", *BY_NAME)
_KEPT = 4096  # orders found so far; a program that meets more shapes starts over
_orders: dict[tuple, tuple[Backend, ...]] = {}


class _Thread(threading.local):  # not a ContextVar: torch.compile cannot trace one
    def __init__(self) -> None:  # in every thread anew
        self.override: Any = None  # (what `use_backend` names, what stood here before)
        self.record: list[tuple[Problem, str, str]] | None = None


_thread = _Thread()


class use_backend:
    """Context manager: every layer run in this block and thread uses this backend, whatever it was made with.

    name: a backend's name or "auto". Raises ValueError for an unknown one.
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name

    def __enter__(self) -> use_backend:
        _thread.override = (self.name, _thread.override)  # the thread's own: one object may nest
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.override = _thread.override[1]


class record:
    """Context manager: gathers every problem met in this block and thread, for `explain`."""

    def __enter__(self) -> list[tuple[Problem, str, str]]:
        self._outside = _thread.record
        _thread.record = []
        return _thread.record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.record = self._outside


def check_name(name: str) -> None:
    """Raise ValueError where no backend bears this name."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")


def _order(measured_order: tuple[str, ...]) -> tuple[Backend, ...]:
    """The table in the measured order. What was not measured keeps its place before, or after, all that was."""
    known = [BY_NAME[name] for name in measured_order]
    first = min(BACKENDS.index(backend) for backend in known)
    return (*BACKENDS[:first], *known, *(backend for backend in BACKENDS[first:] if backend not in known))


_TYPICAL = {kind: _order(names) for kind, names in measured.TYPICAL.items()}


def preference(problem: Problem) -> tuple[Backend, ...]:
    """The order in which `auto` asks: by the times of the nearest recorded shape, else the table's.

    Under torch.compile T and B may stand for any size, and a look at their values would be a guard. There one order
    serves every shape of a cell.
    """
    batch, steps = problem.batch, problem.steps
    if is_compiling() or type(batch) is not int or type(steps) is not int:
        cell = measured.ALIKE.get(problem.cell, problem.cell)
        return _TYPICAL.get((problem.device, cell, problem.train), BACKENDS)
    key = (problem.device, problem.cell, problem.train, batch, steps, problem.input_size, problem.hidden_size)
    order = _orders.get(key)
    if order is None:
        row = recorded(problem)
        order = BACKENDS if row is None else _order(measured.fastest_first(row.ms))
        if len(_orders) >= _KEPT:
            _orders.clear()
        _orders[key] = order
    return order


def recorded(problem: Problem) -> measured.Row | None:
    """The recorded shape whose times order the backends for this problem, outside of torch.compile."""
    sizes = (problem.batch, problem.steps, problem.input_size, problem.hidden_size)
    return measured.nearest(problem.device, problem.cell, problem.train, sizes)


def pick(name: str, problem: Problem) -> Backend:
    """The backend that runs this problem: `name`, or what `use_backend` says, or the first that can.

    Raises NotImplementedError with the reasons where a named backend cannot.
    """
    asked = _asked(name)
    if asked == "auto":
        able = (backend for backend in preference(problem) if not backend.unsupported(problem))
        return next(backend for backend in able if backend.reluctant(problem) is None)
    check_name(asked)
    chosen = BY_NAME[asked]
    reasons = chosen.unsupported(problem)
    if reasons:
        others = [backend.name for backend in BACKENDS if not backend.unsupported(problem)]
        raise NotImplementedError(
            f"backend {asked!r} cannot run this {problem.cell} layer on {problem.device}: {'; '.join(reasons)}. "
            f"Those that can: {', '.join(others)}; backend='auto' chooses among them."
        )
    return chosen


def _asked(name: str) -> str:
    override = _thread.override
    return name if override is None else override[0]


def resolve(name: str, problem: Problem) -> Backend:
    """`pick`, told to whoever records."""
    chosen = pick(name, problem)
    recording = _thread.record
    if recording is not None:
        recording.append((problem, _asked(name), chosen.name))
    return chosen


_chosen: dict[tuple[str, bool, tuple], Backend] = {}
CHOSEN_AT_MOST = 1024  # entries; T and B are part of a problem


def recall(name: str, problem: tuple) -> Backend | None:
    """What `choose` found for the same problem before; None where nothing yet, and inside of `record`.

    `problem`: a Problem, or the bare tuple of its facts, which takes a third of the time to make.
    """
    if _thread.record is not None:
        return None
    override = _thread.override
    return _chosen.get((name if override is None else override[0], _get_mkldnn_enabled(), problem))


def choose(name: str, problem: Problem, *, quiet: bool = False) -> Backend:
    """`resolve` with a memory, for eager calls, whose sizes are plain numbers. quiet: `pick`, with the same memory.

    A choice may depend on the problem and on whether oneDNN is on, and on nothing else that changes in a process.
    """
    chosen = recall(name, problem)
    if chosen is None:
        chosen = pick(name, problem) if quiet else resolve(name, problem)
        if len(_chosen) >= CHOSEN_AT_MOST:
            _chosen.clear()
        _chosen[_asked(name), _get_mkldnn_enabled(), problem] = chosen
    return chosen


__all__ = [
    "BACKENDS",
    "BY_NAME",
    "NAMES",
    "REFERENCE",
    "Backend",
    "Options",
    "Outputs",
    "Problem",
    "Result",
    "Tensors",
    "check_name",
    "choose",
    "describe",
    "preference",
    "recall",
    "record",
    "recorded",
    "resolve",
    "use_backend",
]
