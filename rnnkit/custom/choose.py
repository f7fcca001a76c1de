"""Which backend runs a custom layer, and why the others do not.

A kernel backend is a module with `unsupported`, `forward` and `backward` over a `CellProgram`; `KERNELS` names those
there are. The reference has the same functions over the `CellSpec` itself and takes every cell. Before a kernel is
chosen, the user's step has been tried once by itself (`probe`), and its program has been held against it (`check`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..cells import compute_dtype
from . import check, kernel_check, reference
from .declare import CellSpec, spec_named
from .inputs import CellInputs, CellOptions, CellOutputs
from .probe import probe

NAMES = ("auto", "cpu", "triton", "reference")
KERNELS = {"cpu": "rnnkit.backends.cpu.program", "triton": "rnnkit.backends.triton.program"}
DEVICES = {"cpu": "cpu", "cuda": "triton"}
"""Type of device to the backend that `auto` asks first there."""
_NEVER = {
    "torch": "it has torch.nn's own layers alone",
    "cuda": "its kernels are written for the built-in cells",
}

EVERY = (*NAMES[1:], *_NEVER)
"""All that can be named but auto."""


class CellBackend(Protocol):
    """What runs a layer. `plan` is a CellProgram, of the reference a CellSpec."""

    name: str
    takes_none_states: bool
    """Whether states may be None, for zeros."""

    def unsupported(self, program: Any, device: str, dtype: torch.dtype, o: CellOptions) -> list[str]:
        """Reasons against a layer; `program` None asks what can be said before the step has been looked at."""

    def forward(self, plan: Any, t: CellInputs, o: CellOptions, train: bool) -> tuple[CellOutputs, Sequence[Tensor]]:
        """Outputs, and with `train` what `backward` is given as `saved`."""

    def backward(
        self,
        plan: Any,
        t: CellInputs,
        o: CellOptions,
        y: Tensor,
        saved: Sequence[Tensor],
        grads: CellOutputs,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients in the flat order of `t`, None where they are not needed."""


class Choice(NamedTuple):
    name: str
    backend: CellBackend
    plan: Any


class Asked(NamedTuple):
    """All that a choice depends on, beside the cell and the Python state that its step reads."""

    hidden: int
    device: str
    dtype: torch.dtype
    o: CellOptions


@functools.cache
def _module(path: str) -> ModuleType | None:
    """A backend's module, where there is one."""
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def backend_named(name: str) -> Any:
    return reference if name == "reference" else _module(KERNELS[name])


def unable(name: str, device: str, dtype: torch.dtype = torch.float32, o: CellOptions | None = None) -> list[str]:
    """Why a backend runs no cell at all on this kind of device; empty where it runs some."""
    backend = backend_named(name)
    if backend is None:
        return ["it has no kernels for custom cells yet"]
    found: list[str] = backend.unsupported(None, device, dtype, o or CellOptions())
    return found


class Verdict(NamedTuple):
    """reasons: against the backend; empty means that it can run `plan`."""

    reasons: list[str]
    plan: Any
    checked: check.Checked | None = None
    """What was found of the step, where it was looked at."""


def judge(name: str, spec: CellSpec, q: Asked) -> Verdict:
    """Whether a backend can run this layer."""
    if name == "reference":
        return Verdict([], spec)
    if name in _NEVER:
        return Verdict([f"{_NEVER[name]}, not a user's step"], None)
    reasons = unable(name, q.device, q.dtype, q.o)
    if reasons:
        return Verdict(reasons, None)
    backend = backend_named(name)
    checked = check.program_of(spec, q.hidden, compute_dtype(q.dtype))
    if checked.program is None:
        return Verdict([checked.reason or "its step has no program"], None, checked)
    reasons = backend.unsupported(checked.program, q.device, q.dtype, q.o)
    if not reasons:
        wrong = kernel_check.mismatch(name, backend, spec, checked.program, q.device, q.dtype, q.o.heads)
        reasons = [wrong] if wrong else []
    return Verdict(reasons, checked.program, checked)


CACHE_SIZE = 1024
_chosen: dict[tuple[CellSpec, Asked, str], tuple[Choice, check.Checked | None]] = {}


def choose(spec: CellSpec, q: Asked, wanted: str) -> Choice:
    """The backend that runs this layer: the named one, or of `auto` the device's own, or the reference. Remembered for
    as long as the Python state that the step reads gives the same program.

    Raises NotImplementedError, with its reasons, where a named one cannot.
    """
    known = _chosen.get((spec, q, wanted))
    if known is not None:
        choice, checked = known
        if checked is None or checked is check.program_of(spec, q.hidden, compute_dtype(q.dtype)):
            return choice
    expect_known(wanted)
    probe(spec, q.hidden, compute_dtype(q.dtype))
    choice, checked = _choose(spec, q, wanted)
    if len(_chosen) >= CACHE_SIZE:
        _chosen.clear()
    _chosen[spec, q, wanted] = choice, checked
    return choice


def _choose(spec: CellSpec, q: Asked, wanted: str) -> tuple[Choice, check.Checked | None]:
    if wanted == "auto":
        name = DEVICES.get(q.device, "reference")
        reasons, plan, checked = judge(name, spec, q)
        if reasons:
            if checked is not None:
                check.warn_once(spec.name, reasons[0])
            name, plan = "reference", spec
        return Choice(name, backend_named(name), plan), checked
    reasons, plan, checked = judge(wanted, spec, q)
    if reasons:
        raise NotImplementedError(
            f"backend {wanted!r} cannot run {spec.name} on {q.device}: {'; '.join(reasons)}. "
            "backend='auto' chooses one that can, backend='reference' runs every cell."
        )
    return Choice(wanted, backend_named(wanted), plan), checked


def expect_known(name: str) -> None:
    """Raise ValueError where no backend bears this name."""
    if name not in NAMES and name not in _NEVER:
        raise ValueError(f"backend of a custom cell must be one of {', '.join(NAMES)}; got {name!r}")


def choose_by_key(
    key: str,
    hidden: int,
    device: str,
    dtype: torch.dtype,
    reverse: bool,
    all_states: bool,
    recompute: bool,
    heads: int,
    name: str,
) -> str:
    """The name of the choice, from constants alone: torch.compile takes what it returns for one."""
    asked = Asked(hidden, device, dtype, CellOptions(reverse, all_states, recompute, heads))
    # To choose may be to try the step and to check its program. What traces or transforms the caller's thread would
    # see that, down to the switches of grad mode; a thread of its own it does not reach.
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(choose, spec_named(key), asked, name).result().name


# As torch.compiler.assume_constant_result does, which would import the compiler with the package.
choose_by_key._dynamo_marked_constant = True  # type: ignore[attr-defined]
