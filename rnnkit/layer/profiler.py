"""What torch's profilers show of a layer, or of a whole call that runs as one: a row `rnnkit::<cell>`, such as
rnnkit::lstm, with the shapes of its tensors.

torch records each autograd function under the name of its class. So a call that autograd records has its row, and
`rnnkit::<cell>Backward`, by the name that `named` gives its function, at no cost. A call without gradients that goes to
a backend directly gets one from `as_row`, when `recording()` says that somebody looks; a call through an operator
(torch.compile, dispatch modes) is `rnnkit::layer_forward` by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionMeta

from ..backends.cpu import extension

Given = TypeVar("Given", bound=Sequence[Tensor | None] | None)
_compiling = torch.compiler.is_compiling
_enter = torch._C._autograd._record_function_with_args_enter
_leave = torch._C._autograd._record_function_with_args_exit
_LOADED = ctypes.DEFAULT_MODE | getattr(os, "RTLD_NOLOAD", 0)  # only what torch has loaded, never a second copy


def _any_callbacks() -> Callable[[], bool]:
    """at::hasCallbacks of torch's library: whether anybody records in this thread, also observers that another thread
    or a C++ program has added. torch's question for Python sees profilers of this thread alone; it serves where the
    library does not export the other, or is another file than the one that is loaded. The extension asks faster than
    ctypes does."""
    known: Callable[[], bool] = torch._C._autograd._profiler_enabled
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        with contextlib.suppress(OSError, AttributeError):  # a file that is not loaded; a symbol that is not there
            found = ctypes.PyDLL(str(library), _LOADED)._ZN2at12hasCallbacksEv
            found.argtypes, found.restype = [], ctypes.c_bool
            native: Any = extension.native
            if not hasattr(native, "recording"):  # not built, or by older sources
                return found
            native.bind_recording(ctypes.cast(found, ctypes.c_void_p).value)
            return native.recording
    return known


recording = _any_callbacks()
"""Whether somebody records what torch runs. Asked once by a call without gradients: some 40 ns by the extension."""


@functools.cache
def named(function: type[Function], cell: str) -> type[Function]:
    """The autograd function under the name of the cell."""
    return FunctionMeta(f"rnnkit::{cell}", (function,), {"__module__": function.__module__})  # type: ignore[return-value]


class _Row(Function):
    """An autograd function only for its row: nothing that it is given requires a gradient, or autograd is off."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Any], *tensors: Tensor | None) -> Any:
        return run()


def as_row(cell: str, run: Callable[[], Given], tensors: Sequence[Tensor | None]) -> Given:
    """What `run` gives, a sequence or None, with the cell's row around it. `tensors`: those whose shapes the row has;
    plain ones, and autograd does not record the call."""
    return named(_Row, cell).apply(run, *tensors)


def annotated(cell: str, run: Callable[[], Given], tensors: Sequence[Tensor | None]) -> Given:
    """The same around formulas that torch differentiates or transforms: no autograd function fits there, so the row is
    an annotation."""
    if _compiling() or not recording():
        return run()
    row = _enter(f"rnnkit::{cell}", *tensors)
    try:
        return run()
    finally:
        _leave(row)
