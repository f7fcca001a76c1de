"""The literal table of backends and the choice among them.

`auto` takes the first backend, in the order of recorded times, that gives no reason against a layer and does not leave
it to others; a named backend runs it or raises with its reasons. Nothing falls back silently. The choice for a layer is
cached for eager calls.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from types import TracebackType
from typing import Any

import torch
from torch._C import _get_mkldnn_enabled
from torch.compiler import is_compiling

from . import dispatch_times
from .base import Backend
from .cpu.backend import CPU
from .cuda.backend import CUDA
from .reference import Reference
from .spec import LayerSpec
from .torch import Torch
from .triton.backend import Triton

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
CACHE_SIZE = 1024  # choices; T and B are part of a spec. A program that meets more starts over
_selected: dict[tuple[tuple, LayerSpec], Backend] = {}
ORDER_CACHE_SIZE = 4096
_orders: dict[tuple, tuple[Backend, ...]] = {}


class _Thread(threading.local):  # not a ContextVar: torch.compile cannot trace one
    def __init__(self) -> None:  # in every thread anew
        self.override: Any = None  # (what `use_backend` names, what stood here before)
        self.record: list[tuple[LayerSpec, str, str]] | None = None


_thread = _Thread()


class use_backend(contextlib.ContextDecorator):
    """Context manager: every layer run in this block and thread uses this backend, whatever it was made with. As a
    decorator, in every call of the function.

    name: a backend's name or "auto". Raises ValueError for an unknown one.
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name

    def _recreate_cm(self) -> use_backend:
        """For each call of a decorated function: torch.compile traces a manager that is made where it is entered."""
        return use_backend(self.name)

    def __enter__(self) -> use_backend:
        _thread.override = (self.name, _thread.override)  # the thread's own: one object may nest
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.override = _thread.override[1]


class record:
    """Context manager: gathers every layer met in this block and thread, for `explain`."""

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


_TYPICAL = {kind: _order(names) for kind, names in dispatch_times.TYPICAL.items()}


def preference(spec: LayerSpec) -> tuple[Backend, ...]:
    """The order in which `auto` asks: by the times of the nearest recorded shape, else the table's.

    Under torch.compile T and B may stand for any size, and a look at their values would be a guard. There one order
    serves every shape of a cell.
    """
    batch, steps = spec.batch, spec.steps
    if is_compiling() or type(batch) is not int or type(steps) is not int:
        cell = dispatch_times.ALIKE.get(spec.cell, spec.cell)
        return _TYPICAL.get((spec.device, cell, spec.train), BACKENDS)
    if not _comparable(spec):
        return BACKENDS
    key = (spec.device, spec.cell, spec.train, batch, steps, spec.input_size, spec.hidden_size)
    order = _orders.get(key)
    if order is None:
        row = recorded(spec)
        order = BACKENDS if row is None else _order(dispatch_times.fastest_first(row.ms))
        if len(_orders) >= ORDER_CACHE_SIZE:
            _orders.clear()
        _orders[key] = order
    return order


def _comparable(spec: LayerSpec) -> bool:
    """Whether recorded times hold for this dtype. On a CPU they are of float32, which torch hands to oneDNN. Where it
    does not, torch runs a chain of small operators: with oneDNN off, in float64 and float16, and in bfloat16 without
    AVX-512. In float16, and in bfloat16 held to AVX2, that was two to seven times slower than the engine (LSTM,
    H = 256 to 768, one thread, Zen 4); float64 and oneDNN off were not measured.
    """
    if spec.device != "cpu" or spec.cell != "lstm":  # of which torch has no other operator than that chain
        return True
    if not _get_mkldnn_enabled():
        return False
    return spec.dtype == torch.float32 or (spec.dtype == torch.bfloat16 and _onednn_has_bfloat16())


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def recorded(spec: LayerSpec) -> dispatch_times.RecordedShape | None:
    """The recorded shape whose times order the backends for this layer, outside of torch.compile. None where no row
    says anything of it."""
    if not _comparable(spec):
        return None
    sizes = (spec.batch, spec.steps, spec.input_size, spec.hidden_size)
    return dispatch_times.nearest(spec.device, spec.cell, spec.train, sizes)


def select_backend(name: str, spec: LayerSpec, *, cache: bool = True, report: bool = True) -> Backend:
    """The backend that runs this layer: `name`, or what `use_backend` says, or of `auto` the first that can.

    Args:
        cache: remember the choice, as eager calls do, whose sizes are plain numbers. A choice may depend on the spec
            and on whether oneDNN is on, and on nothing else that changes in a process.
        report: tell whoever records.

    Raises:
        NotImplementedError: a named backend cannot; with its reasons.
    """
    facts = choice_facts(name) if cache else None
    chosen = None if facts is None else _selected.get((facts, spec))
    if chosen is None:
        asked = _asked(name)
        chosen = _first_able(spec) if asked == "auto" else _named(asked, spec)
        if report and _thread.record is not None:
            _thread.record.append((spec, asked, chosen.name))
        if facts is not None:
            if len(_selected) >= CACHE_SIZE:
                _selected.clear()
            _selected[facts, spec] = chosen
    return chosen


def choice_facts(name: str) -> tuple | None:
    """What a choice depends on beside a layer's spec, for those who remember choices; None inside of `record`, where
    each is to be told."""
    if _thread.record is not None:
        return None
    override = _thread.override
    return name if override is None else override[0], _get_mkldnn_enabled()


def _asked(name: str) -> str:
    override = _thread.override
    return name if override is None else override[0]


def _first_able(spec: LayerSpec) -> Backend:
    able = (backend for backend in preference(spec) if not backend.unsupported(spec))
    return next(backend for backend in able if backend.auto_exclusion_reason(spec) is None)


def _named(name: str, spec: LayerSpec) -> Backend:
    check_name(name)
    chosen = BY_NAME[name]
    reasons = chosen.unsupported(spec)
    if reasons:
        others = [backend.name for backend in BACKENDS if not backend.unsupported(spec)]
        raise NotImplementedError(
            f"backend {name!r} cannot run this {spec.cell} layer on {spec.device}: {'; '.join(reasons)}. "
            f"Those that can: {', '.join(others)}; backend='auto' chooses among them."
        )
    return chosen
