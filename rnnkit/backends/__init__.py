"""The literal table of backends and the choice among them.

`auto` takes the first backend, in the order of recorded measurements, whose list of reasons against the spec is
empty and that is not reluctant; a named backend runs or raises with its reasons. Nothing falls back silently. What was
found for a spec is remembered, for eager calls (`choose`).
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
from .products import Backend
from .reference import Reference
from .spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result, describe
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
        self.record: list[tuple[LayerSpec, str, str]] | None = None


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
    """Context manager: gathers every spec met in this block and thread, for `explain`."""

    def __enter__(self) -> list[tuple[LayerSpec, str, str]]:
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


def preference(spec: LayerSpec) -> tuple[Backend, ...]:
    """The order in which `auto` asks: by the times of the nearest recorded shape, else the table's.

    Under torch.compile T and B may stand for any size, and a look at their values would be a guard. There one order
    serves every shape of a cell.
    """
    batch, steps = spec.batch, spec.steps
    if is_compiling() or type(batch) is not int or type(steps) is not int:
        cell = measured.ALIKE.get(spec.cell, spec.cell)
        return _TYPICAL.get((spec.device, cell, spec.train), BACKENDS)
    key = (spec.device, spec.cell, spec.train, batch, steps, spec.input_size, spec.hidden_size)
    order = _orders.get(key)
    if order is None:
        row = recorded(spec)
        order = BACKENDS if row is None else _order(measured.fastest_first(row.ms))
        if len(_orders) >= _KEPT:
            _orders.clear()
        _orders[key] = order
    return order


def recorded(spec: LayerSpec) -> measured.Row | None:
    """The recorded shape whose times order the backends for this spec, outside of torch.compile."""
    sizes = (spec.batch, spec.steps, spec.input_size, spec.hidden_size)
    return measured.nearest(spec.device, spec.cell, spec.train, sizes)


def pick(name: str, spec: LayerSpec) -> Backend:
    """The backend that runs this spec: `name`, or what `use_backend` says, or the first that can.

    Raises NotImplementedError with the reasons where a named backend cannot.
    """
    asked = _asked(name)
    if asked == "auto":
        able = (backend for backend in preference(spec) if not backend.unsupported(spec))
        return next(backend for backend in able if backend.reluctant(spec) is None)
    check_name(asked)
    chosen = BY_NAME[asked]
    reasons = chosen.unsupported(spec)
    if reasons:
        others = [backend.name for backend in BACKENDS if not backend.unsupported(spec)]
        raise NotImplementedError(
            f"backend {asked!r} cannot run this {spec.cell} layer on {spec.device}: {'; '.join(reasons)}. "
            f"Those that can: {', '.join(others)}; backend='auto' chooses among them."
        )
    return chosen


def _asked(name: str) -> str:
    override = _thread.override
    return name if override is None else override[0]


def resolve(name: str, spec: LayerSpec) -> Backend:
    """`pick`, told to whoever records."""
    chosen = pick(name, spec)
    recording = _thread.record
    if recording is not None:
        recording.append((spec, _asked(name), chosen.name))
    return chosen


_chosen: dict[tuple[str, bool, tuple], Backend] = {}
CHOSEN_AT_MOST = 1024  # entries; T and B are part of a spec


def recall(name: str, spec: tuple) -> Backend | None:
    """What `choose` found for the same spec before; None where nothing yet, and inside of `record`.

    `spec`: a LayerSpec, or the bare tuple of its facts, which takes a third of the time to make.
    """
    if _thread.record is not None:
        return None
    override = _thread.override
    return _chosen.get((name if override is None else override[0], _get_mkldnn_enabled(), spec))


def choose(name: str, spec: LayerSpec, *, quiet: bool = False) -> Backend:
    """`resolve` with a memory, for eager calls, whose sizes are plain numbers. quiet: `pick`, with the same memory.

    A choice may depend on the spec and on whether oneDNN is on, and on nothing else that changes in a process.
    """
    chosen = recall(name, spec)
    if chosen is None:
        chosen = pick(name, spec) if quiet else resolve(name, spec)
        if len(_chosen) >= CHOSEN_AT_MOST:
            _chosen.clear()
        _chosen[_asked(name), _get_mkldnn_enabled(), spec] = chosen
    return chosen


__all__ = [
    "BACKENDS",
    "BY_NAME",
    "NAMES",
    "REFERENCE",
    "Backend",
    "LayerInputs",
    "LayerOptions",
    "LayerOutputs",
    "LayerSpec",
    "Result",
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
