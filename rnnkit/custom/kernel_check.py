"""A kernel held against the user's own step, in the kernel's dtype: the second half of the self-check.

`check` holds a program against autograd in float64; here the backend that is to run it is tried on a short layer, with
values and gradients: as it is mostly used, and once more with the ways turned that a layer can turn. The measure is the
reference in float64, the budget what the reference loses in the same dtype.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import compute_dtype
from . import scan
from .declare import CellSpec
from .inputs import CellInputs, CellOptions, CellOutputs, unflat
from .trial import tiled

_STEPS, _ROWS, _INPUTS = 3, 3, 4
_LARGE = 1 << 20
"""Numbers in a weight above which its gradient is left out: it is a product like every other."""
_LOSS, _ROUNDINGS = 16, 64
"""The error may be so many times the reference's, plus so many units in the last place of the largest number, or of 1:
what is drawn is about 1, and terms may cancel."""
_SIXTH = 1e-7
"""Of torch's own hardsigmoid, whose derivative in float64 holds a sixth of float32."""


class _Ways(NamedTuple):
    """How a layer is run."""

    words: str
    biases: bool
    o: CellOptions


_WAYS = (
    _Ways("", True, CellOptions(all_states=True)),
    _Ways(" in reverse, with recompute and without biases", False, CellOptions(True, True, True)),
)


class Held(NamedTuple):
    """What was found of a kernel."""

    program: Any
    """Kept, so that no other takes its identity."""
    wrong: str | None
    seconds: float


_KEPT = 512
_found: dict[tuple[Any, ...], Held] = {}
_lock = threading.RLock()


def mismatch(
    name: str, backend: Any, spec: CellSpec, program: Any, device: str, dtype: torch.dtype, heads: int = 1
) -> str | None:
    """Where the backend's numbers differ from the step's, or that it raises; None where all is well. Looked at once."""
    key = (name, id(program), device, dtype, heads)
    with _lock:
        if key not in _found:
            while len(_found) >= _KEPT:
                del _found[next(iter(_found))]
            start = time.perf_counter()
            with ThreadPoolExecutor(1) as own:  # which no transform and no mode of the caller's reaches
                try:
                    wrong = own.submit(_compare, name, backend, spec, program, device, dtype, heads).result()
                except Exception as error:  # what the kernel raises is a reason to run another
                    wrong = f"its kernel on {name} raises {type(error).__name__}: {error}"
            _found[key] = Held(program, wrong, time.perf_counter() - start)
        return _found[key].wrong


def seconds(name: str, program: Any, device: str, dtype: torch.dtype, heads: int = 1) -> float:
    """What `mismatch` took, the first time; 0.0 where no kernel was tried."""
    held = _found.get((name, id(program), device, dtype, heads))
    return 0.0 if held is None else held.seconds


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compare(
    name: str, backend: Any, spec: CellSpec, program: Any, device: str, dtype: torch.dtype, heads: int
) -> str | None:
    with _one_thread():
        given = _inputs(spec, program.hidden, heads, device).to(dtype)
        kinds = (given, given.to(torch.float64), given.to(compute_dtype(dtype)))
        for words, biases, o in _WAYS:
            t, exactly, usually = kinds if biases else [t._replace(b_ih=None, b_hh=None) for t in kinds]
            wrong = _difference(backend, spec, program, t, exactly, usually, o._replace(heads=heads))
            if wrong:
                return f"its kernel on {name}{words} gives {wrong}"
    return None


def _difference(
    backend: Any, spec: CellSpec, program: Any, t: CellInputs, exactly: CellInputs, usually: CellInputs, o: CellOptions
) -> str | None:
    """The first of outputs and gradients that is off. The same inputs in three dtypes: the kernel's, float64, and what
    the reference computes in."""
    dtype, needs = t.x.dtype, _needs(spec, t)
    grads = _gradients(spec, program.hidden, t.x.device.type)
    exact = _by_reference(spec, exactly, o, grads, needs)
    usual = _by_reference(spec, usually, o, grads, needs)
    outputs, saved = backend.forward(program, t, o, True)
    found = backend.backward(program, t, o, outputs.y, saved, _cast(grads, dtype), needs)
    got = [outputs.y, *outputs.last, *outputs.all, *(g for g in found if g is not None)]
    for what, v, right, other in zip(_names(spec, needs), got, exact, usual, strict=True):
        error, allowed = _distance(v, right), _LOSS * _distance(other.to(dtype), right)
        allowed += max(_ROUNDINGS * torch.finfo(dtype).eps, _SIXTH) * max(1.0, _size(right))
        if not error <= allowed:
            return f"{what} off by {error:.1e}, where {allowed:.1e} is rounding"
    return None


