"""Whether a cell's program may run: traced twice, derived, and held against autograd of the user's own step.

The check is in float64, at random points and at edges: zeros of both signs, bounds of activations, equal inputs, gates
of ±80. It cannot be switched off. What fails it runs by the reference, and the reason says which operation and what to
write instead.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rnnkit.custom import evaluate
from rnnkit.custom.cut import make_program
from rnnkit.custom.errors import NotTraced, StepError
from rnnkit.custom.fingerprint import fingerprint, of_value
from rnnkit.custom.graph import ROW, CellProgram
from rnnkit.custom.trace import Traced, results, trace


class Spec(Protocol):
    """A cell's declaration, as it is read off a class."""

    @property
    def name(self) -> str: ...
    @property
    def step(self) -> Callable[..., Any]: ...
    @property
    def gates(self) -> int: ...
    @property
    def states(self) -> tuple[str, ...]: ...
    @property
    def units(self) -> tuple[str, ...]: ...
    @property
    def weights(self) -> tuple[tuple[str, int], ...]:
        """Names and blocks; ("w_hh", gates) first where the step takes a or gh."""

    @property
    def steps(self) -> tuple[tuple[str, str, bool], ...]:
        """Names, UNIT or ROW, whether a gradient may be wanted."""

    @property
    def options(self) -> Mapping[str, Any]: ...


class Checked(NamedTuple):
    program: CellProgram | None
    reason: str | None
    """Why there is none."""
    seconds: float
    """What tracing, derivative and check took."""


def _trace(spec: Spec, hidden: int, dtype: torch.dtype) -> Traced:
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
    )


def compile_step(spec: Spec, hidden: int, dtype: torch.dtype = torch.float32) -> CellProgram:
    """The program of a cell for one H, not yet checked."""
    traced, again = (_trace(spec, hidden, dtype) for _ in range(2))
    if (traced.graph.nodes, traced.graph.products, traced.new) != (again.graph.nodes, again.graph.products, again.new):
        raise NotTraced(
            "the step computes something else each time it is run (random numbers, a counter): hand in what changes as "
            "a per_step input"
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


# --- points ----------------------------------------------------------------------------------------------------------

_EDGES = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 1e-3, -1e-3, 2.0)
_EXTREMES = (80.0, -80.0, 20.0, -20.0, 1e-30, -1e-30, 0.0, 1.0)
_FAR = 1 << 20
"""Numbers in a weight above which its gradient is not formed: that of a product is the same whatever H is."""


