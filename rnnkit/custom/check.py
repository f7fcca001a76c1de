"""Whether a cell's program may run: traced twice, derived, and held against autograd of the user's own step.

The check is in float64, at random points and at edges: zeros of both signs, bounds of activations, equal inputs, gates
of ±80. It cannot be switched off. What fails it runs by the reference, and the reason says which operation and what to
write instead.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkit.custom import evaluate
from rnnkit.custom.cut import make_program
from rnnkit.custom.errors import NotTraced, StepError
from rnnkit.custom.fingerprint import fingerprints
from rnnkit.custom.graph import CellProgram
from rnnkit.custom.trace import FEW, MANY, Traced, trace
from rnnkit.custom.trial import AT_EDGES, FAR, Spec, Tried, nearby, points, run_step, try_step


class Checked(NamedTuple):
    program: CellProgram | None
    reason: str | None
    """Why there is none."""
    seconds: float
    """What tracing, derivative and check took."""


def _trace(spec: Spec, hidden: int, dtype: torch.dtype, rows: int = FEW) -> Traced:
    return trace(
        spec.step,
        hidden=hidden,
        gates=spec.gates,
        states=spec.states,
        units=spec.units,
        weights=dict(spec.weights),
        steps={name: (kind, grad) for name, kind, grad in spec.steps},
        options=spec.options,
        dtype=dtype,
        rows=rows,
    )


def compile_step(spec: Spec, hidden: int, dtype: torch.dtype = torch.float32) -> CellProgram:
    """The program of a cell for one H, not yet checked."""
    traced, again = (_trace(spec, hidden, dtype, rows) for rows in (FEW, MANY))
    if (traced.graph.nodes, traced.graph.products, traced.new) != (again.graph.nodes, again.graph.products, again.new):
        raise NotTraced(
            "the step computes something else each time it is run (random numbers, a counter), or for another "
            "number of rows: hand in what changes as a per_step input"
        )
    return make_program(
        spec.name,
        traced.graph,
        traced.new,
        hidden=hidden,
        gates=spec.gates,
        states=tuple(spec.states),
        units=tuple(spec.units),
        weights=tuple(spec.weights),
        steps=tuple(spec.steps),
    )


# --- the check -------------------------------------------------------------------------------------------------------


def check_program(spec: Spec, program: CellProgram, dtype: torch.dtype = torch.float32) -> str | None:
    """What is wrong with a program, or None."""
    constant = {name for name, _, grad in spec.steps if not grad}
    weights = {name for name, _ in spec.weights}
    wide = dtype == torch.float32
    for number, given in enumerate(points(spec, program.hidden)):
        left = {name for name in weights if number or given[name].numel() > FAR}  # once is enough
        names = [name for name in given if name not in constant | left]
        random = torch.Generator().manual_seed(number)
        shape = given[spec.states[0]].shape
        d_new = [torch.randn(shape, generator=random, dtype=torch.float64) for _ in spec.states]
        tried = try_step(spec, given, names, d_new, wide)
        different = None if number else _rows_that_matter(spec, given, tried.new, wide)
        if different:
            return different
        with torch.no_grad():
            kept = evaluate.forward(program, given)
            have = evaluate.backward(program, given, kept, d_new, names)
        around: list[list[Tried]] = []
        for what, mine, pick in [
            *((f"the state {s}", kept.new[k], _state(k)) for k, s in enumerate(spec.states)),
            *((f"the gradient of {name}", have[name], _gradient(name)) for name in names),
        ]:
            own = pick(tried)
            wrong = _wrong(mine, own, 0.0)
            if bool(wrong.any()):
                around = around or [
                    [try_step(spec, _moved(given, weights, by), names, d_new, wide) for by in side] for side in _SIDES
                ]
                out, in_ = (torch.stack([(pick(x) - own).abs() for x in side]).amax(0) for side in around)
                spread = torch.minimum(out, in_) if number == AT_EDGES else torch.maximum(out, in_)
                wrong = _wrong(mine, own, 10 * spread.nan_to_num(math.inf))
            if bool(wrong.any()):
                at = tuple(wrong.nonzero()[0].tolist())
                return (
                    f"what was read off the step gives {what} as {mine[at]:.9g} where the step itself gives "
                    f"{own.expand(mine.shape)[at]:.9g}; {_HINTS[what.startswith('the state')]}"
                )
    return None


def _rows_that_matter(spec: Spec, given: Mapping[str, Tensor], new: Sequence[Tensor], wide: bool) -> str | None:
    """What differs where the first row, or two, of a batch are the whole batch. A trace takes one row for no batch."""
    own = {"gx", *spec.states, *(name for name, _, _ in spec.steps)}
    for rows, words in ((1, "one row"), (2, "two rows")):
        few = {name: x[:rows] if name in own else x for name, x in given.items()}
        try:
            with torch.no_grad():
                alone = run_step(spec, few, wide)
        except Exception as e:  # which the reference raises where such a batch comes
            return f"for {words} the step raises {type(e).__name__}: {e}; {_ALIKE}"
        for name, mine, other in zip(spec.states, alone, new, strict=True):
            if bool(_wrong(mine, other[:rows], 0.0).any()):
                return f"for {words} the step gives another state {name} than for more; {_ALIKE}"
    return None


_ALIKE = "the number of rows must not matter to a step"
_SIDES = ((1e-13, 3e-14, 1e-14), (-1e-13, -3e-14, -1e-14))
"""How far around a point the step is tried where it and its program differ: both may be ill-conditioned there. At edges
the better side counts: beyond a bound a derivative is another one, but on one side of it is as at the bound itself."""
_HINTS = {
    True: "does it depend on the number of rows, or on more than its arguments?",
    False: "an operation in it has another derivative than its own",
}


def _state(k: int) -> Callable[[Tried], Tensor]:
    return lambda tried: tried.new[k]


def _gradient(name: str) -> Callable[[Tried], Tensor]:
    def pick(tried: Tried) -> Tensor:
        found = tried.gradients[name]
        return torch.zeros((), dtype=torch.float64) if found is None else found

    return pick


def _moved(given: Mapping[str, Tensor], weights: set[str], by: float) -> dict[str, Tensor]:
    return {**given, **nearby({name: x for name, x in given.items() if name not in weights}, by)}


def _wrong(mine: Tensor, own: Tensor, spread: Tensor | float) -> Tensor:
    """Where the step itself is infinite or NaN the program may be either."""
    finite = torch.isfinite(own)
    scale = own.where(finite, torch.zeros_like(own)).abs().max()
    room = 1e-7 * (own.abs() + torch.clamp(scale, 1e-3, 1e3))  # torch's own 1/6 in hardsigmoid is float32's
    return finite & ~((mine - own).abs() <= room + spread)


def _make(spec: Spec, hidden: int, dtype: torch.dtype) -> Checked:
    start = time.perf_counter()
    program, reason = None, None
    with torch.no_grad():
        run_step(spec, next(points(spec, hidden, dtype)))  # what is wrong with the step itself is raised here
    try:
        program = compile_step(spec, hidden, dtype)
        reason = check_program(spec, program, dtype)
    except NotTraced as e:
        reason = str(e)
    except StepError:
        raise
    except Exception as e:  # of torch or the step, where its tensors hold no numbers
        reason = f"the step could not be traced: {type(e).__name__}: {e}"
    return Checked(program if reason is None else None, reason, time.perf_counter() - start)


def _alone(spec: Spec, hidden: int, dtype: torch.dtype) -> Checked:
    """In a thread of its own, which has no autocast, no inference mode, no transform and no mode of torch's. On one
    thread of torch's: the tensors are small, and on a busy machine several take 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that have not yet begun
    try:
        return _make(spec, hidden, dtype)
    finally:
        torch.set_num_threads(threads)