def _inputs(spec: CellSpec, hidden: int, heads: int, device: str) -> CellInputs:
    """Drawn alike every time; torch's own generator is left alone."""
    random = torch.Generator().manual_seed(2)

    def draw(*shape: int, over: int = 1) -> Tensor:
        return (torch.randn(shape, generator=random) / over**0.5).to(device)

    rows = spec.gates * hidden
    bias = (draw(rows), draw(rows) if spec.recurrent else None)
    return CellInputs(
        draw(_STEPS, _ROWS, _INPUTS),
        tuple(draw(_ROWS, hidden).abs() for _ in spec.states),
        draw(rows, _INPUTS, over=_INPUTS),
        *bias,
        tuple(tiled(draw, blocks * hidden, hidden // heads) for _, blocks in spec.weights),
        tuple(draw(hidden) for _ in spec.units),
        tuple(draw(_STEPS, _ROWS, *([] if kind == "row" else [hidden])).abs() for _, kind, _ in spec.steps),
        torch.tensor([_STEPS, 1, _STEPS - 1], device=device),
        torch.tensor([[False] * 3, [False, False, True], [True, False, False]], device=device),
        (),
    )


def _needs(spec: CellSpec, t: CellInputs) -> list[bool]:
    wanted = CellInputs(
        t.x,
        t.states,
        t.w_ih,
        t.b_ih,
        t.b_hh,
        tuple(w if w.numel() <= _LARGE else None for w in t.weights),  # type: ignore[misc]
        t.units,
        tuple(v if grad else None for v, (_, _, grad) in zip(t.steps, spec.steps, strict=True)),  # type: ignore[misc]
        None,
        None,
        (),
    )
    return [v is not None for v in wanted.flat()]


def _names(spec: CellSpec, needs: list[bool]) -> list[str]:
    states = list(spec.states)
    every = ["x", *states, "weight_ih", "bias_ih", "bias_hh", *(n for n, _ in spec.weights), *spec.units]
    every += [n for n, _, _ in spec.steps]
    gradients = [f"the gradient of {n}" for n, need in zip(every, needs, strict=False) if need]
    return [states[0], *(f"the last {s}" for s in states), *states[1:], *gradients]


def _gradients(spec: CellSpec, hidden: int, device: str) -> CellOutputs:
    random = torch.Generator().manual_seed(3)
    n = len(spec.states)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    every = [draw(_STEPS, _ROWS, hidden) for _ in range(n)]
    return CellOutputs(every[0], tuple(draw(1, _ROWS, hidden) for _ in range(n)), tuple(every[1:]))


def _cast(v: CellOutputs, dtype: torch.dtype) -> CellOutputs:
    return CellOutputs(v.y.to(dtype), tuple(g.to(dtype) for g in v.last), tuple(g.to(dtype) for g in v.all))


def _by_reference(spec: CellSpec, t: CellInputs, o: CellOptions, grads: CellOutputs, needs: list[bool]) -> list[Tensor]:
    """Outputs, then the gradients that are needed."""
    given = zip(t.flat(), needs, strict=True)
    flat = [v.detach().requires_grad_() if v is not None and need else v for v, need in given]
    y, last, every = scan.outputs(spec, unflat(spec, flat), o)
    outputs = [y, *last, *every]
    g = _cast(grads, t.x.dtype)
    wanted = [v for v, need in zip(flat, needs, strict=True) if v is not None and need]
    pairs = [(v, d) for v, d in zip(outputs, (g.y, *g.last, *g.all), strict=True) if v.requires_grad]
    # one number to differentiate: with gradients handed in, torch imports sympy, a second of the first call
    total: Any = sum((v * d).sum() for v, d in pairs)
    found = torch.autograd.grad(total, wanted, allow_unused=True) if pairs else [None] * len(wanted)
    gradients = [torch.zeros_like(v) if d is None else d for v, d in zip(wanted, found, strict=True)]
    return [v.detach() for v in outputs] + gradients


def _size(v: Tensor) -> float:
    finite = v[v.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; none where both are NaN or the same infinity."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    different = (a - b).abs().masked_fill(same, 0)
    return float("inf") if different.isnan().any() else float(different.max()) if different.numel() else 0.0
