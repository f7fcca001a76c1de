"""The literal table of backends and the choice among them.

`auto` takes the first backend, in the order of recorded times, that gives no reason against a layer and does not leave
it to others; a named backend runs it or raises with its reasons, and no other takes its place. The choice for a layer
is cached for eager calls.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import get_num_threads
from torch._C import _get_mkldnn_enabled
from torch.compiler import is_compiling

from . import dispatch_times, processor, user_times
from .base import Backend
from .cpu.backend import CPU
from .cuda.backend import CUDA
from .dispatch_times import RecordedShape
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
LARGE = (16, 128)  # B and H of an LSTM from which products of bfloat16 count, see `basis`
_orders: dict[tuple, tuple[Backend, ...]] = {}
_tables = 0  # counts the readings of the recorded times, so that what others remember of a choice ends with them


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


def _names(order: tuple[Backend, ...]) -> tuple[str, ...]:
    return tuple(backend.name for backend in order)


class Basis(NamedTuple):
    """By what the backends are put in order for all layers of a kind."""

    rows: tuple[RecordedShape, ...]
    """Recorded shapes, of which the nearest decides; empty where a rule does."""
    order: tuple[str, ...]
    """All backends: by the rule, or, of rows, one order for every shape."""
    rule: str | None
    """What decides where no row of this very kind does; None where one does, and where nothing is known."""


def preference(spec: LayerSpec) -> tuple[Backend, ...]:
    """The order in which `auto` asks: by the times of the nearest recorded shape, a rule, or the table's.

    Under torch.compile T and B may stand for any size, and a look at their values would be a guard. There one order
    serves every shape of a cell.
    """
    batch, steps = spec.batch, spec.steps
    if is_compiling() or type(batch) is not int or type(steps) is not int:
        large = spec.hidden_size >= LARGE[1]
        names = _typical(spec.device, spec.cell, spec.dtype, spec.proj_size > 0, spec.train, large)
        return tuple([BY_NAME[name] for name in names])
    sizes = (batch, steps, spec.input_size, spec.hidden_size)
    key = (spec.device, spec.cell, spec.dtype, spec.proj_size > 0, spec.train, _state(), sizes)
    order = _orders.get(key)
    if order is None:
        order = tuple(BY_NAME[name] for name in measured_order(spec))
        if len(_orders) >= ORDER_CACHE_SIZE:
            _orders.clear()
        _orders[key] = order
    return order


def measured_order(spec: LayerSpec, *, tuned: bool = True) -> tuple[str, ...]:
    """The names of all backends in the order for this layer, outside of torch.compile. tuned: as in `basis`."""
    found = basis(spec, tuned=tuned)
    row = dispatch_times.nearest((spec.batch, spec.steps, spec.input_size, spec.hidden_size), found.rows)
    return found.order if row is None else _names(_order(dispatch_times.fastest_first(row.ms)))


def _state() -> tuple[int, bool]:
    """What of torch's settings a choice depends on: the number of threads, and whether oneDNN is on."""
    return get_num_threads(), _get_mkldnn_enabled()


def _typical(device: str, cell: str, dtype: torch.dtype, *more: bool) -> tuple[str, ...]:
    return _basis(device, cell, dtype, *more, *_state()).order


# As torch.compiler.assume_constant_result does, which would import the compiler with the package: files are read there.
# What was compiled keeps its choice.
_typical._dynamo_marked_constant = True  # type: ignore[attr-defined]


def basis(spec: LayerSpec, *, tuned: bool = True) -> Basis:
    """By what the backends are put in order for this layer. tuned: the user's own table counts.

    On a CPU, the first of these that holds:

    1. Rows of this instruction set, dtype and the nearest number of threads, the user's own before the package's.
       Torch's LSTM must run there as it did where they were recorded. oneDNN has one fused layer, of float32, and of
       bfloat16 where it supports that; torch runs every other LSTM, with a projection too, as a chain of small
       operators. It has nothing else of an RNN or a GRU.
    2. Torch's LSTM in bfloat16, from B = 16 and H = 128 on, where oneDNN has products of it (AMX, AVX512-BF16) that the
       engine does not use: the package's rows were recorded without them. Smaller ones have too little to multiply:
       the engine without such products was ahead there, 1.4 to 4.7 times, behind from 32×16×256×256 on, and neither
       at 16×32×128×128 (against AVX512-BF16, one thread, Zen 4). No AMX was measured.
    3. The engine, where it multiplies in this dtype, or where torch's LSTM is that chain: in float16, and in bfloat16
       held to AVX2, the chain took two to seven times as long (LSTM, H = 256 to 768, one thread, Zen 4).
    4. Rows of the same instruction set in another dtype or with fewer threads.
    5. The table's order, in which the engine comes first.

    Rows of a GPU were recorded in float32 and stand for every dtype.
    """
    large = spec.batch >= LARGE[0] and spec.hidden_size >= LARGE[1]
    return _basis(spec.device, spec.cell, spec.dtype, spec.proj_size > 0, spec.train, large, *_state(), tuned)


