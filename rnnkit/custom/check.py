"""Whether a cell's program may run: traced, derived, and held against autograd of the user's own step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from rnnkit.custom.cut import make_program
from rnnkit.custom.graph import CellProgram
from rnnkit.custom.trace import trace


class Spec(Protocol):
    """A cell's declaration, as declare.py reads it off a class."""

    name: str
    step: Callable[..., Any]
    gates: int
    states: tuple[str, ...]
    units: tuple[str, ...]
    weights: tuple[tuple[str, int], ...]
    steps: tuple[tuple[str, str, bool], ...]
    options: dict[str, Any]


class Checked(NamedTuple):
    program: CellProgram | None
    reason: str | None
    seconds: float


def compile_step(spec: Spec, hidden: int, dtype: torch.dtype = torch.float32) -> CellProgram:
    """The program of a cell for one H, not yet checked."""
    traced = trace(
        spec.step,
        hidden=hidden,
        gates=spec.gates,
        states=spec.states,
        units=spec.units,
        weights=dict(spec.weights),
        steps={name: (kind, grad) for name, kind, grad in spec.steps},
        options=spec.options,
        dtype=dtype,
    )
    return make_program(
        spec.name,
        traced.graph,
        traced.new,
        hidden=hidden,
        gates=spec.gates,
        states=spec.states,
        units=spec.units,
        weights=spec.weights,
        steps=spec.steps,
    )


def program_of(spec: Spec, hidden: int, dtype: torch.dtype = torch.float32) -> Checked:
    start = time.perf_counter()
    program = compile_step(spec, hidden, dtype)
    return Checked(program, None, time.perf_counter() - start)
