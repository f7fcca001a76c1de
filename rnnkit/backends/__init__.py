"""The literal table of backends and the choice among them.

`auto` takes the first backend whose list of reasons against the problem is empty; a named backend runs or raises
with its reasons. Nothing falls back silently.
"""

from __future__ import annotations

import threading
from types import TracebackType

from .cpu import CPU
from .planned import Planned
from .problem import Options, Outputs, Problem, Result, Tensors, describe
from .products import Backend
from .reference import Reference
from .torch import Torch

REFERENCE = Reference()
BACKENDS: tuple[Backend, ...] = (
    Planned("cuda", "CUDA kernels"),
    Planned("triton", "Triton kernels"),
    CPU(),
    Torch(),
    REFERENCE,
)
BY_NAME: dict[str, Backend] = {backend.name: backend for backend in BACKENDS}
NAMES = ("auto", *BY_NAME)

_thread = threading.local()  # not a ContextVar: torch.compile cannot trace one


class use_backend:
    """Context manager: every layer run in this block and thread uses this backend, whatever it was made with.

    name: a backend's name or "auto". Raises ValueError for an unknown one.
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name

    def __enter__(self) -> use_backend:
        _thread.override = (self.name, getattr(_thread, "override", None))  # the thread's own: one object may nest
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.override = _thread.override[1]


class record:
    """Context manager: gathers every problem met in this block and thread, for `explain`."""

    def __enter__(self) -> list[tuple[Problem, str, str]]:
        self._outside = getattr(_thread, "record", None)
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


def preference(problem: Problem) -> tuple[Backend, ...]:
    """The order in which `auto` asks."""
    return BACKENDS


def resolve(name: str, problem: Problem) -> Backend:
    """The backend that runs this problem: `name`, or what `use_backend` says, or the first that can.

    Raises NotImplementedError with the reasons where a named backend cannot.
    """
    override = getattr(_thread, "override", None)
    asked = name if override is None else override[0]
    if asked == "auto":
        chosen = next(backend for backend in preference(problem) if not backend.unsupported(problem))
    else:
        check_name(asked)
        chosen = BY_NAME[asked]
        reasons = chosen.unsupported(problem)
        if reasons:
            able = [backend.name for backend in BACKENDS if not backend.unsupported(problem)]
            raise NotImplementedError(
                f"backend {asked!r} cannot run this {problem.cell} layer on {problem.device}: {'; '.join(reasons)}. "
                f"Those that can: {', '.join(able)}; backend='auto' chooses among them."
            )
    recording = getattr(_thread, "record", None)
    if recording is not None:
        recording.append((problem, asked, chosen.name))
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
    "describe",
    "preference",
    "record",
    "resolve",
    "use_backend",
]