@functools.lru_cache(maxsize=512)
def _basis(
    device: str,
    cell: str,
    dtype: torch.dtype,
    projected: bool,
    train: bool,
    large: bool,
    threads: int,
    onednn: bool,
    tuned: bool = True,
) -> Basis:
    if device != "cpu":
        rows = dispatch_times.gpu_rows(device, cell, train)
        return _by_rows(rows) if rows else Basis((), tuple(BY_NAME), None)
    isa = processor.instruction_set(dtype)
    if not isa:
        return Basis((), tuple(BY_NAME), None)
    name, lstm = str(dtype).removeprefix("torch."), cell == "lstm"
    engine_first = tuple(BY_NAME)
    fused = lstm and onednn and not projected and _onednn_fuses(dtype, train)
    products = processor.unused_bfloat16() if fused and large and dtype == torch.bfloat16 else ""
    alike = dispatch_times.ALIKE.get(cell, cell)

    def rows_in(dtype: str, beyond: bool = False) -> tuple[RecordedShape, ...]:
        kind = dispatch_times.Kind(device, isa, dtype, alike, train)
        own = user_times.rows(kind) if tuned else ()
        shipped = dispatch_times.shipped(kind)
        if lstm:  # recorded with oneDNN on, and without projections
            own = own if fused == _onednn_fuses(getattr(torch, dtype), train) else ()
            shipped = shipped if fused == _recorded_fused(dtype, isa) else ()
            shipped = () if products and dtype == "bfloat16" else shipped
        return dispatch_times.at_threads(threads, shipped, own, beyond=beyond)

    rows = rows_in(name)
    if rows:
        return _by_rows(rows)
    wanted = f"no time is recorded of {name} on {isa} with {dispatch_times.said(threads)}"
    if products:
        why = f"torch first: oneDNN has this processor's products of bfloat16 ({products}), which cpu does not use"
        return Basis((), _names(_order(("torch", "cpu"))), why)
    if lstm and not fused:
        return Basis((), engine_first, f"cpu first: torch runs this LSTM in {name} as a chain of small operators here")
    if processor.computes_in(dtype):
        return Basis((), engine_first, f"cpu first, which multiplies in {name}: {wanted}")
    for other in dict.fromkeys((name, "bfloat16", "float32")):
        rows = rows_in(other, beyond=True)
        if rows:
            return _by_rows(rows, f"{wanted}; those of {other} stand for it")
    return Basis((), engine_first, f"cpu first: {wanted}, nor of another dtype")


def _by_rows(rows: tuple[RecordedShape, ...], rule: str | None = None) -> Basis:
    return Basis(rows, _names(_order(dispatch_times.typical(rows))), rule)


def _onednn_fuses(dtype: torch.dtype, train: bool) -> bool:
    """Whether oneDNN has a fused LSTM of this dtype on this processor."""
    if dtype == torch.float16:
        return not train and _onednn_has("fp16")
    return (dtype == torch.float32 and _onednn_has("")) or (dtype == torch.bfloat16 and _onednn_has("bf16"))


def _recorded_fused(dtype: str, isa: str) -> bool:
    """Whether it had where the package's rows were recorded: torch was held to the same instruction set."""
    return dtype == "float32" or (dtype == "bfloat16" and isa.startswith("avx512"))


@functools.cache
def _onednn_has(dtype: str) -> bool:
    """Whether this torch has oneDNN, and that supports a dtype: "bf16" or "fp16"."""
    if not torch.backends.mkldnn.is_available():
        return False
    return not dtype or bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")())


def recorded(spec: LayerSpec) -> RecordedShape | None:
    """The recorded shape whose times order the backends for this layer, outside of torch.compile. None where no row
    says anything of it."""
    return dispatch_times.nearest((spec.batch, spec.steps, spec.input_size, spec.hidden_size), basis(spec).rows)


def forget() -> None:
    """Read the tables again, and choose anew: `tune` has written one."""
    dispatch_times.forget()
    user_times.forget()
    _basis.cache_clear()
    _orders.clear()
    _selected.clear()
    global _tables
    _tables += 1


def select_backend(name: str, spec: LayerSpec, *, cache: bool = True, report: bool = True) -> Backend:
    """The backend that runs this layer: `name`, or what `use_backend` says, or of `auto` the first that can.

    Args:
        cache: remember the choice, as eager calls do, whose sizes are plain numbers. A choice may depend on the spec,
            on torch's number of threads and on whether oneDNN is on, and on nothing else that changes in a process.
        report: tell whoever records.

    Raises:
        NotImplementedError: a named backend cannot; with its reasons.
    """
    facts = choice_facts(name) if cache else None
    chosen = None if facts is None else _selected.get((facts, spec))
    if chosen is None:
        wanted = asked(name)
        chosen = _first_able(spec) if wanted == "auto" else _named(wanted, spec)
        if report and _thread.record is not None:
            _thread.record.append((spec, wanted, chosen.name))
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
    return asked(name), _state(), _tables


def asked(name: str) -> str:
    """What `use_backend` says in this block and thread, else `name`."""
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