def points(spec: Spec, hidden: int, dtype: torch.dtype = torch.float64) -> Iterator[dict[str, Tensor]]:
    """Inputs of one step to try a cell at, by name: near, at the edges (with equals), far out. The same ones always,
    and torch's generator is left alone."""
    random = torch.Generator().manual_seed(1729)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def of(values: tuple[float, ...]) -> Callable[..., Tensor]:
        def draw(*shape: int) -> Tensor:
            which = torch.randint(len(values), shape, generator=random)
            return torch.tensor(values, dtype=torch.float64)[which]

        return draw

    weights = {}
    for name, blocks in spec.weights:
        near = normal(min(blocks * hidden, 512), min(hidden, 512)) / hidden**0.5
        wide = near.repeat(-(-blocks * hidden // near.shape[0]), -(-hidden // near.shape[1]))
        weights[name] = wide[: blocks * hidden, :hidden].contiguous().to(dtype)

    kinds: tuple[tuple[int, Callable[..., Tensor]], ...] = (
        (5, normal),
        (3, lambda *shape: normal(*shape) * 4),
        (7, of(_EDGES)),
        (5, of(_EXTREMES)),
    )
    for rows, draw in kinds:
        given = {"gx": draw(rows, spec.gates * hidden)}
        given |= {name: draw(rows, hidden) for name in spec.states}
        given |= {name: draw(hidden) for name in spec.units}
        for name, kind, grad in spec.steps:
            x = draw(rows, 1 if kind == ROW else hidden)
            given[name] = x if grad else torch.where(x > 0, x.abs().clamp(max=2.0).round(), 0.0)
        if draw is not kinds[0][1] and draw is not kinds[1][1]:
            for name in spec.states:  # ties: a gate that equals a state, two states that are equal
                tied = torch.rand((rows, hidden), generator=random) < 0.25
                given[name] = torch.where(tied, given["gx"][:, :hidden], given[name])
        if spec.weights and spec.weights[0][0] == "w_hh":
            given["b_hh"] = draw(spec.gates * hidden)
        yield {name: x.to(dtype) for name, x in given.items()} | weights


class _Wide(TorchFunctionMode):
    """A step of float32 run in float64: what names float32 means float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "float":
            return args[0].double()
        if name == "rms_norm" and len(args) < 4 and kwargs.get("eps") is None:
            kwargs["eps"] = torch.finfo(torch.float32).eps
        if name in ("zeros", "ones", "full", "tensor", "scalar_tensor") and kwargs.get("dtype") is None:
            kwargs["dtype"] = _default(args, kwargs)
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()}
        return func(*args, **kwargs)


def _default(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    value = args[-1] if args else kwargs.get("fill_value", 0.0)
    return torch.bool if isinstance(value, bool) else torch.float64


def run_step(spec: Spec, given: Mapping[str, Tensor], wide: bool = False) -> tuple[Tensor, ...]:
    """The user's own step, once. `wide`: one of float32 on points of float64."""
    named: dict[str, Any] = {**given, **spec.options}
    if "b_hh" in given:
        named["gh"] = torch.nn.functional.linear(given[spec.states[0]], given["w_hh"], given["b_hh"])
        named["a"] = given["gx"] + named["gh"]
    parameters = inspect.signature(spec.step).parameters
    missing = [name for name in parameters if name not in named]
    if missing:
        raise StepError(
            f"step takes {', '.join(missing)}, which the cell does not declare; it may take a, gx, gh, "
            f"{', '.join(n for n in named if n not in ('a', 'gx', 'gh', 'b_hh', 'w_hh'))}"
        )
    taken = {name: named[name] for name in parameters}
    before = {name: x._version for name, x in taken.items() if isinstance(x, Tensor)}
    with _Wide() if wide else contextlib.nullcontext():
        out = spec.step(**taken)
    for name, version in before.items():
        if taken[name]._version != version:
            raise StepError(f"step changes its argument {name} in place: write a new value, as {name} = {name} + ...")
    rows, hidden = given[spec.states[0]].shape
    return results(out, spec.states, rows, hidden)


# --- the check -------------------------------------------------------------------------------------------------------


def check_program(spec: Spec, program: CellProgram, dtype: torch.dtype = torch.float32) -> str | None:
    """What is wrong with a program, or None."""
    unwanted = {name for name, _, grad in spec.steps if not grad}
    for number, given in enumerate(points(spec, program.hidden)):
        weights = {name for name, _ in spec.weights if number or given[name].numel() > _FAR}  # once is enough
        for name, x in given.items():
            x.requires_grad_(name not in unwanted | weights)
        out = run_step(spec, given, wide=dtype == torch.float32)
        wanted = [name for name, x in given.items() if x.requires_grad]
        random = torch.Generator().manual_seed(number)
        d_new = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in out]
        # One number, and not grad_outputs, at which torch imports sympy, for a second
        total = torch.stack([(x * d).sum() for x, d in zip(out, d_new, strict=True)]).sum()
        want: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if total.requires_grad:
            want = torch.autograd.grad(total, [given[name] for name in wanted], allow_unused=True)
        wide = dtype == torch.float32
        slack = functools.cache(functools.partial(_slack, spec, given, wanted, d_new, out, want, wide))
        with torch.no_grad():
            kept = evaluate.forward(program, given)
            have = evaluate.backward(program, given, kept, d_new, wanted)
            for k, (name, x, y) in enumerate(zip(spec.states, kept.new, out, strict=True)):
                if _differs(x, y) and (wrong := _differs(x, y, slack()[0][k])):
                    return (
                        f"what was read off the step gives the state {name} as {wrong}: does it depend on the "
                        "number of rows, or on more than its arguments?"
                    )
            for k, (name, found) in enumerate(zip(wanted, want, strict=True)):
                y = torch.zeros(()) if found is None else found
                if _differs(have[name], y) and (wrong := _differs(have[name], y, slack()[1][k])):
                    return (
                        f"what was read off the step gives the gradient of {name} as {wrong}: an operation in it has "
                        "another derivative than its own"
                    )
    return None


def _slack(
    spec: Spec,
    given: Mapping[str, Tensor],
    wanted: Sequence[str],
    d_new: Sequence[Tensor],
    out: Sequence[Tensor],
    want: Sequence[Tensor | None],
    wide: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """How far the step's own values and gradients move where its inputs do by some roundings: large where terms cancel.
    All inputs by the same factor, so that equals stay equals and zeros zeros."""
    moved = [torch.zeros_like(x) for x in out], [torch.zeros_like(given[name]) for name in wanted]
    for k in (-5, -3, -1, 2, 4, 6):
        near = {name: (x.detach() * (1 + k * 2.0**-51)).requires_grad_(x.requires_grad) for name, x in given.items()}
        with torch.enable_grad():
            other = run_step(spec, near, wide=wide)
            total = torch.stack([(x * d).sum() for x, d in zip(other, d_new, strict=True)]).sum()
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if total.requires_grad:
            found = torch.autograd.grad(total, [near[name] for name in wanted], allow_unused=True)
        for into, first, second in ((moved[0], out, other), (moved[1], want, found)):
            for i, (a, b) in enumerate(zip(first, second, strict=True)):
                if a is not None and b is not None:
                    into[i] = torch.maximum(into[i], (a - b).abs().nan_to_num(0.0))
    return moved


_MOVES = 50.0
"""Times that an error may be what six small moves make of the step itself."""


def _differs(have: Tensor, want: Tensor, slack: Tensor | float = 0.0) -> str | None:
    """Where the step itself is infinite or NaN the program may be either."""
    finite = torch.isfinite(want).expand(have.shape)
    scale = want.where(torch.isfinite(want), torch.zeros_like(want)).abs().max()
    error = (have - want).abs()
    wrong = finite & ~(
        error <= 1e-7 * (want.abs() + torch.clamp(scale, 1e-3, 1e3)) + _MOVES * slack
    )  # hardsigmoid's 1/6 is float32
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{have[at]:.9g} where the step itself gives {want.expand(have.shape)[at]:.9g}"


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


def program_of(spec: Spec, hidden: int, dtype: torch.dtype = torch.float32) -> Checked:
    """The checked program of a cell, or why there is none; kept for the next call. Raises what is wrong with the step
    on any backend: StepError, or what the step raises.

    `dtype` is what a step computes in, float32 or float64: what reads it (rms_norm's eps) is in the program.
    """
    try:
        options = tuple((name, of_value(value, name)) for name, value in sorted(spec.options.items()))
        declared = (spec.name, spec.gates, spec.states, spec.units, spec.weights, spec.steps)
        key = (fingerprint(spec.step), options, declared, hidden, dtype)
    except NotTraced as e:
        return Checked(None, str(e), 0.0)
    found = _cache.get(key)
    if found is None:
        with _lock:
            found = _cache.get(key)
            if found is None:
                with ThreadPoolExecutor(1) as own:
                    found = own.submit(_alone, spec, hidden, dtype).result()
                while len(_cache) >= _KEPT:
                    del _cache[next(iter(_cache))]
                _cache[key] = found
    return found


_warned: set[tuple[str, str]] = set()


def warn_once(name: str, reason: str) -> None:
    """That the reference runs a cell, and why."""
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(f"{name} runs by the reference, right but slow: {reason}", RuntimeWarning, stacklevel=3)