_cache: dict[Hashable, Checked] = {}
_lock = threading.Lock()
_KEPT = 512
_MET = 16
"""Sizes and dtypes of which a cell remembers what it met last."""
_TRIES = 3


def program_of(spec: Spec, hidden: int, dtype: torch.dtype = torch.float32) -> Checked:
    """The checked program of a cell, or why there is none; kept for the next call. Raises what is wrong with the step
    on any backend: StepError, or what the step raises.

    `dtype` is what a step computes in, float32 or float64: what reads it (rms_norm's eps) is in the program.
    """
    met = spec.met.get((hidden, dtype))
    if met is not None and met[0] is _cache and all([walk.unchanged() for walk in met[1]]):
        last: Checked = met[2]
        return last
    declared = (spec.name, spec.gates, spec.states, spec.units, spec.weights, spec.steps)
    for _ in range(_TRIES):
        try:
            read, unchanged = fingerprints(spec.step, spec.options)
            found, kept = _kept_or_made((read, declared, hidden, dtype), spec, hidden, dtype)
        except NotTraced as e:
            return Checked(None, str(e), 0.0)
        if kept:
            if unchanged is not None:
                if len(spec.met) >= _MET:
                    spec.met.clear()
                spec.met[hidden, dtype] = _cache, unchanged, found
            return found
    if found.reason is not None:
        return found
    return Checked(None, "what the step reads changed while its program was made: hand it in as a per_step input", 0.0)


def _kept_or_made(key: tuple[Hashable, ...], spec: Spec, hidden: int, dtype: torch.dtype) -> tuple[Checked, bool]:
    """And whether it is kept: not where what the step reads changed meanwhile, for nobody knows then which of it the
    program holds."""
    found = _cache.get(key)
    if found is not None:
        return found, True
    with _lock:
        found = _cache.get(key)
        if found is not None:
            return found, True
        with ThreadPoolExecutor(1) as own:
            found = own.submit(_alone, spec, hidden, dtype).result()
        if fingerprints(spec.step, spec.options)[0] != key[0]:
            return found, False
        while len(_cache) >= _KEPT:
            del _cache[next(iter(_cache))]
        _cache[key] = found
        return found, True


_warned: set[tuple[str, str]] = set()


def warn_once(name: str, reason: str) -> None:
    """That the reference runs a cell, and why."""
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(f"{name} runs by the reference, right but slow: {reason}", RuntimeWarning, stacklevel=3)
